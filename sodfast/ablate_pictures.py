"""Pictures of dynamic distillation's runs side by side (Ren et al., figs. 5, 7 and 8)."""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .data.folders import Pair, find_data
from .data.grey import read_depth, read_grey
from .evaluate import Evaluation, evaluate_network
from .pictures import read_image
from .plot import COLOURS, draw_curves, require_matplotlib, save_figure, tidy
from .predict import Predictor
from .runlog import read_teaching
from .weights import atomic_write

__all__ = ["draw_all", "draw_heat", "draw_scatter"]

LAST = 10_000  # iterations, as in the paper's figure 7
PICTURES = 6


def draw_all(
    runs: Mapping[str, Path],
    folder: Path,
    val: str | os.PathLike[str] | None = None,
    disparity: bool = True,
) -> list[Path]:
    """scatter.png of the runs that distilled, and with `val` scores.md, the paper's figures of
    every run, and curves.png and heat.png of all.

    runs: label to the run's folder. val: pairs (with depth maps where a network takes them).
    disparity: what the depth maps are, see `sodfast.data.grey.read_depth`. Returns what was
    written; without matplotlib no pictures are, and a warning says so. Raises what reading `val`
    raises.
    """
    written = []
    predictors: dict[str, Predictor] = {}
    evaluations = []
    if val is not None:
        for label, place in runs.items():
            predictors[label] = Predictor(place / "weights.safetensors", disparity=disparity)
            evaluations.append(evaluate_network(predictors[label], val))
            evaluations[-1].name = label
        written.append(folder / "scores.md")
        with atomic_write(written[-1]) as file:
            file.write(_as_markdown(evaluations).encode())
    try:
        require_matplotlib()
    except ImportError as error:  # an extra; the tables say the same
        print(f"sodfast: warning: {error}", file=sys.stderr)
        return written
    taught = {label: read_teaching(place) for label, place in runs.items()}
    taught = {label: lines for label, lines in taught.items() if lines}
    if taught:
        written.append(folder / "scatter.png")
        draw_scatter(taught, written[-1])
    if val is not None:
        written.append(folder / "curves.png")
        draw_curves(evaluations, written[-1], ("pysodmetrics",))
        depth = any(predictor.channels == 4 for predictor in predictors.values())
        pairs = find_data(val, depth=depth).pairs
        pairs.sort(key=lambda pair: hashlib.sha256(pair.name.encode()).digest())
        written.append(folder / "heat.png")
        draw_heat(predictors, pairs[:PICTURES], written[-1])
    return written


def _as_markdown(evaluations: Sequence[Evaluation]) -> str:
    """A row per run: mean F, weighted F and MAE, as in the paper's tables 3 and 5."""
    lines = ["| | mean F | weighted F | MAE |", "|---|---:|---:|---:|"]
    for evaluation in evaluations:
        figures = evaluation.scores.figures()["pysodmetrics"]
        values = " | ".join(f"{figures[name]:.4f}" for name in ("mean_f", "weighted_f", "mae"))
        lines.append(f"| {evaluation.name} | {values} |")
    images = evaluations[0].scores.images
    lines += ["", f"{images} pictures at their own size (PySODMetrics), the first seed's weights."]
    return "\n".join(lines) + "\n"


def draw_scatter(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str]
) -> None:
    """Writes a PNG with a panel per run: in each of its last 10,000 iterations how right teacher
    and student were (soft IoU with the truth, mean of the batch).

    runs: label to lines of `sodfast.runlog.read_teaching`. Raises ImportError without matplotlib.
    """
    plt = require_matplotlib()
    figure, panels = plt.subplots(
        1, len(runs), figsize=(1 + 3 * len(runs), 3.6), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axes, (label, lines) in zip(panels[0], runs.items()):
        kept = [line for line in lines[-LAST:] if line["alpha"]]
        x = [line["batch"] + 1 for line in kept]
        scores = {
            "teacher": [statistics.fmean(line["alpha"]) for line in kept],
            "student": [1 - statistics.fmean(line["beta"]) for line in kept],
        }
        for number, (who, values) in enumerate(scores.items()):
            mean = statistics.fmean(values) if values else float("nan")
            axes.scatter(
                x, values, s=4, alpha=0.5, linewidths=0, color=COLOURS[number],
                label=f"{who}, mean {mean:.3f}",
            )  # fmt: skip
        axes.set(title=label, xlabel="iteration", ylim=(0, 1))
        tidy(axes)
        axes.legend(loc="lower left", fontsize=7.5, markerscale=3)
    panels[0][0].set_ylabel("soft IoU with the truth")
    save_figure(figure, path)


def draw_heat(
    predictors: Mapping[str, Predictor], pairs: Sequence[Pair], path: str | os.PathLike[str]
) -> None:
    """Writes a PNG with a row per picture (at least one, all with depth or none): photo, depth
    (where there is any), truth, and the map of every network in colours from cold (0) to hot (1).

    Raises ImportError without matplotlib, and what reading the files raises.
    """
    plt = require_matplotlib()
    depth = pairs[0].depth is not None
    titles = ["photo", *(["depth"] if depth else []), "truth", *predictors]
    figure, panels = plt.subplots(
        len(pairs), len(titles), figsize=(1.6 * len(titles), 1.5 * len(pairs)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, pair in zip(panels, pairs):
        cells: list[tuple[np.ndarray, str]] = [(read_image(pair.image), "gray")]
        if pair.depth is not None:
            meant = next(iter(predictors.values())).disparity
            cells.append((read_depth(pair.depth, meant), "gray"))
        cells.append((read_grey(pair.mask), "gray"))
        for predictor in predictors.values():
            given = pair.depth if predictor.channels == 4 else None
            cells.append((predictor(pair.image, given), "jet"))
        for axes, (cell, colours) in zip(row, cells):
            axes.imshow(cell, cmap=colours, vmin=0, vmax=255, interpolation="nearest")
            axes.set_axis_off()
    for axes, title in zip(panels[0], titles):
        axes.set_title(title, fontsize=8)
    save_figure(figure, path)
