"""Figures of merit for saliency maps.

Three different numbers are published under the name "max-F". Each class here names the
convention it follows, after the program that defines it; `score` and `Scores` give all.

    SalMetric           max F, mean F, MAE                                the CSNet papers
    PySODMetrics        MAE, F, weighted F, S, E (max, mean, adaptive)    most newer papers
    KDSCFNetToolbox     max F, adaptive E, MAE                            the KD-SCFNet paper

Files: counts (the histograms that all share), one for each convention, and one for each
measure that is more than a few lines: structure (S), alignment (E), weighted (weighted F).
"""

from .alignment import e_measure
from .counts import Counted
from .pysodmetrics import PySODMetrics, PySODMetricsResult
from .salmetric import SalMetric, SalMetricResult
from .scores import CONVENTIONS, FIGURES, ImageScores, Scores, score
from .structure import s_measure
from .toolbox import KDSCFNetToolbox, KDSCFNetToolboxResult
from .weighted import nearest_foreground, weighted_f_measure

__all__ = [
    "CONVENTIONS",
    "FIGURES",
    "Counted",
    "ImageScores",
    "KDSCFNetToolbox",
    "KDSCFNetToolboxResult",
    "PySODMetrics",
    "PySODMetricsResult",
    "SalMetric",
    "SalMetricResult",
    "Scores",
    "e_measure",
    "nearest_foreground",
    "s_measure",
    "score",
    "weighted_f_measure",
]
