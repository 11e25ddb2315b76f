"""``sodfast plot``: pictures that papers print."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..metrics.scores import CONVENTIONS, FIGURES
from . import UsageError, WorkError, new_png, positive

if TYPE_CHECKING:
    from ..plot import TradeoffRow


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("plot", help="pictures of figures: accuracy against cost")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    tradeoff = kinds.add_parser(
        "tradeoff",
        help="F against parameters, MACs and images per second",
        description="Draws networks of three sources together: rows of a CSV file (what papers "
        "print), results of `sodfast eval --json`, and weights that are evaluated now.",
    )
    tradeoff.add_argument("-o", "--output", required=True, type=new_png, metavar="FILE.png")
    tradeoff.add_argument(
        "--rows", nargs="+", action="extend", default=[], metavar="FILE.csv",
        help="published rows: name, f, parameters, macs, images_per_second, family, source",
    )  # fmt: skip
    tradeoff.add_argument(
        "--results", nargs="+", action="extend", default=[], metavar="FILE.json",
        help="what `sodfast eval --weights … --json` printed",
    )  # fmt: skip
    tradeoff.add_argument(
        "--weights", nargs="+", action="extend", default=[], metavar="FILE",
        help="weights to evaluate now on --data",
    )  # fmt: skip
    tradeoff.add_argument("--data", metavar="DIR", help="the data set for --weights")
    tradeoff.add_argument(
        "--distance", action="store_true", help="depth maps of --data are distances: far is bright"
    )
    tradeoff.add_argument("--threads", type=positive, metavar="N", help="default: all cores")
    tradeoff.add_argument(
        "--figure", choices=tuple(FIGURES), default="max_f", help="the vertical axis (max_f)"
    )
    tradeoff.add_argument(
        "--convention", choices=tuple(CONVENTIONS), default="salmetric",
        help="of --results and --weights; the rows must follow the same (salmetric)",
    )  # fmt: skip
    tradeoff.add_argument("--data-set", metavar="NAME", help="which of the data sets in --results")
    tradeoff.add_argument(
        "--macs", choices=("paper", "conv"), default="paper",
        help="how to count for --results and --weights: as the CSNet papers (the default), or "
        "the convolutions alone",
    )  # fmt: skip
    tradeoff.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ..plot import draw_tradeoff, read_rows, require_matplotlib

    if not (arguments.rows or arguments.results or arguments.weights):
        raise UsageError("nothing to draw: give --rows, --results or --weights")
    if bool(arguments.weights) != bool(arguments.data):
        raise UsageError("--weights and --data go together")
    if arguments.distance and not arguments.weights:
        raise UsageError("--distance is for --weights: nothing else reads depth maps here")
    try:
        require_matplotlib()
        rows = [row for path in arguments.rows for row in read_rows(path)]
        for path in arguments.results:
            rows.append(_from_results(_read_json(path), path, arguments))
        for weights in arguments.weights:
            rows.append(_from_results(_evaluate(weights, arguments), weights, arguments))
        label = f"{FIGURES[arguments.figure]}, {CONVENTIONS[arguments.convention]}"
        remarks = draw_tradeoff(rows, arguments.output, label)
    except (ImportError, OSError, ValueError) as error:
        raise WorkError(error) from error
    for remark in remarks:
        print(f"sodfast: {remark}", file=sys.stderr)
    print(f"{arguments.output}: {len(rows)} networks")
    return 0


def _read_json(path: str) -> dict[str, Any]:
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(results, dict) or results.get("format") != 1 or "datasets" not in results:
        raise ValueError(f"{path}: not a file of `sodfast eval --json`")
    if not results.get("model"):
        raise ValueError(f"{path}: it scores a folder of maps, so it knows no parameters")
    return results


def _evaluate(weights: str, arguments: argparse.Namespace) -> dict[str, Any]:
    from ..report import as_json
    from .evaluate import evaluate_weights

    evaluations, model, _ = evaluate_weights(
        weights, [arguments.data], arguments.threads, disparity=not arguments.distance
    )
    for evaluation in evaluations:
        if not evaluation.complete:
            raise ValueError(
                f"{evaluation.name}: {len(evaluation.maps)} of {evaluation.truths} could be "
                "scored; `sodfast eval` tells why"
            )
    return as_json(evaluations, model)


def _from_results(
    results: dict[str, Any], source: str, arguments: argparse.Namespace
) -> TradeoffRow:
    from ..plot import TradeoffRow

    sets = {entry["name"]: entry for entry in results["datasets"]}
    wanted = arguments.data_set
    if wanted is None and len(sets) > 1:
        raise ValueError(f"{source}: --data-set must say which of {', '.join(sets)}")
    if wanted is not None and wanted not in sets:
        raise ValueError(f"{source}: holds no data set {wanted!r}, only {', '.join(sets)}")
    figures = sets[wanted or next(iter(sets))]["figures"].get(arguments.convention, {})
    value = figures.get(arguments.figure)
    if value is None:
        raise ValueError(
            f"{source}: {CONVENTIONS[arguments.convention]} has no {FIGURES[arguments.figure]} here"
        )
    model = results["model"]
    speed = model.get("images_per_second") or {}
    return TradeoffRow(
        name=Path(model["weights"]).stem,
        f=value,
        parameters=model["parameters"],
        macs=model[f"{arguments.macs}_macs"],
        images_per_second=speed.get("network"),
        ours=True,
    )
