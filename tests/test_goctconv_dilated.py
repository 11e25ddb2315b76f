"""The compiled dilated bank: values, gradients, refusals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

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
from sodfast.ops import goctconv_dilated, goctconv_dilated_reference

pytestmark = pytest.mark.usefixtures("compiled")


@dataclass(frozen=True)
class Case:
    batch: int
    size: tuple[int, int]  # of scale 0
    in_channels: tuple[int, ...]
    dilations: tuple[int, ...]
    out_channels: tuple[tuple[int, ...], ...]  # per scale one number per dilation
    bias: bool = True
    layout: str = "contiguous"
    seed: int = 0

    @property
    def totals(self) -> list[int]:
        return [sum(row) for row in self.out_channels]

    def tensors(self) -> Tensors:
        source = Source(self.seed)
        shapes = [
            (self.batch, c, self.size[0] >> i, self.size[1] >> i)
            for i, c in enumerate(self.in_channels)
        ]
        weights = [source.uniform(o, c, 3, 3) for o, c in zip(self.totals, self.in_channels)]
        bias = [source.uniform(sum(self.totals))] if self.bias else []
        return {
            "xs": [lay_out(source.uniform(*shape), self.layout) for shape in shapes],
            "weights": [lay_out(weight, self.layout) for weight in weights],
            "bias": [lay_out(b, self.layout) for b in bias],
        }

    def grads(self) -> list[Tensor]:
        source = Source(self.seed + 1)
        shapes = [
            (self.batch, o, self.size[0] >> i, self.size[1] >> i) for i, o in enumerate(self.totals)
        ]
        return [lay_out(source.uniform(*shape), self.layout, (2, 3)) for shape in shapes]

    def terms(self) -> dict[str, float]:
        values = self.batch * self.size[0] * self.size[1]
        return {
            "ys": 9 * max(self.in_channels),
            "xs": 9 * max(self.totals),
            "weights": values,
            "bias": values,
        }

    def run(self, function: Callable) -> Callable[[Tensors], list[Tensor]]:
        def call(t: Tensors) -> list[Tensor]:
            epilogue = {name: t[name][0] for name in ("bias", "slope") if t.get(name)}
            branches = self.dilations, self.out_channels
            return function(t["xs"], t["weights"], *branches, **epilogue)

        return call

    def reference(self) -> Callable[[Tensors], list[Tensor]]:
        """Pads by the dilation; one past the map does what all further ones do."""
        dilations = tuple(min(d, max(self.size) + 1) for d in self.dilations)
        return replace(self, dilations=dilations).run(goctconv_dilated_reference)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    scales = draw(scale_counts)
    dilations = draw(
        st.one_of(
            st.just((1, 2, 4, 8, 16)),
            st.lists(st.sampled_from([1, 2, 3, 7, 70, 2**62]), min_size=1, max_size=8).map(tuple),
        )
    )

    def work(values: float, c: list[int]) -> float:
        pairs = zip(c[:scales], c[scales:])
        return sum(values / 4**s * (9 * a * b + a + b) for s, (a, b) in enumerate(pairs))

    batch, size, channels = draw(sizes_and_channels(scales, 2 * scales, work))
    rows = []
    for total in channels[scales:]:  # shared out among the branches, some of which get nothing
        cuts = sorted(draw(st.integers(0, total)) for _ in dilations[1:])
        rows.append(tuple(b - a for a, b in zip([0, *cuts], [*cuts, total])))
    bias, layout, seed = draw(st.booleans()), draw(layouts), draw(seeds)
    return Case(batch, size, tuple(channels[:scales]), dilations, tuple(rows), bias, layout, seed)


@given(cases())
def test_values_and_gradients(case: Case) -> None:
    compiled, reference = case.run(goctconv_dilated), case.reference()
    check_against_reference(compiled, reference, case.tensors(), case.grads(), case.terms())


@given(cases(), slope_ranges)
def test_epilogue(case: Case, slopes: tuple[float, float]) -> None:
    tensors = case.tensors()
    low, high = slopes
    slope = Source(case.seed).uniform(sum(case.totals), low=low, high=high)
    tensors["slope"] = [lay_out(slope, case.layout)]
    compiled, reference = case.run(goctconv_dilated), case.reference()
    check_against_reference(compiled, reference, tensors, [], case.terms())


CSF = (1, 2, 4, 8, 16)  # the banks of the published networks, x1-L and x2-L
LARGE = [
    Case(1, (56, 56), (12, 24, 24), CSF, ((1, 2, 2, 2, 4), (1, 4, 4, 4, 5), (2, 2, 4, 5, 4))),
    Case(2, (56, 40), (17, 38, 32), CSF, ((2, 1, 2, 2, 1), (0, 6, 6, 7, 5), (0, 1, 3, 7, 7))),
    Case(1, (67, 95), (5,), (3, 1), ((13, 20),)),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    compiled, reference = case.run(goctconv_dilated), case.reference()
    check_against_reference(compiled, reference, case.tensors(), case.grads(), case.terms())
    assert_deterministic(compiled, case.tensors(), case.grads())


SMALL = [
    Case(2, (4, 6), (2, 1), (1, 2), ((1, 1), (2, 0))),
    Case(1, (5, 3), (2,), (2, 1, 9), ((1, 1, 1),), bias=False),
    Case(1, (8, 4), (1, 0, 2), (1, 2), ((1, 1), (2, 1), (0, 0))),
    Case(0, (4, 4), (2,), (1,), ((2,),)),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck_of_the_compiled_op(case: Case) -> None:
    tensors = {name: [t.double() for t in group] for name, group in case.tensors().items()}
    flat = [t.requires_grad_() for group in tensors.values() for t in group]

    def function(*arguments: Tensor) -> tuple[Tensor, ...]:
        given = iter(arguments)
        named = {name: [next(given) for _ in group] for name, group in tensors.items()}
        return tuple(case.run(goctconv_dilated)(named))

    with sodfast.use_backend("cpu"), CallCounter() as calls:
        assert torch.autograd.gradcheck(function, flat)
    assert calls.counts["goctconv_dilated"] >= 2 * sum(t.numel() for t in flat)
    assert calls.counts["goctconv_dilated_grad_input"] > 0
    assert calls.counts["goctconv_dilated_grad_weight"] > 0


@pytest.mark.parametrize("size", [(1, 3_000_000), (3_000_000, 1)], ids=str)
def test_dilation_past_a_long_strip_takes_the_centre_alone(size: tuple[int, int]) -> None:
    """Its memory must follow the map's area, not the square of its longer side."""
    x, weight = torch.rand(1, 1, *size), torch.rand(1, 1, 3, 3)
    with sodfast.use_backend("cpu"):
        (y,) = goctconv_dilated([x], [weight], [10**9], [[1]])
    torch.testing.assert_close(y, x * weight[0, 0, 1, 1])


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_reach_their_nine_neighbours(isa: str, value: float) -> None:
    dilations = (1, 4)
    xs = [torch.zeros(1, 2, 12, 18), torch.zeros(1, 1, 6, 9)]
    expected = [torch.zeros(1, 2, *x.shape[2:], dtype=torch.bool) for x in xs]
    for x, mask in zip(xs, expected):
        for row, column in ((0, 0), (3, 4), (5, 8)):
            x[0, -1, row, column] = value
            for branch, d in enumerate(dilations):
                for dy in (-d, 0, d):
                    for dx in (-d, 0, d):
                        if 0 <= row + dy < x.shape[2] and 0 <= column + dx < x.shape[3]:
                            mask[0, branch, row + dy, column + dx] = True
    weights, slope = [torch.ones(2, 2, 3, 3), torch.ones(2, 1, 3, 3)], torch.tensor([1, -1, 1, 0.5])
    with sodfast.use_backend("cpu"), instruction_set(isa):
        ys = goctconv_dilated(xs, weights, dilations, [[1, 1]] * 2, torch.ones(4), slope)
    for y, mask in zip(ys, expected):
        assert torch.equal(~y.isfinite(), mask)


