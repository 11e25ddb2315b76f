"""All measures in the convention of PySODMetrics, which most newer papers report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .alignment import e_measure
from .counts import LEVELS, Counted, at_least
from .structure import s_measure
from .weighted import weighted_f_measure

__all__ = ["PySODMetrics", "PySODMetricsResult"]


@dataclass(frozen=True)
class PySODMetricsImage:
    """One map's figures: six numbers, and four curves (256,) over the thresholds 0 … 255."""

    mae: float
    adaptive_f: float
    weighted_f: float
    s: float
    adaptive_e: float
    precision: np.ndarray
    recall: np.ndarray
    f_measure: np.ndarray
    e_measure: np.ndarray

    @property
    def max_f(self) -> float:
        return float(self.f_measure.max())

    @property
    def mean_f(self) -> float:
        return float(self.f_measure.mean())

    @property
    def max_e(self) -> float:
        return float(self.e_measure.max())

    @property
    def mean_e(self) -> float:
        return float(self.e_measure.mean())


@dataclass(frozen=True)
class PySODMetricsResult(PySODMetricsImage):
    """What `PySODMetrics.result` returns: the means over the images, curves too.

    mae, adaptive_f, weighted_f, s, adaptive_e: float. precision, recall, f_measure,
    e_measure: (256,) float64, threshold 0 … 255. max_f, mean_f, max_e, mean_e: of the
    averaged curves. images: how many were added.
    """

    images: int = 0


def measure(image: Counted, beta_squared: float = 0.3) -> PySODMetricsImage:
    """One map's figures in this convention; see `PySODMetrics`."""
    values = image.normalised
    total = image.background + image.foreground
    wrong = total @ values - image.foreground @ values + image.foreground @ (1 - values)

    # The stretched map as 8 bits again, truncated: the thresholds are those of that map.
    # (Levels below the lowest do not occur; clipping only keeps them from wrapping around.)
    levels = (np.clip(values, 0, 1) * 255).astype(np.uint8)
    hits = at_least(_relabel(image.foreground, levels))
    marked = at_least(_relabel(total, levels))
    precision, recall, f_measure = _f_measure(hits, marked, image.positives, beta_squared)
    e_curve = e_measure(hits, marked, image.positives, image.size)

    hits = np.array([image.foreground[image.adaptive].sum()])
    marked = np.array([total[image.adaptive].sum()])
    return PySODMetricsImage(
        mae=float(wrong) / image.size,
        adaptive_f=float(_f_measure(hits, marked, image.positives, beta_squared)[2][0]),
        weighted_f=weighted_f_measure(image),
        s=s_measure(image),
        adaptive_e=float(e_measure(hits, marked, image.positives, image.size)[0]),
        precision=precision,
        recall=recall,
        f_measure=f_measure,
        e_measure=e_curve,
    )


def _relabel(histogram: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The histogram after each level has become levels[level]."""
    moved = np.zeros(LEVELS, np.int64)
    np.add.at(moved, levels, histogram)
    return moved


def _f_measure(
    hits: np.ndarray, marked: np.ndarray, positives: int, beta_squared: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F; each 0 where there is nothing to divide by."""
    precision = hits / np.maximum(marked, 1)
    recall = hits / max(positives, 1)
    below = np.where(hits > 0, beta_squared * precision + recall, 1.0)
    return precision, recall, (1 + beta_squared) * precision * recall / below


class PySODMetrics:
    """MAE, F, weighted F, S and E in the convention of the PySODMetrics program.

    Prediction: 8 bit, min–max normalised per image (a constant map stays as it is). Truth:
    pixels over 128. For every image alone, with B_t = (M ≥ t), t = 0 … 255 of the normalised
    map in 8 bits::

        F_t = (1 + β²) P R / (β² P + R),  β² = 0.3        E_t as in `alignment.e_measure`

    The curves are averaged over the images; max and mean are those of the averaged curve.
    Adaptive: at the threshold min(2 · mean(M), 1) of each image. Weighted F (β² = 1), S
    (α = 0.5) and MAE (of the normalised map) are averaged over the images.

    With an empty truth F and weighted F are 0, S is 1 − mean(M), E is the share of unmarked
    pixels. A full truth needs no exception but E's: the share of marked pixels.

    >>> metric = PySODMetrics()
    >>> metric.add(prediction, truth)      # uint8 (H, W) each, once per image
    >>> metric.result().weighted_f
    """

    def __init__(self) -> None:
        self._images: list[PySODMetricsImage] = []

    def add(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Adds one image; arguments and errors as for `SalMetric.add`."""
        self.add_measured(measure(Counted(prediction, truth)))

    def add_measured(self, image: PySODMetricsImage) -> None:
        """Adds one image that `measure` has seen."""
        self._images.append(image)

    def result(self) -> PySODMetricsResult:
        """The figures over all images so far. Raises ValueError before the first one."""
        if not self._images:
            raise ValueError("no image has been added yet")

        def mean(name: str) -> float:
            return float(np.mean([getattr(image, name) for image in self._images]))

        def curve(name: str) -> np.ndarray:
            return np.mean([getattr(image, name) for image in self._images], axis=0)

        return PySODMetricsResult(
            mae=mean("mae"),
            adaptive_f=mean("adaptive_f"),
            weighted_f=mean("weighted_f"),
            s=mean("s"),
            adaptive_e=mean("adaptive_e"),
            precision=curve("precision"),
            recall=curve("recall"),
            f_measure=curve("f_measure"),
            e_measure=curve("e_measure"),
            images=len(self._images),
        )
