"""The compiled multi-scale depthwise convolution: values, gradients, refusals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
    scale_counts,
    seeds,
    sizes_and_channels,
    slope_ranges,
)
from torch import Tensor

import sodfast
from sodfast.ops import goctconv_depthwise, goctconv_depthwise_reference

pytestmark = pytest.mark.usefixtures("compiled")


@dataclass(frozen=True)
class Case:
    batch: int
    size: tuple[int, int]  # of scale 0
    channels: tuple[int, ...]
    dilation: int = 1
    bias: bool = True
    layout: str = "contiguous"
    seed: int = 0

    def maps(self, draw: Callable[..., Tensor], *expand_dims: int) -> list[Tensor]:
        height, width = self.size
        maps = [draw(self.batch, c, height >> i, width >> i) for i, c in enumerate(self.channels)]
        return [lay_out(x, self.layout, expand_dims) for x in maps]

    def tensors(self) -> Tensors:
        source, count = Source(self.seed), sum(self.channels)
        bias = [source.uniform(count)] if self.bias else []
        return {
            "xs": self.maps(source.uniform, 0),
            "weight": [lay_out(source.uniform(count, 1, 3, 3), self.layout)],
            "bias": [lay_out(b, self.layout) for b in bias],
        }

    def grads(self) -> list[Tensor]:
        return self.maps(Source(self.seed + 1).uniform, 2, 3)

    def terms(self) -> dict[str, float]:
        values = self.batch * self.size[0] * self.size[1]
        return {"ys": 9, "xs": 9, "weight": values, "bias": values}

    def run(self, function: Callable) -> Callable[[Tensors], list[Tensor]]:
        def call(t: Tensors) -> list[Tensor]:
            epilogue = {name: t[name][0] for name in ("bias", "slope") if t.get(name)}
            return function(t["xs"], t["weight"][0], self.dilation, **epilogue)

        return call


@st.composite
def cases(draw: st.DrawFn) -> Case:
    scales = draw(scale_counts)
    batch, size, channels = draw(sizes_and_channels(scales, scales, lambda n, c: 9 * n * sum(c)))
    dilation = draw(st.sampled_from([1, 1, 2, 3, 5, 16, 70, 10**6, 2**62]))
    bias, layout, seed = draw(st.booleans()), draw(layouts), draw(seeds)
    return Case(batch, size, tuple(channels), dilation, bias, layout, seed)


def centre_only(case: Case, function: Callable) -> Callable[[Tensors], list[Tensor]]:
    """The reference, which pads by the dilation: one past the map does what all further do."""
    return Case(
        case.batch, case.size, case.channels, min(case.dilation, max(case.size) + 1)
    ).run(function)  # fmt: skip


@given(cases())
def test_values_and_gradients(case: Case) -> None:
    check_against_reference(
        case.run(goctconv_depthwise),
        centre_only(case, goctconv_depthwise_reference),
        case.tensors(),
        case.grads(),
        case.terms(),
    )


@given(cases(), slope_ranges)
def test_epilogue(case: Case, slopes: tuple[float, float]) -> None:
    tensors = case.tensors()
    low, high = slopes
    slope = Source(case.seed).uniform(sum(case.channels), low=low, high=high)
    tensors["slope"] = [lay_out(slope, case.layout)]
    check_against_reference(
        case.run(goctconv_depthwise),
        centre_only(case, goctconv_depthwise_reference),
        tensors,
        [],
        case.terms(),
    )


LARGE = [
    Case(2, (224, 224), (9, 10)),
    Case(1, (97, 131), (1,), dilation=2),
    Case(1, (64, 256), (5, 4, 3, 2), dilation=5),
    Case(3, (33, 15), (33,), dilation=40),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    compiled, reference = case.run(goctconv_depthwise), case.run(goctconv_depthwise_reference)
    check_against_reference(compiled, reference, case.tensors(), case.grads(), case.terms())
    assert_deterministic(compiled, case.tensors(), case.grads())


SMALL = [
    Case(2, (4, 6), (2, 1)),
    Case(1, (5, 3), (2,), dilation=2),
    Case(1, (4, 4), (1, 0, 2), dilation=3, bias=False),
    Case(0, (4, 4), (2, 1)),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck_of_the_compiled_op(case: Case) -> None:
    tensors = {name: [t.double() for t in group] for name, group in case.tensors().items()}
    flat = [t.requires_grad_() for group in tensors.values() for t in group]

    def function(*arguments: Tensor) -> tuple[Tensor, ...]:
        given = iter(arguments)
        named = {name: [next(given) for _ in group] for name, group in tensors.items()}
        return tuple(case.run(goctconv_depthwise)(named))

    with sodfast.use_backend("cpu"), CallCounter() as calls:
        assert torch.autograd.gradcheck(function, flat)
    assert calls.counts["goctconv_depthwise"] >= 2 * sum(t.numel() for t in flat)
    assert calls.counts["goctconv_depthwise_grad_input"] > 0
    assert calls.counts["goctconv_depthwise_grad_weight"] > 0


@pytest.mark.parametrize("size", [(1, 3_000_000), (3_000_000, 1)], ids=str)
def test_dilation_past_a_long_strip_takes_the_centre_alone(size: tuple[int, int]) -> None:
    """Its memory must follow the map's area, not the square of its longer side."""
    x, weight = torch.rand(1, 1, *size), torch.rand(1, 1, 3, 3)
    with sodfast.use_backend("cpu"):
        (y,) = goctconv_depthwise([x], weight, 10**9)
    torch.testing.assert_close(y, x * weight[0, 0, 1, 1])


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dilation", [1, 3])
def test_nan_and_infinity_reach_their_nine_neighbours(
    isa: str, value: float, dilation: int
) -> None:
    xs = [torch.zeros(1, 2, 12, 18), torch.zeros(1, 2, 6, 9)]
    expected = [torch.zeros_like(x, dtype=torch.bool) for x in xs]
    for x, mask in zip(xs, expected):
        for row, column in ((0, 0), (3, 4), (5, 8)):
            x[0, 1, row, column] = value
            for dy in (-dilation, 0, dilation):
                for dx in (-dilation, 0, dilation):
                    if 0 <= row + dy < x.shape[2] and 0 <= column + dx < x.shape[3]:
                        mask[0, 1, row + dy, column + dx] = True
    slope = torch.tensor([1.0, -1.0, 1.0, 0.5])
    with sodfast.use_backend("cpu"), instruction_set(isa):
        ys = goctconv_depthwise(xs, torch.ones(4, 1, 3, 3), dilation, torch.ones(4), slope)
    for y, mask in zip(ys, expected):
        assert torch.equal(~y.isfinite(), mask)


