"""Batch normalisation and PReLU of every scale, with the channel means as a by-product."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._backend import choose, register

NormActResult = tuple[list[Tensor], Tensor, Tensor, Tensor]


def goctconv_norm_act(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool = False,
    eps: float = 1e-5,
    moments: Tensor | None = None,
) -> NormActResult:
    r"""Normalise every channel, scale and shift it, and apply PReLU.

    .. math:: z = \gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta, \qquad
              y = \max(z, 0) + a \min(z, 0)

    The channel means of y are what dynamic weight decay weighs a channel by (CSNet, Eq. 3);
    they come out of the same pass. The op is functional: in training it does not touch the
    running statistics, :func:`goctconv_update_stats_` does.

    Args:
        xs: 1 to 4 tensors, high resolution first; scale i is (B, C_i, H/2^i, W/2^i) exactly.
            An absent scale has C_i = 0.
        weight, bias, slope: gamma, beta and the PReLU slopes, (sum of C_i,), high resolution
            first. Slopes may have any value, also negative.
        running_mean, running_var: (sum of C_i,), used when training is False.
        training: use the statistics of this batch over B, H and W (the variance divided by
            B·H·W) instead of the running ones.
        eps: added to the variance; at least 0.
        moments: what :func:`goctconv_measured` or :func:`goctconv_norm_depthwise` returned with xs
            as its result: spares the compiled kernels a pass over xs. None, or (sum of C_i, B, 2),
            float64; in training only.

    All tensors share one device and, but for moments, one dtype (float32 or float64 in the CPU
    kernels, float32, float16 or bfloat16 in the CUDA kernels, other floating dtypes by the
    reference). Under autocast everything runs in float32 on the CPU; on CUDA the parameters and
    what is said of the batch stay float32 beside xs in half precision.
    NaN and infinity propagate.

    Returns:
        (ys, mean, var, channel_means): ys shaped as xs; the mean and variance that were used,
        (sum of C_i,), and the means over H and W of ys, (B, sum of C_i). The last three are
        not differentiable.

    Raises:
        TypeError: an integer dtype, or dtypes that differ.
        ValueError: a wrong rank, shape or device, a negative eps, moments without training, or
            a scale whose size is not exactly that of scale 0 divided by 2^i (names both sizes).
        RuntimeError: a backend that was asked for by name cannot run.
    """
    xs = _check.scales(xs)
    parameters = (weight, bias, slope, running_mean, running_var)
    names = ("weight", "bias", "slope", "running_mean", "running_var")
    channels = sum([x.shape[1] for x in xs])
    for parameter, name in zip(parameters, names):
        _check.parameter(parameter, name, (channels,), xs[0])
    if eps < 0:
        raise ValueError(f"eps must not be negative: {eps}")
    if moments is not None:
        _check.moments(moments, (channels, xs[0].shape[0], 2), xs[0], training)
    if choose("goctconv_norm_act", xs[0]) == "reference":
        return goctconv_norm_act_reference(xs, *parameters, training, eps, moments)
    return torch.ops.sodfast.goctconv_norm_act(xs, *parameters, training, eps, moments)


def goctconv_norm_act_reference(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool = False,
    eps: float = 1e-5,
    moments: Tensor | None = None,
) -> NormActResult:
    """:func:`goctconv_norm_act` in plain torch: the specification, and the fallback.

    It measures xs whether it gets their moments or not.
    """
    parameters = (weight, bias, slope, running_mean, running_var)
    per_scale = zip(*[parameter.split([x.shape[1] for x in xs]) for parameter in parameters])
    ys, means, variances = [], [], []
    for x, (gamma, beta, a, mean, var) in zip(xs, per_scale):
        if x.numel() == 0:
            if training:  # an absent scale has no values; those of an empty batch are 0/0
                mean = var = torch.full_like(mean, math.nan)
        else:
            old_mean, old_var = (None, None) if training else (mean, var)
            if training:
                var, mean = torch.var_mean(x.detach(), dim=(0, 2, 3), correction=0)
            x = torch.batch_norm(x, gamma, beta, old_mean, old_var, training, 0.0, eps, False)
            x = F.prelu(x, a.to(x.dtype))
        ys.append(x)
        means.append(mean)
        variances.append(var)
    channel_means = torch.cat([y.detach().mean((2, 3)) for y in ys], dim=1).to(weight.dtype)
    # on CUDA autocast leaves the maps in half precision, and what is said of them it does not
    batch_mean, batch_var = (torch.cat(x).detach().to(weight.dtype) for x in (means, variances))
    return ys, batch_mean, batch_var, channel_means


def goctconv_update_stats_(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    channels: Sequence[int],
    counts: Sequence[int],
    momentum: float = 0.1,
) -> None:
    r"""Move running statistics towards a batch's, in place.

    .. math:: \mu_r \leftarrow (1-m)\,\mu_r + m\,\mu, \qquad
              \sigma^2_r \leftarrow (1-m)\,\sigma^2_r + m\,\tfrac{n}{n-1}\,\sigma^2

    Args:
        running_mean, running_var: (C,), modified.
        mean, var: (C,), from :func:`goctconv_norm_act` in training.
        channels: channels per scale, C in total.
        counts: values per channel (B·H·W) of each scale, the n above; 1 leaves the variance
            unscaled, 0 leaves the scale's statistics untouched.
        momentum: m above, in [0, 1].

    Raises:
        TypeError: dtypes that differ.
        ValueError: shapes, devices or list lengths that do not fit, momentum outside [0, 1].
        RuntimeError: a backend that was asked for by name cannot run.
    """
    channels, counts = _check.channel_list(channels, "channels"), list(counts)
    if len(counts) != len(channels) or any(count < 0 for count in counts):
        raise ValueError(f"counts must hold {len(channels)} numbers from 0 on, not {counts}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], not {momentum}")
    tensors = (running_mean, running_var, mean, var)
    for tensor, name in zip(tensors, ("running_mean", "running_var", "mean", "var")):
        _check.parameter(tensor, name, (sum(channels),), running_mean)
    if choose("goctconv_update_stats_", running_mean) == "reference":
        goctconv_update_stats_reference_(*tensors, channels, counts, momentum)
    else:
        torch.ops.sodfast.goctconv_update_stats_(*tensors, channels, counts, momentum)


@torch.no_grad()
def goctconv_update_stats_reference_(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    channels: Sequence[int],
    counts: Sequence[int],
    momentum: float = 0.1,
) -> None:
    """:func:`goctconv_update_stats_` in plain torch: the specification, and the fallback."""
    tensors = (running_mean, running_var, mean, var)
    per_scale = zip(*[tensor.split(list(channels)) for tensor in tensors])
    for n, (old_mean, old_var, new_mean, new_var) in zip(counts, per_scale):
        if n == 0:
            continue
        old_mean.lerp_(new_mean, momentum)
        old_var.lerp_(new_var * (n / max(n - 1, 1)), momentum)


def _fake(
    xs: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    eps: float,
    moments: Tensor | None,
) -> NormActResult:
    ys = [x.new_empty(x.shape) for x in xs]
    channel_means = weight.new_empty(xs[0].shape[0], weight.shape[0])
    return ys, weight.new_empty(weight.shape), weight.new_empty(weight.shape), channel_means


def _fake_backward(
    grads: list[Tensor],
    xs: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    like_weight = [weight.new_empty(weight.shape) for _ in range(3)]
    return [x.new_empty(x.shape) for x in xs], like_weight[0], like_weight[1], like_weight[2]


def _fake_update_stats(*_: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple, output: NormActResult) -> None:
    xs, weight, bias, slope, _, _, ctx.training, ctx.eps, _ = inputs
    _, mean, var, channel_means = output
    ctx.mark_non_differentiable(mean, var, channel_means)
    ctx.save_for_backward(*xs, weight, bias, slope, mean, var)


def _backward(ctx: Any, grads: list[Tensor], *_: Tensor) -> tuple:
    *xs, weight, bias, slope, mean, var = ctx.saved_tensors
    grad_xs, grad_weight, grad_bias, grad_slope = torch.ops.sodfast.goctconv_norm_act_backward(
        grads, xs, weight, bias, slope, mean, var, ctx.training, ctx.eps
    )
    return grad_xs, grad_weight, grad_bias, grad_slope, None, None, None, None, None


register("goctconv_norm_act", fake=_fake, backward=_backward, setup_context=_setup_context)
register("goctconv_norm_act_backward", fake=_fake_backward)
register("goctconv_update_stats_", fake=_fake_update_stats, autocast=False)
