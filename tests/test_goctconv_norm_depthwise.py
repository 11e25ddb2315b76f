"""The norm with a depthwise convolution behind it: values, gradients, blocks that train by it."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import test_goctconv
import test_goctconv_norm_act
import torch
from gpu_kernels import HALVES, check_kernels, device_of, dtypes_of, running
from hypothesis import assume, given, settings
from op_cases import (
    Call,
    CallCounter,
    Source,
    Tensors,
    assert_one_device,
    lay_out,
    opcheck,
    threads,
)
from torch import Tensor

import sodfast
from sodfast import ops
from sodfast.nn import ILBlock, NormAct
from sodfast.ops import (
    goctconv_norm_act,
    goctconv_norm_act_reference,
    goctconv_norm_depthwise,
    goctconv_norm_depthwise_reference,
)
from sodfast.ops.goctconv import plane_moments
from sodfast.sync import synchronise

pytestmark = pytest.mark.usefixtures("compiled")


@dataclass(frozen=True)
class Case:
    norm: test_goctconv_norm_act.Case
    given: bool = False  # the moments of xs

    def tensors(self) -> Tensors:
        kernel = Source(self.norm.seed + 3).uniform(sum(self.norm.channels), 1, 3, 3)
        return {**self.norm.tensors(), "kernel": [lay_out(kernel, self.norm.layout)]}

    def grads(self) -> list[Tensor]:
        source = Source(self.norm.seed + 2)
        return [lay_out(source.uniform(*s), self.norm.layout, (2, 3)) for s in self.norm.shapes()]

    def clearance(self) -> float:
        """How near any z comes to zero, where float32 may take PReLU's other branch."""
        wide = {name: [t.double() for t in ts] for name, ts in self.norm.tensors().items()}
        wide["slope"] = [torch.ones_like(slope) for slope in wide["slope"]]  # then y is z
        with threads(1):
            zs = self.norm.run(goctconv_norm_act_reference)(wide)[: len(self.norm.channels)]
        return min((z.abs().min().item() for z in zs if z.numel()), default=math.inf)

    def terms(self) -> dict[str, float]:
        sums = {name: 9 * n for name, n in self.norm.terms().items()}
        values = self.norm.batch * self.norm.size[0] * self.norm.size[1]
        expanded = self.norm.layout == "expanded"
        return {**sums, "ys": 9, "kernel": values**2 if expanded else values}

    def run(self, function: Callable) -> Callable[[Tensors], list[Tensor]]:
        """Calls it; after the results come the statistics and moments."""

        def call(t: Tensors) -> list[Tensor]:
            vectors = [t[name][0] for name in ("weight", "bias", "slope")]
            running = [r.to(vectors[0]) for r in self.norm.running]
            training = self.norm.training
            moments = plane_moments(t["xs"]) if self.given and training else None
            ys, *statistics = function(
                t["xs"], *vectors, *running, t["kernel"][0], moments, training, self.norm.eps
            )
            # Sums of squares as variances, which do not grow with the plane.
            if training:
                areas = [y.shape[2] * y.shape[3] for y in ys for _ in range(y.shape[1])]
                scale = statistics[-1].new_tensor(areas).view(-1, 1)
                statistics[-1] = torch.stack(
                    [statistics[-1][..., 0], statistics[-1][..., 1] / scale], 2
                )
            return [*ys, *(s.to(vectors[0].dtype) for s in statistics)]

        return call

    def check(self, kernels: str) -> None:
        assert self.clearance() > 1e-5
        runs = self.run(goctconv_norm_depthwise), self.run(goctconv_norm_depthwise_reference)
        check_kernels(kernels, *runs, self.tensors(), self.grads(), self.terms())


