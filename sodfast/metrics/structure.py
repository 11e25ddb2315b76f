"""The structure measure S (Fan et al., ICCV 2017), from histograms."""

from __future__ import annotations

import numpy as np

from .counts import LEVELS, Counted

__all__ = ["s_measure"]

_EPS = float(np.spacing(1))


def s_measure(image: Counted, alpha: float = 0.5) -> float:
    """S = max(0, α S_object + (1 − α) S_region) of one map, as PySODMetrics computes it.

    With M the min–max normalised map, G the truth, μ its mean, O(x) = 2 x̄ / (x̄² + 1 + σ_x)::

        S_object = μ O(M inside G) + (1 − μ) O(1 − M outside G)
        S_region = Σ over the four parts that G's centroid cuts:  share of area · SSIM(M, G)

    An empty truth scores 1 − mean(M), a full one mean(M). A part where map and truth are both
    constant scores 1; a part without pixels (the centroid in the last row or column) counts
    nothing. There PySODMetrics' result depends on rounding, or is NaN.
    """
    total = image.background + image.foreground
    if image.positives in (0, image.size):
        mean = float(total @ image.steps) / image.size / image.span
        return 1 - mean if image.positives == 0 else mean
    share = image.positives / image.size
    scale = 1 / image.span
    inside = _object(image.foreground, image.steps * scale)
    outside = _object(image.background, 1 - image.steps * scale)
    by_object = share * inside + (1 - share) * outside
    return max(0.0, alpha * by_object + (1 - alpha) * _region(image))


def _object(histogram: np.ndarray, values: np.ndarray) -> float:
    count = int(histogram.sum())
    mean = float(histogram @ values) / count
    variance = float(histogram @ (values - mean) ** 2) / (count - 1) if count > 1 else 0.0
    return 2 * mean / (mean**2 + 1 + variance**0.5 + _EPS)


def _region(image: Counted) -> float:
    height, width = image.inside.shape
    # The centroid, rounded, and the row and column after it: where the parts begin.
    rows = image.inside.sum(axis=1, dtype=np.int64)
    columns = image.inside.sum(axis=0, dtype=np.int64)
    y = round(int(rows @ np.arange(height)) / image.positives) + 1
    x = round(int(columns @ np.arange(width)) / image.positives) + 1

    # One histogram for all: 4 parts × background, foreground × 256 levels.
    index = image.prediction.astype(np.int64)
    index += image.inside.astype(np.int64) * LEVELS
    index[:, x:] += 2 * LEVELS
    index[y:] += 4 * LEVELS
    parts = np.bincount(index.ravel(), minlength=8 * LEVELS).reshape(4, 2, LEVELS)
    return sum(
        _ssim(background, foreground, image.steps, image.span)
        * (int(background.sum() + foreground.sum()) / image.size)
        for background, foreground in parts
    )


def _ssim(background: np.ndarray, foreground: np.ndarray, steps: np.ndarray, span: int) -> float:
    """SSIM of a part, without its constants: luminance · contrast · structure."""
    total = background + foreground
    count = int(total.sum())
    if count == 0:
        return 0.0
    # In whole steps of the map, so that a constant part has a deviation of exactly zero.
    mean = int(total @ steps) / count
    deviation = steps - mean
    truth = int(foreground.sum()) / count
    degrees = count - 1 + _EPS
    variance = float(total @ deviation**2) / degrees / span**2
    variance_truth = (
        int(foreground.sum()) * (1 - truth) ** 2 + int(background.sum()) * truth**2
    ) / degrees
    covariance = (
        (float(foreground @ deviation) * (1 - truth) - float(background @ deviation) * truth)
        / degrees
        / span
    )
    mean /= span
    above = 4 * mean * truth * covariance
    below = (mean**2 + truth**2) * (variance + variance_truth)
    if above != 0:
        return above / (below + _EPS)
    return 1.0 if below == 0 else 0.0
