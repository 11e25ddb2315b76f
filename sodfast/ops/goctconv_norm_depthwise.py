"""Batch normalisation, PReLU and the depthwise 3x3 behind them, for training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _check
from ._backend import choose, register
from .goctconv import plane_moments
from .goctconv_depthwise import goctconv_depthwise_reference
from .goctconv_norm_act import goctconv_norm_act_reference

NormDepthwiseResult = tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]


def goctconv_norm_depthwise(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    kernel: Tensor,
    moments: Tensor | None = None,
    training: bool = False,
    eps: float = 1e-5,
) -> NormDepthwiseResult:
    r"""Normalise and activate every channel, then convolve it with its own 3x3 kernel.

    .. math:: y = \mathrm{PReLU}\Big(\gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} +
              \beta\Big), \qquad o_c = w_c * y_c

    What :func:`goctconv_norm_act` and :func:`goctconv_depthwise` do one after the other, as an
    ILBlock does twice (CSNet, section 3.2). The compiled kernels never write y: they normalise
    what the convolution reads, and the backward makes y again from xs, which alone is kept. With
    them :class:`sodfast.nn.ILBlock` trains by this op, elsewhere by the two.

    Args:
        xs: 1 to 4 tensors, high resolution first; scale i is (B, C_i, H/2^i, W/2^i) exactly.
            An absent scale has C_i = 0.
        weight, bias, slope: gamma, beta and the PReLU slopes, (sum of C_i,).
        running_mean, running_var: (sum of C_i,), used when training is False.
        kernel: (sum of C_i, 1, 3, 3).
        moments: what this op or :func:`goctconv_measured` returned with xs as its result: spares a
            pass over xs. None, or (sum of C_i, B, 2), float64; in training only.
        training: use the statistics of this batch over B, H and W (the variance divided by
            B·H·W) instead of the running ones.
        eps: added to the variance; at least 0.

    All tensors but moments share one device and one dtype (float32 or float64 in the CPU kernel,
    float32, float16 or bfloat16 in the CUDA kernel, any in the reference). Under autocast
    everything runs in float32 on the CPU; on CUDA everything but xs may stay float32.
    NaN and infinity propagate.

    Returns:
        (os, mean, var, channel_means, moments): os shaped as xs; mean and variance that were
        used, (sum of C_i,); the means over H and W of y, (B, sum of C_i); in training, of every
        plane of os, mean and sum of squared distances from it, (sum of C_i, B, 2), float64,
        otherwise (0,). Only os are differentiable.

    Raises:
        TypeError: an integer dtype, or dtypes that differ.
        ValueError: a wrong rank, shape or device, a negative eps, moments without training, or
            a scale whose size is not exactly that of scale 0 divided by 2^i.
        RuntimeError: a backend that was asked for by name cannot run.
    """
    xs = _check.scales(xs)
    parameters = (weight, bias, slope, running_mean, running_var)
    names = ("weight", "bias", "slope", "running_mean", "running_var")
    channels = sum([x.shape[1] for x in xs])
    for parameter, name in zip(parameters, names):
        _check.parameter(parameter, name, (channels,), xs[0])
    _check.parameter(kernel, "kernel", (channels, 1, 3, 3), xs[0])
    if eps < 0:
        raise ValueError(f"eps must not be negative: {eps}")
    if moments is not None:
        _check.moments(moments, (channels, xs[0].shape[0], 2), xs[0], training)
    if choose("goctconv_norm_depthwise", xs[0]) == "reference":
        return goctconv_norm_depthwise_reference(xs, *parameters, kernel, moments, training, eps)
    return torch.ops.sodfast.goctconv_norm_depthwise(
        xs, *parameters, kernel, moments, training, eps
    )


def goctconv_norm_depthwise_reference(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    kernel: Tensor,
    moments: Tensor | None = None,
    training: bool = False,
    eps: float = 1e-5,
) -> NormDepthwiseResult:
    """:func:`goctconv_norm_depthwise` in plain torch: the specification, and the fallback.

    It measures xs whether it gets their moments or not.
    """
    ys, mean, var, channel_means = goctconv_norm_act_reference(
        xs, weight, bias, slope, running_mean, running_var, training, eps
    )
    ys = goctconv_depthwise_reference(ys, kernel)
    if not training:
        return ys, mean, var, channel_means, xs[0].new_empty(0, dtype=torch.float64)
    return ys, mean, var, channel_means, plane_moments(ys)


def _fake(
    xs: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    kernel: Tensor,
    moments: Tensor | None,
    training: bool,
    eps: float,
) -> NormDepthwiseResult:
    batch, channels = xs[0].shape[0], weight.shape[0]
    mean, var = weight.new_empty(channels), weight.new_empty(channels)
    shape = (channels, batch, 2) if training else (0,)
    of_ys = xs[0].new_empty(shape, dtype=torch.float64)
    ys = [x.new_empty(x.shape) for x in xs]
    return ys, mean, var, weight.new_empty(batch, channels), of_ys


def _fake_backward(
    grads: list[Tensor],
    xs: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    mean: Tensor,
    var: Tensor,
    kernel: Tensor,
    training: bool,
    eps: float,
) -> NormDepthwiseResult:
    gweight, gbias, gslope = (weight.new_empty(weight.shape) for _ in range(3))
    return (
        [x.new_empty(x.shape) for x in xs],
        gweight,
        gbias,
        gslope,
        kernel.new_empty(kernel.shape),
    )


def _setup_context(ctx: Any, inputs: tuple, output: NormDepthwiseResult) -> None:
    xs, weight, bias, slope, _, _, kernel, _, ctx.training, ctx.eps = inputs
    _, mean, var, channel_means, moments = output
    ctx.mark_non_differentiable(mean, var, channel_means, moments)
    ctx.save_for_backward(*xs, weight, bias, slope, mean, var, kernel)


def _backward(ctx: Any, grads: list[Tensor], *_: Tensor) -> tuple:
    *xs, weight, bias, slope, mean, var, kernel = ctx.saved_tensors
    grad_xs, grad_weight, grad_bias, grad_slope, grad_kernel = (
        torch.ops.sodfast.goctconv_norm_depthwise_backward(
            grads, xs, weight, bias, slope, mean, var, kernel, ctx.training, ctx.eps
        )
    )
    return grad_xs, grad_weight, grad_bias, grad_slope, None, None, grad_kernel, None, None, None


register("goctconv_norm_depthwise", fake=_fake, backward=_backward, setup_context=_setup_context)
register("goctconv_norm_depthwise_backward", fake=_fake_backward)
