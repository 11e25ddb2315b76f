"""Argument checks shared by the ops: every message names the argument and its value."""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SCALES = 4
MAX_DILATIONS = 8


def scales(xs: Sequence[Tensor], name: str = "xs") -> list[Tensor]:
    """Check the tensors of all scales, high resolution first, and return them as a list.

    Scale i is (B, C_i, H/2^i, W/2^i), exactly; an absent scale has C_i = 0.
    """
    if not isinstance(xs, (list, tuple)):
        raise TypeError(f"{name} must be a list with one tensor per scale, not {type(xs).__name__}")
    if not 1 <= len(xs) <= MAX_SCALES:
        raise ValueError(f"{name} must hold 1 to {MAX_SCALES} scales, not {len(xs)}")
    for i, x in enumerate(xs):
        maps(x, f"{name}[{i}]")
    batch, _, height, width = xs[0].shape
    for i, x in enumerate(xs[1:], start=1):
        same_place(x, f"{name}[{i}]", xs[0], f"{name}[0]")
        if x.shape[0] != batch:
            raise ValueError(f"{name}[{i}] has batch size {x.shape[0]}, {name}[0] has {batch}")
        if x.shape[2] << i != height or x.shape[3] << i != width:
            raise ValueError(
                f"{name}[{i}] is {x.shape[2]}x{x.shape[3]}, but scale {i} must be exactly the "
                f"size of scale 0, {height}x{width}, divided by {1 << i}"
            )
    return list(xs)


def maps(x: Tensor, name: str) -> None:
    """Check that a single argument is (B, C, H, W), floating point and not empty in H and W."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name} must be (B, C, H, W), not {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {x.dtype}")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{name} has an empty size: {x.shape[2]}x{x.shape[3]}")


def same_place(x: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Check that two tensors share device and dtype (autocast may still unite the dtypes)."""
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, {like_name} is on {like.device}")
    if x.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        raise TypeError(f"{name} is {x.dtype}, {like_name} is {like.dtype}")


def parameter(x: Tensor, name: str, shape: tuple[int, ...], like: Tensor) -> None:
    """Check a parameter's type, shape, device and dtype against what goes with ``xs[0]``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {x.dtype}")
    same_place(x, name, like, "xs[0]")


def moments(x: Tensor, shape: tuple[int, ...], like: Tensor, training: bool) -> None:
    """Check the moments of ``xs``, float64, that an op is given in training."""
    if not training:
        raise ValueError("moments have no use where training is False")
    if not isinstance(x, Tensor) or x.dtype != torch.float64:
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"moments must be a float64 tensor, not {found}")
    if tuple(x.shape) != shape:
        raise ValueError(f"moments must have shape {shape}, not {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"moments is on {x.device}, xs[0] is on {like.device}")


def epilogue(bias: Tensor | None, slope: Tensor | None, channels: int, like: Tensor) -> None:
    """Check the optional bias and slope of a convolution's epilogue, each (channels,)."""
    if bias is not None:
        parameter(bias, "bias", (channels,), like)
    if slope is not None:
        parameter(slope, "slope", (channels,), like)


def channel_list(channels: Sequence[int], name: str = "out_channels") -> list[int]:
    """Check channel counts, one per scale, and return them as a list."""
    counts = list(channels)
    if not 1 <= len(counts) <= MAX_SCALES:
        raise ValueError(f"{name} must hold 1 to {MAX_SCALES} scales, not {len(counts)}")
    if any(count < 0 for count in counts):
        raise ValueError(f"{name} must not be negative: {counts}")
    return counts


def branch_list(row: Sequence[int], dilations: Sequence[int], scale: int) -> list[int]:
    """Check one scale's channel counts, one per dilation, and return them as a list."""
    counts = list(row)
    if not 1 <= len(dilations) <= MAX_DILATIONS or any(d < 1 for d in dilations):
        raise ValueError(
            f"dilations must be 1 to {MAX_DILATIONS} numbers from 1 on, not {list(dilations)}"
        )
    if len(counts) != len(dilations) or any(count < 0 for count in counts):
        raise ValueError(
            f"out_channels[{scale}] must hold {len(dilations)} numbers from 0 on "
            f"(one per dilation), not {counts}"
        )
    return counts


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels last where x lies so and not contiguous as well, else contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
