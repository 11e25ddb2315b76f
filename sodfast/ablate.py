"""Ablations: the runs of an entry in `sodfast.ablations`, a table and a plot of them."""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .ablate_pictures import draw_all
from .ablate_plot import draw_costs, draw_epochs
from .ablations import Ablation
from .recipe import Recipe, load_recipe
from .runlog import read_log
from .train import train
from .weights import atomic_write

__all__ = ["Run", "ablate", "as_markdown", "plan"]


class Run(NamedTuple):
    """One training run of an ablation. folder: its name below the ablation's folder. teacher:
    the weights that it distils, where the ablation compares teachers."""

    series: str
    point: str
    seed: int
    folder: str
    recipe: Recipe
    teacher: str = ""

    @property
    def label(self) -> str:
        return f"{self.series}, {self.point}" if self.point else self.series


def plan(
    ablation: Ablation,
    recipe: str | os.PathLike[str] | None = None,
    settings: Sequence[str] = (),
    seeds: int = 1,
    teachers: Sequence[str | os.PathLike[str]] = (),
) -> list[Run]:
    """The runs of an ablation: all labels with the first seed, then with the next.

    recipe, settings: as of `sodfast.recipe.load_recipe`; what the ablation varies comes last;
    without a recipe the ablation's own. seeds: how many per label, from the recipe's on.
    teachers: weight files, for an ablation that compares them; one, for dynamic distillation.

    Raises ValueError for a setting that the ablation itself varies and for teachers that are
    missing, alike or out of place, and what load_recipe raises.
    """
    recipe = recipe or ablation.recipe
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if key in ablation.varied:
            raise ValueError(f"{key} is what this ablation varies: it cannot be set")
    if ablation.dynamic:
        if len(teachers) != 1:
            raise ValueError(f"this ablation needs one teacher, got {len(teachers)}")
    elif ablation.taught != bool(teachers):
        raise ValueError(
            "this ablation compares teachers: name at least one"
            if ablation.taught
            else f"this ablation has no teacher, got {os.fspath(teachers[0])}"
        )
    listed: list[tuple[str, str, dict[str, Any], str]]
    listed = [(series, point, varied, "") for series, point, varied in ablation.runs]
    for path in map(Path, teachers if ablation.taught else ()):
        # Training calls all its results alike: then the folder says which run it was.
        name = path.parent.name if path.stem in ("weights", "trained") else path.stem
        listed.append((name or path.stem, "", {}, str(path)))
    first = load_recipe(recipe, settings).seed
    runs: list[Run] = []
    for seed in range(first, first + seeds):
        for series, point, varied, teacher in listed:
            own = {**varied, "seed": seed}
            words = [f"{key}={json.dumps(value)}" for key, value in own.items()]
            folder = re.sub(r"[^\w.×]+", "-", f"{series} {point} seed {seed}".replace("  ", " "))
            if any(run.folder == folder for run in runs):
                raise ValueError(f"two teachers are called {series!r}: rename {teacher}")
            each = load_recipe(recipe, [*settings, *words])
            if ablation.dynamic and each.loss == "dkd":
                teacher = os.fspath(teachers[0])
                _check_weights(each, varied)
            runs.append(Run(series, point, seed, folder, each, teacher))
    return runs


def _check_weights(recipe: Recipe, varied: dict[str, Any]) -> None:
    """ValueError where the shared recipe leaves a run of dynamic distillation another one."""
    if "fixed_weight" in recipe.dkd and "dkd.fixed_weight" not in varied:
        raise ValueError(
            f"the recipe has dkd.fixed_weight = {recipe.dkd['fixed_weight']}, so that nothing is "
            "dynamic: take one without it"
        )
    if not recipe.dkd.get("threshold", True) and set(varied) == {"loss"}:
        raise ValueError("the recipe has dkd.threshold = 0, no noise elimination: take one with it")