@settings(max_examples=15)
@given(test_goctconv_norm_act.cases())
def test_values_and_gradients(kernels: str, norm: test_goctconv_norm_act.Case) -> None:
    assume(norm.batch * norm.size[0] * norm.size[1] < 4096)
    case = Case(norm, given=norm.seed % 2 == 0)
    assume(case.clearance() > 1e-5)
    with pytest.MonkeyPatch.context() as patch:  # in half precision z may change its sign
        wide = tuple(t for t in dtypes_of(kernels) if t not in HALVES)
        patch.setattr("gpu_kernels.dtypes_of", lambda backend: wide)
        case.check(kernels)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_maps_beside_float32_parameters(gpu: str, dtype: torch.dtype) -> None:
    """As under autocast: maps in half precision, everything per channel in float32."""
    norm = test_goctconv_norm_act.Case(3, (48, 64), (3, 2), slopes=(0.3, 0.9))
    tensors = Case(norm).tensors()
    xs = [x.to(dtype) for x in tensors["xs"]]
    vectors = [tensors[name][0] for name in ("weight", "bias", "slope")]
    kernel = tensors["kernel"][0]
    grads = [Source(7).uniform(*x.shape).to(dtype) for x in xs]
    found: dict[str, list[Tensor]] = {}
    for name, wide in (("exact", torch.float64), ("found", None)):
        device = torch.device("cpu") if wide else device_of(gpu)
        leaves = [t.to(device, wide).requires_grad_() for t in [*xs, *vectors, kernel]]
        statistics = [r.to(device, wide) for r in norm.running]
        function = goctconv_norm_depthwise_reference
        with running(gpu) if wide is None else sodfast.use_backend("reference"):
            if wide is None:  # the public function asks for one dtype outside autocast
                function = torch.ops.sodfast.goctconv_norm_depthwise
            arguments = (*leaves[2:5], *statistics, leaves[5], None, True, norm.eps)
            ys, *rest = function(leaves[:2], *arguments)
            gradients = torch.autograd.grad(ys, leaves, [g.to(device, wide) for g in grads])
        found[name] = [t.detach().cpu() for t in [*ys, *rest[:3], *gradients]]
    for i, (t, x) in enumerate(zip(found["found"], found["exact"])):
        halves = i < 2 or 5 <= i < 7  # results and their gradients
        assert t.dtype == (dtype if halves else torch.float32)
        eps = torch.finfo(dtype).eps if halves else 1e-5
        atol = 2 * eps * max(x.abs().max().item(), 1e-2)  # a mean next to 0 is a sum that cancels
        torch.testing.assert_close(t.double(), x, rtol=2 * eps, atol=atol)


