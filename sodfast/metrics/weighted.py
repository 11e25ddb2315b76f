"""The weighted F-measure (Margolin et al., CVPR 2014), and the distance transform it needs."""

from __future__ import annotations

import numpy as np

from .counts import Counted

__all__ = ["nearest_foreground", "weighted_f_measure"]

_EPS = float(np.spacing(1))
_RADIUS = 3  # a 7 × 7 window
_SIGMA = 5.0
# Rows are worked on so many pixels at a time: what is in use then fits into the cache.
_BAND = 1 << 14


def weighted_f_measure(image: Counted, beta_squared: float = 1.0) -> float:
    """Weighted F of one map, as PySODMetrics computes it.

    With M the min–max normalised map, G the truth, E = |M − G|, d the distance to the nearest
    foreground pixel and K a 7 × 7 Gaussian of σ = 5::

        inside G   E_w = min(E, K ∗ E′),  E′ = E inside G, and outside it E of the nearest
                                          foreground pixel (zero beyond the image)
        outside G  E_w = E · (2 − 2^(−d/5))
        TP = |G| − Σ_G E_w     FP = Σ_¬G E_w     R = 1 − mean_G E_w     P = TP / (TP + FP)
        F = (1 + β²) P R / (R + β² P)

    An empty truth scores 0.
    """
    if image.positives == 0:
        return 0.0
    inside, values = image.inside, image.values
    rows, columns, squared = nearest_foreground(inside)
    # Only what the window can reach from inside G matters of the error outside it.
    box = _reach(inside)
    nearest = rows[box].astype(np.int64) * inside.shape[1] + columns[box]
    error = 1 - values.take(nearest)  # inside G the nearest foreground pixel is the pixel itself
    weighted = np.minimum(error, _blur(error))[inside[box]]
    outside = ~inside
    importance = 2 - np.exp(np.log(0.5) / 5 * np.sqrt(squared[outside]))
    false_positive = float(values[outside] @ importance)
    missed = float(weighted.sum())
    true_positive = image.positives - missed
    recall = 1 - missed / image.positives
    precision = true_positive / (true_positive + false_positive + _EPS)
    return float(
        (1 + beta_squared) * recall * precision / (recall + beta_squared * precision + _EPS)
    )


def _reach(inside: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns of the window's reach around the foreground."""

    def reach(axis: int) -> slice:
        occupied = np.flatnonzero(inside.any(axis=axis))
        return slice(max(0, int(occupied[0]) - _RADIUS), int(occupied[-1]) + _RADIUS + 1)

    return reach(1), reach(0)


def _blur(image: np.ndarray) -> np.ndarray:
    """The 7 × 7 Gaussian, zero beyond the border; separable, so 7 + 7 terms."""
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    kernel = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    kernel /= kernel.sum()
    height, width = image.shape
    padded = np.pad(image, _RADIUS)
    down = sum(weight * padded[i : i + height] for i, weight in enumerate(kernel))
    return sum(weight * down[:, i : i + width] for i, weight in enumerate(kernel))


def nearest_foreground(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every pixel the nearest foreground pixel: its row, its column, its squared distance.

    inside: (H, W) bool with at least one True; ValueError otherwise. Returns (H, W) arrays of
    int32, int32 and int64. Exact and Euclidean; of pixels equally near the leftmost is taken,
    and of those the uppermost. (So does SciPy's distance transform, and PySODMetrics with it.)

    Along each column the nearest foreground pixel is the last one above or the next one
    below. Then a pixel (y, x) looks for the column j with the least (x − j)² + vertical
    distance² in its row. The best j never decreases with x, so once every second column
    knows its j, those between search from the left neighbour's to the right neighbour's: H
    times (W + columns) candidates per halving, H W log W in all, without a loop over pixels.
    """
    height, width = inside.shape
    if not inside.any():
        raise ValueError("inside must hold at least one foreground pixel")
    # 32 bits where they are enough: what this costs is above all memory traffic.
    y = np.arange(height, dtype=np.int32)[:, None]
    far = np.int32(2 * (height + width))  # further than anything in the image
    above = np.maximum.accumulate(np.where(inside, y, -far), axis=0)
    below = np.minimum.accumulate(np.where(inside, y, height + far)[::-1], axis=0)[::-1]
    upper = y - above <= below - y
    nearest_row = np.where(upper, above, below)
    vertical = nearest_row - y

    column = np.empty((height, width), np.int32)
    squared = np.empty((height, width), np.int64)
    band = max(1, _BAND // width)
    for top in range(0, height, band):
        part = slice(top, top + band)
        column[part], squared[part] = _nearest_column(vertical[part].astype(np.int64) ** 2)
    return np.take_along_axis(nearest_row, column, axis=1), column, squared


def _nearest_column(vertical: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every (y, x) the leftmost j with the least (x − j)² + vertical[y, j]; and that sum."""
    height, width = vertical.shape
    flat = vertical.ravel()
    bits = flat.size.bit_length()
    row = np.arange(height)[:, None] * width
    # found[:, x + 1] is the j of column x; before the first and after the last: the ends.
    found = np.empty((height, width + 2), np.int64)
    found[:, 0], found[:, -1] = 0, width - 1
    squared = np.empty((height, width), np.int64)
    step = 1 << (width.bit_length() - 1)
    while step:
        x = np.arange(step - 1, width, 2 * step)
        first = found[:, x + 1 - step]
        counts = (found[:, np.minimum(x + 1 + step, width + 1)] - first + 1).ravel()
        starts = np.cumsum(counts) - counts
        # All candidates of all pixels of this halving, one after another, as flat positions.
        candidate = np.arange(int(counts.sum()))
        candidate += np.repeat((row + first).ravel() - starts, counts)
        key = np.repeat((row + x).ravel(), counts)
        key -= candidate
        key *= key
        key += flat.take(candidate)
        # The position in the lower bits makes the leftmost of equals the least.
        key <<= bits
        key += candidate
        least = np.minimum.reduceat(key, starts).reshape(height, -1)
        found[:, x + 1] = (least & ((1 << bits) - 1)) - row
        squared[:, x] = least >> bits
        step //= 2
    return found[:, 1:-1], squared
