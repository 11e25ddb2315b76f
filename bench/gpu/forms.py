"""The forms in which a case runs on a GPU, and the bytes that every form must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sodfast
from gpu.scfnet_works import MapWork
from gpu.works import DTYPES, Work

LEAVES = (
    sodfast.nn.GOctConv, sodfast.nn.SimplifiedGOctConv, sodfast.nn.DilatedBank,
    sodfast.nn.NormAct, nn.Conv2d,
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """A form of running a case; prepare returns the call that is timed.

    bf16 is autocast for the baselines and in training, as it is used. In inference parameters can
    be bfloat16 too: ours are, and those of the baselines with pure, which autocast would convert
    on every call. compiled is torch.compile's mode, both of which replay CUDA graphs.
    """

    name: str
    backend: str
    baseline: bool = False
    channels_last: bool = False
    compiled: str = ""
    graph: bool = False
    pure: bool = False

    @property
    def usual(self) -> bool:
        """Whether it runs when nobody asks; compiling the others takes most of a stage."""
        return self.backend != "triton" and self.compiled != "max-autotune"

    @property
    def replays(self) -> bool:
        """Whether a call replays a CUDA graph: the peak of its memory was at the capture."""
        return self.graph or bool(self.compiled)

    def serves(self, work: Work) -> bool:
        """Whether it differs from the form without pure: there are parameters to convert."""
        converts = work.dtype != "fp32" and not work.training and not isinstance(work, MapWork)
        return converts or not self.pure

    def prepare(self, work: Work) -> Callable[[], Any]:
        sodfast.use_backend(self.backend)
        module, xs = work.build()
        half = work.dtype != "fp32"
        whole = half and not work.training and (self.pure or not self.baseline)
        if whole:
            module, xs = module.to(DTYPES[work.dtype]), [x.to(DTYPES[work.dtype]) for x in xs]
        elif half and work.layer:  # what reaches a layer under autocast
            xs = [x.to(DTYPES[work.dtype]) for x in xs]
        if self.channels_last:
            module = module.to(memory_format=torch.channels_last)
            xs = [x.contiguous(memory_format=torch.channels_last) for x in xs]
        if self.compiled:
            for x in xs:  # its graphs read them where they are, as ours do, and copy nothing
                torch._dynamo.mark_static_address(x)
        autocast = half and not whole
        make = _training_step if work.kind == "training" else _op_step
        if work.kind != "training" and not work.training:
            make = _inference_step
        step = make(module, xs, work, autocast, self.compiled)
        return _captured(step) if self.graph else step


# In the order in which they run: ours first, then the fastest to prepare.
FORMS = [
    Form("cuda", "cuda"),
    Form("cuda graph", "cuda", graph=True),
    Form("eager", "reference", baseline=True),
    Form("eager channels_last", "reference", baseline=True, channels_last=True),
    Form("eager graph", "reference", baseline=True, graph=True),
    Form("eager bf16", "reference", baseline=True, pure=True),
    Form("eager bf16 graph", "reference", baseline=True, pure=True, graph=True),
    Form("compile bf16", "reference", baseline=True, pure=True, compiled="reduce-overhead"),
    Form("compile", "reference", baseline=True, compiled="reduce-overhead"),
    Form("triton", "triton"),
    Form("triton graph", "triton", graph=True),
    Form("compile max-autotune", "reference", baseline=True, compiled="max-autotune"),
]


def _call(module: nn.Module, xs: list[Tensor], work: Work) -> Any:
    return module(xs) if work.layer else module(xs[0])


def _compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    return torch.compile(function, mode=mode) if mode else function


def _inference_step(
    module: nn.Module, xs: list[Tensor], work: Work, autocast: bool, compiled: str
) -> Callable[[], Any]:
    run = _compiled(module, compiled)

    def step() -> Any:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return _call(run, xs, work)

    return step


def _op_step(
    module: nn.Module, xs: list[Tensor], work: Work, autocast: bool, compiled: str
) -> Callable[[], Any]:
    """Forward and backward of a layer, with the gradients of its inputs and parameters."""
    xs = [x.requires_grad_(i < work.differentiated) for i, x in enumerate(xs)]
    leaves = [x for x in [*xs, *module.parameters()] if x.requires_grad]
    run = _compiled(module, compiled)

    def forward() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return [y for y in tree_leaves(_call(run, xs, work)) if y.requires_grad]

    grads = [1e-3 * torch.randn_like(y) for y in forward()]
    return lambda: torch.autograd.grad(forward(), leaves, grads, allow_unused=True)


def _training_step(
    module: nn.Module, xs: list[Tensor], work: Work, autocast: bool, compiled: str
) -> Callable[[], Any]:
    """Forward, loss, backward and the optimizer's step; capturable as a whole."""
    criterion, optimizer = work.parts(module, xs[0])
    run = _compiled(module, compiled)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            result = run(xs[0])
        criterion(result).backward()
        optimizer.step()

    return step


def _captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """What counts as a layer: a fused ILBlock as a whole."""
    if isinstance(module, LEAVES) or (
        isinstance(module, sodfast.nn.ILBlock) and module.conv1.slope is not None
    ):
        yield module
        return
    for child in module.children():
        yield from _layers(child)


def limit_bytes(work: Work) -> int:
    """What every layer must move: input, output and parameters once forward.

    The backward reads the input and the gradient of the output and writes that of the input,
    and reads and writes parameters' worth once more each. A network's layers are summed as if
    nothing were fused across them, but for fused ILBlocks, which are one layer.
    """
    if isinstance(work, MapWork):
        return work.values() * DTYPES[work.dtype].itemsize
    module = work.module().to("meta")
    total = 0

    def add(layer: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        nonlocal total
        numbers = [
            sum(x.numel() for x in tree_leaves(group) if isinstance(x, Tensor))
            for group in (args, result, list(layer.parameters(recurse=True)))
        ]
        weights = (3, 2, 3) if work.training and layer.training else (1, 1, 1)  # a teacher does not
        total += sum(n * w for n, w in zip(numbers, weights))

    hooks = [m.register_forward_hook(add) for m in _layers(module)]
    xs = [torch.empty(shape, device="meta") for shape in work.shapes()]
    with torch.no_grad(), sodfast.use_backend("reference"):
        _call(module, xs, work)
    for hook in hooks:
        hook.remove()
    return total * DTYPES[work.dtype].itemsize
