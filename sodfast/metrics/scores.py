"""All conventions at once: one map is measured, many are added up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import pysodmetrics, salmetric, toolbox
from .counts import Counted, absolute_error

__all__ = ["CONVENTIONS", "FIGURES", "ImageScores", "Scores", "score"]

# Every convention by the name it has in tables and files.
CONVENTIONS = {
    "pysodmetrics": "PySODMetrics",
    "salmetric": "SalMetric",
    "kd_scfnet_toolbox": "KD-SCFNet toolbox",
}
# Every figure, in the order of the columns; not each convention has all of them.
FIGURES = {
    "mae": "MAE",
    "max_f": "max F",
    "mean_f": "mean F",
    "adaptive_f": "adaptive F",
    "weighted_f": "weighted F",
    "s": "S",
    "max_e": "max E",
    "mean_e": "mean E",
    "adaptive_e": "adaptive E",
}


@dataclass(frozen=True)
class ImageScores:
    """One map in every convention. height, width in pixels; positives: pixels of the truth."""

    height: int
    width: int
    positives: int
    constant: bool
    pysodmetrics: pysodmetrics.PySODMetricsImage
    salmetric: salmetric.SalMetricImage
    kd_scfnet_toolbox: toolbox.KDSCFNetToolboxImage


def score(prediction: np.ndarray, truth: np.ndarray) -> ImageScores:
    """Measures one map in every convention. Several threads may call it at once.

    prediction: (H, W) uint8. truth: (H, W) uint8 (foreground is > 128) or bool. Raises
    TypeError for another dtype and ValueError for a wrong rank, an empty image, or sizes
    that differ.
    """
    image = Counted(prediction, truth)
    return ImageScores(
        height=image.prediction.shape[0],
        width=image.prediction.shape[1],
        positives=image.positives,
        constant=image.constant,
        pysodmetrics=pysodmetrics.measure(image),
        salmetric=salmetric.measure(
            image.background, image.foreground, absolute_error(image.prediction, image.truth)
        ),
        kd_scfnet_toolbox=toolbox.measure(image),
    )


class Scores:
    """A data set's figures in every convention.

    >>> scores = Scores()
    >>> scores.add(score(prediction, truth))       # once per image
    >>> scores.figures()["salmetric"]["max_f"]
    """

    def __init__(self) -> None:
        self.pysodmetrics = pysodmetrics.PySODMetrics()
        self.salmetric = salmetric.SalMetric()
        self.kd_scfnet_toolbox = toolbox.KDSCFNetToolbox()
        self.images = 0

    def add(self, image: ImageScores) -> None:
        """Adds one image."""
        for convention in CONVENTIONS:
            getattr(self, convention).add_measured(getattr(image, convention))
        self.images += 1

    def figures(self) -> dict[str, dict[str, float]]:
        """Convention to figure to value, with the keys of CONVENTIONS and FIGURES.

        Raises ValueError before the first image.
        """
        results = {name: getattr(self, name).result() for name in CONVENTIONS}
        return {
            name: {
                figure: float(getattr(result, figure))
                for figure in FIGURES
                if hasattr(result, figure)
            }
            for name, result in results.items()
        }
