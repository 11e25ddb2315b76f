"""The compiled fusion of SCFM: values, gradients, ratios of sizes, refusals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from map_cases import (
    check_autocast,
    check_compiles_and_exports,
    check_gradcheck,
    check_second_derivative_is_refused,
    lengths,
    map_sizes,
    poison,
)
from op_cases import (
    Call,
    CallCounter,
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
from sodfast.ops import scfm, scfm_reference

pytestmark = pytest.mark.usefixtures("compiled")


@dataclass(frozen=True)
class Case:
    size: tuple[int, int, int, int]  # of x
    small: tuple[int, int]  # of y
    multiply: bool = True
    layout: str = "contiguous"
    seed: int = 0

    def tensors(self) -> Tensors:
        source = Source(self.seed)
        return {
            "x": [lay_out(source.uniform(*self.size), self.layout)],
            "y": [lay_out(source.uniform(*self.size[:2], *self.small), self.layout)],
        }

    def memory_format(self) -> torch.memory_format:
        """Of the results: that of x."""
        (x,) = self.tensors()["x"]
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return torch.channels_last if last else torch.contiguous_format

    def grads(self) -> list[Tensor]:
        # x + up(y) hands x's gradient through as it comes, in its layout.
        kept = self.multiply or self.memory_format() == torch.channels_last
        layout = self.layout if kept else "contiguous"
        return [lay_out(Source(self.seed + 1).uniform(*self.size), layout, (2, 3))]

    def terms(self) -> dict[str, float]:
        rows, columns = (max(1.0, a / b) for a, b in zip(self.size[2:], self.small))
        return {"ys": 2, "x": 2, "y": 4 * rows * columns}

    def run(self, function: Callable) -> Callable[[Tensors], list[Tensor]]:
        return lambda t: [function(t["x"][0], t["y"][0], self.multiply)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, channels, height, width = draw(map_sizes())
    small = draw(lengths), draw(lengths)
    if draw(st.booleans()):  # an exact ratio, as between the scales of a network
        ratio = draw(st.sampled_from([1, 2, 2, 3, 4, 8]))
        small = max(1, height // ratio), max(1, width // ratio)
        height, width = ratio * small[0], ratio * small[1]
    return Case(
        (batch, channels, height, width), small, draw(st.booleans()), draw(layouts), draw(seeds)
    )  # fmt: skip


@given(cases())
def test_values_and_gradients(case: Case) -> None:
    check_against_reference(
        case.run(scfm), case.run(scfm_reference), case.tensors(), case.grads(), case.terms(),
        case.memory_format(),
    )  # fmt: skip


LARGE = [
    Case((8, 16, 88, 88), (44, 44)),
    Case((2, 16, 88, 88), (11, 11), multiply=False),
    Case((1, 1, 352, 352), (100, 300), layout="channels_last"),
    Case((3, 2, 50, 61), (97, 131)),
    Case((1, 2, 5, 700), (5, 3)),
    Case((8, 16, 44, 44), (22, 22), layout="channels_last"),
    Case((2, 21, 40, 33), (7, 50), multiply=False, layout="channels_last"),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    compiled, reference = case.run(scfm), case.run(scfm_reference)
    check_against_reference(
        compiled, reference, case.tensors(), case.grads(), case.terms(), case.memory_format()
    )
    assert_deterministic(compiled, case.tensors(), case.grads())


def test_same_size_needs_no_interpolation(backend: str, device: torch.device) -> None:
    x, y = (t.to(device) for t in torch.rand(2, 1, 3, 7, 19))
    torch.testing.assert_close(scfm(x, y), x + x * y)
    torch.testing.assert_close(scfm(x, y, multiply=False), x + y)


@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.parametrize("small", [(2, 3), (4, 6), (1, 1), (3, 17), (9, 5)])
def test_gradcheck_of_the_compiled_op(small: tuple[int, int], multiply: bool) -> None:
    tensors = Case((2, 2, 4, 6), small).tensors()
    check_gradcheck(
        lambda x, y: scfm(x, y, multiply),
        [tensors["x"][0], tensors["y"][0]],
        ("scfm", "scfm_backward"),
    )


@pytest.mark.parametrize("size", [(0, 2, 8, 8), (2, 0, 8, 8)])
def test_nothing_in_the_batch(size: tuple[int, ...]) -> None:
    x, y = torch.zeros(size, requires_grad=True), torch.zeros(*size[:2], 4, 4, requires_grad=True)
    with sodfast.use_backend("cpu"):
        out = scfm(x, y)
        gx, gy = torch.autograd.grad(out.sum(), (x, y))
    assert out.shape == gx.shape == x.shape and gy.shape == y.shape


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_go_where_the_reference_has_them(isa: str, value: float) -> None:
    x, y = Source(0).uniform(1, 1, 24, 40), Source(1).uniform(1, 1, 12, 20)
    x[0, 0, 3, 5] = y[0, 0, 0, 0] = y[0, 0, 7, 19] = value
    with sodfast.use_backend("cpu"), instruction_set(isa):
        for a, b in ((x, y), (x.double(), y.double())):
            found, expected = scfm(a, b), scfm_reference(a, b)
            assert torch.equal(found.isfinite(), expected.isfinite())
            assert torch.equal(found.isnan(), expected.isnan())


def test_backward_computes_only_what_is_asked_for() -> None:
    x, y = torch.rand(1, 2, 8, 8, requires_grad=True), torch.rand(1, 2, 4, 4)
    with sodfast.use_backend("cpu"), CallCounter() as calls:
        (gx,) = torch.autograd.grad(scfm(x, y, multiply=False).sum(), x)
    assert calls.counts == {"scfm": 1}
    assert torch.equal(gx, torch.ones_like(x))


# ---- torch --------------------------------------------------------------------------------------


def test_the_reference_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, "scfm", ["scfm_reference"])
    monkeypatch.setattr(F, "interpolate", None)
    x, y = torch.rand(1, 2, 8, 8, requires_grad=True), torch.rand(1, 2, 4, 4, requires_grad=True)
    with sodfast.use_backend("cpu"):
        scfm(x, y).sum().backward()
    assert x.grad is not None and y.grad is not None
    with sodfast.use_backend("reference"), pytest.raises(AssertionError, match="was called"):
        scfm(x, y)


@pytest.mark.parametrize("multiply", [True, False])
def test_compile_export_autocast_and_second_derivative(multiply: bool) -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        return scfm(x, y, multiply)

    x, y = torch.rand(1, 2, 8, 8, requires_grad=True), torch.rand(1, 2, 3, 5, requires_grad=True)
    check_compiles_and_exports(run, [x, y], "scfm")
    check_autocast(run, [x.detach(), y.detach()])
    check_second_derivative_is_refused(lambda b: run(x.detach(), b), [y])


x8, y4 = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)
BAD = {
    "rank of x": (ValueError, r"x must be \(B, C, H, W\), not \(2, 8, 8\)", (x8[0], y4)),
    "rank of y": (ValueError, r"y must be \(B, C, H, W\)", (x8, y4[0])),
    "empty x": (ValueError, "x has an empty size: 8x0", (x8[..., :0], y4)),
    "empty y": (ValueError, "y has an empty size: 0x4", (x8, y4[:, :, :0])),
    "batch": (ValueError, r"y must have.*\(1, 2\), not \(2, 2\)", (x8, torch.zeros(2, 2, 4, 4))),
    "channels": (ValueError, r"\(1, 2\), not \(1, 1\)", (x8, y4[:, :1])),
    "integers": (TypeError, "y must be floating point, not torch.int64", (x8, y4.long())),
    "dtypes": (TypeError, "y is torch.float64, x is torch.float32", (x8, y4.double())),
    "devices": (ValueError, "y is on meta, x is on cpu", (x8, y4.to("meta"))),
    "half": (RuntimeError, "'cpu' was asked for.*float16", (x8.half(), y4.half())),
    "no tensor": (TypeError, "y must be a tensor, not list", (x8, [y4])),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    error, message, arguments = BAD[name]
    with sodfast.use_backend("cpu"), pytest.raises(error, match=message):
        scfm(*arguments)


def sound_calls() -> Iterator[Call]:
    case = Case((2, 3, 9, 18), (4, 9), layout="sliced storage")
    tensors, (grad,) = case.tensors(), case.grads()
    (x,), (y,) = tensors["x"], tensors["y"]
    yield "scfm", (x, y, True)
    yield "scfm", (y, x, False)
    yield "scfm_backward", (grad, x, y, True)
    yield "scfm_backward", (grad, x, y, False)


@pytest.mark.parametrize("number", range(len(list(sound_calls()))))
def test_registration(number: int) -> None:
    assert_registered(*list(sound_calls())[number])
    assert_one_device(*list(sound_calls())[number])


def nonsense() -> Iterator[Call]:
    for x, y in (
        (x8[0], y4),
        (x8, y4[0]),
        (x8[..., :0], y4),
        (x8, y4[:, :, :0]),
        (x8, y4[:, :1]),
        (x8, torch.zeros(2, 2, 4, 4)),
        (x8.long(), y4.long()),
        (x8.half(), y4.half()),
        (x8, y4.double()),
    ):
        for multiply in (True, False):
            yield "scfm", (x, y, multiply)
            yield "scfm_backward", (x, x, y, multiply)
    for grad in (x8[0], y4, x8.double(), torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 8, 9)):
        yield "scfm_backward", (grad, x8, y4, True)


def test_raw_ops_refuse_nonsense() -> None:
    assert_refused(__name__)


def test_raw_ops_survive_random_changes(full: bool) -> None:
    assert_survived(__name__, 20_000 if full else 1_000)
