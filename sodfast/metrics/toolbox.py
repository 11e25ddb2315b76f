"""Max-F, E and MAE as the KD-SCFNet paper's toolbox has them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .alignment import e_measure
from .counts import LEVELS, Counted, at_least

__all__ = ["KDSCFNetToolbox", "KDSCFNetToolboxResult"]

_EPS = float(np.spacing(1))


@dataclass(frozen=True)
class KDSCFNetToolboxResult:
    """What `KDSCFNetToolbox.result` returns.

    max_f: the largest F-measure over the thresholds; NaN when every truth was empty.
    adaptive_e: E at the adaptive threshold. mae: mean absolute error of the stretched maps.
    images: how many were added. images_with_truth: how many of them F is an average of.
    precision, recall, f_measure: (256,) float64, threshold t / 255.
    """

    max_f: float
    adaptive_e: float
    mae: float
    images: int
    images_with_truth: int
    precision: np.ndarray
    recall: np.ndarray
    f_measure: np.ndarray


@dataclass(frozen=True)
class KDSCFNetToolboxImage:
    """One image's share; precision and recall (256,), or None for an empty truth."""

    adaptive_e: float
    mae: float
    precision: np.ndarray | None
    recall: np.ndarray | None


def measure(image: Counted) -> KDSCFNetToolboxImage:
    """One map's figures in this convention; see `KDSCFNetToolbox`."""
    total = image.background + image.foreground
    if image.constant:
        # Nothing to stretch: all zero here. Twice the mean is then zero, which all pixels reach.
        steps = np.zeros(LEVELS, np.int64)
        passed = np.ones(LEVELS, bool)
    else:
        steps, passed = np.maximum(image.steps, 0), image.adaptive
    wrong = int(total @ steps) - 2 * int(image.foreground @ steps) + image.span * image.positives

    hits = np.array([image.foreground[passed].sum()])
    marked = np.array([total[passed].sum()])
    adaptive_e = float(e_measure(hits, marked, image.positives, image.size)[0])
    mae = wrong / (image.span * image.size)
    if image.positives == 0:
        return KDSCFNetToolboxImage(adaptive_e, mae, None, None)
    # The highest t with step / span ≥ t / 255, in whole numbers.
    reached = np.minimum(steps * 255 // image.span, 255)
    hits = at_least(np.bincount(reached, image.foreground, LEVELS))
    marked = at_least(np.bincount(reached, total, LEVELS))
    return KDSCFNetToolboxImage(adaptive_e, mae, hits / (marked + _EPS), hits / image.positives)


class KDSCFNetToolbox:
    """Max-F, E and MAE in the convention of the toolbox that the KD-SCFNet paper uses.

    Prediction M: 8 bit, min–max normalised per image (a constant map becomes zero). Truth:
    pixels over 128. With B_t = (M ≥ t / 255), t = 0 … 255, precision and recall are averaged
    over the images first; F = (1 + β²) P R / (β² P + R) of the averages, β² = 0.3, and max-F
    is the largest. E is that of `alignment.e_measure` at the threshold min(2 · mean(M), 1),
    MAE that of the normalised map, both averaged over the images.

    An image with an empty truth has no recall: it counts for E and MAE but not for F. (The
    toolbox stretches the truth too, so that a full one becomes empty; here it stays full.)

    >>> metric = KDSCFNetToolbox()
    >>> metric.add(prediction, truth)      # uint8 (H, W) each, once per image
    >>> metric.result().max_f
    """

    def __init__(self, beta_squared: float = 0.3) -> None:
        if not beta_squared > 0:
            raise ValueError(f"beta_squared must be positive, got {beta_squared}")
        self.beta_squared = float(beta_squared)
        self._precision = np.zeros(LEVELS)
        self._recall = np.zeros(LEVELS)
        self._with_truth = 0
        self._alignment = 0.0
        self._error = 0.0
        self._images = 0

    def add(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Adds one image; arguments and errors as for `SalMetric.add`."""
        self.add_measured(measure(Counted(prediction, truth)))

    def add_measured(self, image: KDSCFNetToolboxImage) -> None:
        """Adds one image that `measure` has seen."""
        if image.precision is not None and image.recall is not None:
            self._precision += image.precision
            self._recall += image.recall
            self._with_truth += 1
        self._alignment += image.adaptive_e
        self._error += image.mae
        self._images += 1

    def result(self) -> KDSCFNetToolboxResult:
        """The figures over all images so far. Raises ValueError before the first one."""
        if self._images == 0:
            raise ValueError("no image has been added yet")
        counted = self._with_truth or np.nan
        precision, recall = self._precision / counted, self._recall / counted
        below = self.beta_squared * precision + recall
        f_measure = (1 + self.beta_squared) * precision * recall / np.where(below == 0, 1.0, below)
        return KDSCFNetToolboxResult(
            max_f=float(f_measure.max()),
            adaptive_e=self._alignment / self._images,
            mae=self._error / self._images,
            images=self._images,
            images_with_truth=self._with_truth,
            precision=precision,
            recall=recall,
            f_measure=f_measure,
        )
