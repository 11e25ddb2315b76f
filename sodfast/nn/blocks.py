"""The blocks of CSNet: the in-layer multi-scale block and the cross-stage fusion.

``fusable_pairs`` names, for :func:`sodfast.fuse`, which convolution each NormAct follows;
"self" stands for a block that holds the convolution's weights itself.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sodfast import ops
from sodfast.ops._backend import has_kernel

from .layers import (
    Channels,
    GOctConv,
    NormAct,
    Scales,
    SimplifiedGOctConv,
    channel_tuple,
    init_convolution,
    scale_list,
)

DILATIONS = (1, 2, 4, 8, 16)


class GOctConvBNAct(nn.Module):
    """:class:`GOctConv`, batch normalisation and PReLU; arguments as of GOctConv."""

    fusable_pairs = (("conv", "norm"),)

    def __init__(
        self,
        in_channels: Channels,
        out_channels: Channels,
        kernel_size: int = 1,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv = GOctConv(in_channels, out_channels, kernel_size, stride)
        self.norm = NormAct(out_channels)

    def forward(self, xs: Scales) -> list[Tensor]:
        return self.norm(self.conv(xs))


class ILBlock(nn.Module):
    """In-layer multi-scale block: GOctConv and two depthwise 3x3, each with norm and PReLU.

    Args:
        in_channels: channels per input scale, high resolution first.
        out_channels: channels per output scale.
        kernel_size: of the cross-scale convolution, 1 or 3.
        stride: of the cross-scale convolution, 1 or 2.
        weight_gain: of the depthwise layers, see :class:`SimplifiedGOctConv`.

    Shape: as of :class:`GOctConv`.
    """

    fusable_pairs = (("conv1", "norm1"), ("conv2", "norm2"), ("conv3", "norm3"))

    def __init__(
        self,
        in_channels: Channels,
        out_channels: Channels,
        kernel_size: int = 1,
        stride: int = 1,
        weight_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.conv1 = GOctConv(in_channels, out_channels, kernel_size, stride)
        self.norm1 = NormAct(out_channels)
        self.conv2 = SimplifiedGOctConv(out_channels, weight_gain=weight_gain)
        self.norm2 = NormAct(out_channels)
        self.conv3 = SimplifiedGOctConv(out_channels, weight_gain=weight_gain)
        self.norm3 = NormAct(out_channels)

    def forward(self, xs: Scales) -> list[Tensor]:
        xs = scale_list(xs)
        convs = (self.conv1, self.conv2, self.conv3)
        if self._is_fused() and has_kernel("ilblock", xs[0]):  # on CUDA
            return ops.ilblock(
                xs,
                [conv.weight for conv in convs],
                [cast(Tensor, conv.bias) for conv in convs],
                [cast(Tensor, conv.slope) for conv in convs],
                self.conv1.out_channels,
                self.conv1.stride,
            )
        if self._norms_into_convolutions(xs[0]):  # the same, without their results in memory
            measured = self.training and has_kernel("goctconv_measured", xs[0])  # on CUDA
            ys, moments = self.conv1.measured(xs) if measured else (self.conv1(xs), None)
            ys, moments = self.norm1.into(self.conv2, ys, moments)
            ys, moments = self.norm2.into(self.conv3, ys, moments)
            # Who watches the last norm, or replaced it, gets the call of any norm.
            plain = type(self.norm3) is NormAct and "forward" not in vars(self.norm3)
            plain = plain and not _is_watched(self.norm3)
            return self.norm3(ys, moments) if plain else self.norm3(ys)
        ys = self.norm2(self.conv2(self.norm1(self.conv1(xs))))
        return self.norm3(self.conv3(ys))

    def _is_fused(self) -> bool:
        """Whether :func:`sodfast.fuse` made the layers, and nobody wants to see what is between."""
        convs = (self.conv1, self.conv2, self.conv3)
        kinds = (GOctConv, SimplifiedGOctConv, SimplifiedGOctConv)
        layers: tuple[nn.Module, ...] = (*convs, self.norm1, self.norm2, self.norm3)
        return (
            all(type(conv) is kind and conv.slope is not None for conv, kind in zip(convs, kinds))
            and all(type(norm) is nn.Identity for norm in layers[3:])
            and not any(_is_watched(layer) for layer in layers)
        )

    def _norms_into_convolutions(self, x: Tensor) -> bool:
        """Whether a kernel does both at once, and nobody wants to see what is between them."""
        layers: tuple[nn.Module, ...] = (
            self.conv1, self.norm1, self.conv2, self.norm2, self.conv3,
        )  # fmt: skip
        kinds = (GOctConv, NormAct, SimplifiedGOctConv, NormAct, SimplifiedGOctConv)
        return (
            has_kernel("goctconv_norm_depthwise", x)
            and all(type(layer) is kind for layer, kind in zip(layers, kinds))
            and self.conv1.bias is None
            and not any(_is_watched(layer) for layer in layers)
        )

    def add_to(self, plan: Any, xs: Sequence[Any]) -> list[Any]:
        """Add the fused block to a :class:`sodfast.plan.PlanBuilder`."""
        return plan.block(self, xs, self.conv1, (self.conv2, self.conv3))


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody hooked a module: its own call must then happen."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


class DilatedBank(nn.Module):
    """Parallel dilated 3x3 convolutions per scale, concatenated, then norm and PReLU.

    Args:
        in_channels: channels per scale, high resolution first.
        out_channels: per scale one channel count per dilation; 0 = that branch is absent.
        dilations: pixels between the taps of each branch.
        weight_gain: the forward uses ``weights * weight_gain``, see
            :class:`SimplifiedGOctConv`.

    Shape: scale s (B, in_channels[s], H/2^s, W/2^s) to (B, sum(out_channels[s]), H/2^s,
    W/2^s).
    """

    fusable_pairs = (("self", "norm"),)
    bias: Tensor | None  # both set by sodfast.fuse, for inference only
    slope: Tensor | None

    def __init__(
        self,
        in_channels: Channels,
        out_channels: Sequence[Sequence[int]],
        dilations: Sequence[int] = DILATIONS,
        weight_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.in_channels = channel_tuple(in_channels, "in_channels")
        self.out_channels = tuple(tuple(row) for row in out_channels)
        self.dilations, self.weight_gain = tuple(dilations), weight_gain
        if len(self.out_channels) != len(self.in_channels):
            raise ValueError(
                f"out_channels has {len(self.out_channels)} scales, in_channels "
                f"{len(self.in_channels)}"
            )
        for s, row in enumerate(self.out_channels):
            if len(row) != len(self.dilations):
                raise ValueError(
                    f"out_channels[{s}] must hold one number per dilation "
                    f"{self.dilations}, not {row}"
                )
        totals = channel_tuple([sum(row) for row in self.out_channels], "out_channels")
        self.weights = nn.ParameterList(
            torch.empty(rows, columns, 3, 3) for rows, columns in zip(totals, self.in_channels)
        )
        self.norm: nn.Module = NormAct(totals)
        self.register_buffer("bias", None)
        self.register_buffer("slope", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torch initialises a convolution (before the gain)."""
        for weight in self.weights:
            init_convolution(weight)

    def forward(self, xs: Scales) -> list[Tensor]:
        weights = list(self.weights)
        if self.weight_gain != 1:
            weights = [weight * self.weight_gain for weight in weights]
        ys = ops.goctconv_dilated(
            scale_list(xs, self.in_channels), weights, self.dilations, self.out_channels,
            self.bias, self.slope,
        )  # fmt: skip
        return self.norm(ys)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels} -> {self.out_channels}, dilations={self.dilations}, "
            f"weight_gain={self.weight_gain}"
        )


