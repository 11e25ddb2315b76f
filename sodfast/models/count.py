"""Parameters and multiply-accumulates of a model, as the papers count them and as they are."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sodfast.ops._backend import use_backend

aten = torch.ops.aten

# What CSNet's papers add per output element to the convolutions' MACs. Pooling is counted
# with one per pixel of the window.
PAPER_COST = {
    "native_batch_norm": 4,
    "_native_batch_norm_legit_no_training": 4,
    "native_group_norm": 4,
    "_prelu_kernel": 3,
    "upsample_bilinear2d": 9,
}


class _Counter(TorchDispatchMode):
    """Adds up what every aten op that runs inside costs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_macs = 0
        self.elementwise = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        out = result[0] if isinstance(result, tuple) else result
        if name == "convolution":
            weight = args[1]
            self.conv_macs += out.numel() * weight[0].numel()
        elif name in PAPER_COST:
            self.elementwise += PAPER_COST[name] * out.numel()
        elif "pool2d" in name:
            window = args[1]
            self.elementwise += out.numel() * window[0] * window[-1]
        return result


def count(model: nn.Module, size: Sequence[int] = (224, 224)) -> dict[str, int]:
    """Count a model's parameters and its work for one image.

    Args:
        model: takes (1, C, H, W), where C is its ``config["in_channels"]`` (3 without).
        size: (H, W).

    Returns:
        ``params``: learned numbers (no running statistics). ``conv_macs``: multiply-accumulates
        of all convolutions. ``paper_macs``: what CSNet's papers print as FLOPs or MACC; it adds
        4 per element of batch or group normalisation, 3 of PReLU, 9 of bilinear upsampling and
        the window of pooling (the authors' counter agrees within 2 %). ReLU counts nothing.
    """
    # Shapes are all that matters: the reference on the meta device computes nothing.
    twin = copy.deepcopy(model).to("meta").eval()
    channels = getattr(model, "config", {}).get("in_channels", 3)
    with use_backend("reference"), torch.no_grad(), _Counter() as counter:
        twin(torch.empty(1, channels, *size, device="meta"))
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "conv_macs": counter.conv_macs,
        "paper_macs": counter.conv_macs + counter.elementwise,
    }