def ablate(
    ablation: Ablation,
    runs: Sequence[Run],
    data: str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    val: str | os.PathLike[str] | None = None,
    device: str | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    images: str | os.PathLike[str] | None = None,
) -> list[dict[str, Any]]:
    """Trains what is not trained yet, and returns a row per label; folder/table.md, table.json
    and plot.png (where matplotlib is installed) are written after every run; of dynamic
    distillation also `ablate_pictures.draw_all`'s at the end.

    runs: from :func:`plan`. A run that has its results.json is not run again, one that was
    killed is resumed. images: without ground truth, for runs that have a teacher; data may then
    be None. Other arguments, and errors, as of `sodfast.train.train`; ValueError also where a
    run in the folder was done with other settings.
    """
    folder = Path(folder)
    done: list[tuple[Run, dict[str, Any]]] = []
    rows: list[dict[str, Any]] = []
    for number, run in enumerate(runs, 1):
        place = folder / run.folder
        if not _finished(run, place):
            if progress:
                print(f"run {number} of {len(runs)}: {run.label}", file=sys.stderr)
            train(
                run.recipe, data, place, val, resume=True, device=device, cache_folder=cache_folder,
                progress=progress, teacher=run.teacher or None, images=images,
            )  # fmt: skip
        if os.environ.get("RANK", "0") != "0":  # under torchrun the first process writes
            continue
        done.append((run, json.loads((place / "results.json").read_text(encoding="utf-8"))))
        rows = _rows(done)
        _write(folder / "table.md", as_markdown(ablation, rows))
        _write(folder / "table.json", json.dumps({"paper": ablation.paper, "rows": rows}, indent=1))
        _draw(ablation, rows, [run for run, _ in done], folder)
    if ablation.dynamic and done:
        first = {run.label: folder / run.folder for run, _ in reversed(done)}  # of the first seed
        places = {run.label: first[run.label] for run, _ in done}
        draw_all(places, folder, val, done[0][0].recipe.disparity)
    return rows


def _finished(run: Run, place: Path) -> bool:
    """Whether the run is there; a ValueError where another one is."""
    if not (place / "results.json").is_file():
        return False
    # A setting that came later than the run was at its default then.
    then = {**Recipe().as_dict(), **read_log(place, "start")[-1]["recipe"]}
    differs = [key for key, value in run.recipe.as_dict().items() if then[key] != value]
    if differs:
        raise ValueError(
            f"{place} was run with other settings ({', '.join(differs)}): choose another folder"
        )
    return True


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


_FIGURES = ("params", "conv_macs", "paper_macs", "max_f", "mae")


def _rows(done: Sequence[tuple[Run, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Per label the means over its seeds; max_f and mae also with their least and greatest."""
    labels = dict.fromkeys((run.series, run.point) for run, _ in done)
    rows = []
    for series, point in labels:
        own = [result for run, result in done if (run.series, run.point) == (series, point)]
        row: dict[str, Any] = {"series": series, "point": point, "seeds": len(own)}
        # Before the elimination where there was one.
        row["params_before"] = own[0].get("trained", own[0]["result"])["params"]
        for figure in _FIGURES:
            values = [result["result"][figure] for result in own if figure in result["result"]]
            if values:
                row[figure] = statistics.fmean(values)
                row[f"{figure}_range"] = [min(values), max(values)]
        rows.append(row)
    return rows


def as_markdown(ablation: Ablation, rows: Sequence[dict[str, Any]]) -> str:
    """The table: cost and scores of every label; ± is half the range over several seeds."""
    lines = [
        f"{ablation.title} ({ablation.paper})",
        "",
        "| | | parameters before | after | conv MACs | paper MACC | max-F | MAE |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        scores = []
        for figure in ("max_f", "mae"):
            if figure not in row:
                scores.append("–")
                continue
            low, high = row[f"{figure}_range"]
            spread = f" ± {(high - low) / 2:.4f}" if row["seeds"] > 1 else ""
            scores.append(f"{row[figure]:.4f}{spread}")
        lines.append(
            f"| {row['series']} | {row['point']} | {row['params_before']:,} | "
            f"{row['params']:,.0f} | {row['conv_macs'] / 1e9:.4f} G | "
            f"{row['paper_macs'] / 1e9:.4f} G | {' | '.join(scores)} |"
        )
    lines += ["", f"{rows[0]['seeds']} seed(s) per line; scores of the validation pairs."]
    return "\n".join(lines)


def _draw(
    ablation: Ablation, rows: Sequence[dict[str, Any]], runs: Sequence[Run], folder: Path
) -> None:
    """plot.png; nothing where no run was scored (no pairs to validate on)."""
    if not any("max_f" in row for row in rows):
        return
    try:
        if not ablation.by_epoch:
            draw_costs(rows, folder / "plot.png", ablation.title)
            return
        curves: dict[str, list[list[dict[str, float]]]] = {}
        for run in runs:
            start = read_log(folder / run.folder, "start")[-1]
            events = read_log(folder / run.folder, "validation")
            per_epoch = start["steps"] / run.recipe.epochs
            curves.setdefault(run.label, []).append(
                [{**event, "epoch": event["step"] / per_epoch} for event in events]
            )
        draw_epochs(curves, folder / "plot.png", ablation.title)
    except ImportError as error:  # matplotlib is an extra; the table says the same
        print(f"sodfast: warning: {error}", file=sys.stderr)
