"""The fusion inside SCFNet's SCFM: a map with an upsampled one, without the upsampled one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._backend import choose, register


def scfm(x: Tensor, y: Tensor, multiply: bool = True) -> Tensor:
    r"""Fuse a map with a coarser (or finer) one, upsampled as it is read.

    .. math:: x + x \odot \mathrm{up}(y) \;\text{ with multiply}, \qquad
              x + \mathrm{up}(y) \;\text{ without}

    up is bilinear to the size of x, align_corners=False, at any ratio of sizes in either
    direction: what ``F.interpolate(y, size=x.shape[2:], mode="bilinear")`` returns. (KD-SCFNet,
    section 3.2: the steps of the semantic and cross-layer fusion module.)

    Args:
        x: (B, C, H, W).
        y: (B, C, h, w).
        multiply: whether up(y) is multiplied with x.

    Both share one device and one dtype: in compiled kernels float32 or float64 on the CPU,
    float32, float16 or bfloat16 on a GPU, others by the reference. Under autocast everything runs
    in float32 on the CPU, in autocast's dtype on CUDA. NaN and infinity propagate. The gradients
    are deterministic.

    Returns:
        (B, C, H, W) in the memory format of x, contiguous or channels last, which cost the same on
        the CPU and on CUDA.

    Raises:
        TypeError: an integer dtype, or dtypes that differ.
        ValueError: a wrong rank or device, an empty size, or different B or C.
        RuntimeError: a backend that was asked for by name cannot run.
    """
    _check.maps(x, "x")
    _check.maps(y, "y")
    _check.same_place(y, "y", x, "x")
    if x.shape[:2] != y.shape[:2]:
        raise ValueError(
            f"y must have batch and channels of x, {tuple(x.shape[:2])}, not {tuple(y.shape[:2])}"
        )
    if choose("scfm", x) == "reference":
        return scfm_reference(x, y, multiply)
    return torch.ops.sodfast.scfm(x, y, multiply)


def scfm_reference(x: Tensor, y: Tensor, multiply: bool = True) -> Tensor:
    """:func:`scfm` in plain torch: the specification, and the fallback."""
    up = F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
    return torch.addcmul(x, x, up) if multiply else x + up


def _fake(x: Tensor, y: Tensor, multiply: bool) -> Tensor:
    return torch.empty_like(x, memory_format=_check.memory_format(x))


def _fake_backward(grad: Tensor, x: Tensor, y: Tensor, multiply: bool) -> tuple[Tensor, Tensor]:
    grad_x = (
        torch.empty_like(x, memory_format=_check.memory_format(x)) if multiply else x.new_empty(0)
    )
    return grad_x, torch.empty_like(y, memory_format=_check.memory_format(x))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, y, ctx.multiply = inputs
    ctx.save_for_backward(x, y)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, y = ctx.saved_tensors
    if not (ctx.multiply or ctx.needs_input_grad[1]):
        return grad, None, None
    grad_x, grad_y = torch.ops.sodfast.scfm_backward(grad, x, y, ctx.multiply)
    return grad_x if ctx.multiply else grad, grad_y, None


register("scfm", fake=_fake, backward=_backward, setup_context=_setup_context, cuda_autocast="half")
register("scfm_backward", fake=_fake_backward)
