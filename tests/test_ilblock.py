"""The fused ILBlock: values on the CUDA kernels' backends, refusals, and that networks use it."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import test_goctconv
import torch
from gpu_kernels import check_kernels, device_of, running
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    Call,
    CallCounter,
    Source,
    Tensors,
    assert_one_device,
    assert_registered,
    lay_out,
)
from torch import Tensor

import sodfast
from sodfast.nn import ILBlock
from sodfast.ops import ilblock, ilblock_reference

pytestmark = pytest.mark.usefixtures("compiled")


@dataclass(frozen=True)
class Case:
    first: test_goctconv.Case  # the cross-scale convolution
    slopes: tuple[float, float] = (-0.5, 0.5)

    def tensors(self) -> Tensors:
        source, rows = Source(self.first.seed + 2), sum(self.first.out_channels)
        of_first, low, high = self.first.tensors(), *self.slopes
        depthwise = [source.uniform(rows, 1, 3, 3) for _ in range(2)]
        vectors = {
            "biases": [source.uniform(rows) for _ in range(3)],
            "slopes": [source.uniform(rows, low=low, high=high) for _ in range(3)],
        }
        layout = self.first.layout
        return {
            "xs": of_first["xs"],
            "weights": of_first["weight"] + [lay_out(w, layout) for w in depthwise],
            **{name: [lay_out(t, layout) for t in group] for name, group in vectors.items()},
        }

    def terms(self) -> dict[str, float]:
        return {"ys": 81 * self.first.terms()["ys"]}

    def run(self, function: Callable) -> Callable[[Tensors], list[Tensor]]:
        names = ("xs", "weights", "biases", "slopes")
        first = self.first
        return lambda t: function(*(t[name] for name in names), first.out_channels, first.stride)

    def check(self, gpu: str) -> None:
        runs = self.run(ilblock), self.run(ilblock_reference)
        check_kernels(gpu, *runs, self.tensors(), [], self.terms())


@settings(max_examples=15)
@given(
    test_goctconv.cases(),
    st.sampled_from([(-0.5, 0.5), (0.25, 0.25), (-2.0, -1.0), (1.0, 3.0)]),
)
def test_values(gpu: str, first: test_goctconv.Case, slopes: tuple[float, float]) -> None:
    Case(first, slopes).check(gpu)


@pytest.mark.parametrize(
    "first",
    [
        # Several tiles of 14 x 28 and of 16 channels, their edges, every scale.
        test_goctconv.Case(1, (30, 58), (9, 5), (19, 3)),
        test_goctconv.Case(2, (16, 32), (3, 2, 1, 1), (2, 3, 2, 9)),
        test_goctconv.Case(1, (29, 57), (3,), (5,), kernel=3),
        test_goctconv.Case(1, (64, 16), (5, 0, 3), (1, 17), kernel=3, stride=2),
        # So many channels that the layers run one by one.
        test_goctconv.Case(1, (8, 12), (20, 9), (4, 2), kernel=3),
        test_goctconv.Case(1, (1, 1), (2,), (3,)),
        test_goctconv.Case(2, (4, 4), (0, 0), (2, 1)),
    ],
    ids=str,
)
def test_values_of_several_tiles(gpu: str, first: test_goctconv.Case) -> None:
    Case(first).check(gpu)


def test_nan_reaches_exactly_what_depends_on_it(gpu: str) -> None:
    case = Case(test_goctconv.Case(1, (16, 64), (2, 1, 1), (2, 1, 1)), (0.5, 1.0))
    tensors, device = case.tensors(), device_of(gpu)
    for weight in tensors["weights"]:
        weight.abs_()
    with running(gpu):
        for scale, row, column in ((0, 0, 31), (0, 13, 27), (1, 7, 14), (2, 0, 0), (2, 3, 15)):
            found = []
            for value in (None, 1e3, torch.nan):
                xs = [x.clone() for x in tensors["xs"]]
                if value is not None:
                    xs[scale][0, 0, row, column] = value
                given = {name: [t.to(device) for t in ts] for name, ts in tensors.items()}
                given["xs"] = [x.to(device) for x in xs]
                found.append([y.cpu() for y in case.run(ilblock)(given)])
            for before, moved, nan in zip(*found):
                assert torch.equal(nan.isnan(), moved != before)


@torch.no_grad()
def test_fused_networks_run_their_blocks_by_it(gpu: str, small_csnet: Callable) -> None:
    model = small_csnet()
    fused = sodfast.fuse(model).network
    blocks = sum(isinstance(module, ILBlock) for module in model.modules())
    x, device = torch.randn(2, 3, 64, 48), device_of(gpu)
    with sodfast.use_backend("reference"):
        expected = fused(x)
    with running(gpu), CallCounter() as calls, warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fused.to(device)(x.to(device)).cpu()
    assert calls.counts["ilblock"] == blocks
    assert "goctconv_depthwise" not in calls.counts
    assert (found - expected).abs().max() < 5e-5 * expected.abs().max()


@torch.no_grad()
def test_on_the_cpu_a_fused_block_runs_its_layers() -> None:
    block = sodfast.fuse(ILBlock((3, 2), (4, 1)).eval())
    xs = [torch.randn(1, 3, 8, 8), torch.randn(1, 2, 4, 4)]
    with CallCounter() as calls, warnings.catch_warnings():
        warnings.simplefilter("error")
        block(xs)
    assert calls.counts == {"goctconv": 1, "goctconv_depthwise": 2}


@torch.no_grad()
def test_torch_compile_keeps_it(gpu: str) -> None:
    block, device = sodfast.fuse(ILBlock((3, 2), (4, 1)).eval()), device_of(gpu)
    xs = [torch.randn(1, 3, 8, 8, device=device), torch.randn(1, 2, 4, 4, device=device)]
    called: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        called.extend(str(n.target) for n in module.graph.nodes if n.op == "call_function")
        return module.forward

    compiled = torch.compile(block.to(device), fullgraph=True, backend=backend)
    with running(gpu):
        torch.testing.assert_close(compiled(xs), block(xs))
    assert [name for name in called if "sodfast" in name] == ["sodfast.ilblock"]


def test_it_has_no_gradient(gpu: str) -> None:
    case = Case(test_goctconv.Case(1, (4, 4), (2,), (3,)))
    tensors = {n: [t.to(device_of(gpu)) for t in ts] for n, ts in case.tensors().items()}
    tensors["xs"][0].requires_grad_()
    with running(gpu):
        (y,) = case.run(ilblock)(tensors)
        with pytest.raises(RuntimeError, match="ilblock has no gradient"):
            y.sum().backward()


x8, w23, w3, v3 = (
    torch.zeros(1, 2, 8, 8),
    torch.zeros(3, 2, 1, 1),
    torch.zeros(3, 1, 3, 3),
    torch.zeros(3),
)
SOUND = ([x8], [w23, w3, w3], [v3] * 3, [v3] * 3, [3], 1)
BAD = {
    "two weights": (ValueError, "weights must hold.*not 2", {1: [w23, w3]}),
    "four biases": (ValueError, "biases must hold.*not 4", {2: [v3] * 4}),
    "no slopes": (ValueError, "slopes must hold.*not 0", {3: []}),
    "5x5": (ValueError, r"\(3, 2, 5, 5\)", {1: [torch.zeros(3, 2, 5, 5), w3, w3]}),
    "dense": (ValueError, r"weights\[1\].*\(3, 3, 3, 3\)", {1: [w23, torch.zeros(3, 3, 3, 3), w3]}),
    "bias": (ValueError, r"biases\[2\].*\(3,\), not \(2,\)", {2: [v3, v3, v3[:2]]}),
    "slope dtype": (TypeError, r"slopes\[1\] is torch.float64", {3: [v3, v3.double(), v3]}),
    "integers": (TypeError, "int64", {0: [x8.long()]}),
    "channels": (ValueError, r"out_channels.*-1", {4: [-1]}),
    "stride": (ValueError, "stride.*3", {5: 3}),
    "device": (ValueError, "meta", {1: [w23, w3, w3.to("meta")]}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    error, message, changes = BAD[name]
    arguments = [changes.get(i, argument) for i, argument in enumerate(SOUND)]
    with sodfast.use_backend("reference"), pytest.raises(error, match=message):
        ilblock(*arguments)


def test_raw_op_refuses_nonsense(gpu: str) -> None:
    device = device_of(gpu)
    changes = [change for name, (_, _, change) in BAD.items() if name != "device"]
    changes += [{0: [x8[0]]}, {0: []}, {1: [w3, w23, w3]}, {4: [2]}, {4: [3, 1]}, {0: [x8] * 5}]
    for change in changes:
        arguments = [change.get(i, argument) for i, argument in enumerate(SOUND)]
        moved = [[t.to(device) if isinstance(t, Tensor) else t for t in a] if isinstance(a, list)
                 else a for a in arguments]  # fmt: skip
        with running(gpu), pytest.raises(RuntimeError):
            torch.ops.sodfast.ilblock(*moved)


def sound_calls() -> Iterator[Call]:
    for first in (
        test_goctconv.Case(2, (8, 16), (3, 2), (4, 3), layout="sliced storage"),
        test_goctconv.Case(1, (8, 8), (30,), (2,), kernel=3, stride=2),
    ):
        tensors = Case(first).tensors()
        yield "ilblock", (*tensors.values(), list(first.out_channels), first.stride)


@pytest.mark.parametrize("number", range(len(list(sound_calls()))))
def test_registration(gpu: str, number: int) -> None:
    name, arguments = list(sound_calls())[number]
    device = device_of(gpu)
    moved = tuple([t.to(device) for t in a] if i < 4 else a for i, a in enumerate(arguments))
    with running(gpu):
        assert_one_device(name, moved)
        assert_registered(name, moved)


def test_fused_blocks_that_are_watched_or_changed_run_their_layers(gpu: str) -> None:
    block = sodfast.fuse(ILBlock((3, 5), (4, 3)).eval()).to(device_of(gpu))
    x = [torch.rand(2, 3, 8, 8).to(device_of(gpu)), torch.rand(2, 5, 4, 4).to(device_of(gpu))]

    def layers_run() -> bool:
        with running(gpu), CallCounter() as calls:
            block(x)
        return "ilblock" not in calls.counts

    assert not layers_run()
    seen: list[str] = []
    for name in ("conv1", "conv2", "norm3"):
        layer = getattr(block, name)
        handle = layer.register_forward_hook(lambda *_, name=name: seen.append(name))
        assert layers_run()
        handle.remove()
    assert seen == ["conv1", "conv2", "norm3"]
    block.conv1 = torch.nn.Sequential(block.conv1)
    assert layers_run()


def test_a_block_with_another_layer_runs_on_the_cpu() -> None:
    block = ILBlock((3, 5), (4, 3)).eval()
    x = [torch.rand(2, 3, 8, 8), torch.rand(2, 5, 4, 4)]
    expected = block(x)
    block.conv1 = torch.nn.Sequential(block.conv1)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_nan_stays_in_its_sample(gpu: str, dtype: torch.dtype) -> None:
    """Tensor cores take eight channels at once, also where three are."""
    case = Case(test_goctconv.Case(3, (32, 32), (3, 5), (4, 7), kernel=1))
    device = device_of(gpu)
    tensors = {k: [t.to(device, dtype) for t in group] for k, group in case.tensors().items()}
    for x in tensors["xs"]:
        x[:2] = torch.nan
    with running(gpu):
        for y in case.run(ilblock)(tensors):
            assert y[:2].isnan().all() and y[2].isfinite().all()
