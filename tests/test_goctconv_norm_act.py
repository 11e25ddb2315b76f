"""The compiled batch normalisation with PReLU, its gradients and the running statistics."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

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
    doubled,
    instruction_set,
    instruction_sets,
    lay_out,
    layouts,
    scale_counts,
    seeds,
    sizes_and_channels,
    slope_ranges,
)
from torch import Tensor, nn

import sodfast
from sodfast.ops import (
    goctconv_norm_act,
    goctconv_norm_act_reference,
    goctconv_update_stats_,
    goctconv_update_stats_reference_,
)
from sodfast.ops.goctconv import plane_moments

pytestmark = pytest.mark.usefixtures("compiled")


@dataclass(frozen=True)
class Case:
    batch: int
    size: tuple[int, int]  # of scale 0
    channels: tuple[int, ...]
    training: bool = True
    eps: float = 1e-5
    values: tuple[float, float] = (0.0, 1.0)  # offset and spread of the input
    slopes: tuple[float, float] = (-0.5, 0.5)
    layout: str = "contiguous"
    seed: int = 0
    given: bool = False  # the moments of xs, in training

    def shapes(self) -> list[tuple[int, ...]]:
        height, width = self.size
        return [(self.batch, c, height >> i, width >> i) for i, c in enumerate(self.channels)]

    def tensors(self) -> Tensors:
        source, (offset, spread) = Source(self.seed), self.values
        xs = []
        for batch, channels, height, width in self.shapes():
            # Spread evenly, so that the few values of a tiny map are never nearly the same:
            # normalising would blow up the rounding of their mean.
            count = batch * height * width
            order = torch.rand(channels, count, generator=source.generator).argsort(1).float()
            x = (order + source.uniform(channels, count, low=0.25, high=0.75)) / max(count, 1)
            x = offset * source.uniform(channels, 1) + spread * (2 * x - 1)
            xs.append(x.view(channels, batch, height, width).transpose(0, 1))
        count, (low, high) = sum(self.channels), self.slopes
        vectors = {
            "weight": source.uniform(count, low=-1.5, high=1.5),
            "bias": source.uniform(count),
            "slope": source.uniform(count, low=low, high=high),
        }
        return {
            "xs": [lay_out(x.contiguous(), self.layout) for x in xs],
            **{name: [lay_out(v, self.layout)] for name, v in vectors.items()},
        }

    @cached_property
    def running(self) -> tuple[Tensor, Tensor]:
        """Not far from the batch's: next to a wrong mean every sum would only cancel."""
        source, (_, spread) = Source(self.seed + 1), self.values
        count = sum(self.channels)
        mean = torch.cat([x.mean((0, 2, 3)).nan_to_num() for x in self.tensors()["xs"]])
        mean += 0.5 * spread * source.uniform(count)
        var = spread**2 * source.uniform(count, low=0.1)
        return lay_out(mean, self.layout), lay_out(var, self.layout)

    def grads(self) -> list[Tensor]:
        """Zero where z is next to zero: there float32 may take PReLU's other branch."""
        source = Source(self.seed + 2)
        wide = doubled(self.tensors())
        wide["slope"] = [torch.ones_like(slope) for slope in wide["slope"]]  # then y is z
        grads = []
        for z, shape in zip(self.run(goctconv_norm_act_reference)(wide), self.shapes()):
            grad, near = lay_out(source.uniform(*shape), self.layout, (2, 3)), z.abs() <= 1e-4
            grads.append(grad * ~near if near.any() else grad)
        return grads

    def terms(self) -> dict[str, float]:
        values = self.batch * self.size[0] * self.size[1]
        # A sum over an expanded gradient, the same everywhere, grows as n, not as sqrt(n).
        sums = values**2 if self.layout == "expanded" else values
        # The gradient to x is the incoming one times gamma / sqrt(var + eps).
        xs = [x for x in self.tensors()["xs"] if self.training and x.numel()]
        variances = [x.var((0, 2, 3), correction=0) for x in xs] or [self.running[1]]
        least = torch.cat([*variances, torch.ones(1)]).min().item()
        return {"weight": sums, "bias": sums, "slope": sums, "xs": 2.25 / (least + self.eps)}

    def run(self, function: Callable) -> Callable[[Tensors], list[Tensor]]:
        """Calls it; after the results come mean, variance and channel means."""

        def call(t: Tensors) -> list[Tensor]:
            vectors = [t[name][0] for name in ("weight", "bias", "slope")]
            running = [r.to(vectors[0]) for r in self.running]  # dtype and device
            moments = plane_moments(t["xs"]) if self.given and self.training else None
            ys, *statistics = function(
                t["xs"], *vectors, *running, self.training, self.eps, moments
            )
            return [*ys, *statistics]

        return call


