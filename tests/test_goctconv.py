"""The compiled cross-scale convolution: values, gradients, registration, refusals."""

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
from sodfast.ops import goctconv, goctconv_reference

pytestmark = pytest.mark.usefixtures("compiled")


@dataclass(frozen=True)
class Case:
    batch: int
    size: tuple[int, int]  # of scale 0, before the stride
    in_channels: tuple[int, ...]
    out_channels: tuple[int, ...]
    kernel: int = 1
    stride: int = 1
    bias: bool = True
    layout: str = "contiguous"
    seed: int = 0

    def tensors(self) -> Tensors:
        source = Source(self.seed)
        rows, columns = sum(self.out_channels), sum(self.in_channels)
        xs = [
            source.grid(self.batch, channels, self.size[0] >> i, self.size[1] >> i)
            for i, channels in enumerate(self.in_channels)
        ]
        weight = source.uniform(rows, columns, self.kernel, self.kernel)
        bias = [source.uniform(rows)] if self.bias else []
        return {
            "xs": [lay_out(x, self.layout) for x in xs],
            "weight": [lay_out(weight, self.layout)],
            "bias": [lay_out(b, self.layout) for b in bias],
        }

    def grads(self) -> list[Tensor]:
        source = Source(self.seed + 1)
        height, width = (size // self.stride for size in self.size)
        shapes = [
            (self.batch, channels, height >> j, width >> j)
            for j, channels in enumerate(self.out_channels)
        ]
        return [lay_out(source.uniform(*shape), self.layout, (2, 3)) for shape in shapes]

    def terms(self) -> dict[str, float]:
        taps = self.kernel**2
        values = self.batch * self.size[0] * self.size[1] / self.stride**2
        return {
            "ys": sum(self.in_channels) * taps,
            "xs": sum(self.out_channels) * taps,
            "weight": values,
            "bias": values,
        }

    def run(self, function: Callable) -> Callable[[Tensors], list[Tensor]]:
        def call(t: Tensors) -> list[Tensor]:
            epilogue = {name: t[name][0] for name in ("bias", "slope") if t.get(name)}
            return function(t["xs"], t["weight"][0], self.out_channels, self.stride, **epilogue)

        return call


@st.composite
def cases(draw: st.DrawFn) -> Case:
    scales, targets = draw(scale_counts), draw(scale_counts)
    kernel, stride = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2]))

    def work(values: float, c: list[int]) -> float:
        return values * (sum(c[:scales]) * sum(c[scales:]) * kernel**2 + sum(c))

    batch, (height, width), channels = draw(
        sizes_and_channels(max(scales, targets), scales + targets, work)
    )
    if stride == 2:
        # Of one scale the stride may drop a row or column; several must still divide after it.
        odd = st.booleans() if scales == 1 else st.just(False)
        height, width = 2 * height + draw(odd), 2 * width + draw(odd)
    sides = tuple(channels[:scales]), tuple(channels[scales:])
    bias, layout, seed = draw(st.booleans()), draw(layouts), draw(seeds)
    return Case(batch, (height, width), *sides, kernel, stride, bias, layout, seed)


@given(cases())
def test_values_and_gradients(case: Case) -> None:
    check_against_reference(
        case.run(goctconv), case.run(goctconv_reference), case.tensors(), case.grads(), case.terms()
    )


@given(cases(), slope_ranges)
def test_epilogue(case: Case, slopes: tuple[float, float]) -> None:
    tensors = case.tensors()
    low, high = slopes
    slope = Source(case.seed).uniform(sum(case.out_channels), low=low, high=high)
    tensors["slope"] = [lay_out(slope, case.layout)]
    check_against_reference(
        case.run(goctconv), case.run(goctconv_reference), tensors, [], case.terms()
    )


