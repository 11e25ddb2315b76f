"""Max-F and MAE in the convention of the SalMetric program, which the CSNet papers report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .counts import LEVELS, absolute_error, check_pair, histograms

__all__ = ["SalMetric", "SalMetricResult"]

_STABILISER = 1e-4  # SalMetric's own: added to numerator and denominator of both ratios


@dataclass(frozen=True)
class SalMetricResult:
    """What `SalMetric.result` returns.

    max_f: the largest F-measure over the thresholds. mean_f: the mean of F over them.
    mae: mean absolute error, 0 … 1. threshold: the 8-bit threshold at which F is largest.
    images: how many were added. precision, recall, f_measure: (256,) float64, one value per
    threshold 0 … 255.
    """

    max_f: float
    mean_f: float
    mae: float
    threshold: int
    images: int
    precision: np.ndarray
    recall: np.ndarray
    f_measure: np.ndarray


@dataclass(frozen=True)
class SalMetricImage:
    """One image's share: precision and recall (256,) float64, and the mean absolute error."""

    precision: np.ndarray
    recall: np.ndarray
    mae: float


def measure(background: np.ndarray, foreground: np.ndarray, mae: float) -> SalMetricImage:
    """One image from its histograms outside and inside the truth, (256,) int64 each."""
    positives, size = int(foreground.sum()), int(foreground.sum() + background.sum())
    # Pixels strictly over t: everything minus the cumulative count up to and with t.
    hits = positives - np.cumsum(foreground)
    marked = size - np.cumsum(foreground + background)
    return SalMetricImage(
        precision=(hits + _STABILISER) / (marked + _STABILISER),
        recall=(hits + _STABILISER) / (positives + _STABILISER),
        mae=mae,
    )


class SalMetric:
    """Max-F, mean F and MAE in the convention of the SalMetric program.

    Prediction M: 8 bit, taken as it is (no min-max normalisation). Truth G: pixels over 128.
    For every threshold t = 0 … 255 and every image, with B_t = (M > t), strictly::

        precision_t = (|B_t ∧ G| + 1e-4) / (|B_t| + 1e-4)
        recall_t    = (|B_t ∧ G| + 1e-4) / (|G|  + 1e-4)

    Both are averaged over the images first; then F_t = (1 + β²) P R / (β² P + R) of the
    averages, β² = 0.3, max-F is the largest F_t and mean F their mean. MAE is the mean over
    the images of mean |M − G| / 255, where a truth with grey values keeps them.

    An empty B_t has precision 1 and an empty truth has recall 1 by these formulas.

    One image costs one histogram, not 256 comparisons: |B_t| and |B_t ∧ G| are the tails of
    the histograms of M and of M inside G.

    >>> metric = SalMetric()
    >>> metric.add(prediction, truth)      # uint8 (H, W) each, once per image
    >>> metric.result().max_f
    """

    def __init__(self, beta_squared: float = 0.3) -> None:
        if not beta_squared > 0:
            raise ValueError(f"beta_squared must be positive, got {beta_squared}")
        self.beta_squared = float(beta_squared)
        self._precision = np.zeros(LEVELS)
        self._recall = np.zeros(LEVELS)
        self._error = 0.0
        self._images = 0

    def add(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Adds one image.

        prediction: (H, W) uint8, the map as it was written. truth: (H, W) uint8 (foreground
        is > 128) or bool. Raises TypeError for another dtype (a float map has to be made
        8 bit by whoever knows its range) and ValueError for a wrong rank, an empty image, or
        sizes that differ.
        """
        counts = histograms(*check_pair(prediction, truth))
        self.add_measured(
            measure(*counts, absolute_error(np.asarray(prediction), np.asarray(truth)))
        )

    def add_measured(self, image: SalMetricImage) -> None:
        """Adds one image that `measure` has seen."""
        self._precision += image.precision
        self._recall += image.recall
        self._error += image.mae
        self._images += 1

    def result(self) -> SalMetricResult:
        """The figures over all images so far. Raises ValueError before the first one."""
        if self._images == 0:
            raise ValueError("no image has been added yet")
        precision = self._precision / self._images
        recall = self._recall / self._images
        f_measure = (
            (1 + self.beta_squared) * precision * recall / (self.beta_squared * precision + recall)
        )
        best = int(f_measure.argmax())
        return SalMetricResult(
            max_f=float(f_measure[best]),
            mean_f=float(f_measure.mean()),
            mae=self._error / self._images,
            threshold=best,
            images=self._images,
            precision=precision,
            recall=recall,
            f_measure=f_measure,
        )
