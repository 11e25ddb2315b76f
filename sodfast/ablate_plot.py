"""Plots of ablations: scores over what the networks cost, or over the epochs of training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .plot import COLOURS, readable_ticks, require_matplotlib, save_figure, tidy

__all__ = ["draw_costs", "draw_epochs"]

_COSTS = {"params": "parameters", "conv_macs": "multiply-accumulates of the convolutions"}
_SCORES = {"mae": "MAE of the validation pairs", "max_f": "max-F of the validation pairs"}


def draw_costs(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str) -> None:
    """Writes a PNG: max-F over parameters and over work, a line per series.

    rows: as `sodfast.ablate.ablate` returns them; those without max_f are left out. Over
    several seeds a bar spans least and greatest. Raises ImportError without matplotlib.
    """
    plt = require_matplotlib()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    rows = [row for row in rows if "max_f" in row]
    for axes, (cost, label) in zip(panels, _COSTS.items()):
        for number, series in enumerate(dict.fromkeys(row["series"] for row in rows)):
            own = sorted((row for row in rows if row["series"] == series), key=lambda r: r[cost])
            colour = COLOURS[number % len(COLOURS)]
            x, y = [row[cost] for row in own], [row["max_f"] for row in own]
            below = [row["max_f"] - row["max_f_range"][0] for row in own]
            above = [row["max_f_range"][1] - row["max_f"] for row in own]
            axes.errorbar(x, y, (below, above), color=colour, marker="o", markersize=5,
                          linewidth=1.2, capsize=2, label=series)  # fmt: skip
            names: dict[tuple[float, float], list[str]] = {}
            for row in own:  # several settings may end in the same network
                names.setdefault((row[cost], row["max_f"]), []).append(row["point"])
            for place, several in names.items():
                # Series above each other: one's names over its points, the next's under them.
                axes.annotate(
                    ", ".join(several), place, (0, -12 if number % 2 else 7),
                    textcoords="offset points", ha="center", fontsize=8, color=colour,
                )  # fmt: skip
        # At least a factor of 1.6 wide, so that equal costs look equal.
        low, high = 0.8 * min(row[cost] for row in rows), 1.25 * max(row[cost] for row in rows)
        axes.set(xscale="log", xlim=(low, high), xlabel=f"{label}  (← better)")
        readable_ticks(axes, [low, high])
        axes.margins(y=0.15)
        tidy(axes)
    panels[0].set_ylabel(_SCORES["max_f"])
    panels[0].legend(fontsize=8.5)
    figure.suptitle(title)
    save_figure(figure, path)


def draw_epochs(
    curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
    path: str | os.PathLike[str],
    title: str,
) -> None:
    """Writes a PNG: MAE and max-F over the epochs of training, a colour per label.

    curves: per label a list of runs, each a list of validations with the keys "epoch", "mae"
    and "max_f". Raises ImportError without matplotlib.
    """
    plt = require_matplotlib()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axes, (score, label) in zip(panels, _SCORES.items()):
        for number, (series, runs) in enumerate(curves.items()):
            for events in runs:
                axes.plot(
                    [event["epoch"] for event in events], [event[score] for event in events],
                    color=COLOURS[number % len(COLOURS)], linewidth=1.4, marker=".",
                    label=series if events is runs[0] else None,
                )  # fmt: skip
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        tidy(axes)
    panels[0].legend(fontsize=8.5)
    figure.suptitle(title)
    save_figure(figure, path)
