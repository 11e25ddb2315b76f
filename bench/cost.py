"""What a case cannot do without: its multiply-accumulates, and the bytes it must move."""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import torch
from cases import Case
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sodfast


class Cost(NamedTuple):
    """
    macs: of the convolutions; in training, those of both gradients too.
    bytes: each argument, parameter and result moved once per pass, as if everything between
        stayed in cache: a floor, and for a whole network a low one.
    shape: the arguments', readable.
    """

    macs: int
    bytes: int
    shape: str


class _Macs(TorchDispatchMode):
    """Adds up the multiply-accumulates of the convolutions that run inside.

    (torch's own FlopCounterMode miscounts the backward of grouped convolutions.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.total += result.numel() * args[1][0].numel()
        elif name == "convolution_backward":
            grad, weight, mask = args[0], args[2], args[10]
            self.total += grad.numel() * weight[0].numel() * (mask[0] + mask[1])
        return result


def cost_of(case: Case) -> Cost:
    """Found by running the reference on the meta device, which computes and allocates nothing."""
    with torch.device("meta"), sodfast.use_backend("reference"):
        module, args, _ = case.build()
        inputs = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
        with _Macs() as counter, torch.set_grad_enabled(case.training):
            outputs = [y for y in tree_leaves(module(*args)) if isinstance(y, Tensor)]
            moved = _bytes(inputs) + _bytes(parameters) + _bytes(outputs)
            if case.training:
                leaves = [x for x in [*inputs, *parameters] if x.requires_grad]
                roots = [y for y in outputs if y.requires_grad]
                torch.autograd.grad(roots, leaves, [torch.empty_like(y) for y in roots])
                # The backward reads what the forward read, and the gradient of its result.
                moved += _bytes(inputs) + _bytes(parameters) + _bytes(roots) + _bytes(leaves)
    runs = [(shape, len(list(same))) for shape, same in groupby(_shape(x) for x in inputs)]
    shapes = (shape if times == 1 else f"{times} of {shape}" for shape, times in runs)
    return Cost(counter.total, moved, " + ".join(shapes))


def _bytes(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _shape(x: Tensor) -> str:
    if x.dim() == 4 and x.shape[2] == x.shape[3]:
        return f"{x.shape[0]}×{x.shape[1]}×{x.shape[2]}²"
    return "×".join(str(n) for n in x.shape)
