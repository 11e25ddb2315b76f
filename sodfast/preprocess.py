"""From a picture to the network's input, and from its output back to a map.

What a network expects is a small dictionary that travels with its weights::

    {"size": [224, 224], "mean": [r, g, b], "std": [r, g, b], "resample": "bilinear"}

size is [height, width] in pixels; mean and std are on the 0 … 1 scale, in the order RGB. A network
that takes depth has a fourth value in both (0 and 1: depth stays in 0 … 1, 1 near).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from .pictures import read_image

__all__ = ["check_depth", "check_preprocessing", "read_image", "to_input", "to_map"]


def check_preprocessing(preprocessing: Any) -> dict[str, Any]:
    """Returns a clean copy of a preprocessing dictionary.

    Raises ValueError that names the entry which is missing, unknown or out of range.
    """
    if not isinstance(preprocessing, dict):
        raise ValueError(f"preprocessing must be a dict, got {type(preprocessing).__name__}")
    expected = {"size", "mean", "std", "resample"}
    if set(preprocessing) != expected:
        odd = sorted(map(str, expected.symmetric_difference(preprocessing)))
        raise ValueError(f"preprocessing has missing or unknown entries: {', '.join(odd)}")

    def numbers(name: str, length: int | None) -> list[float]:
        values = preprocessing[name]
        good = isinstance(values, (list, tuple)) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
            for v in values
        )
        if not good or not values or (length is not None and len(values) != length):
            count = length if length is not None else "a list of"
            raise ValueError(f"preprocessing {name} must be {count} numbers, got {values!r:.60}")
        return list(values)

    size = numbers("size", 2)
    if any(v != int(v) or not 1 <= v <= 65536 for v in size):
        raise ValueError(f"preprocessing size must be [height, width] in pixels, got {size}")
    mean = numbers("mean", None)
    std = numbers("std", len(mean))
    if any(v <= 0 for v in std):
        raise ValueError(f"preprocessing std must be positive, got {std}")
    if preprocessing["resample"] != "bilinear":
        raise ValueError(
            f"preprocessing resample must be 'bilinear', got {preprocessing['resample']!r:.60}"
        )
    return {"size": [int(v) for v in size], "mean": mean, "std": std, "resample": "bilinear"}


def bilinear_taps(length: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two neighbours and the weight of the second, for `count` samples of `length` pixels.

    In float32, step by step as torch.nn.functional.interpolate(align_corners=False) does it.
    """
    scale = np.float32(length) / np.float32(count)
    position = scale * (np.arange(count, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    position = np.maximum(position, np.float32(0))
    first = np.minimum(position.astype(np.int64), length - 1)
    second = np.minimum(first + 1, length - 1)
    return first, second, np.clip(position - first.astype(np.float32), 0, 1)


def to_input(
    rgb: np.ndarray,
    preprocessing: dict[str, Any],
    size: tuple[int, int] | None = None,
    depth: np.ndarray | None = None,
) -> torch.Tensor:
    """(H, W, 3) uint8 to the network's input, (1, 3, height, width) float32.

    (resize(rgb / 255) − mean) / std, the resize bilinear **without** antialiasing, as the
    published CSNet was trained and tested: the same as torch's ``interpolate(…,
    mode="bilinear", align_corners=False)``. Without antialiasing each output pixel sees four
    input pixels, so only those are read and converted: a 12-megapixel photo costs no more
    than a small one.

    size: (height, width); None takes preprocessing["size"]. depth: (h, w) uint8, 0 far … 255
    near, of the picture's proportions, where mean and std have a fourth value; the input is then
    (1, 4, height, width). Raises ValueError for a depth map that is missing, not wanted, or of
    another shape.
    """
    mean, std = (torch.tensor(preprocessing[name], dtype=torch.float32) for name in ("mean", "std"))
    if len(mean) not in (3, 4):
        raise ValueError(
            f"preprocessing mean must have 3 values for RGB, or 4 with depth, got {len(mean)}"
        )
    height, width = size if size is not None else preprocessing["size"]
    if len(mean) == 4 and depth is None:
        raise ValueError("the network takes a depth map with the picture, and there is none")
    if len(mean) == 3 and depth is not None:
        raise ValueError("the network takes no depth map, only RGB")
    resized = _resized(rgb, (height, width))
    if depth is not None:
        check_depth(depth, rgb)
        resized = torch.cat([resized, _resized(depth[:, :, None], (height, width))])
    planes = torch.empty(len(mean), height, width)
    torch.sub(resized, 255 * mean[:, None, None], out=planes)
    return planes.div_(255 * std[:, None, None])[None]


def check_depth(depth: np.ndarray, rgb: np.ndarray) -> None:
    """Raises ValueError where a depth map is no (h, w) uint8 of the picture's proportions.

    Its size may be another, as many sensors are coarser than their camera: by up to 2 % the
    proportions may differ.
    """
    if depth.ndim != 2 or depth.dtype != np.uint8 or not depth.size:
        raise ValueError(f"depth must be (H, W) uint8, got {depth.shape} {depth.dtype}")
    (height, width), (tall, wide) = depth.shape, rgb.shape[:2]
    if abs(width * tall - height * wide) > max(0.02 * height * wide, width, wide):
        raise ValueError(f"the image is {wide}x{tall}, the depth map {width}x{height}")


def _resized(array: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """(H, W, C) uint8 to (C, height, width) float32, a view in another order."""
    height, width = size
    channels = array.shape[2]
    top, bottom, down = bilinear_taps(array.shape[0], height)
    left, right, across = bilinear_taps(array.shape[1], width)
    # Whole rows are copied first, then single values, already in the order of planes.
    rows = array.reshape(array.shape[0], -1).take(np.concatenate([top, bottom]), axis=0)
    columns = channels * np.concatenate([left, right]) + np.arange(channels)[:, None]
    corners = torch.from_numpy(rows.take(columns.ravel(), axis=1)).float()
    # Upper or lower, row, colour, left or right, column.
    corners = corners.view(2, height, channels, 2, width)
    sides = torch.lerp(corners[:, :, :, 0], corners[:, :, :, 1], torch.from_numpy(across))
    resized = torch.lerp(sides[0], sides[1], torch.from_numpy(down)[:, None, None])
    return resized.permute(1, 0, 2)


def to_map(logits: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Logits (1, 1, h, w) to the 8-bit map (H, W) uint8 of size = (H, W).

    resize(sigmoid(logits)) · 255, truncated (not rounded), the resize bilinear with
    align_corners=False. Raises ValueError when the logits hold NaN: 8 bits cannot show it.
    """
    if logits.ndim != 4 or logits.shape[:2] != (1, 1):
        raise ValueError(f"logits must be (1, 1, h, w), got shape {tuple(logits.shape)}")
    probability = torch.sigmoid(logits.detach().float())
    if bool(probability.isnan().any()):
        raise ValueError("the network's output holds NaN")
    probability = functional.interpolate(
        probability, size=tuple(size), mode="bilinear", align_corners=False
    )
    return probability[0, 0].mul_(255).to(torch.uint8).cpu().numpy()
