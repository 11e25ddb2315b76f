"""Batch statistics over all processes: two ranks then train as one would.

Statistics of a batch of B pictures on each of R processes are taken over all R·B of them. The
kernels are those of one process: with the shared mean and variance given, the norm is the one
of evaluation, and the part of the gradient that runs through the statistics is added here,

    dx = γ/σ · (dz − Σdz / N − x̂ · Σ(dz x̂) / N),

where dz is the gradient behind the PReLU, so that Σdz = dβ and Σ(dz x̂) = dγ, summed over all
processes, and N counts the values of a channel on all of them.

One process takes the same way, with nothing to add up, when it is asked to: the statistics of the
fused kernel differ from these in the last bit, as it sums blocks in float32, and a network has
maxima and kinks that turn a last bit into another gradient. Between a step of two processes
and one of one, both here, is the rounding of sums alone (1e-6 of the gradient in float32).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops
from .nn import NormAct
from .nn.layers import Scales, scale_list

__all__ = ["SyncNormAct", "synchronise"]


def synchronise(model: nn.Module) -> nn.Module:
    """Turns every NormAct of a model into a SyncNormAct, in place; returns the model."""
    for module in model.modules():
        if type(module) is NormAct:
            module.__class__ = SyncNormAct
    return model


class SyncNormAct(NormAct):
    """A :class:`sodfast.nn.NormAct` whose batch statistics are those of all processes.

    In training it raises ValueError, as that does, where all processes together have a single
    value per channel.
    """

    def forward(self, xs: Scales, moments: Tensor | None = None) -> list[Tensor]:
        # moments are of this process alone: of no use
        if not self.training:
            return super().forward(xs)
        xs = scale_list(xs)
        *ys, mean, var, means, counts = _SyncNorm.apply(
            self.eps, self.weight, self.bias, self.slope, *xs
        )
        if any(n == 1 and x.shape[1] for n, x in zip(counts.tolist(), xs)):
            raise ValueError("training needs more than one value per channel, of all processes")
        ops.goctconv_update_stats_(
            self.running_mean, self.running_var, mean, var, self.channels,
            [int(n) for n in counts], self.momentum,
        )  # fmt: skip
        self.channel_means = means
        return ys


def _add_up(values: Tensor) -> None:
    """Over all processes, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)


class _SyncNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, eps: float, weight: Tensor, bias: Tensor, slope: Tensor, *xs: Tensor
    ) -> Any:
        # Float64: variances are near 1e-4, and a difference of sums would lose them.
        wide = [x.double() for x in xs]
        counts = torch.tensor([x.numel() // max(x.shape[1], 1) for x in xs], dtype=torch.float64)
        sums = torch.cat([x.sum((0, 2, 3)) for x in wide])
        squares = torch.cat([x.square().sum((0, 2, 3)) for x in wide])
        together = torch.cat([counts.to(sums.device), sums, squares])
        _add_up(together)
        counts, sums, squares = together.split([len(counts), len(sums), len(sums)])
        per_channel = torch.cat([n.expand(x.shape[1]) for n, x in zip(counts, xs)])
        mean = sums / per_channel
        var = (squares / per_channel - mean.square()).clamp_min(0)
        mean, var = mean.to(weight.dtype), var.to(weight.dtype)
        ys, _, _, means = ops.goctconv_norm_act(xs, weight, bias, slope, mean, var, False, eps)
        ctx.save_for_backward(weight, bias, slope, mean, var, per_channel, *xs)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, means, counts)
        return (*ys, mean, var, means, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, bias, slope, mean, var, per_channel, *xs = ctx.saved_tensors
        grads = grads[: len(xs)]
        with torch.enable_grad():
            # Computed again, so that whatever backend is chosen has its own backward.
            inputs = [t.detach().requires_grad_() for t in (weight, bias, slope, *xs)]
            ys = ops.goctconv_norm_act(
                inputs[3:], inputs[0], inputs[1], inputs[2], mean, var, False, ctx.eps
            )[0]
            some = [(y, g) for y, g in zip(ys, grads) if y.numel()]
            found = torch.autograd.grad(
                [y for y, _ in some], inputs, [g for _, g in some], allow_unused=True
            )
        d_weight, d_bias, d_slope, *d_xs = (
            torch.zeros_like(t) if d is None else d for t, d in zip(inputs, found)
        )
        shared = torch.cat([d_bias, d_weight]).double()
        _add_up(shared)
        d_shift, d_scale = (
            (part / per_channel).to(weight.dtype) for part in shared.split(len(weight))
        )
        inverse = (var + ctx.eps).rsqrt()
        start, results = 0, []
        for x, d_x in zip(xs, d_xs):
            own = slice(start, start + x.shape[1])
            start += x.shape[1]
            factor, shift, scale, centre, narrow = (
                t[own].view(1, -1, 1, 1)
                for t in (weight * inverse, d_shift, d_scale, mean, inverse)
            )
            results.append(d_x - factor * (shift + (x - centre) * narrow * scale))
        return (None, d_weight, d_bias, d_slope, *results)
