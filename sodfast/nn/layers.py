"""The three layers that hold parameters: cross-scale convolution, depthwise, norm + PReLU."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sodfast import ops

Channels = int | Sequence[int]
Scales = Tensor | Sequence[Tensor]


def channel_tuple(channels: Channels, name: str) -> tuple[int, ...]:
    """Channel counts per scale as a tuple; an int means one scale."""
    counts = tuple(channels) if isinstance(channels, Iterable) else (channels,)
    if not 1 <= len(counts) <= 4 or any(not isinstance(c, int) or c < 0 for c in counts):
        raise ValueError(f"{name} must be 1 to 4 numbers from 0 on, one per scale: {channels!r}")
    if sum(counts) == 0:
        raise ValueError(f"{name} has no channel on any scale: {channels!r}")
    return counts


def scale_list(xs: Scales, channels: tuple[int, ...] | None = None) -> list[Tensor]:
    """The tensors of all scales as a list; a single tensor stands for one scale.

    Raises ValueError where they have other than these channels, which a layer was made for.
    """
    xs = [xs] if isinstance(xs, Tensor) else list(xs)
    for i, x in enumerate(xs):
        if not isinstance(x, Tensor):
            raise TypeError(f"xs[{i}] must be a tensor, not {type(x).__name__}")
    # What is no (B, C, H, W) the op refuses.
    if channels is not None and all(x.ndim == 4 for x in xs):
        found = tuple(x.shape[1] for x in xs)
        if found != channels:
            raise ValueError(
                f"xs must be {len(channels)} scales of {channels} channels, "
                f"got {len(xs)} of {found}"
            )
    return xs


def init_convolution(weight: Tensor) -> None:
    """torch's default for convolutions."""
    if weight.numel():  # an absent scale or branch has nothing to initialise
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


