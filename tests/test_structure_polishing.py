"""The sums of the structure polishing loss: values, gradients to the logits, refusals."""

from collections.abc import Callable, Iterator
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
    windows,
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
from sodfast.ops import structure_polishing_sums, structure_polishing_sums_reference

pytestmark = pytest.mark.usefixtures("compiled")

# Of these logits no two pairs have nearly the same difference of sigmoids: two maxima are then
# either tied or well apart, and every precision sends a gradient to the same pixel.
LOGITS = torch.tensor([-40.0, -3.1, -1.7, -0.6, 0.35, 1.2, 2.95])
TRUTHS = torch.tensor([0.0, 0.0, 0.25, 0.5, 1.0, 1.0])


@dataclass(frozen=True)
class Case:
    size: tuple[int, int, int, int]
    k: int = 1
    layout: str = "contiguous"
    seed: int = 0

    def draw(self, palette: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = palette[torch.randint(len(palette), self.size, generator=generator)]
        return lay_out(drawn, self.layout)

    def tensors(self) -> Tensors:
        return {"logits": [self.draw(LOGITS, self.seed)]}

    def grads(self) -> list[Tensor]:
        return [Source(self.seed + 1).uniform(self.size[0], 2, 3)]

    def terms(self) -> dict[str, float]:
        return {"ys": self.size[2] * self.size[3], "logits": self.k**2}

    def run(self, function: Callable) -> Callable[[Tensors], list[Tensor]]:
        truth = self.draw(TRUTHS, self.seed + 2)
        return lambda t: [function(t["logits"][0], truth.to(t["logits"][0]), self.k)]


def one_channel(size: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    return size[0], 1, *size[2:]


cases = st.builds(Case, map_sizes().map(one_channel), windows, layouts, seeds)


def test_the_logits_are_well_apart() -> None:
    p = LOGITS.double().sigmoid()
    differences = (p[:, None] - p).flatten()
    apart = differences[differences > 0].sort().values
    assert (apart[1:] - apart[:-1]).min() > 1e-4


@given(cases)
def test_values_and_gradients(case: Case) -> None:
    check_against_reference(
        case.run(structure_polishing_sums),
        case.run(structure_polishing_sums_reference),
        case.tensors(),
        case.grads(),
        case.terms(),
    )


LARGE = [
    Case((3, 1, 352, 352), 13),
    Case((1, 1, 97, 131), 31, "channels_last"),
    Case((2, 1, 700, 19), 3),
    Case((1, 1, 5, 1000), 1, "sliced storage"),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    compiled = case.run(structure_polishing_sums)
    reference = case.run(structure_polishing_sums_reference)
    check_against_reference(compiled, reference, case.tensors(), case.grads(), case.terms())
    assert_deterministic(compiled, case.tensors(), case.grads())


@pytest.mark.parametrize("size, k", [((2, 1, 4, 5), 1), ((1, 1, 5, 7), 3), ((1, 1, 3, 2), 31)])
def test_gradcheck_of_the_compiled_op(size: tuple[int, ...], k: int) -> None:
    draw = torch.Generator().manual_seed(3)
    logits, truth = (torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(2))
    truth = truth.sigmoid()
    ops = ("structure_polishing_sums", "structure_polishing_sums_backward")
    check_gradcheck(lambda x: structure_polishing_sums(x, truth, k), [logits], ops)


@pytest.mark.parametrize("isa", instruction_sets())
def test_sigmoid_at_all_magnitudes(isa: str) -> None:
    """One pixel per image, so that the sum is the sigmoid itself; 1e-6 of it, or 1e-37."""
    tails = torch.tensor([-1e30, -torch.inf, 1e30, torch.inf, torch.nan, 0.0, -0.0])
    logits = torch.cat([torch.linspace(-120, 120, 24001), tails]).reshape(-1, 1, 1, 1)
    with sodfast.use_backend("cpu"), instruction_set(isa):
        sums = structure_polishing_sums(logits, torch.ones_like(logits), 1)
    expected = logits.double().sigmoid().flatten()
    for found in (sums[:, 0, 0], sums[:, 0, 1]):
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-6, atol=1e-37, equal_nan=True
        )  # fmt: skip
    assert torch.equal(sums[:, 0, 2], torch.ones(len(logits)))


def test_nothing_in_the_batch() -> None:
    logits = torch.zeros(0, 1, 8, 9, requires_grad=True)
    with sodfast.use_backend("cpu"):
        sums = structure_polishing_sums(logits, torch.zeros(0, 1, 8, 9), 3)
        (gradient,) = torch.autograd.grad(sums.sum(), logits)
    assert sums.shape == (0, 2, 3) and gradient.shape == logits.shape


def test_images_do_not_mix(backend: str, device: torch.device) -> None:
    case = Case((3, 1, 20, 33), 5)
    logits, truth = case.draw(LOGITS, 0).to(device), case.draw(TRUTHS, 1).to(device)
    together = structure_polishing_sums(logits, truth, 5)
    alone = [structure_polishing_sums(a[None], b[None], 5) for a, b in zip(logits, truth)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_loss_goes_down_the_gradient(backend: str, device: torch.device) -> None:
    """Dice of map and boundary, as the layers form it, is near 0 after some steps."""
    truth = torch.zeros(1, 1, 24, 24, device=device)
    truth[..., 6:17, 8:20] = 1
    logits = torch.zeros_like(truth, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    losses = []
    for _ in range(60):
        pg, p, g = structure_polishing_sums(logits, truth, 3).unbind(-1)
        loss = (1 - (2 * pg + 1) / (p + g + 1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 < 0.5 < losses[0]


# ---- torch --------------------------------------------------------------------------------------


def test_the_reference_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["boundary_reference", "structure_polishing_sums_reference"]
    poison(monkeypatch, "boundary", names)
    logits, truth = torch.randn(1, 1, 8, 8, requires_grad=True), torch.rand(1, 1, 8, 8)
    with sodfast.use_backend("cpu"):
        structure_polishing_sums(logits, truth, 5).sum().backward()
    assert logits.grad is not None
    with sodfast.use_backend("reference"), pytest.raises(AssertionError, match="was called"):
        structure_polishing_sums(logits, truth, 5)


def test_compile_export_autocast_and_second_derivative() -> None:
    logits, truth = torch.randn(2, 1, 12, 17, requires_grad=True), torch.rand(2, 1, 12, 17)
    op = "structure_polishing_sums"
    check_compiles_and_exports(
        lambda x, g: structure_polishing_sums(x, g, 5), [logits, truth], op
    )  # fmt: skip
    check_autocast(lambda x, g: structure_polishing_sums(x, g, 3), [logits.detach(), truth])
    check_second_derivative_is_refused(lambda x: structure_polishing_sums(x, truth, 3), [logits])


def test_truth_gets_no_gradient(backend: str, device: torch.device) -> None:
    logits, truth = torch.zeros(2, 1, 1, 4, 4, device=device)
    truth.requires_grad_()
    with pytest.raises(ValueError, match="truth requires a gradient"):
        structure_polishing_sums(logits, truth, 3)
    if backend == "cpu":
        sums = torch.ops.sodfast.structure_polishing_sums(logits, truth, 3)
        with pytest.raises(RuntimeError, match="no gradient to truth: detach it"):
            sums.sum().backward()


z8, z9 = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 9)
BAD = {
    "rank": (ValueError, r"logits must be \(B, C, H, W\), not \(1, 8, 8\)", (z8[0], z8[0], 3)),
    "channels": (ValueError, r"logits must be \(B, 1, H, W\)", (*2 * (z8.view(1, 2, 8, 8),), 3)),
    "size": (ValueError, "logits has an empty size", (z8[:, :, :0], z8[:, :, :0], 3)),
    "truth": (ValueError, r"truth.*\(2, 1, 8, 8\), not \(2, 1, 8, 9\)", (z8, z9, 3)),
    "batch": (ValueError, r"truth.*not \(1, 1, 8, 8\)", (z8, z8[:1], 3)),
    "even k": (ValueError, "k must be odd and from 1 to 31, not 12", (z8, z8, 12)),
    "large k": (ValueError, "not 33", (z8, z8, 33)),
    "integers": (TypeError, "logits must be floating point", (z8.long(), z8, 3)),
    "booleans": (TypeError, "truth must be floating point, not torch.bool", (z8, z8.bool(), 3)),
    "dtypes": (TypeError, "truth is torch.float64, logits is", (z8, z8.double(), 3)),
    "devices": (ValueError, "truth is on meta, logits is on cpu", (z8, z8.to("meta"), 3)),
    "half": (RuntimeError, "'cpu' was asked for.*float16", (z8.half(), z8.half(), 3)),
    "no tensor": (TypeError, "truth must be a tensor, not NoneType", (z8, None, 3)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    error, message, arguments = BAD[name]
    with sodfast.use_backend("cpu"), pytest.raises(error, match=message):
        structure_polishing_sums(*arguments)


def sound_calls() -> Iterator[Call]:
    case = Case((2, 1, 9, 18), layout="sliced storage")
    (logits,), (g,) = case.tensors()["logits"], case.grads()
    truth = case.draw(TRUTHS, 1)
    yield "structure_polishing_sums", (logits, truth, 5)
    yield "structure_polishing_sums_backward", (g, logits, truth, 5)


@pytest.mark.parametrize("number", range(len(list(sound_calls()))))
def test_registration(number: int) -> None:
    assert_registered(*list(sound_calls())[number])
    assert_one_device(*list(sound_calls())[number])


def nonsense() -> Iterator[Call]:
    good = torch.zeros(2, 2, 3)
    for logits, truth, k in (
        (z8[0], z8[0], 3),
        (z8.view(1, 2, 8, 8), z8.view(1, 2, 8, 8), 3),
        (z8[:, :, :0], z8[:, :, :0], 3),
        (z8, z9, 3),
        (z8, z8[:1], 3),
        (z8, z8[0], 3),
        (z8, z8.double(), 3),
        (z8.long(), z8.long(), 3),
        (z8.half(), z8.half(), 3),
        (z8, z8, 2),
        (z8, z8, 33),
        (z8, z8, -1),
    ):
        yield "structure_polishing_sums", (logits, truth, k)
        yield "structure_polishing_sums_backward", (good, logits, truth, k)
    for grad in (good[:1], good[..., :2], good.double(), good.flatten(), torch.zeros(2, 3, 2)):
        yield "structure_polishing_sums_backward", (grad, z8, z8, 3)


def test_raw_ops_refuse_nonsense() -> None:
    assert_refused(__name__)


def test_raw_ops_survive_random_changes(full: bool) -> None:
    assert_survived(__name__, 20_000 if full else 1_000)
