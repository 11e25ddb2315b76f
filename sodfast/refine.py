"""A map's edge moved onto the photo's: what makes a cutout of a map that is coarser than its photo.

A network sees a few hundred pixels a side, and its map, enlarged to the photo, has an edge as soft
as the photo is large. Near an edge the map is therefore explained by the photo's colours: on a grid
as coarse as the network's input, in every window w of 3 x 3 cells,

    alpha_i = a_w . colour_i + b_w      with  a_w = (cov_w(colour) + eps)^-1 cov_w(colour, map),
                                              b_w = mean_w(map) - a_w . mean_w(colour)

a and b are averaged over the windows that hold a cell, enlarged bilinearly, and applied to the
photo's own pixels. This is the guided filter with colours (He, Sun, Tang, TPAMI 2013), on a coarse
grid (He, Sun, arXiv:1505.00996). Where the map is flat, a = 0 and nothing of the photo shows. Last,
what is nearly 0 or 1 becomes 0 or 1: a faint haze of the background is no part of a cutout.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .pictures import row_strips
from .preprocess import bilinear_taps

__all__ = ["refine"]

SIDE = 224  # cells of the grid, at most: as the pixels that the networks see
EPSILON = 1e-4  # of colours in 0 … 1: contrast below 0.01 is noise
LOW, HIGH = 0.2, 0.8  # become 0 and 1; see docs/cut_out_products.md for what they win


def refine(rgb: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """The opacity of the object: (H, W, 3) uint8 RGB and its map (H, W) uint8 to (H, W) uint8.

    0 transparent … 255 solid. Takes memory for about a million pixels beside the result, whatever
    the photo's size. Raises ValueError for arrays of another kind or of sizes that differ.
    """
    height, width = saliency.shape[:2]
    if saliency.dtype != np.uint8 or saliency.ndim != 2:
        raise ValueError(f"saliency must be (H, W) uint8, got {saliency.dtype} {saliency.shape}")
    if rgb.dtype != np.uint8 or rgb.shape != (height, width, 3):
        raise ValueError(
            f"rgb must be uint8 of shape {(height, width, 3)}, got {rgb.dtype} of {rgb.shape}"
        )
    alpha = np.empty_like(saliency)
    if not saliency.size:
        return alpha
    grid = (min(height, SIDE), min(width, SIDE))
    lines = _lines(_averaged(rgb, grid), _averaged(saliency[:, :, None], grid))
    # First across, for all rows of the grid, then down, for some rows of the photo at a time.
    lines = functional.interpolate(lines, (grid[0], width), mode="bilinear", align_corners=False)
    above, below, weight = bilinear_taps(grid[0], height)
    for rows in row_strips(height, width):
        share = torch.from_numpy(weight[rows])[:, None]
        ab = torch.lerp(lines[0][:, above[rows]], lines[0][:, below[rows]], share)
        photo = torch.from_numpy(rgb[rows].transpose(2, 0, 1).astype(np.float32, order="C"))
        value = (ab[:3] * photo).sum(0).div_(255).add_(ab[3])
        value.sub_(LOW).mul_(255 / (HIGH - LOW)).round_().clamp_(0, 255)
        alpha[rows] = value.to(torch.uint8).numpy()
    return alpha


def _averaged(image: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """(H, W, C) uint8 to (1, C, h, w) in 0 … 1: the mean of every cell."""
    ends = np.arange(grid[0] + 1) * image.shape[0]
    rows = [
        image[start // grid[0] : -(-end // grid[0])].mean(0, dtype=np.float32)
        for start, end in itertools.pairwise(ends)
    ]
    x = torch.from_numpy(np.stack(rows)).permute(2, 0, 1)[None].div_(255)
    return functional.interpolate(x, grid, mode="area")


def _lines(colour: Tensor, saliency: Tensor) -> Tensor:
    """a and b of every cell: (1, 3, h, w) and (1, 1, h, w) to (1, 4, h, w)."""
    # Of differences to the middle of the range: less is lost where squares are subtracted.
    colour, saliency = colour.double() - 0.5, saliency.double()
    mean, level = _window(colour), _window(saliency)
    spread = _window(colour[:, :, None] * colour[:, None]) - mean[:, :, None] * mean[:, None]
    shared = _window(colour * saliency) - mean * level
    spread = spread.permute(0, 3, 4, 1, 2) + EPSILON * torch.eye(3, dtype=spread.dtype)
    a = torch.linalg.solve(spread, shared.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    b = level - (a * (mean + 0.5)).sum(1, keepdim=True)
    return _window(torch.cat([a, b], 1)).float()


def _window(x: Tensor) -> Tensor:
    """The mean of 3 x 3 cells around each, edges repeated: (B, …, h, w)."""
    planes = x.flatten(1, -3)
    padded = functional.pad(planes, (1, 1, 1, 1), mode="replicate")
    return functional.avg_pool2d(padded, 3, 1).view(x.shape)
