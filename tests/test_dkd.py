"""The ops of dynamic distillation: values, gradients to the student, refusals."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from map_cases import (
    check_autocast,
    check_compiles_and_exports,
    check_gradcheck,
    check_second_derivative_is_refused,
    map_sizes,
    poison,
)
from op_cases import (
    Call,
    Source,
    Tensors,
    assert_deterministic,
    assert_one_device,
    assert_refused,
    assert_registered,
    assert_survived,
    check_against_reference,
    instruction_set,
    instruction_sets,
    lay_out,
    layouts,
    seeds,
)
from torch import Tensor

import sodfast
from sodfast.ops import dkd_loss, dkd_loss_reference, dkd_theta, dkd_theta_reference

pytestmark = pytest.mark.usefixtures("compiled")


@dataclass(frozen=True)
class Case:
    size: tuple[int, int, int, int]
    scale: float = 3.0  # of the logits
    temperature: float = 5.0
    kl_factor: float = 25.0
    layout: str = "contiguous"
    binary: bool = True  # the truth
    p: float = 0.7
    seed: int = 0

    def maps(self) -> list[Tensor]:
        """Student, teacher, truth; the teacher near the student in half of the pixels."""
        source = Source(self.seed)
        student = self.scale * (source.uniform(*self.size) + source.uniform(*self.size))
        near = source.uniform(*self.size) > 0
        teacher = self.scale * (source.uniform(*self.size) + source.uniform(*self.size))
        teacher = torch.where(near, student + 0.01 * teacher, teacher)
        truth = source.uniform(*self.size, low=0.0)
        truth = (truth > 0.7).float() if self.binary else truth
        return [lay_out(x, self.layout) for x in (student, teacher, truth)]

    def tensors(self) -> Tensors:
        return {"student": [self.maps()[0]]}

    def theta(self) -> Tensor:
        return Source(self.seed + 1).uniform(self.size[0], low=0.0)

    def grads(self) -> list[Tensor]:
        """Times the pixels, so that the gradient to a logit is of order one."""
        pixels = self.size[2] * self.size[3]
        return [pixels * Source(self.seed + 2).uniform(self.size[0])]

    def run_theta(self, function: Callable) -> Callable[[Tensors], list[Tensor]]:
        """Without the threshold, at which rounding decides between two values."""
        _, *others = self.maps()
        return lambda t: list(
            function(x := t["student"][0], *[o.to(x.dtype) for o in others], self.p, None)
        )

    def run_loss(self, function: Callable) -> Callable[[Tensors], list[Tensor]]:
        others = [*self.maps()[1:], self.theta()]
        numbers = (self.temperature, self.kl_factor)
        return lambda t: [
            function(x := t["student"][0], *[o.to(x.dtype) for o in others], *numbers)
        ]

    def check(self) -> None:
        tensors, grads = self.tensors(), self.grads()
        theta, loss = self.run_theta(dkd_theta), self.run_loss(dkd_loss)
        check_against_reference(theta, self.run_theta(dkd_theta_reference), tensors, grads, {})
        check_against_reference(loss, self.run_loss(dkd_loss_reference), tensors, grads, {})


cases = st.builds(
    Case,
    map_sizes().map(lambda size: (size[0], 1, *size[2:])),
    st.sampled_from([1e-3, 1.0, 3.0, 10.0, 40.0, 1e4]),
    st.sampled_from([1.0, 5.0, 10.0, 0.5]),
    st.sampled_from([1.0, 25.0, 12.5, 0.0]),
    layouts,
    st.booleans(),
    st.sampled_from([0.7, 0.0, 0.3, 1.0]),
    seeds,
)


@given(cases)
def test_values_and_gradients(case: Case) -> None:
    case.check()


LARGE = [
    Case((4, 1, 256, 256)),
    Case((1, 1, 97, 131), 40.0, layout="channels_last"),
    Case((2, 1, 700, 19), 1e4, binary=False),
    Case((1, 1, 5, 1000), layout="sliced storage"),
    Case((3000, 1, 1, 1)),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    case.check()
    for run in (case.run_theta(dkd_theta), case.run_loss(dkd_loss)):
        assert_deterministic(run, case.tensors(), case.grads())


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("size", [(2, 1, 4, 5), (3, 1, 1, 1), (0, 1, 2, 2)])
def test_gradcheck_of_the_compiled_op(size: tuple[int, ...], scale: float) -> None:
    case = Case(size, scale)
    student, *others = [x.double() for x in (*case.maps(), case.theta())]
    ops = ("dkd_loss", "dkd_loss_backward")
    if size[0] == 0:
        with sodfast.use_backend("cpu"):
            loss = dkd_loss(student.requires_grad_(), *others)
            (gradient,) = torch.autograd.grad(loss.sum(), student)
            assert loss.shape == (0,) and gradient.shape == size
            assert [x.shape for x in dkd_theta(student, *others[:2])] == [(0,)] * 3
        return
    check_gradcheck(lambda x: dkd_loss(x, *others, 2.0, 3.0), [student], ops)


# ---- precision where the numbers are small, or large -------------------------------------------


def check_small_errors(running: Callable[[], AbstractContextManager], device: torch.device) -> None:
    """What a good network still does wrong is not lost in what it does right: 1e-5 of it."""
    for right in (3.0, 8.0, 15.0, 25.0, 60.0):
        truth = (Source(0).uniform(1, 1, 30, 47) > 0).float().to(device)
        student = right * (2 * truth - 1)
        with running():
            _, alpha, beta = dkd_theta(student, student, truth)
            loss = dkd_loss(student, student, truth, torch.zeros(1, device=device))
        error = 1 / (1 + math.exp(right))
        ce = math.log1p(math.exp(-right))
        salient, wrong = truth.sum().item(), 30 * 47 * error
        union = salient * (1 - error) + wrong
        assert beta.item() == pytest.approx(wrong / union, rel=1e-5, abs=1e-30)
        assert alpha.item() == pytest.approx(salient * (1 - error) / union, rel=1e-5)
        assert loss.item() == pytest.approx(ce, rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("isa", instruction_sets())
def test_small_errors_keep_their_digits(isa: str) -> None:
    def running() -> AbstractContextManager:
        stack = ExitStack()
        stack.enter_context(sodfast.use_backend("cpu"))
        stack.enter_context(instruction_set(isa))
        return stack

    check_small_errors(running, torch.device("cpu"))


@pytest.mark.parametrize("isa", instruction_sets())
def test_sigmoids_and_logarithms_at_all_magnitudes(isa: str) -> None:
    """One pixel per image, so that a sum is one value: 2e-6 of it, or 1e-37. With a truth of 1
    the IoU is the sigmoid."""
    x = torch.linspace(-120, 120, 24001).reshape(-1, 1, 1, 1)
    ones, none = torch.ones_like(x), torch.zeros(len(x))
    student = x.clone().requires_grad_()
    with sodfast.use_backend("cpu"), instruction_set(isa):
        _, alpha, beta = dkd_theta(x, x, ones)
        loss = dkd_loss(student, x, ones, none)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
    wide = x.double().flatten()
    near = {"rtol": 2e-6, "atol": 1e-37}
    torch.testing.assert_close(alpha.double(), wide.sigmoid(), **near)
    torch.testing.assert_close(beta.double(), (-wide).sigmoid(), **near)
    exact = -torch.nn.functional.logsigmoid(wide)
    torch.testing.assert_close(loss.detach().double(), exact, **near)
    torch.testing.assert_close(gradient.flatten().double(), -(-wide).sigmoid(), rtol=0, atol=1e-7)


def test_extreme_logits(backend: str, device: torch.device) -> None:
    """±1e4 in all combinations: the divergence is what the logits are apart, over T."""
    extreme = torch.tensor([1e4, -1e4], device=device)
    student, teacher = torch.meshgrid(extreme, extreme, indexing="ij")
    student, teacher = (x.reshape(4, 1, 1, 1) for x in (student, teacher))
    student = student.clone().requires_grad_()
    theta = torch.ones(4, device=device)
    loss = dkd_loss(student, teacher, torch.zeros_like(teacher), theta, 5.0, 1.0)
    torch.testing.assert_close(loss.detach().cpu(), torch.tensor([0.0, 2e3, 2e3, 0.0]))
    loss.sum().backward()
    torch.testing.assert_close(student.grad.flatten().cpu(), torch.tensor([0, 0.2, -0.2, 0]))
    found = dkd_theta(student, teacher, torch.ones_like(teacher))
    theta, alpha, beta = (x.cpu() for x in found)
    assert alpha.tolist() == [1, 0, 1, 0] and beta.tolist() == [0, 0, 1, 1]
    assert theta.tolist() == pytest.approx([0, 0.01, math.tanh(1), 0.01])


@pytest.mark.parametrize("which", range(4))
def test_nan_propagates_within_its_image(which: int, backend: str, device: torch.device) -> None:
    case = Case((3, 1, 20, 61))
    arguments = [x.to(device) for x in (*case.maps(), case.theta())]
    arguments[which][1].flatten()[-1:] = math.nan  # of theta: the image's
    student = arguments[0].requires_grad_()
    loss = dkd_loss(*arguments)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isnan().tolist() == [False, True, False]
    assert not gradient[[0, 2]].isnan().any()
    assert gradient[1, 0, -1, -1].isnan() and gradient[1].isnan().all() == (which == 3)
    if which < 3:
        theta, alpha, beta = dkd_theta(*arguments[:3])
        assert not torch.stack([theta, alpha, beta])[:, [0, 2]].isnan().any()
        assert alpha[1].isnan().item() == (which != 0) and beta[1].isnan().item() == (which != 1)
        assert theta[1].isnan() or (which == 0 and alpha[1] <= 0.5)


def test_no_gradient_is_made_where_none_is_needed() -> None:
    case = Case((2, 1, 9, 11))
    student, *others = (*case.maps(), case.theta())
    with sodfast.use_backend("cpu"):
        expected = dkd_loss(student.clone().requires_grad_(), *others)
        plain = dkd_loss(student, *others)
        with torch.no_grad():
            silent = dkd_loss(student.clone().requires_grad_(), *others)
        raw, nothing = torch.ops.sodfast.dkd_loss(student, *others, 5.0, 1.0, False)
        assert nothing.numel() == 0
        wanted = torch.ops.sodfast.dkd_loss(student.requires_grad_(), *others, 5.0, 1.0, False)
    for loss in (plain, silent, raw):
        assert not loss.requires_grad and torch.equal(loss, expected)
    with pytest.raises(RuntimeError, match="with_gradient=False"):
        wanted[0].sum().backward()


def test_the_weight_is_a_constant(backend: str, device: torch.device) -> None:
    maps = [x.to(device).requires_grad_() for x in Case((2, 1, 5, 6)).maps()]
    assert not any(x.requires_grad for x in dkd_theta(*maps))


def test_the_threshold_takes_alpha_as_it_is_returned(backend: str, device: torch.device) -> None:
    """An IoU of 3/5 is not above 0.6, in whatever dtype; without a threshold 0 is no bound."""
    truth = torch.tensor([1.0, 1, 1, 1, 1, 0, 0], device=device).view(1, 1, 1, 7)
    teacher = torch.tensor([1e4, 1e4, 1e4, -1e4, -1e4, -1e4, -1e4], device=device).view_as(truth)
    student = torch.zeros_like(truth)
    for threshold, kept in ((0.6, False), (0.59, True), (None, True), (1.0, False)):
        theta, alpha, beta = dkd_theta(student, teacher, truth, 0.7, threshold, 0.02)
        right = math.tanh(alpha.item() ** 0.7 * beta.item() ** 0.3) if kept else 0.02
        assert theta.item() == pytest.approx(right) and alpha.item() == pytest.approx(0.6)
    theta, alpha, _ = dkd_theta(student, -teacher, truth * (teacher > 0), 0.0, None)
    assert alpha.item() == 0 and theta.item() > 0.3


def test_images_do_not_mix(backend: str, device: torch.device) -> None:
    case = Case((3, 1, 20, 33))
    arguments = [x.to(device) for x in (*case.maps(), case.theta())]
    singles = [[x[i : i + 1] for x in arguments] for i in range(3)]
    together, apart = dkd_loss(*arguments), [dkd_loss(*single) for single in singles]
    torch.testing.assert_close(together, torch.cat(apart))
    weights = [torch.stack(dkd_theta(*single[:3])) for single in singles]
    torch.testing.assert_close(torch.stack(dkd_theta(*arguments[:3])), torch.cat(weights, 1))


# ---- torch --------------------------------------------------------------------------------------


def test_the_reference_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, "dkd", ["dkd_theta_reference", "dkd_loss_reference"])
    student, *others = (*Case((1, 1, 8, 8)).maps(), torch.ones(1))
    student.requires_grad_()
    with sodfast.use_backend("cpu"):
        dkd_theta(student, *others[:2])
        dkd_loss(student, *others).sum().backward()
    assert student.grad is not None
    with sodfast.use_backend("reference"):
        for call in (lambda: dkd_theta(student, *others[:2]), lambda: dkd_loss(student, *others)):
            with pytest.raises(AssertionError, match="was called"):
                call()


def test_compile_export_autocast_and_second_derivative() -> None:
    case = Case((2, 1, 12, 17))
    arguments = [*case.maps(), case.theta()]
    check_autocast(lambda *maps: torch.stack(dkd_theta(*maps)), arguments[:3])
    check_autocast(dkd_loss, arguments)
    check_second_derivative_is_refused(lambda x: dkd_loss(x, *arguments[1:]), arguments[:1])
    arguments[0].requires_grad_()
    check_compiles_and_exports(lambda *a: dkd_loss(*a, 2.0, 4.0), arguments, "dkd_loss")


@pytest.mark.parametrize("name", ["teacher_logits", "truth", "theta"])
def test_constants_get_no_gradient(name: str, backend: str, device: torch.device) -> None:
    case = Case((2, 1, 4, 4))
    arguments = [x.to(device) for x in (*case.maps(), case.theta())]
    arguments[("student", "teacher_logits", "truth", "theta").index(name)].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires a gradient"):
        dkd_loss(*arguments)
    if backend == "cpu":
        loss, _ = torch.ops.sodfast.dkd_loss(*arguments, 5.0, 1.0, True)
        with pytest.raises(RuntimeError, match=f"no gradient to {name}: detach it"):
            loss.sum().backward()


z8, z9, w = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 9), torch.zeros(2)
wide8 = z8.view(1, 2, 8, 8)
BAD_MAPS = {
    "rank": (
        ValueError,
        r"student_logits must be \(B, C, H, W\), not \(1, 8, 8\)",
        (z8[0], z8, z8),
    ),
    "channels": (ValueError, r"student_logits must be \(B, 1, H, W\)", (wide8, wide8, wide8)),
    "size": (ValueError, "student_logits has an empty size", (z8[:, :, :0],) * 3),
    "teacher": (ValueError, r"teacher_logits.*\(2, 1, 8, 8\), not \(2, 1, 8, 9\)", (z8, z9, z8)),
    "truth": (ValueError, r"truth.*\(2, 1, 8, 8\), not \(1, 1, 8, 8\)", (z8, z8, z8[:1])),
    "integers": (TypeError, "truth must be floating point, not torch.int64", (z8, z8, z8.long())),
    "dtypes": (TypeError, "teacher_logits is torch.float64, student", (z8, z8.double(), z8)),
    "devices": (ValueError, "truth is on meta, student_logits is on cpu", (z8, z8, z8.to("meta"))),
    "half": (RuntimeError, "'cpu' was asked for.*float16", (z8.half(),) * 3),
    "no tensor": (TypeError, "teacher_logits must be a tensor, not NoneType", (z8, None, z8)),
}
BAD_REST = {
    "theta's shape": (ValueError, r"theta must have shape \(2,\), not \(3,\)", (torch.ones(3),)),
    "theta a number": (TypeError, "theta must be a tensor, not float", (0.5,)),
    "theta's dtype": (TypeError, "theta is torch.float64", (w.double(),)),
    "cold": (ValueError, "temperature must be above 0 and finite, not 0", (w, 0)),
    "no temperature": (ValueError, "temperature.*not nan", (w, math.nan)),
    "negative factor": (ValueError, "kl_factor.*not -1", (w, 5.0, -1)),
    "infinite factor": (ValueError, "kl_factor.*not inf", (w, 5.0, math.inf)),
}
BAD_RULES = {
    "p": ((1.5,), "p must be in 0–1, not 1.5"),
    "no p": ((math.nan,), "p must be in 0–1, not nan"),
    "threshold": ((0.7, -1.0), "threshold must be in 0–1, not -1.0"),
    "epsilon": ((0.7, None, 2.0), "epsilon must be in 0–1, not 2.0"),
}


def test_a_rule_is_made_of_numbers() -> None:
    with pytest.raises(TypeError, match="p must be a number, not '0.7'"):
        dkd_theta(z8, z8, z8, "0.7")


@pytest.mark.parametrize("name", BAD_RULES)
def test_a_bad_rule_is_refused(name: str) -> None:
    rule, message = BAD_RULES[name]
    with pytest.raises(ValueError, match=message):
        dkd_theta(z8, z8, z8, *rule)


@pytest.mark.parametrize("name", [*BAD_MAPS, *BAD_REST])
def test_bad_input_is_refused(name: str) -> None:
    with sodfast.use_backend("cpu"):
        if name in BAD_REST:
            error, message, rest = BAD_REST[name]
            with pytest.raises(error, match=message):
                dkd_loss(z8, z8, z8, *rest)
            return
        error, message, maps = BAD_MAPS[name]
        with pytest.raises(error, match=message):
            dkd_theta(*maps)
        with pytest.raises(error, match=message):
            dkd_loss(*maps, w.to(maps[0].dtype))


def sound_calls() -> Iterator[Call]:
    case = Case((2, 1, 9, 18), layout="sliced storage")
    maps, theta = tuple(case.maps()), case.theta()
    yield "dkd_theta", (*maps, 0.7, 0.5, 0.01)
    yield "dkd_loss", (*maps, theta, 5.0, 25.0, True)
    yield "dkd_loss_backward", (theta, maps[0])


@pytest.mark.parametrize("number", range(len(list(sound_calls()))))
def test_registration(number: int) -> None:
    assert_registered(*list(sound_calls())[number])
    assert_one_device(*list(sound_calls())[number])


def nonsense() -> Iterator[Call]:
    for maps in (
        (z8[0], z8[0], z8[0]),
        (wide8, wide8, wide8),
        (z8[:, :, :0],) * 3,
        (z8, z9, z8),
        (z8, z8, z8[:1]),
        (z8, z8[0], z8),
        (z8, z8.double(), z8),
        (z8.long(),) * 3,
        (z8.half(),) * 3,
    ):
        yield "dkd_theta", (*maps, 0.7, 0.5, 0.01)
        yield "dkd_loss", (*maps, w, 5.0, 1.0, True)
    for theta, temperature, factor in (
        (w[:1], 5.0, 1.0),
        (w[:, None], 5.0, 1.0),
        (w.double(), 5.0, 1.0),
        (w, 0.0, 1.0),
        (w, -1.0, 1.0),
        (w, math.nan, 1.0),
        (w, math.inf, 1.0),
        (w, 5.0, -1.0),
        (w, 5.0, math.nan),
        (w, 5.0, math.inf),
    ):
        yield "dkd_loss", (z8, z8, z8, theta, temperature, factor, True)
    for rule in (
        (-0.1, 0.5, 0.01),
        (1.1, 0.5, 0.01),
        (math.nan, 0.5, 0.01),
        (0.7, 1.1, 0.01),
        (0.7, math.nan, 0.01),
        (0.7, 0.5, -0.01),
        (0.7, 0.5, 2.0),
        (0.7, 0.5, math.nan),
    ):
        yield "dkd_theta", (z8, z8, z8, *rule)
    for grad, gradient in ((w[:1], z8), (w.double(), z8), (w, wide8), (w, z8[0]), (z8, z8)):
        yield "dkd_loss_backward", (grad, gradient)
    yield "dkd_loss_backward", (w, torch.zeros(0))  # what dkd_loss returns without gradient


def test_raw_ops_refuse_nonsense() -> None:
    assert_refused(__name__)


def test_raw_ops_survive_random_changes(full: bool) -> None:
    assert_survived(__name__, 20_000 if full else 1_000)