@st.composite
def cases(draw: st.DrawFn) -> Case:
    scales = draw(scale_counts)
    batch, size, channels = draw(sizes_and_channels(scales, scales, lambda n, c: 16 * n * sum(c)))
    return Case(
        batch,
        size,
        tuple(channels),
        training=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-5, 1e-5, 1e-2])),
        # Offsets cost digits, tiny values make eps matter; both occur in trained networks.
        values=draw(st.sampled_from([(0.0, 1.0), (1.0, 1.0), (3.0, 0.5), (0.0, 0.01)])),
        slopes=draw(slope_ranges),
        layout=draw(layouts),
        seed=draw(seeds),
        given=draw(st.booleans()),
    )


@given(cases())
def test_values_and_gradients(case: Case) -> None:
    compiled, reference = case.run(goctconv_norm_act), case.run(goctconv_norm_act_reference)
    check_against_reference(compiled, reference, case.tensors(), case.grads(), case.terms())


LARGE = [
    Case(4, (64, 96), (9, 10)),
    Case(2, (96, 72), (5, 4, 3, 2), values=(3.0, 0.5), given=True),
    Case(1, (161, 95), (7,), training=False),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    compiled, reference = case.run(goctconv_norm_act), case.run(goctconv_norm_act_reference)
    check_against_reference(compiled, reference, case.tensors(), case.grads(), case.terms())
    assert_deterministic(compiled, case.tensors(), case.grads())


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_statistics_keep_their_digits_beside_a_large_mean(isa: str, offset: float) -> None:
    x = offset + torch.randn(2, 3, 63, 65, generator=torch.Generator().manual_seed(0))
    ones, zeros = torch.ones(3), torch.zeros(3)
    with sodfast.use_backend("cpu"), instruction_set(isa):
        _, mean, var, _ = goctconv_norm_act([x], ones, zeros, ones, zeros, ones, True)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-6, atol=0)


