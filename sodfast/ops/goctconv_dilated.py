"""The dilated bank of the cross-stage fusion: parallel dilated 3x3 convolutions per scale."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._backend import choose, register
from .goctconv import bias_gradient, bias_prelu, refuse_slope


def goctconv_dilated(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    out_channels: Sequence[Sequence[int]],
    bias: Tensor | None = None,
    slope: Tensor | None = None,
) -> list[Tensor]:
    r"""Convolve every scale with several dense 3x3 kernels of different dilation at once.

    The cross-stage fusion's instance of gOctConv (CSNet, section 3.2): inside each scale the
    branches run in parallel on the same input and are concatenated,
    :math:`y_s = [\,W_{s,d} *_d x_s\,]_{d \in \mathrm{dilations}}`, where :math:`*_d` has
    dilation and zero padding d.

    Args:
        xs: 1 to 4 tensors, high resolution first; scale s is (B, C_s, H/2^s, W/2^s) exactly.
            An absent scale has C_s = 0.
        weights: one tensor per scale, (sum of out_channels[s], C_s, 3, 3): the branches'
            kernels in the order of dilations.
        dilations: pixels between the taps of each branch, at least 1 each.
        out_channels: per scale one channel count per dilation; 0 = that branch is absent.
        bias: (sum of all out_channels,), over all scales; None = 0.
        slope: (sum of all out_channels,), PReLU slopes applied last; None = no activation. It
            is meant for inference: the compiled op refuses to differentiate through it.

    All tensors share one device and one dtype (float32 or float64 in the CPU kernels, float32,
    float16 or bfloat16 in the CUDA kernels, other floating dtypes by the reference; under
    autocast everything runs in float32 on the CPU and in the autocast's dtype on CUDA).
    NaN and infinity propagate.

    Returns:
        One tensor per scale: (B, sum of out_channels[s], H/2^s, W/2^s).

    Raises:
        TypeError: an integer dtype, or dtypes that differ.
        ValueError: a wrong rank, shape, device, dilation or channel count, or a scale whose
            size is not exactly that of scale 0 divided by 2^s (names both sizes).
        RuntimeError: a backend that was asked for by name cannot run.
    """
    xs, dilations = _check.scales(xs), list(dilations)
    out_channels = [_check.branch_list(row, dilations, s) for s, row in enumerate(out_channels)]
    if len(out_channels) != len(xs) or len(weights) != len(xs):
        raise ValueError(
            f"xs has {len(xs)} scales, weights {len(weights)}, out_channels {len(out_channels)}"
        )
    for s, (x, weight, row) in enumerate(zip(xs, weights, out_channels)):
        _check.parameter(weight, f"weights[{s}]", (sum(row), x.shape[1], 3, 3), xs[0])
    flat = [count for row in out_channels for count in row]
    _check.epilogue(bias, slope, sum(flat), xs[0])
    if choose("goctconv_dilated", xs[0]) == "reference":
        return goctconv_dilated_reference(xs, weights, dilations, out_channels, bias, slope)
    return torch.ops.sodfast.goctconv_dilated(xs, list(weights), bias, slope, dilations, flat)


def goctconv_dilated_reference(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    out_channels: Sequence[Sequence[int]],
    bias: Tensor | None = None,
    slope: Tensor | None = None,
) -> list[Tensor]:
    """:func:`goctconv_dilated` in plain torch: the specification, and the fallback."""
    ys = []
    for x, weight, row in zip(xs, weights, out_channels):
        if weight.numel() == 0:  # nothing goes in, or nothing comes out
            ys.append(x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:]))
            continue
        branches = [
            F.conv2d(x, kernel, padding=dilation, dilation=dilation)
            for kernel, dilation in zip(weight.split(list(row)), dilations)
            if kernel.shape[0]
        ]
        ys.append(torch.cat(branches, dim=1))
    return bias_prelu(ys, bias, slope)


def _fake(
    xs: list[Tensor],
    weights: list[Tensor],
    bias: Tensor | None,
    slope: Tensor | None,
    dilations: list[int],
    out_channels: list[int],
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], w.shape[0], *x.shape[2:]) for x, w in zip(xs, weights)]


def _fake_grad_input(
    grads: list[Tensor], weights: list[Tensor], dilations: list[int], out_channels: list[int]
) -> list[Tensor]:
    return [g.new_empty(g.shape[0], w.shape[1], *g.shape[2:]) for g, w in zip(grads, weights)]


def _fake_grad_weight(
    grads: list[Tensor],
    xs: list[Tensor],
    weights: list[Tensor],
    dilations: list[int],
    out_channels: list[int],
) -> list[Tensor]:
    return [weight.new_empty(weight.shape) for weight in weights]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    xs, weights, _, slope, ctx.dilations, ctx.out_channels = inputs
    ctx.save_for_backward(*xs, *weights)
    ctx.slope = slope


def _backward(ctx: Any, grads: list[Tensor]) -> tuple:
    refuse_slope("goctconv_dilated", ctx.slope)
    ops, branches = torch.ops.sodfast, (ctx.dilations, ctx.out_channels)
    saved, count = list(ctx.saved_tensors), len(grads)
    xs, weights = saved[:count], saved[count:]
    need_xs, need_weights, need_bias, *_ = ctx.needs_input_grad
    grad_xs, grad_weights, grad_bias = [None] * count, [None] * count, None
    if any(need_xs):
        grad_xs = ops.goctconv_dilated_grad_input(grads, weights, *branches)
    if any(need_weights):
        grad_weights = ops.goctconv_dilated_grad_weight(grads, xs, weights, *branches)
    if need_bias:
        grad_bias = bias_gradient(grads)
    return grad_xs, grad_weights, grad_bias, None, None, None


register(
    "goctconv_dilated",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    cuda_autocast="half",
)
register("goctconv_dilated_grad_input", fake=_fake_grad_input)
register("goctconv_dilated_grad_weight", fake=_fake_grad_weight)