x8, x4 = torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 4, 4)
w5, w2 = torch.zeros(5, 1, 3, 3), torch.zeros(2, 1, 3, 3)
BAD = {
    "rank": (ValueError, r"xs\[0\].*\(2, 8, 8\)", ([x8[0]], w2)),
    "size": (ValueError, r"xs\[1\] is 4x8.*8x8", ([x8, torch.zeros(1, 3, 4, 8)], w5)),
    "odd": (ValueError, "4x4.*9x8", ([torch.zeros(1, 2, 9, 8), x4], w5)),
    "batch": (ValueError, "batch size 0.*1", ([x8, x4[:0]], w5)),
    "channels": (ValueError, r"\(5, 1, 3, 3\), not \(2, 1, 3, 3\)", ([x8, x4], w2)),
    "dense weight": (ValueError, r"not \(2, 2, 3, 3\)", ([x8], torch.zeros(2, 2, 3, 3))),
    "5x5": (ValueError, r"not \(2, 1, 5, 5\)", ([x8], torch.zeros(2, 1, 5, 5))),
    "dilation": (ValueError, "dilation.*0", ([x8], w2, 0)),
    "negative dilation": (ValueError, "dilation.*-1", ([x8], w2, -1)),
    "bias": (ValueError, r"bias.*\(2,\), not \(5,\)", ([x8], w2, 1, torch.zeros(5))),
    "slope": (ValueError, r"slope.*\(2,\)", ([x8], w2, 1, None, torch.zeros(1, 2))),
    "integers": (TypeError, "xs.*int64", ([x8.long()], w2)),
    "booleans": (TypeError, "xs.*bool", ([x8.bool()], w2)),
    "dtypes": (TypeError, "float64.*float32", ([x8], w2.double())),
    "half": (RuntimeError, "'cpu' was asked for.*float16", ([x8.half()], w2.half())),
    "devices": (ValueError, "meta.*cpu", ([x8], w2.to("meta"))),
    "no scales": (ValueError, "1 to 4 scales, not 0", ([], w2)),
    "five scales": (ValueError, "1 to 4 scales, not 5", ([x8] * 5, w2)),
    "no tensor": (TypeError, "weight.*list", ([x8], w2.tolist())),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    error, message, arguments = BAD[name]
    with sodfast.use_backend("cpu"), pytest.raises(error, match=message):
        goctconv_depthwise(*arguments)


def sound_calls() -> Iterator[Call]:
    case = Case(2, (8, 16), (3, 2), layout="sliced storage")
    tensors, grads = case.tensors(), case.grads()
    weight, bias = tensors["weight"][0], tensors["bias"][0]
    yield "goctconv_depthwise", (tensors["xs"], weight, bias, None, 2)
    yield "goctconv_depthwise", (tensors["xs"], weight, bias, bias, 1)
    yield "goctconv_depthwise_grad_input", (grads, weight, 2)
    yield "goctconv_depthwise_grad_weight", (grads, tensors["xs"], weight, 2)


@pytest.mark.parametrize("number", range(len(list(sound_calls()))))
def test_registration(number: int) -> None:
    assert_registered(*list(sound_calls())[number])


@pytest.mark.parametrize("number", range(len(list(sound_calls()))))
def test_raw_ops_refuse_mixed_devices(number: int) -> None:
    assert_one_device(*list(sound_calls())[number])


def nonsense() -> Iterator[Call]:
    for xs, weight, bias, slope, dilation in (
        ([], w2, None, None, 1),
        ([x8] * 5, w2, None, None, 1),
        ([x8[0]], w2, None, None, 1),
        ([x8, x8], torch.zeros(4, 1, 3, 3), None, None, 1),
        ([x8, x4.double()], w5, None, None, 1),
        ([torch.zeros(1, 2, 8, 0)], w2, None, None, 1),
        ([x8.long()], w2.long(), None, None, 1),
        ([x8.half()], w2.half(), None, None, 1),
        ([x8], w2.double(), None, None, 1),
        ([x8], w5, None, None, 1),
        ([x8], torch.zeros(2, 2, 3, 3), None, None, 1),
        ([x8], torch.zeros(2, 1, 3), None, None, 1),
        ([x8], torch.zeros(2, 1, 1, 1), None, None, 1),
        ([x8], w2, torch.zeros(1), None, 1),
        ([x8], w2, torch.zeros(2).double(), None, 1),
        ([x8], w2, None, torch.zeros(2, 1), 1),
        ([x8], w2, None, None, 0),
        ([x8], w2, None, None, -(2**63)),
    ):
        yield "goctconv_depthwise", (xs, weight, bias, slope, dilation)
    for grads, weight, dilation in (
        ([], w2, 1),
        ([x8] * 5, w2, 1),
        ([x8], w5, 1),
        ([x8], w2.flatten(), 1),
        ([x8], w2.double(), 1),
        ([x8[0]], w2, 1),
        ([x8], w2, 0),
    ):
        yield "goctconv_depthwise_grad_input", (grads, weight, dilation)
    for grads, xs, weight, dilation in (
        ([], [x8], w2, 1),
        ([x8], [], w2, 1),
        ([x8, x4], [x8], w2, 1),
        ([x4], [x8], w2, 1),
        ([x8[:0]], [x8], w2, 1),
        ([x8[0]], [x8], w2, 1),
        ([x8.double()], [x8], w2, 1),
        ([x8], [x8.double()], w2, 1),
        ([x8], [x8], w5, 1),
        ([x8], [x8], w2, -1),
    ):
        yield "goctconv_depthwise_grad_weight", (grads, xs, weight, dilation)


def test_raw_ops_refuse_nonsense() -> None:
    assert_refused(__name__)


def test_raw_ops_survive_random_changes(full: bool) -> None:
    assert_survived(__name__, 20_000 if full else 1_000)