SMALL = [
    Case(2, (4, 6), (2, 1)),
    Case(3, (2, 3), (2,), slopes=(-2.0, -1.0)),
    Case(2, (4, 4), (1, 0, 2), training=False),
    Case(2, (2, 2), (2,), eps=1e-2, values=(0.0, 0.1)),
    Case(0, (4, 4), (2, 1)),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck_of_the_compiled_op(case: Case) -> None:
    tensors = {name: [t.double() for t in group] for name, group in case.tensors().items()}
    flat = [t.requires_grad_() for group in tensors.values() for t in group]

    def function(*arguments: Tensor) -> tuple[Tensor, ...]:
        given = iter(arguments)
        named = {name: [next(given) for _ in group] for name, group in tensors.items()}
        return tuple(case.run(goctconv_norm_act)(named)[: len(case.channels)])

    with sodfast.use_backend("cpu"), CallCounter() as calls:
        assert torch.autograd.gradcheck(function, flat)
    assert calls.counts["goctconv_norm_act"] >= 2 * sum(t.numel() for t in flat)
    assert calls.counts["goctconv_norm_act_backward"] > 0


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("training", [True, False])
def test_nan_stays_in_its_channel(isa: str, training: bool) -> None:
    x = torch.rand(2, 3, 5, 7)
    x[1, 1, 2, 3] = torch.nan
    ones = torch.ones(3)
    with sodfast.use_backend("cpu"), instruction_set(isa):
        (y,), mean, var, means = goctconv_norm_act([x], ones, ones, -ones, ones, ones, training)
    expected = torch.zeros_like(x, dtype=torch.bool)
    if training:
        expected[:, 1] = True
        assert mean.isnan().tolist() == var.isnan().tolist() == [False, True, False]
    else:
        expected[1, 1, 2, 3] = True
    assert torch.equal(y.isnan(), expected)
    assert torch.equal(means.isnan(), expected.any(3).any(2))


def layers(channels: tuple[int, ...], momentum: float) -> tuple[nn.Module, list[nn.Module]]:
    """NormAct, and torch's own layers with the same parameters, one pair per scale."""
    ours = sodfast.nn.NormAct(channels, momentum=momentum)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.uniform_(-1, 1)
    theirs: list[nn.Module] = []
    for scale, count in enumerate(channels):
        norm, act = nn.BatchNorm2d(count, momentum=momentum), nn.PReLU(count)
        with torch.no_grad():
            for mine, other in (
                (ours.weight, norm.weight),
                (ours.bias, norm.bias),
                (ours.slope, act.weight),
            ):
                other.copy_(mine.split(channels)[scale])
        theirs.append(nn.Sequential(norm, act))
    return ours, theirs


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
def test_layer_is_batch_norm_and_prelu_over_several_steps(momentum: float) -> None:
    torch.manual_seed(0)
    channels = (3, 5)
    ours, theirs = layers(channels, momentum)
    for step in range(7):
        training = step not in (3, 6)
        ours.train(training)
        shapes = [(2 + step, 3, 8, 6), (2 + step, 5, 4, 3)]
        xs = [(step + torch.randn(s)).requires_grad_() for s in shapes]
        twins = [x.detach().clone().requires_grad_() for x in xs]
        with sodfast.use_backend("cpu"):
            ys = ours(xs)
        expected = [pair.train(training)(x) for pair, x in zip(theirs, twins)]
        grads = [torch.randn_like(y) for y in ys]
        torch.autograd.backward(ys, grads)
        torch.autograd.backward(expected, grads)
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(ys, expected, **close)
        torch.testing.assert_close([x.grad for x in xs], [x.grad for x in twins], **close)
        pairs = [
            (ours.weight.grad, [pair[0].weight.grad for pair in theirs]),
            (ours.bias.grad, [pair[0].bias.grad for pair in theirs]),
            (ours.slope.grad, [pair[1].weight.grad for pair in theirs]),
            (ours.running_mean, [pair[0].running_mean for pair in theirs]),
            (ours.running_var, [pair[0].running_var for pair in theirs]),
        ]
        for mine, other in pairs:
            torch.testing.assert_close(mine, torch.cat(other), rtol=1e-4, atol=1e-4)
        if training:
            means = torch.cat([y.detach().mean((2, 3)) for y in expected], 1)
            torch.testing.assert_close(ours.channel_means, means, **close)
        else:
            assert ours.channel_means is None


def test_reference_in_mixed_precision_keeps_statistics_in_float32() -> None:
    """Under autocast on CUDA it meets maps in half precision beside parameters in float32."""
    xs = [torch.randn(2, 3, 8, 8).bfloat16(), torch.randn(2, 2, 4, 4).bfloat16()]
    mixed, wide = (sodfast.nn.NormAct((3, 2)).train() for _ in range(2))
    with sodfast.use_backend("reference"):
        wide([x.float() for x in xs])
        with torch.autocast("cpu", torch.bfloat16):
            ys = mixed(xs)
    assert all(y.dtype == torch.bfloat16 for y in ys)
    for name in ("running_mean", "running_var", "channel_means"):
        found, expected = getattr(mixed, name), getattr(wide, name)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_of_the_statistics(dtype: torch.dtype) -> None:
    """Against the reference, over many steps.

    Where nothing was counted all stays as it was; a variance of one value is not scaled.
    """
    torch.manual_seed(0)
    channels, counts = [3, 0, 4, 2], [50, 7, 1, 0]
    running = [torch.randn(9, dtype=dtype), torch.rand(9, dtype=dtype)]
    expected = [r.double() for r in running]
    untouched = [r[7:].clone() for r in running]
    with sodfast.use_backend("cpu"):
        for _ in range(20):
            batch = [torch.randn(9, dtype=dtype), torch.rand(18, dtype=dtype)[::2]]
            before = [b.clone() for b in batch]
            goctconv_update_stats_(*running, *batch, channels, counts, 0.3)
            wide = [b.double() for b in batch]
            goctconv_update_stats_reference_(*expected, *wide, channels, counts, 0.3)
            assert all(torch.equal(a, b) for a, b in zip(batch, before))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for ours, theirs, old in zip(running, expected, untouched):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
        assert torch.equal(ours[7:], old)


def test_update_marks_the_statistics_as_changed() -> None:
    """Autograd must notice when a graph still needs the old values."""
    x, ones = torch.randn(2, 3, 4, 4), torch.ones(3)
    mean, var = torch.zeros(3), torch.ones(3)
    versions = mean._version, var._version
    with sodfast.use_backend("cpu"):
        goctconv_update_stats_(mean, var, ones, ones, [3], [32])
    assert mean._version > versions[0] and var._version > versions[1]
    scale = torch.ones(3, requires_grad=True)
    y = (scale * mean).sum() + x.sum()
    with sodfast.use_backend("cpu"):
        goctconv_update_stats_(mean, var, ones, ones, [3], [32])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


x8, x4, c5, c2 = torch.ones(1, 2, 8, 8), torch.ones(1, 3, 4, 4), torch.ones(5), torch.ones(2)
V5, V2 = [c5] * 5, [c2] * 5
BAD = {
    "rank": (ValueError, r"xs\[0\].*\(1, 1, 2, 8, 8\)", ([x8[None]], *V2)),
    "size": (ValueError, r"xs\[1\] is 4x4.*6x8", ([torch.ones(1, 2, 6, 8), x4], *V5)),
    "channels": (ValueError, r"weight.*\(5,\), not \(2,\)", ([x8, x4], *V2)),
    "slope": (ValueError, r"slope.*\(2,\), not \(1,\)", ([x8], c2, c2, c2[:1], c2, c2)),
    "mean": (ValueError, r"running_mean.*not \(2, 1\)", ([x8], c2, c2, c2, c2[:, None], c2)),
    "var": (ValueError, r"running_var.*not \(5,\)", ([x8], c2, c2, c2, c2, c5)),
    "eps": (ValueError, "eps.*-1", ([x8], *V2, True, -1.0)),
    "integers": (TypeError, "xs.*uint8", ([x8.byte()], *V2)),
    "dtypes": (TypeError, "bias.*float64", ([x8], c2, c2.double(), c2, c2, c2)),
    "half": (RuntimeError, "'cpu' was asked for.*float16", ([x8.half()], *[c2.half()] * 5)),
    "devices": (ValueError, "running_var.*meta", ([x8], c2, c2, c2, c2, c2.to("meta"))),
    "no tensor": (TypeError, "slope.*float", ([x8], c2, c2, 0.25, c2, c2)),
    "moments dtype": (TypeError, "moments must be.*float32", ([x8], *V2, True, 0.0, c2)),
    "moments shape": (
        ValueError,
        r"moments.*\(2, 1, 2\), not \(2,\)",
        ([x8], *V2, True, 0.0, c2.double()),
    ),
    "moments unused": (ValueError, "moments have no use", ([x8], *V2, False, 0.0, c2)),
    "no scales": (ValueError, "1 to 4 scales, not 0", ([], *V2)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    error, message, arguments = BAD[name]
    with sodfast.use_backend("cpu"), pytest.raises(error, match=message):
        goctconv_norm_act(*arguments)


BAD_UPDATES = {
    "shape": (ValueError, r"running_var.*\(5,\), not \(2,\)", (c5, c2, c5, c5, [3, 2], [9, 4])),
    "sum": (ValueError, r"running_mean.*\(4,\), not \(5,\)", (c5, c5, c5, c5, [4], [9])),
    "negative": (ValueError, r"channels.*\[-1, 6\]", (c5, c5, c5, c5, [-1, 6], [9, 4])),
    "counts": (ValueError, r"counts.*2 numbers.*\[9\]", (c5, c5, c5, c5, [3, 2], [9])),
    "negative count": (ValueError, r"counts.*\[9, -4\]", (c5, c5, c5, c5, [3, 2], [9, -4])),
    "momentum": (ValueError, "momentum.*1.5", (c5, c5, c5, c5, [5], [9], 1.5)),
    "nan": (ValueError, "momentum.*nan", (c5, c5, c5, c5, [5], [9], math.nan)),
    "dtypes": (TypeError, "mean.*float64", (c5, c5, c5.double(), c5, [5], [9])),
}


@pytest.mark.parametrize("name", BAD_UPDATES)
def test_bad_update_is_refused_and_changes_nothing(name: str) -> None:
    error, message, (mean, var, *rest) = BAD_UPDATES[name]
    mean, var = mean.clone(), var.clone()
    with sodfast.use_backend("cpu"), pytest.raises(error, match=message):
        goctconv_update_stats_(mean, var, *rest)
    assert (mean == 1).all() and (var == 1).all()


def sound_calls() -> Iterator[Call]:
    case = Case(2, (8, 16), (3, 2), layout="sliced storage")
    xs, *vectors = case.tensors().values()
    flat = [vector for (vector,) in vectors]
    for training, moments in ((True, None), (True, plane_moments(xs)), (False, None)):
        yield "goctconv_norm_act", (xs, *flat, *case.running, training, 1e-5, moments)
    yield "goctconv_norm_act_backward", (case.grads(), xs, *flat, *case.running, True, 1e-5)
    statistics = [torch.ones(5) for _ in range(4)]
    yield "goctconv_update_stats_", (*statistics, [3, 2], [256, 64], 0.1)


@pytest.mark.parametrize("number", range(len(list(sound_calls()))))
def test_registration(number: int) -> None:
    assert_registered(*list(sound_calls())[number])


@pytest.mark.parametrize("number", range(len(list(sound_calls()))))
def test_raw_ops_refuse_mixed_devices(number: int) -> None:
    assert_one_device(*list(sound_calls())[number])


def nonsense() -> Iterator[Call]:
    for xs, vectors in (
        ([], V2),
        ([x8] * 5, [torch.ones(10)] * 5),
        ([x8[0]], V2),
        ([x8, x8], [torch.ones(4)] * 5),
        ([x8.long()], V2),
        ([x8.half()], [c2.half()] * 5),
        ([x8.double()], V2),
        ([x8, x4.double()], V5),
        ([torch.ones(1, 2, 0, 8)], V2),
        ([x8], V5),
        *(([x8], [*V2[:i], c5, *V2[i + 1 :]]) for i in range(5)),
        *(([x8], [*V2[:i], c2.double(), *V2[i + 1 :]]) for i in range(5)),
        *(([x8], [*V2[:i], c2[None], *V2[i + 1 :]]) for i in range(5)),
    ):
        for training in (True, False):
            yield "goctconv_norm_act", (xs, *vectors, training, 1e-5, None)
            yield "goctconv_norm_act_backward", (xs, xs, *vectors, training, 1e-5)
    m2 = torch.zeros(2, 1, 2).double()
    for moments in (m2.float(), m2[:1], m2[:, :0], m2[..., :1], m2[0], m2[None]):
        yield "goctconv_norm_act", ([x8], *V2, True, 1e-5, moments)
    yield "goctconv_norm_act", ([x8], *V2, False, 1e-5, m2)
    for grads in ([], [x8, x8], [x4], [x8[:0]], [x8[:, :1]], [x8[0]], [x8.double()]):
        yield "goctconv_norm_act_backward", (grads, [x8], *V2, True, 1e-5)
    four = [torch.ones(4) for _ in range(4)]
    strided = [torch.ones(8)[::2], torch.ones(4), *four[2:]]
    for statistics, channels, counts in (
        (four, [4], []),
        (four, [], [4]),
        (four, [4, 0], [9]),
        (four, [3], [9]),
        (four, [5], [9]),
        (four, [-1, 5], [9, 9]),
        (four, [-1_000_000, 1_000_004], [9, 9]),
        (four, [2**62, 2**62, 2**62, 2**62 + 4], [9] * 4),
        (four, [4], [-9]),
        ([*four[:3], torch.ones(5)], [4], [9]),
        ([*four[:3], four[3].double()], [4], [9]),
        ([t.long() for t in four], [4], [9]),
        ([t.half() for t in four], [4], [9]),
        ([t[None] for t in four], [4], [9]),
        (strided, [4], [9]),
        ([strided[1], strided[0], *four[2:]], [4], [9]),
        ([torch.ones(1).expand(4), *four[1:]], [4], [9]),
    ):
        yield "goctconv_update_stats_", (*statistics, channels, counts, 0.1)


def test_raw_ops_refuse_nonsense() -> None:
    assert_refused(__name__)


def test_raw_ops_survive_random_changes(full: bool) -> None:
    assert_survived(__name__, 20_000 if full else 1_000)
