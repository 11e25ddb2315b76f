"""Augmentation of a whole batch on the training device.

What happens to a picture is a function of (seed, epoch, index) alone: not of the rank, the
worker, the batch size or what was drawn before. So two ranks together do what one would, and
a resumed run needs no generator's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["augment", "draw", "draw_colour", "uniform"]


def uniform(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """(len(indices), count) float64 in [0, 1): a hash of (seed, epoch, index, column).

    SplitMix64's finaliser applied to a counter; 53 good bits per number.
    """
    with np.errstate(over="ignore"):
        key = _mix(np.uint64(seed % 2**64) + np.uint64(0x9E3779B97F4A7C15))
        key = _mix(key ^ np.uint64(epoch))
        rows = _mix(key ^ np.asarray(indices).astype(np.uint64))
        columns = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits: np.ndarray = _mix(rows[:, None] + columns[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: Any) -> Any:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draw(
    seed: int,
    epoch: int,
    indices: np.ndarray,
    crop: float = 15 / 224,
    horizontal_flip: float = 0.5,
    vertical_flip: float = 0.0,
    rotation: float = 0.0,
) -> np.ndarray:
    """The affine maps of a batch: (B, 2, 3) float32, as `torch.nn.functional.affine_grid` takes.

    crop: from each of the four sides, up to this part of the side is cut, uniformly.
    horizontal_flip, vertical_flip: probabilities. rotation: up to so many degrees either way,
    uniformly, about the middle of what is cut out; what then lies outside of the picture repeats
    its edge. Raises ValueError outside their ranges.
    """
    if not 0 <= crop < 0.5:
        raise ValueError(f"crop must be from 0 to under 0.5, got {crop}")
    for name, value in (("horizontal_flip", horizontal_flip), ("vertical_flip", vertical_flip)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value}")
    if not 0 <= rotation <= 180:
        raise ValueError(f"rotation must be from 0 to 180 degrees, got {rotation}")
    u = uniform(seed, epoch, indices, 11)  # columns 6 to 9 belong to `draw_colour`
    left, right, top, bottom = (crop * u[:, column] for column in range(4))
    theta = np.zeros((len(u), 2, 3))
    # Output -1 … 1 goes to the box's edges in the input's -1 … 1.
    theta[:, 0, 0] = (1 - left - right) * np.where(u[:, 4] < horizontal_flip, -1, 1)
    theta[:, 0, 2] = left - right
    theta[:, 1, 1] = (1 - top - bottom) * np.where(u[:, 5] < vertical_flip, -1, 1)
    theta[:, 1, 2] = top - bottom
    if rotation:
        angle = np.deg2rad(rotation * (2 * u[:, 10] - 1))
        turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1)
        theta[:, :, :2] = theta[:, :, :2] @ turn.reshape(-1, 2, 2)
    return theta.astype(np.float32)


def draw_colour(
    seed: int, epoch: int, indices: np.ndarray, blur: float = 0.0, brightness: float = 0.0
) -> np.ndarray:
    """What happens to the colours of a batch: (B, 3) float32 of blur's side, factor and shift.

    blur: probability of a Gaussian blur with a side of 3, 5, 7 or 9 pixels; a side of 0 stands
    for none. brightness: b multiplies 8-bit values by 1 − b … 1 + b and adds −30 b … 30 b
    (KD-SCFNet: 0.5). Raises ValueError outside their ranges.
    """
    for name, value in (("blur", blur), ("brightness", brightness)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value}")
    u = uniform(seed, epoch, indices, 10)[:, 6:]  # the first six belong to `draw`
    side = np.where(u[:, 0] < blur, 3 + 2 * np.floor(4 * u[:, 1]), 0)
    factor = 1 + brightness * (2 * u[:, 2] - 1)
    shift = np.floor(30 * brightness * (2 * u[:, 3] - 1))
    return np.stack([side, factor, shift], 1).astype(np.float32)


def _blurred(images: Tensor, sides: np.ndarray) -> Tensor:
    """Gaussian blur of (B, 3, S, S), each with its own window; 0 leaves a picture as it is."""
    images = images.clone()
    for number in np.flatnonzero(sides):
        side = int(sides[number])
        sigma = 0.3 * ((side - 1) / 2 - 1) + 0.8  # OpenCV's for a window of this side
        taps = torch.arange(side, dtype=torch.float32, device=images.device) - side // 2
        taps = torch.exp(-(taps**2) / (2 * sigma**2))
        taps = (taps / taps.sum()).expand(3, 1, 1, side)
        half = side // 2
        one = F.pad(images[number : number + 1], [half] * 4, mode="reflect")
        one = F.conv2d(F.conv2d(one, taps, groups=3), taps.transpose(2, 3), groups=3)
        images[number] = one[0]
    return images


def augment(
    images: Tensor,  # (B, S, S, 3) uint8
    masks: Tensor,  # (B, S, S) uint8, 0–255
    theta: Tensor,  # (B, 2, 3) float32, from `draw`
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    colour: np.ndarray | None = None,  # (B, 3) float32, from `draw_colour`
    depths: Tensor | None = None,  # (B, S, S) uint8, 0 far … 255 near
) -> tuple[Tensor, Tensor]:
    """Blur, brighten, crop, flip, turn, resize (bilinear, no antialiasing) and normalise on the
    tensors' device.

    mean, std: 3 values, or 4 where depth is wanted. Returns the network's input
    (B, len(mean), size, size) float32 and the truth (B, 1, size, size) in 0–1, which is soft
    along edges. Image, mask and depth move together; blur and brightness are the image's.
    Raises ValueError for depth that is wanted and not there.
    """
    if len(mean) == 4 and depths is None:
        raise ValueError("the network takes depth maps, and these pictures have none")
    parts = [images, masks[..., None]]
    if len(mean) == 4 and depths is not None:
        parts.insert(1, depths[..., None])
    both = torch.cat(parts, dim=3).permute(0, 3, 1, 2)
    if colour is not None:
        both = both.to(torch.float32)
        factor, shift = torch.from_numpy(colour[:, 1:]).to(both.device).T.view(2, -1, 1, 1, 1)
        pictures = _blurred(both[:, :3], colour[:, 0]).mul_(factor).add_(shift).clamp_(0, 255)
        both = torch.cat([pictures, both[:, 3:]], dim=1)
    grid = F.affine_grid(theta, [len(images), both.shape[1], size, size], align_corners=False)
    both = F.grid_sample(
        both.to(torch.float32), grid, "bilinear", padding_mode="border", align_corners=False
    ).div_(255)
    x, truth = both[:, :-1], both[:, -1:]
    shape = (1, -1, 1, 1)
    centre = torch.tensor(mean, dtype=torch.float32, device=x.device).view(shape)
    spread = torch.tensor(std, dtype=torch.float32, device=x.device).view(shape)
    return ((x - centre) / spread).contiguous(), truth.contiguous()
