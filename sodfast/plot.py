"""Pictures of figures: curves over the threshold, and accuracy against cost.

matplotlib is an optional extra; it is imported when something is drawn, not before.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .evaluate import Evaluation
from .metrics import CONVENTIONS
from .weights import atomic_write

__all__ = [
    "COLOURS",
    "COSTS",
    "TradeoffRow",
    "draw_curves",
    "draw_tradeoff",
    "read_rows",
    "readable_ticks",
    "require_matplotlib",
    "save_figure",
    "tidy",
]

_INK, _GRID, _FAINT = "#22282e", "#dfe3e7", "#8a949e"
# Distinct also for people who see colours differently (Okabe and Ito's set).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLES = {"salmetric": "-", "pysodmetrics": "--", "kd_scfnet_toolbox": ":"}

# What a network costs: the column of the CSV, the axis, and which side is better.
COSTS = {
    "parameters": ("parameters", "left"),
    "macs": ("multiply-accumulates of one image", "left"),
    "images_per_second": ("images per second", "right"),
}
_OTHER_COLUMNS = ("family", "source")
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def require_matplotlib() -> Any:
    """matplotlib.pyplot, drawing to files only. ImportError with a sentence where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib, which is not installed: pip install 'sodfast[plots]', "
            "or pip install matplotlib"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_curves(
    evaluations: Sequence[Evaluation],
    path: str | os.PathLike[str],
    conventions: Sequence[str] = tuple(CONVENTIONS),
) -> None:
    """Writes a PNG: precision over recall, and F over the threshold, in every convention.

    Conventions are told apart by the kind of line, and by colour too where there is one data
    set; several have a colour each. Whole or not at all. Raises ValueError when there is
    nothing to draw, ImportError without matplotlib.
    """
    if not evaluations:
        raise ValueError("evaluations must not be empty: nothing was scored")
    plt = require_matplotlib()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    several = len(evaluations) > 1
    for number, evaluation in enumerate(evaluations):
        prefix = f"{evaluation.name}, " if several else ""
        for key in conventions:
            convention = CONVENTIONS[key]
            result = getattr(evaluation.scores, key).result()
            colour = COLOURS[(number if several else list(CONVENTIONS).index(key)) % len(COLOURS)]
            style = {"color": colour, "linestyle": _STYLES[key], "linewidth": 1.6}
            left.plot(result.recall, result.precision, label=f"{prefix}{convention}", **style)
            label = f"{prefix}{convention}: max {result.max_f:.4f}"
            right.plot(range(len(result.f_measure)), result.f_measure, label=label, **style)
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    left.set_title("Precision and recall")
    right.set(xlabel="threshold", ylabel="F, β² = 0.3", xlim=(0, 255), ylim=(0, 1.02))
    right.set_title("F over the threshold")
    for axes in (left, right):
        tidy(axes)
        axes.legend(loc="lower left" if axes is left else "lower center", fontsize=8.5)
    if len(evaluations) == 1:
        figure.suptitle(f"{evaluations[0].name}, {len(evaluations[0].maps):,} maps", color=_INK)
    save_figure(figure, path)


@dataclass(frozen=True)
class TradeoffRow:
    """A network in the trade-off plot; a cost that is not known is None.

    f: the figure on the vertical axis. family: rows of one family are joined by a line.
    ours: measured here, drawn in colour.
    """

    name: str
    f: float
    parameters: float | None = None
    macs: float | None = None
    images_per_second: float | None = None
    family: str = ""
    ours: bool = False