class CrossStageFusion(nn.Module):
    """Fuse the last features of several stages into one high-resolution feature (CSF).

    A 1x1 GOctConv mixes the stages, a :class:`DilatedBank` widens the receptive field inside
    each scale, a second 1x1 GOctConv merges all scales into the highest resolution.

    Args:
        in_channels: channels of each stage's feature, high resolution first.
        mid_channels: channels per scale between mix and bank.
        bank_channels: out_channels of the bank, per scale one count per dilation.
        out_channels: channels of the result.
        dilations, weight_gain: of the bank.

    Shape: scale i (B, in_channels[i], H/2^i, W/2^i) to a list of one (B, out_channels, H, W).
    """

    def __init__(
        self,
        in_channels: Channels,
        mid_channels: Channels,
        bank_channels: Sequence[Sequence[int]],
        out_channels: int,
        dilations: Sequence[int] = DILATIONS,
        weight_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.mix = GOctConvBNAct(in_channels, mid_channels)
        self.bank = DilatedBank(mid_channels, bank_channels, dilations, weight_gain)
        self.merge = GOctConvBNAct([sum(row) for row in bank_channels], out_channels)

    def forward(self, xs: Scales) -> list[Tensor]:
        return self.merge(self.bank(self.mix(xs)))

    def add_to(self, plan: Any, xs: Sequence[Any], head: GOctConv) -> list[Any]:
        """Add the fused fusion and a 1x1 head after it to a :class:`sodfast.plan.PlanBuilder`."""
        xs = plan.bank(self.bank, plan.block(self.mix, xs, self.mix.conv))
        return plan.block(self.merge, xs, self.merge.conv, head=head)