# Larger than what is drawn: several bands of rows, several threads, every tail of a tile.
LARGE = [
    Case(2, (64, 80), (20, 20), (19, 13), kernel=3),
    Case(1, (96, 64), (9, 10), (10, 33), kernel=1),
    Case(1, (64, 128), (3, 4, 5, 6), (7, 5, 3, 2), kernel=3),
    Case(2, (128, 96), (5, 6, 7), (8, 0, 9), kernel=3, stride=2),
    Case(1, (161, 95), (7,), (9,), kernel=3, stride=2),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    check_against_reference(
        case.run(goctconv), case.run(goctconv_reference), case.tensors(), case.grads(), case.terms()
    )
    assert_deterministic(case.run(goctconv), case.tensors(), case.grads())


SMALL = [
    Case(2, (4, 4), (2, 1), (1, 2), kernel=3),
    Case(1, (8, 8), (1, 0, 2), (1, 1), kernel=1),
    Case(1, (8, 8), (1, 1), (1, 1, 1), kernel=3, stride=2),
    Case(1, (5, 7), (2,), (2,), kernel=3, stride=2),
    Case(1, (8, 8), (1, 1, 1, 1), (1, 1, 1, 1), kernel=1, bias=False),
    Case(0, (4, 4), (2, 1), (1, 2), kernel=3),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck_of_the_compiled_op(case: Case) -> None:
    tensors = {name: [t.double() for t in group] for name, group in case.tensors().items()}
    flat = [t.requires_grad_() for group in tensors.values() for t in group]

    def function(*arguments: Tensor) -> tuple[Tensor, ...]:
        given = iter(arguments)
        return tuple(case.run(goctconv)({n: [next(given) for _ in g] for n, g in tensors.items()}))

    with sodfast.use_backend("cpu"), CallCounter() as calls:
        assert torch.autograd.gradcheck(function, flat)
    least = 2 * sum(t.numel() for t in flat)  # gradcheck moves every input up and down
    assert calls.counts["goctconv"] >= least
    assert calls.counts["goctconv_grad_input"] > 0 and calls.counts["goctconv_grad_weight"] > 0


def test_ties_send_the_gradient_to_the_first_maximum() -> None:
    x = torch.zeros(1, 1, 8, 8, requires_grad=True)
    for isa in instruction_sets():
        with sodfast.use_backend("cpu"), instruction_set(isa):
            coarse = goctconv([x], torch.ones(2, 1, 1, 1), (0, 1, 1))
        (grad,) = torch.autograd.grad([coarse[1].sum(), coarse[2].sum()], x)
        expected = torch.zeros(8, 8)
        expected[::2, ::2] += 1
        expected[::4, ::4] += 1
        assert torch.equal(grad[0, 0], expected)


def test_unused_outputs_have_no_part_in_the_gradient() -> None:
    case = Case(1, (8, 8), (2, 3), (3, 2, 1), kernel=3)
    tensors = {name: [t.requires_grad_() for t in g] for name, g in case.tensors().items()}
    flat = [t for group in tensors.values() for t in group]
    for j in range(3):
        with sodfast.use_backend("cpu"):
            found = torch.autograd.grad(case.run(goctconv)(tensors)[j].sum(), flat)
        with sodfast.use_backend("reference"):
            expected = torch.autograd.grad(case.run(goctconv)(tensors)[j].sum(), flat)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", instruction_sets())
def test_nan_reaches_exactly_what_depends_on_it(isa: str) -> None:
    """What one input pixel can change becomes NaN when it is NaN, and nothing else does.

    Eager may spread it one pixel further: it multiplies a neighbour by zero at the border.
    """
    case = Case(1, (16, 24), (2, 2, 2), (2, 2, 2), kernel=3)
    tensors = {**case.tensors(), "bias": []}
    tensors["weight"][0].abs_()
    sizes = [(2, 3), (5, 7), (0, 23), (15, 0)]
    for scale in range(3):
        for row, column in sizes:
            place = (0, 1, row >> scale, column >> scale)
            with sodfast.use_backend("cpu"), instruction_set(isa):
                before = case.run(goctconv)(tensors)
                after = {}
                for value in (100.0, torch.nan):
                    xs = [x.clone() for x in tensors["xs"]]
                    xs[scale][place] = value
                    after[value] = case.run(goctconv)({**tensors, "xs": xs})
            for y, moved, nan in zip(before, *after.values()):
                assert (moved != y).any()
                assert torch.equal(nan.isnan(), moved != y)


@pytest.mark.parametrize("isa", instruction_sets())
def test_infinity_propagates(isa: str) -> None:
    x = torch.ones(1, 1, 4, 4)
    x[0, 0, 1, 1] = torch.inf
    weight = torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1, 1)
    with sodfast.use_backend("cpu"), instruction_set(isa):
        (y,) = goctconv([x], weight, [3], slope=torch.tensor([1.0, 0.5, 1.0]))
    assert y[0, 0, 1, 1] == torch.inf and y[0, 1, 1, 1] == -torch.inf and y[0, 2, 1, 1].isnan()
    assert y.isfinite().sum() == y.numel() - 3


def test_views_with_a_pending_sign_are_read_right() -> None:
    x = torch.randn(1, 3, 6, 5, dtype=torch.complex64).conj().imag
    weight = torch.randn(2, 3, 1, 1)
    assert x.is_neg()
    with sodfast.use_backend("cpu"):
        torch.testing.assert_close(goctconv([x], weight, [2])[0], torch.conv2d(x.clone(), weight))


x8, x4 = torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 4, 4)
w5, w2 = torch.zeros(4, 5, 1, 1), torch.zeros(4, 2, 3, 3)
BAD = {
    "rank": (ValueError, r"xs\[1\].*\(3, 4, 4\)", ([x8, x4[0]], w5, [2, 2])),
    "size": (ValueError, r"xs\[1\] is 5x4.*8x8", ([x8, torch.zeros(1, 3, 5, 4)], w5, [2, 2])),
    "odd": (ValueError, "9x8.*2", ([torch.zeros(1, 2, 9, 8)], w2, [2, 2])),
    "many": (ValueError, "8x6.*4", ([torch.zeros(1, 2, 8, 6)], w2, [2, 1, 1])),
    "stride": (ValueError, "3x3.*2", ([torch.zeros(1, 2, 6, 6)], w2, [2, 2], 2)),
    "strided": (
        ValueError,
        r"xs\[1\] is 1x1 after stride 2.*3x3",
        ([torch.zeros(1, 2, 6, 6), torch.zeros(1, 3, 3, 3)], w5, [4], 2),
    ),
    "too small": (ValueError, "1x8.*stride 2", ([torch.zeros(1, 2, 1, 8)], w2, [4], 2)),
    "stride 3": (ValueError, "stride.*3", ([x8], w2, [4], 3)),
    "empty map": (ValueError, "empty size: 0x8", ([torch.zeros(1, 2, 0, 8)], w2, [4])),
    "batch": (ValueError, "batch size 2.*1", ([x8, torch.zeros(2, 3, 4, 4)], w5, [2, 2])),
    "inputs": (ValueError, r"\(4, 5, 1, 1\), not \(4, 2, 1, 1\)", ([x8, x4], w5[:, :2], [2, 2])),
    "outputs": (ValueError, r"\(5, 2, 3, 3\), not \(4, 2, 3, 3\)", ([x8], w2, [2, 3])),
    "negative": (ValueError, r"negative: \[5, -1\]", ([x8], w2, [5, -1])),
    "5x5": (ValueError, "5, 5", ([x8], torch.zeros(4, 2, 5, 5), [4])),
    "3x1": (ValueError, "weight", ([x8], torch.zeros(4, 2, 3, 1), [4])),
    "bias": (ValueError, r"bias.*\(4,\), not \(3,\)", ([x8], w2, [4], 1, torch.zeros(3))),
    "slope": (ValueError, r"slope.*\(4,\)", ([x8], w2, [4], 1, None, torch.zeros(1))),
    "integers": (TypeError, "xs.*int64", ([x8.long()], w2, [4])),
    "integer weight": (TypeError, "weight.*int32", ([x8], w2.int(), [4])),
    "dtypes": (TypeError, "float64.*float32", ([x8], w2.double(), [4])),
    "dtypes of scales": (TypeError, r"xs\[1\].*float64", ([x8, x4.double()], w5, [4])),
    "half": (RuntimeError, "'cpu' was asked for.*float16", ([x8.half()], w2.half(), [4])),
    "devices": (ValueError, "meta.*cpu", ([x8], w2.to("meta"), [4])),
    "devices of scales": (ValueError, r"xs\[1\].*meta", ([x8, x4.to("meta")], w5, [4])),
    "no list": (TypeError, "list.*Tensor", (x8, w2, [4])),
    "no scales": (ValueError, "1 to 4 scales, not 0", ([], w2, [4])),
    "five scales": (ValueError, "1 to 4 scales, not 5", ([x8] * 5, w2, [4])),
    "five targets": (ValueError, "1 to 4 scales, not 5", ([x8], w2, [4, 0, 0, 0, 0])),
    "no tensor": (TypeError, r"xs\[0\].*ndarray", ([x8.numpy()], w2, [4])),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    error, message, arguments = BAD[name]
    with sodfast.use_backend("cpu"), pytest.raises(error, match=message):
        goctconv(*arguments)


def sound_calls() -> Iterator[Call]:
    case = Case(2, (8, 16), (3, 2), (2, 4, 1), kernel=3, layout="sliced storage")
    tensors, grads = case.tensors(), case.grads()
    weight, bias = tensors["weight"][0], tensors["bias"][0]
    yield "goctconv", (tensors["xs"], weight, bias, None, [2, 4, 1], 1)
    yield "goctconv", (tensors["xs"], weight, bias, bias, [7], 2)
    yield "goctconv_grad_input", (grads, tensors["xs"], weight, 1)
    yield "goctconv_grad_weight", (grads, tensors["xs"], weight, 1)


@pytest.mark.parametrize("number", range(len(list(sound_calls()))))
def test_registration(number: int) -> None:
    assert_registered(*list(sound_calls())[number])


@pytest.mark.parametrize("number", range(len(list(sound_calls()))))
def test_raw_ops_refuse_mixed_devices(number: int) -> None:
    assert_one_device(*list(sound_calls())[number])


def nonsense() -> Iterator[Call]:
    huge = [2**62, 2**62, 2**62, 2**62 + 4]  # 4 in all, modulo 2^64
    for xs, weight, bias, slope, out_channels, stride in (
        ([], w2, None, None, [4], 1),
        ([x8] * 5, w2, None, None, [4], 1),
        ([x8], w2, None, None, [], 1),
        ([x8], w2, None, None, [4, 0, 0, 0, 0], 1),
        ([x8], w2, None, None, [5, -1], 1),
        ([x8], w2, None, None, huge, 1),
        ([x8], w2, None, None, [4], 0),
        ([x8], w2, None, None, [4], -2),
        ([x8], w2, None, None, [4], 2**40),
        ([x8], w2[0], None, None, [4], 1),
        ([x8], w2[:, :, :, :1], None, None, [4], 1),
        ([x8], torch.zeros(4, 2, 5, 5), None, None, [4], 1),
        ([x8], w2[:, :1], None, None, [4], 1),
        ([x8], w2[:3], None, None, [4], 1),
        ([x8], w2.double(), None, None, [4], 1),
        ([x8.double()], w2, None, None, [4], 1),
        ([x8.half()], w2.half(), None, None, [4], 1),
        ([x8.long()], w2.long(), None, None, [4], 1),
        ([x8], w2, torch.zeros(3), None, [4], 1),
        ([x8], w2, torch.zeros(4, 1), None, [4], 1),
        ([x8], w2, torch.zeros(4).double(), None, [4], 1),
        ([x8], w2, None, torch.tensor(1.0), [4], 1),
        ([x8, x8], torch.zeros(4, 4, 1, 1), None, None, [4], 1),
        ([x8, x4[:0]], w5, None, None, [4], 1),
        ([x8, x4.double()], w5, None, None, [4], 1),
        ([x8[0]], w2, None, None, [4], 1),
        ([torch.zeros(1, 2, 0, 8)], w2, None, None, [4], 1),
        ([torch.zeros(1, 2, 9, 8)], w2, None, None, [2, 2], 1),
        ([torch.zeros(1, 2, 1, 1)], w2, None, None, [4], 2),
        ([x8.to_sparse()], w2, None, None, [4], 1),
    ):
        yield "goctconv", (xs, weight, bias, slope, out_channels, stride)
    g8, g4 = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 4, 4)
    for op in ("goctconv_grad_input", "goctconv_grad_weight"):
        for grads, xs, weight, stride in (
            ([], [x8], w2, 1),
            ([g8], [], w2, 1),
            ([g8] * 5, [x8], w2, 1),
            ([g4], [x8], w2, 1),
            ([g8], [x8], w2, 2),
            ([g8[:0]], [x8], w2, 1),
            ([g8[:, :3]], [x8], w2, 1),
            ([g8[0]], [x8], w2, 1),
            ([g8.double()], [x8], w2, 1),
            ([g8], [x8.double()], w2, 1),
            ([g8], [x8], w2.double(), 1),
            ([g8], [x8], w2[:, :1], 1),
            ([g8], [x8], w2.flatten(), 1),
        ):
            yield op, (grads, xs, weight, stride)


def test_raw_ops_refuse_nonsense() -> None:
    assert_refused(__name__)


def test_raw_ops_survive_random_changes(full: bool) -> None:
    assert_survived(__name__, 20_000 if full else 1_000)