def read_rows(path: str | os.PathLike[str]) -> list[TradeoffRow]:
    """Published figures from a CSV file with a header.

    Columns: name and f; parameters, macs, images_per_second, each of which may be empty;
    family; source, which is for the reader. Numbers may end in K, M or G (thousand, million,
    thousand million). Raises FileNotFoundError, and ValueError that names line and column.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of rows: {path}")
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = [name.strip() for name in reader.fieldnames or ()]
        known = ("name", "f", *COSTS, *_OTHER_COLUMNS)
        missing = [name for name in ("name", "f") if name not in columns]
        unknown = [name for name in columns if name not in known]
        if missing or unknown:
            which = f"lacks {missing[0]!r}" if missing else f"has an unknown {unknown[0]!r}"
            raise ValueError(f"{path}: its header {which}; columns are {', '.join(known)}")
        reader.fieldnames = columns
        rows = []
        for cells in reader:
            place = f"{path}, line {reader.line_num}"
            if None in cells or None in cells.values():
                raise ValueError(f"{place}: {len(columns)} columns expected")
            f = _number(cells["f"], f"{place}, column f")
            if f is None or not cells["name"].strip():
                raise ValueError(f"{place}: name and f must not be empty")
            parameters, macs, speed = (
                _number(cells.get(cost, ""), f"{place}, column {cost}") for cost in COSTS
            )
            family = cells.get("family", "").strip()
            rows.append(TradeoffRow(cells["name"].strip(), f, parameters, macs, speed, family))
    return rows


def _number(text: str, place: str) -> float | None:
    """A positive number with K, M or G behind it, or None where the cell is empty."""
    text = text.strip()
    if not text:
        return None
    found = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?)\s*([kmg]?)", text, re.IGNORECASE)
    try:
        value = float(found[1]) * _FACTORS[found[2].lower()] if found else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{place}: a positive number expected, got {text!r}")
    return value


def draw_tradeoff(
    rows: Sequence[TradeoffRow], path: str | os.PathLike[str], label: str = "max F"
) -> list[str]:
    """Writes a PNG: the figure against parameters, MACs and speed, a panel for each.

    label: the vertical axis. A row without a cost is left out of that panel, and a panel
    without rows is left out; returns a sentence for each of these. Whole or not at all.
    Raises ValueError when there is nothing to draw, ImportError without matplotlib.
    """
    panels = {cost: [row for row in rows if getattr(row, cost) is not None] for cost in COSTS}
    remarks = []
    for cost, present in panels.items():
        absent = [row.name for row in rows if row not in present]
        if absent:
            remarks.append(f"no {cost.replace('_', ' ')} known of {', '.join(absent)}")
    panels = {cost: present for cost, present in panels.items() if present}
    if not panels:
        raise ValueError("rows must hold at least one network with a cost")
    plt = require_matplotlib()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.6), layout="constrained", squeeze=False,
        sharey=True,
    )  # fmt: skip
    for panel, (cost, present) in zip(axes[0], panels.items()):
        _draw_panel(panel, cost, present)
    axes[0][0].set_ylabel(label)
    figure.canvas.draw()  # places everything; only now is it known where labels would be
    for panel, (cost, present) in zip(axes[0], panels.items()):
        _label_points(figure, panel, cost, present)
    save_figure(figure, path)
    return remarks


def _draw_panel(axes: Any, cost: str, rows: Sequence[TradeoffRow]) -> None:
    title, better = COSTS[cost]
    families: dict[str, list[TradeoffRow]] = {}
    for row in rows:
        if row.family:
            families.setdefault(row.family, []).append(row)
    for members in families.values():
        members.sort(key=lambda row: getattr(row, cost))
        x, y = [getattr(row, cost) for row in members], [row.f for row in members]
        axes.plot(x, y, color=COLOURS[0] if members[0].ours else _FAINT, linewidth=1, zorder=1)
    for ours, colour in ((False, _FAINT), (True, COLOURS[0])):
        chosen = [row for row in rows if row.ours is ours]
        axes.scatter(
            [getattr(row, cost) for row in chosen], [row.f for row in chosen],
            color=colour, s=34 if ours else 24, zorder=2 + ours,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel(f"{title}  ({'←' if better == 'left' else '→'} better)")
    readable_ticks(axes, [getattr(row, cost) for row in rows])
    # Room at the sides for the labels.
    axes.margins(x=0.16, y=0.1)
    tidy(axes)


def readable_ticks(axes: Any, values: Sequence[float]) -> None:
    """Numbers like 100 K on a logarithmic axis, and more of them when it spans little."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(max(values) / min(values))
    steps = (1.0,) if decades > 2 else (1.0, 2.0, 5.0) if decades > 0.6 else range(1, 10)
    axes.xaxis.set_major_locator(LogLocator(subs=tuple(float(step) for step in steps)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " K")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _label_points(figure: Any, axes: Any, cost: str, rows: Sequence[TradeoffRow]) -> None:
    """Writes each name beside its point, where it covers no point and no other name."""
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer()
    points = [axes.transData.transform((getattr(row, cost), row.f)) for row in rows]
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    frame = axes.get_window_extent(renderer)
    # Right, left, above, below, the corners; then the same further away.
    directions = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    places = [(dx * far, dy * far) for far in (6, 14, 24, 36) for dx, dy in directions]
    for row in sorted(rows, key=lambda row: (not row.ours, -row.f)):
        text = axes.annotate(
            row.name, (getattr(row, cost), row.f), (0, 0), textcoords="offset points", fontsize=8.5,
            color=_INK if row.ours else "#5a646e", zorder=4,
        )  # fmt: skip
        best: tuple[float, tuple[int, int], Any] | None = None
        for place in places:
            text.set_position(place)
            text.set_horizontalalignment(_side(place[0], "right", "center", "left"))
            text.set_verticalalignment(_side(place[1], "top", "center", "bottom"))
            box = text.get_window_extent(renderer).expanded(1.02, 1.05)
            covered = sum(_overlap(box, other) for other in taken)
            outside = box.width * box.height - _overlap(box, frame)
            cost_here = covered + 4 * max(0.0, outside) + 0.05 * math.hypot(*place)
            if best is None or cost_here < best[0]:
                best = (cost_here, place, box)
        assert best is not None
        _, place, box = best
        text.set_position(place)
        text.set_horizontalalignment(_side(place[0], "right", "center", "left"))
        text.set_verticalalignment(_side(place[1], "top", "center", "bottom"))
        taken.append(box)
        if math.hypot(*place) > 16:  # far from its point: a line leads there
            axes.annotate(
                "", (getattr(row, cost), row.f), xytext=(place[0] * 0.9, place[1] * 0.9),
                textcoords="offset points", zorder=1,
                arrowprops={"arrowstyle": "-", "color": _FAINT, "linewidth": 0.6},
            )  # fmt: skip


def _side(value: float, negative: str, zero: str, positive: str) -> str:
    return negative if value < 0 else positive if value > 0 else zero


def _overlap(a: Any, b: Any) -> float:
    """The area that two boxes share, in square pixels."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)


def tidy(axes: Any) -> None:
    """The looks that our plots share."""
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK)


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure as a PNG, whole or not at all, and closes it."""
    import matplotlib.pyplot as plt

    try:
        with atomic_write(path, sync=False) as file:
            figure.savefig(file, format="png", dpi=150)
    finally:
        plt.close(figure)
