"""What every convention counts in one map: its histogram, inside and outside the truth.

A map has 8 bits, so whatever happens at 256 thresholds is in two histograms of 256 bins. No
convention needs a pass over the pixels per threshold.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

__all__ = ["LEVELS", "Counted", "absolute_error", "at_least", "check_pair", "histograms"]

LEVELS = 256


def check_pair(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The map (H, W) uint8 and the truth (H, W) bool; 8-bit truth is foreground over 128.

    Raises TypeError for another dtype (a float map has to be made 8 bit by whoever knows its
    range) and ValueError for a wrong rank, an empty image, or sizes that differ.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.dtype != np.uint8:
        raise TypeError(f"prediction must be uint8, got {prediction.dtype}")
    if truth.dtype not in (np.uint8, np.bool_):
        raise TypeError(f"truth must be uint8 or bool, got {truth.dtype}")
    if prediction.ndim != 2:
        raise ValueError(f"prediction must be (H, W), got shape {prediction.shape}")
    if truth.shape != prediction.shape:
        raise ValueError(f"truth has shape {truth.shape}, but prediction has {prediction.shape}")
    if prediction.size == 0:
        raise ValueError(f"prediction holds no pixel: shape {prediction.shape}")
    return prediction, truth if truth.dtype == np.bool_ else truth > 128


def histograms(prediction: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many pixels have each level: outside and inside the truth, (256,) int64 each."""
    # One pass for both: foreground pixels are counted 256 bins further on.
    index = prediction.astype(np.int64).ravel()
    index += inside.ravel().astype(np.int64) * LEVELS
    counts = np.bincount(index, minlength=2 * LEVELS)
    return counts[:LEVELS], counts[LEVELS:]


def absolute_error(prediction: np.ndarray, truth: np.ndarray) -> float:
    """The mean of |map − truth| in 0 … 1, the truth graded where it is 8 bit and graded."""
    truth = truth.astype(np.int16) * (255 if truth.dtype == np.bool_ else 1)
    total = int(np.abs(prediction - truth).sum(dtype=np.int64))
    return total / (255.0 * prediction.size)


def at_least(histogram: np.ndarray) -> np.ndarray:
    """How many pixels have level t or more, for every t: (256,) from (256,)."""
    return histogram[::-1].cumsum()[::-1]


class Counted:
    """One map with its truth, and what is counted in it, each thing once.

    prediction: (H, W) uint8. truth: (H, W) uint8 (foreground is > 128) or bool. Raises what
    `check_pair` raises.
    """

    def __init__(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        self.prediction, self.inside = check_pair(prediction, truth)
        self.truth = np.asarray(truth)
        self.background, self.foreground = histograms(self.prediction, self.inside)
        self.size = int(self.prediction.size)
        self.positives = int(self.foreground.sum())

        present = np.flatnonzero(self.background + self.foreground)
        low, high = int(present[0]), int(present[-1])
        self.constant = low == high
        # Min–max normalisation takes level m to (m − low) / (high − low). A constant map has
        # no range to stretch: PySODMetrics leaves it as it is.
        self.low, self.span = (0, 255) if self.constant else (low, high - low)

    @cached_property
    def normalised(self) -> np.ndarray:
        """The stretched value of each level, (256,) float64; meaningful where it occurs."""
        # Step by step as PySODMetrics does it: what is compared with a threshold must not
        # fall on the other side of it by a rounding error.
        values = np.arange(LEVELS) / 255
        if self.constant:
            return values
        low, high = values[self.low], values[self.low + self.span]
        return (values - low) / (high - low)

    @cached_property
    def values(self) -> np.ndarray:
        """The stretched map, (H, W) float64 in 0 … 1."""
        return self.normalised[self.prediction]

    @cached_property
    def steps(self) -> np.ndarray:
        """Each level as whole steps over the lowest, (256,) int64: `normalised` · `span`."""
        return np.arange(LEVELS) - self.low

    @cached_property
    def adaptive(self) -> np.ndarray:
        """Which levels pass the adaptive threshold, min(2 · mean, 1): (256,) bool."""
        return self.normalised >= min(2 * float(self.values.mean()), 1.0)
