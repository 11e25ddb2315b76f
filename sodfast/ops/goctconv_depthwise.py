"""The simplified gOctConv: a depthwise 3x3 convolution inside every scale."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._backend import choose, register
from .goctconv import bias_gradient, bias_prelu, refuse_slope


def goctconv_depthwise(
    xs: Sequence[Tensor],
    weight: Tensor,
    dilation: int = 1,
    bias: Tensor | None = None,
    slope: Tensor | None = None,
) -> list[Tensor]:
    r"""Convolve every channel of every scale with its own 3x3 kernel.

    The instance of gOctConv with all cross-scale paths removed (CSNet, section 3.2): each
    input channel has one output channel of the same resolution, :math:`y_c = w_c * x_c`.

    Args:
        xs: 1 to 4 tensors, high resolution first; scale i is (B, C_i, H/2^i, W/2^i) exactly.
            An absent scale has C_i = 0.
        weight: (sum of C_i, 1, 3, 3), high resolution first.
        dilation: pixels between the kernel's taps, at least 1; the zero padding equals it.
        bias: (sum of C_i,); None = 0.
        slope: (sum of C_i,), PReLU slopes applied last; None = no activation. It is meant for
            inference: the compiled op refuses to differentiate through it.

    All tensors share one device and one dtype (float32 or float64 in the CPU kernels, float32,
    float16 or bfloat16 in the CUDA kernels, other floating dtypes by the reference; under
    autocast everything runs in float32 on the CPU and in the autocast's dtype on CUDA).
    NaN and infinity propagate.

    Returns:
        One tensor per scale, shaped as in xs.

    Raises:
        TypeError: an integer dtype, or dtypes that differ.
        ValueError: a wrong rank, shape, device or dilation, or a scale whose size is not
            exactly that of scale 0 divided by 2^i (names both sizes).
        RuntimeError: a backend that was asked for by name cannot run.
    """
    xs = _check.scales(xs)
    channels = sum([x.shape[1] for x in xs])
    _check.parameter(weight, "weight", (channels, 1, 3, 3), xs[0])
    _check.epilogue(bias, slope, channels, xs[0])
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, not {dilation}")
    if choose("goctconv_depthwise", xs[0]) == "reference":
        return goctconv_depthwise_reference(xs, weight, dilation, bias, slope)
    return torch.ops.sodfast.goctconv_depthwise(xs, weight, bias, slope, dilation)


def goctconv_depthwise_reference(
    xs: Sequence[Tensor],
    weight: Tensor,
    dilation: int = 1,
    bias: Tensor | None = None,
    slope: Tensor | None = None,
) -> list[Tensor]:
    """:func:`goctconv_depthwise` in plain torch: the specification, and the fallback."""
    ys = []
    for x, kernel in zip(xs, weight.split([x.shape[1] for x in xs])):
        if x.shape[1]:
            x = F.conv2d(x, kernel, padding=dilation, dilation=dilation, groups=x.shape[1])
        ys.append(x)
    return bias_prelu(ys, bias, slope)


def _fake(
    xs: list[Tensor], weight: Tensor, bias: Tensor | None, slope: Tensor | None, dilation: int
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in xs]


def _fake_grad_input(grads: list[Tensor], weight: Tensor, dilation: int) -> list[Tensor]:
    return [grad.new_empty(grad.shape) for grad in grads]


def _fake_grad_weight(
    grads: list[Tensor], xs: list[Tensor], weight: Tensor, dilation: int
) -> Tensor:
    return weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    xs, weight, _, slope, ctx.dilation = inputs
    ctx.save_for_backward(*xs, weight)
    ctx.slope = slope


def _backward(ctx: Any, grads: list[Tensor]) -> tuple:
    refuse_slope("goctconv_depthwise", ctx.slope)
    ops = torch.ops.sodfast
    *xs, weight = ctx.saved_tensors
    need_xs, need_weight, need_bias, *_ = ctx.needs_input_grad
    grad_xs, grad_weight, grad_bias = [None] * len(xs), None, None
    if any(need_xs):
        grad_xs = ops.goctconv_depthwise_grad_input(grads, weight, ctx.dilation)
    if need_weight:
        grad_weight = ops.goctconv_depthwise_grad_weight(grads, xs, weight, ctx.dilation)
    if need_bias:
        grad_bias = bias_gradient(grads)
    return grad_xs, grad_weight, grad_bias, None, None


register(
    "goctconv_depthwise",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    cuda_autocast="half",
)
register("goctconv_depthwise_grad_input", fake=_fake_grad_input)
register("goctconv_depthwise_grad_weight", fake=_fake_grad_weight)