x8, x4 = torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 4, 4)
w8, w4 = torch.zeros(4, 2, 3, 3), torch.zeros(4, 3, 3, 3)
D, ROW = [1, 2], [3, 1]
BAD = {
    "rank": (ValueError, r"xs\[1\].*\(3, 4, 4\)", ([x8, x4[0]], [w8, w4], D, [ROW, ROW])),
    "size": (
        ValueError,
        r"xs\[1\] is 8x8.*8x8, divided by 2",
        ([x8, x8], [w8, w8], D, [ROW, ROW]),
    ),
    "few weights": (ValueError, "xs has 2 .* weights 1", ([x8, x4], [w8], D, [ROW, ROW])),
    "few rows": (ValueError, "xs has 2 .* out_channels 1", ([x8, x4], [w8, w4], D, [ROW])),
    "few branches": (ValueError, r"out_channels\[0\] .* 2 numbers.*\[4\]", ([x8], [w8], D, [[4]])),
    "negative": (ValueError, r"out_channels\[0\].*\[5, -1\]", ([x8], [w8], D, [[5, -1]])),
    "inputs": (
        ValueError,
        r"weights\[0\].*\(4, 2, 3, 3\), not \(4, 3, 3, 3\)",
        ([x8], [w4], D, [ROW]),
    ),
    "outputs": (
        ValueError,
        r"\(5, 2, 3, 3\), not \(4, 2, 3, 3\)",
        ([x8], [w8], D, [[4, 1]]),
    ),
    "no dilation": (ValueError, r"dilations.*\[\]", ([x8], [w8], [], [[]])),
    "dilation": (ValueError, r"dilations.*\[1, 0\]", ([x8], [w8], [1, 0], [ROW])),
    "dilations": (ValueError, "dilations", ([x8], [w8], [1] * 9, [[4] + [0] * 8])),
    "bias": (ValueError, r"bias.*\(4,\)", ([x8], [w8], D, [ROW], torch.zeros(3))),
    "slope": (ValueError, r"slope.*\(4,\)", ([x8], [w8], D, [ROW], None, torch.zeros(5))),
    "integers": (TypeError, "xs.*int32", ([x8.int()], [w8], D, [ROW])),
    "dtypes": (TypeError, r"weights\[0\].*float64", ([x8], [w8.double()], D, [ROW])),
    "half": (RuntimeError, "'cpu' was asked.*float16", ([x8.half()], [w8.half()], D, [ROW])),
    "devices": (ValueError, "meta.*cpu", ([x8], [w8.to("meta")], D, [ROW])),
    "no scales": (ValueError, "1 to 4 scales, not 0", ([], [], D, [])),
    "five scales": (ValueError, "1 to 4 scales, not 5", ([x8] * 5, [w8] * 5, D, [ROW] * 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    error, message, arguments = BAD[name]
    with sodfast.use_backend("cpu"), pytest.raises(error, match=message):
        goctconv_dilated(*arguments)


def sound_calls() -> Iterator[Call]:
    case = Case(2, (8, 16), (3, 2), (1, 3, 2), ((2, 0, 1), (1, 1, 0)), layout="sliced storage")
    tensors, grads = case.tensors(), case.grads()
    xs, weights, (bias,) = tensors.values()
    branches = [1, 3, 2], [2, 0, 1, 1, 1, 0]
    yield "goctconv_dilated", (xs, weights, bias, None, *branches)
    yield "goctconv_dilated", (xs, weights, bias, bias, *branches)
    yield "goctconv_dilated_grad_input", (grads, weights, *branches)
    yield "goctconv_dilated_grad_weight", (grads, xs, weights, *branches)


@pytest.mark.parametrize("number", range(len(list(sound_calls()))))
def test_registration(number: int) -> None:
    assert_registered(*list(sound_calls())[number])


@pytest.mark.parametrize("number", range(len(list(sound_calls()))))
def test_raw_ops_refuse_mixed_devices(number: int) -> None:
    assert_one_device(*list(sound_calls())[number])


def nonsense() -> Iterator[Call]:
    huge = [2**62, 2**62, 2**62, 2**62 + 4]  # 4 in all, modulo 2^64
    for xs, weights, dilations, out_channels in (
        ([], [], [1], []),
        ([x8] * 5, [w8] * 5, [1], [4] * 5),
        ([x8], [], [1], [4]),
        ([x8], [w8, w8], [1], [4]),
        ([x8], [w8], [], []),
        ([x8], [w8], [1], []),
        ([x8], [w8], [1], [4, 0]),
        ([x8], [w8], [1] * 9, [4] + [0] * 8),
        ([x8], [w8], [0], [4]),
        ([x8], [w8], [-1], [4]),
        ([x8], [w8], [1, 1], [5, -1]),
        ([x8], [w8], [1, 1, 1, 1], huge),
        ([x8], [w8], [1, 1], [2**63 - 1, 2**63 - 1]),
        ([x8], [w8[:3]], [1], [4]),
        ([x8], [w8[..., :1]], [1], [4]),
        ([x8], [w8.flatten()], [1], [4]),
        ([x8], [w8.double()], [1], [4]),
        ([x8.double()], [w8], [1], [4]),
        ([x8.half()], [w8.half()], [1], [4]),
        ([x8.long()], [w8.long()], [1], [4]),
        ([x8[0]], [w8], [1], [4]),
    ):
        yield "goctconv_dilated", (xs, weights, None, None, dilations, out_channels)
        grads = [torch.zeros(*x.shape[:-3], 4, *x.shape[-2:], dtype=x.dtype) for x in xs]
        yield "goctconv_dilated_grad_input", (grads, weights, dilations, out_channels)
        yield "goctconv_dilated_grad_weight", (grads, xs, weights, dilations, out_channels)
    yield "goctconv_dilated", ([x8], [w4], None, None, [1], [4])
    yield "goctconv_dilated", ([x8], [w8], torch.zeros(3), None, [1], [4])
    yield "goctconv_dilated", ([x8], [w8], None, torch.zeros(4).double(), [1], [4])
    g8 = torch.zeros(1, 4, 8, 8)
    for grads in ([], [g8, g8], [g8[:0]], [g8[:, :3]], [g8[..., :4]], [g8[0]], [g8.double()]):
        yield "goctconv_dilated_grad_weight", (grads, [x8], [w8], [1], [4])


def test_raw_ops_refuse_nonsense() -> None:
    assert_refused(__name__)


def test_raw_ops_survive_random_changes(full: bool) -> None:
    assert_survived(__name__, 20_000 if full else 1_000)
