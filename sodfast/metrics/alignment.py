"""The enhanced-alignment measure E (Fan et al., IJCAI 2018), from counts."""

from __future__ import annotations

import numpy as np

__all__ = ["e_measure"]

_EPS = float(np.spacing(1))


def e_measure(hits: np.ndarray, marked: np.ndarray, positives: int, size: int) -> np.ndarray:
    """E of binary maps against a truth, as PySODMetrics computes it.

    hits, marked: (T,) how many foreground pixels, and how many pixels in all, each of T
    binary maps B marks. positives: foreground pixels of the truth G. size: all pixels. ::

        φ = 2 (B − B̄)(G − Ḡ) / ((B − B̄)² + (G − Ḡ)²)        E = Σ ((1 + φ)² / 4) / (size − 1)

    φ takes four values only, one for each combination of B and G, so the sum has four terms.
    An empty truth scores the share of unmarked pixels, a full one that of marked pixels. The
    denominator is the authors': E can exceed 1 by 1 / size. (A single pixel is divided by 1.)

    Returns (T,) float64.
    """
    hits, marked = np.asarray(hits, np.float64), np.asarray(marked, np.float64)
    if positives == 0:
        total = size - marked
    elif positives == size:
        total = marked
    else:
        mean_map, mean_truth = marked / size, positives / size
        total = np.zeros(marked.shape)
        for count, b, g in (
            (hits, 1 - mean_map, 1 - mean_truth),
            (marked - hits, 1 - mean_map, -mean_truth),
            (positives - hits, -mean_map, 1 - mean_truth),
            (size - marked - positives + hits, -mean_map, -mean_truth),
        ):
            alignment = 2 * b * g / (b * b + g * g + _EPS)
            total += count * (1 + alignment) ** 2 / 4
    return total / max(size - 1, 1)