def test_moments_of_the_result_serve_the_next(kernels: str) -> None:
    """What comes of them is what comes of measuring, also beside a large mean."""
    case = Case(test_goctconv_norm_act.Case(2, (20, 52), (3, 2), values=(100.0, 0.01)))
    tensors = {n: [t.to(device_of(kernels)) for t in ts] for n, ts in case.tensors().items()}
    vectors = [tensors[name][0] for name in ("weight", "bias", "slope")]
    ones = [torch.ones_like(vectors[0])] * 2
    kernel = tensors["kernel"][0]
    with running(kernels):
        ys, *_, moments = goctconv_norm_depthwise(
            tensors["xs"], *vectors, *ones, kernel, None, True, 1e-5
        )
        assert moments.dtype == torch.float64 and moments.shape == (5, 2, 2)
        torch.testing.assert_close(moments, plane_moments(ys), rtol=1e-5, atol=1e-7)
        results = [
            goctconv_norm_depthwise(ys, *vectors, *ones, kernel, given, True, 1e-5)
            for given in (None, moments)
        ]
        norms = [
            goctconv_norm_act(ys, *vectors, *ones, True, 1e-5, given) for given in (None, moments)
        ]
    for a, b in zip([*results[0][1:], *norms[0][1:]], [*results[1][1:], *norms[1][1:]]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_norm_with_moments_measures_nothing(kernels: str) -> None:
    """What it says of the batch is what these moments say, true or not."""
    xs = [torch.randn(3, 2, 50, 48), torch.randn(3, 1, 25, 24)]  # of a block, and of warps
    wrong = plane_moments([2 * x + 1 for x in xs])
    ones = torch.ones(3, device=device_of(kernels))
    with running(kernels):
        _, mean, var, _ = goctconv_norm_act(
            [x.to(ones.device) for x in xs], *[ones] * 5, True, 1e-5, wrong.to(ones.device)
        )
    for i, values in enumerate([*(2 * xs[0] + 1).unbind(1), *(2 * xs[1] + 1).unbind(1)]):
        exact = torch.var_mean(values.double(), correction=0)
        torch.testing.assert_close((var[i].cpu().double(), mean[i].cpu().double()), exact)


def block_and_images() -> tuple[ILBlock, list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    block = ILBlock((3, 2), (4, 3), weight_gain=100.0).train()
    with torch.no_grad():
        for norm in (block.norm1, block.norm2, block.norm3):
            norm.slope.uniform_(-0.5, 1.0)
            norm.bias.uniform_(-0.5, 0.5)
    xs = [torch.randn(3, 3, 12, 20), torch.randn(3, 2, 6, 10)]
    return block, xs, [torch.randn(3, 4, 12, 20), torch.randn(3, 3, 6, 10)]


def values(block: ILBlock, xs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Results, gradients, channel means and running statistics of a block."""
    ys = block(xs)
    gradients = torch.autograd.grad(ys, list(block.parameters()), grads)
    means = [norm.channel_means for norm in (block.norm1, block.norm2, block.norm3)]
    assert [mean is not None for mean in means] == [
        norm.training for norm in (block.norm1, block.norm2, block.norm3)
    ]
    kept = [*ys, *gradients, *(mean for mean in means if mean is not None), *block.buffers()]
    return [t.detach().cpu() for t in kept]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", ["", "norm1", "norm2", "norm3"])
def test_a_block_trains_as_by_its_layers(kernels: str, training: bool, frozen: str) -> None:
    block, xs, grads = block_and_images()
    block.train(training)
    if frozen:
        getattr(block, frozen).eval()
    twin = copy.deepcopy(block).double()
    with sodfast.use_backend("reference"):
        expected = values(twin, [x.double() for x in xs], [g.double() for g in grads])
    device = device_of(kernels)
    spy = mock.patch.object(ops, "goctconv_norm_act", wraps=goctconv_norm_act)
    with running(kernels), CallCounter() as calls, spy as norm3:
        found = values(block.to(device), [x.to(device) for x in xs], [g.to(device) for g in grads])
    known = training and frozen not in ("norm2", "norm3")
    assert (norm3.call_args.args[-1] is not None) == known
    assert calls.counts["goctconv_norm_depthwise"] == 2
    assert calls.counts["goctconv_norm_depthwise_backward"] == 2
    assert "goctconv_depthwise" not in calls.counts and calls.counts["goctconv_norm_act"] == 1
    assert calls.counts["goctconv_measured" if training and kernels != "cpu" else "goctconv"] == 1
    for t, x in zip(found, expected):
        largest = max(x.abs().max().item(), 1e-3)
        torch.testing.assert_close(t.double(), x, rtol=1e-3, atol=1e-4 * largest)


def test_blocks_that_are_watched_or_changed_run_their_layers(kernels: str) -> None:
    block, xs, _ = block_and_images()
    xs = [x.to(device_of(kernels)) for x in xs]

    def layers_run(module: ILBlock) -> bool:
        with running(kernels), CallCounter() as calls:
            module.to(xs[0].device)(xs)
        return "goctconv_norm_depthwise" not in calls.counts

    assert not layers_run(block)
    seen: list[Any] = []
    for name in ("conv1", "norm1", "norm2", "conv2", "conv3"):
        module = getattr(block, name)
        handle = module.register_forward_hook(lambda *_, name=name: seen.append(name))
        assert layers_run(block)
        handle.remove()
    assert seen == ["conv1", "norm1", "norm2", "conv2", "conv3"]
    # The last norm may be watched or replaced: it then gets what any norm gets, no moments (a hook
    # may change the input).
    handle = block.norm3.register_forward_pre_hook(lambda _, given: seen.append(len(given)))
    assert not layers_run(block) and seen[-1] == 1
    handle.remove()
    other = copy.deepcopy(block)
    other.norm3 = torch.nn.Identity()
    assert not layers_run(other)
    other = copy.deepcopy(block)
    forward = other.norm3.forward
    other.norm3.forward = lambda xs: forward(xs)
    assert not layers_run(other)
    assert not layers_run(block)
    # Batch statistics over several processes are another norm.
    assert layers_run(synchronise(copy.deepcopy(block)))


def test_torch_compile_keeps_it(kernels: str) -> None:
    block, xs, grads = block_and_images()
    device = device_of(kernels)
    xs, grads = ([t.to(device) for t in ts] for ts in (xs, grads))
    block.to(device)
    with running(kernels):
        found = []
        for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
            ys = run(xs)
            found.append([*ys, *torch.autograd.grad(ys, list(block.parameters()), grads)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch(kernels: str, training: bool) -> None:
    device = device_of(kernels)
    vectors = [torch.ones(2, device=device) for _ in range(5)]
    kernel = torch.ones(2, 1, 3, 3, device=device).requires_grad_()
    x = torch.zeros(0, 2, 4, 6, device=device)
    with running(kernels):
        (y,), _, _, means, moments = goctconv_norm_depthwise([x], *vectors, kernel, None, training)
        (gradient,) = torch.autograd.grad(y.sum(), kernel)
    assert y.shape == x.shape and means.shape == (0, 2) and not gradient.any()
    assert moments.shape == ((2, 0, 2) if training else (0,))


def test_results_are_the_same_on_every_run(kernels: str) -> None:
    block, xs, grads = block_and_images()
    block.to(device_of(kernels))
    xs, grads = ([t.to(device_of(kernels)) for t in ts] for ts in (xs, grads))
    with running(kernels):
        found = []
        for _ in range(2):
            ys = block(xs)
            found.append([*ys, *torch.autograd.grad(ys, list(block.parameters()), grads)])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_nan_stays_in_its_channel(kernels: str) -> None:
    x = torch.randn(2, 3, 9, 11)
    x[1, 1, 4, 5] = torch.nan
    vectors = [torch.ones(3, device=device_of(kernels))] * 5
    kernel = torch.ones(3, 1, 3, 3, device=device_of(kernels))
    for training in (True, False):
        with running(kernels):
            (y,), mean, *_ = goctconv_norm_depthwise(
                [x.to(device_of(kernels))], *vectors, kernel, None, training
            )
        where = y.isnan().cpu()
        assert not where[:, [0, 2]].any()
        if training:
            assert where[:, 1].all() and mean.isnan().tolist() == [False, True, False]
        else:
            assert where.sum() == 9 and where[1, 1, 3:6, 4:7].all()


x4, v2, k2 = torch.zeros(2, 2, 4, 4), torch.ones(2), torch.zeros(2, 1, 3, 3)
m2 = torch.zeros(2, 2, 2, dtype=torch.float64)
SOUND = ([x4], v2, v2, v2, v2, v2, k2, m2, True, 1e-5)
BAD = {
    "kernel": (ValueError, r"kernel.*\(2, 1, 3, 3\), not \(2, 1, 1, 1\)", {6: k2[..., :1, :1]}),
    "gamma": (ValueError, r"weight.*\(2,\), not \(1,\)", {1: v2[:1]}),
    "kernel dtype": (TypeError, "kernel is torch.float64", {6: k2.double()}),
    "moments dtype": (TypeError, "moments must be.*float32", {7: m2.float()}),
    "moments shape": (ValueError, r"moments.*\(2, 2, 2\), not \(2, 1, 2\)", {7: m2[:, :1]}),
    "moments unused": (ValueError, "moments have no use", {8: False}),
    "moments device": (ValueError, "moments is on meta", {7: m2.to("meta")}),
    "eps": (ValueError, "eps must not be negative: -1", {9: -1.0}),
    "integers": (TypeError, "int64", {0: [x4.long()]}),
    "rank": (ValueError, r"\(2, 4, 4\)", {0: [x4[0]]}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    error, message, changes = BAD[name]
    arguments = [changes.get(i, argument) for i, argument in enumerate(SOUND)]
    with sodfast.use_backend("reference"), pytest.raises(error, match=message):
        goctconv_norm_depthwise(*arguments)


def test_raw_op_refuses_nonsense(kernels: str) -> None:
    def moved(t: Any) -> Any:
        return t.to(device_of(kernels)) if isinstance(t, Tensor) else t

    changes = [
        change for name, (*_, change) in BAD.items() if name not in ("eps", "moments device")
    ]
    for change in [*changes, {0: []}, {0: [x4] * 5}, {2: v2.double()}, {6: k2.flatten()}]:
        arguments = [change.get(i, argument) for i, argument in enumerate(SOUND)]
        xs, *rest = arguments
        with running(kernels), pytest.raises(RuntimeError):
            torch.ops.sodfast.goctconv_norm_depthwise([moved(x) for x in xs], *map(moved, rest))


def sound_calls() -> Iterator[Call]:
    case = test_goctconv.Case(2, (8, 16), (3, 2), (4, 3), kernel=3, bias=False)
    images, weight = case.tensors()["xs"], case.tensors()["weight"][0]
    yield "goctconv_measured", (images, weight, list(case.out_channels), 1)
    for with_moments in (False, True):
        norm = test_goctconv_norm_act.Case(2, (8, 12), (3, 2), layout="sliced storage")
        tensors, grads = Case(norm).tensors(), Case(norm).grads()
        vectors = [tensors[name][0] for name in ("weight", "bias", "slope")]
        moments = plane_moments(tensors["xs"]) if with_moments else None
        kernel, xs = tensors["kernel"][0], tensors["xs"]
        yield (
            "goctconv_norm_depthwise",
            (xs, *vectors, *norm.running, kernel, moments, True, 1e-5),
        )
    yield (
        "goctconv_norm_depthwise_backward",
        (grads, xs, *vectors, *norm.running, kernel, True, 1e-5),
    )


@pytest.mark.parametrize("number", range(len(list(sound_calls()))))
def test_registration(kernels: str, number: int) -> None:
    name, arguments = list(sound_calls())[number]
    if kernels == "cpu" and name == "goctconv_measured":
        pytest.skip("goctconv_measured has no kernel for the CPU")

    def moved(t: Any) -> Any:
        if isinstance(t, list):
            return [moved(x) for x in t]
        return t.to(device_of(kernels)) if isinstance(t, Tensor) else t

    with running(kernels):
        given = tuple(moved(t) for t in arguments)
        if not name.endswith("_backward"):
            given = ([x.requires_grad_() for x in given[0]], *given[1:])
        assert_one_device(name, given)
        opcheck(getattr(torch.ops.sodfast, name).default, given)


def test_a_norm_alone_is_as_it_was() -> None:
    norm, xs = NormAct((2, 1)).train(), [torch.randn(2, 2, 4, 4), torch.randn(2, 1, 2, 2)]
    with sodfast.use_backend("reference"):
        norm(xs)
        assert norm.channel_means is not None and norm.channel_means.shape == (2, 3)
        with pytest.raises(ValueError, match="more than one value"):
            norm([x[:1, :, :1, :1] for x in xs])