class GOctConv(nn.Module):
    """Convolution from every input scale to every output scale; see :func:`ops.goctconv`.

    Args:
        in_channels: channels per input scale, high resolution first.
        out_channels: channels per output scale.
        kernel_size: 1 or 3.
        stride: 1, or 2 to average-pool every input 2x2 first.
        bias: add a learned bias to every output channel.

    Shape: scale i (B, in_channels[i], H/2^i, W/2^i) to scale j (B, out_channels[j], h/2^j,
    w/2^j), with h = H // stride and w = W // stride.
    """

    slope: Tensor | None  # PReLU as an epilogue: set by sodfast.fuse, for inference only

    def __init__(
        self,
        in_channels: Channels,
        out_channels: Channels,
        kernel_size: int = 1,
        stride: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = channel_tuple(in_channels, "in_channels")
        self.out_channels = channel_tuple(out_channels, "out_channels")
        if kernel_size not in (1, 3):
            raise ValueError(f"kernel_size must be 1 or 3, not {kernel_size!r}")
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, not {stride!r}")
        self.kernel_size, self.stride = kernel_size, stride
        rows, columns = sum(self.out_channels), sum(self.in_channels)
        self.weight = nn.Parameter(torch.empty(rows, columns, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        self.register_buffer("slope", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torch initialises a convolution."""
        init_convolution(self.weight)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, xs: Scales) -> list[Tensor]:
        return ops.goctconv(
            scale_list(xs, self.in_channels), self.weight, self.out_channels, self.stride,
            self.bias, self.slope,
        )  # fmt: skip

    def measured(self, xs: Scales) -> tuple[list[Tensor], Tensor]:
        """The forward of a layer without bias, and the moments of its result; see
        :func:`ops.goctconv_measured`."""
        xs = scale_list(xs, self.in_channels)
        return ops.goctconv_measured(xs, self.weight, self.out_channels, self.stride)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels} -> {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, bias={self.bias is not None}"
        )


class SimplifiedGOctConv(nn.Module):
    """Depthwise 3x3 convolution inside every scale; see :func:`ops.goctconv_depthwise`.

    Args:
        channels: channels per scale, high resolution first.
        dilation: pixels between the kernel's taps.
        weight_gain: the forward uses ``weight * weight_gain``. CSNet's authors train with 100:
            the start is 100 times larger and so, in effect, is the learning rate of an
            optimizer with steps of fixed size (Adam). 1 turns the trick off; multiplying a
            trained weight by its gain undoes it.

    Shape: scale i (B, channels[i], H/2^i, W/2^i), in and out.
    """

    bias: Tensor | None  # both set by sodfast.fuse, for inference only
    slope: Tensor | None

    def __init__(self, channels: Channels, dilation: int = 1, weight_gain: float = 1.0) -> None:
        super().__init__()
        self.channels = channel_tuple(channels, "channels")
        if dilation < 1:
            raise ValueError(f"dilation must be at least 1, not {dilation}")
        self.dilation, self.weight_gain = dilation, weight_gain
        self.weight = nn.Parameter(torch.empty(sum(self.channels), 1, 3, 3))
        self.register_buffer("bias", None)
        self.register_buffer("slope", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torch initialises a convolution (before the gain)."""
        init_convolution(self.weight)

    def forward(self, xs: Scales) -> list[Tensor]:
        weight = self.weight if self.weight_gain == 1 else self.weight * self.weight_gain
        xs = scale_list(xs, self.channels)
        return ops.goctconv_depthwise(xs, weight, self.dilation, self.bias, self.slope)

    def extra_repr(self) -> str:
        return f"{self.channels}, dilation={self.dilation}, weight_gain={self.weight_gain}"


class NormAct(nn.Module):
    """Batch normalisation and PReLU of every scale; see :func:`ops.goctconv_norm_act`.

    Parameters and statistics of all scales are concatenated, high resolution first: ``weight``
    (gamma), ``bias`` (beta), ``slope`` (0.25 at first), ``running_mean``, ``running_var``.
    After a forward in training, ``channel_means`` is the mean over H and W of the result, a
    detached (B, C) tensor that dynamic weight decay reads; otherwise it is None.

    Args:
        channels: channels per scale, high resolution first.
        eps: added to the variance.
        momentum: how far the running statistics move towards each batch's.

    Shape: scale i (B, channels[i], H/2^i, W/2^i), in and out.

    Raises:
        ValueError: in training, a scale with channels has a single value per channel, so that
            no variance exists (as torch's batch normalisation does).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: Channels, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.channels = channel_tuple(channels, "channels")
        self.eps, self.momentum = eps, momentum
        count = sum(self.channels)
        self.weight = nn.Parameter(torch.ones(count))
        self.bias = nn.Parameter(torch.zeros(count))
        self.slope = nn.Parameter(torch.full((count,), 0.25))
        self.register_buffer("running_mean", torch.zeros(count))
        self.register_buffer("running_var", torch.ones(count))
        self.channel_means: Tensor | None = None

    def forward(self, xs: Scales, moments: Tensor | None = None) -> list[Tensor]:
        """moments: of xs, where an earlier layer returned them; see :meth:`into`."""
        xs = self._checked(xs)
        moments = moments if self.training else None
        ys, *statistics = ops.goctconv_norm_act(
            xs, *self._vectors(), self.training, self.eps, moments
        )
        self._keep(xs, *statistics)
        return ys

    def into(
        self, conv: SimplifiedGOctConv, xs: Scales, moments: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """``conv(self(xs))`` as one op; see :func:`ops.goctconv_norm_depthwise`.

        Args:
            conv: with dilation 1; its forward is not called.
            xs: as of the forward.
            moments: of xs, where an earlier layer returned them.

        Returns:
            The result, and in training its moments.
        """
        xs = self._checked(xs)
        kernel = conv.weight if conv.weight_gain == 1 else conv.weight * conv.weight_gain
        moments = moments if self.training else None
        ys, *statistics, moments = ops.goctconv_norm_depthwise(
            xs, *self._vectors(), kernel, moments, self.training, self.eps
        )
        self._keep(xs, *statistics)
        return ys, moments if self.training else None

    def _checked(self, xs: Scales) -> list[Tensor]:
        xs = scale_list(xs, self.channels)
        if self.training:
            for i, x in enumerate(xs):
                if x.shape[1] and x.shape[0] * x.shape[2] * x.shape[3] == 1:
                    raise ValueError(
                        f"training needs more than one value per channel; scale {i} has shape "
                        f"{tuple(x.shape)}"
                    )
        return xs

    def _vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.bias, self.slope, self.running_mean, self.running_var

    def _keep(self, xs: list[Tensor], mean: Tensor, var: Tensor, channel_means: Tensor) -> None:
        """Move the running statistics towards the batch's; remember the channel means."""
        if self.training:
            counts = [x.shape[0] * x.shape[2] * x.shape[3] for x in xs]
            ops.goctconv_update_stats_(
                self.running_mean, self.running_var, mean, var, self.channels, counts,
                self.momentum,
            )  # fmt: skip
        self.channel_means = channel_means if self.training else None

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, momentum={self.momentum}"
