"""A map's edge moved onto the photo's: what makes a cutout of a map that is coarser than its photo.

A network sees a few hundred pixels a side, and its map, enlarged to the photo, has an edge as soft
as the photo is large. Near an edge the map is therefore explained by the photo's colours: of every
window w of 3 x 3 cells, on a grid as coarse as the network's input,

    alpha_i = a_w . colour_i + b_w      with  a_w = (cov_w(colour) + eps)^-1 cov_w(colour, map),
                                              b_w = mean_w(map) - a_w . mean_w(colour)

over all of the photo's pixels in the window. a and b are averaged over the windows that hold a
cell, enlarged bilinearly, and applied to the pixels. This is the guided filter with colours (He,
Sun, Tang, TPAMI 2013) with windows around cells, not around pixels, as in its fast form (He, Sun,
arXiv:1505.00996), but for one thing. That one takes cov(colour) of a photo as coarse as the map,
where noise and texture have been averaged away, and then finds them in the pixels. Of the pixels,
though, cov(colour) has all of the object's own edge and cov(colour, map) as much as a coarse map
knows, and a is too small. So of what the colours vary within a cell, the part WITHIN counts.

Where the map is flat, a = 0 and nothing of the photo shows. Last, what is nearly 0 or 1 becomes 0
or 1: a faint haze of the background is no part of a cutout.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .pictures import row_strips
from .preprocess import bilinear_taps

__all__ = ["refine"]

SIDE = 224  # cells of the grid, at most: as the pixels that the networks see
WITHIN = 0.2  # of the variance of colours within a cell
EPSILON = 1e-4  # of colours in 0 … 1: contrast below 0.01 is noise
LOW, HIGH = 0.2, 0.8  # become 0 and 1; see docs/cut_out_products.md for what they win


def refine(rgb: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """The opacity of the object: (H, W, 3) uint8 RGB and its map (H, W) uint8 to (H, W) uint8.

    0 transparent … 255 solid. Works on strips of about a million pixels, at least one row. Raises
    ValueError for arrays of another kind or of sizes that differ.
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
    lines = _lines(rgb, saliency, (min(height, SIDE), min(width, SIDE)))
    above, below, weight = bilinear_taps(lines.shape[1], height)
    for rows in row_strips(height, width):
        # First across, for the rows of the grid that are needed, then down.
        first = above[rows][0]
        ab = lines[None, :, first : below[rows][-1] + 1]
        ab = functional.interpolate(ab, (ab.shape[2], width), mode="bilinear")[0]
        share = torch.from_numpy(weight[rows])[:, None]
        ab = torch.lerp(ab[:, above[rows] - first], ab[:, below[rows] - first], share)
        value = (ab[:3] * _planes(rgb[rows])).sum(0).add_(ab[3])
        value.sub_(LOW).mul_(255 / (HIGH - LOW)).round_().clamp_(0, 255)
        alpha[rows] = value.to(torch.uint8).numpy()
    return alpha


def _planes(image: np.ndarray) -> Tensor:
    """(h, w, C) uint8 to (C, h, w) in 0 … 1."""
    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32, order="C")).div_(255)


def _lines(rgb: np.ndarray, saliency: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """a and b of every cell, (4, h, w)."""
    cells = _moments(rgb, saliency, grid).double()
    moments = _window(cells)
    mean, level = moments[:3], moments[3]
    shared = moments[4:7] - mean * level
    spread = torch.empty(*level.shape, 3, 3, dtype=moments.dtype)
    for (i, j), square in zip(_PAIRS, moments[7:]):
        between = _window((cells[i] * cells[j])[None])[0]
        product = torch.lerp(between, square, WITHIN)
        spread[:, :, i, j] = spread[:, :, j, i] = product - mean[i] * mean[j] + EPSILON * (i == j)
    a = torch.linalg.solve(spread, shared.permute(1, 2, 0)).permute(2, 0, 1)
    # mean is of colours less 0.5.
    b = level - (a * (mean + 0.5)).sum(0)
    return _window(torch.cat([a, b[None]])).float()


_PAIRS = [(i, j) for i in range(3) for j in range(i, 3)]


def _moments(rgb: np.ndarray, saliency: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Means over the pixels of every cell, (13, h, w): the colours less 0.5, the map, their three
    products, and the six products of colours."""
    height = len(saliency)
    cells = torch.empty(13, *grid)
    for row in range(grid[0]):
        pixels = slice(row * height // grid[0], -(-(row + 1) * height // grid[0]))
        colour = _planes(rgb[pixels]).sub_(0.5)
        map_ = _planes(saliency[pixels, :, None])[0]
        values = [*colour, map_, *(colour * map_), *(colour[i] * colour[j] for i, j in _PAIRS)]
        columns = torch.stack([value.mean(0) for value in values])
        cells[:, row] = functional.interpolate(columns[None], grid[1], mode="area")[0]
    return cells


def _window(x: Tensor) -> Tensor:
    """The mean of 3 × 3 cells around each, edges repeated: (C, h, w)."""
    padded = functional.pad(x[None], (1, 1, 1, 1), mode="replicate")
    return functional.avg_pool2d(padded, 3, 1)[0]
