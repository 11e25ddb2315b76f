"""What `sodfast eval` writes: tables for people, JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from .evaluate import Evaluation
from .metrics import CONVENTIONS, FIGURES

__all__ = ["as_json", "as_markdown", "as_text", "csv_per_image", "remarks"]


def as_text(evaluations: Sequence[Evaluation], model: dict[str, Any] | None = None) -> str:
    """Tables for a terminal: a line per convention and data set, then what was unusual."""
    lines = []
    if model is not None:
        lines += [*_model_lines(model), ""]
    for evaluation in evaluations:
        if not evaluation.maps:
            lines += [f"{evaluation.name}: nothing could be scored"]
        else:
            lines += [_headline(evaluation)]
            rows = [["", *FIGURES.values()]]
            for key, convention in CONVENTIONS.items():
                figures = evaluation.figures()[key]
                rows.append([convention, *(_number(figures.get(f)) for f in FIGURES)])
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            for row in rows:
                cells = [row[0].ljust(widths[0])]
                cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
                lines.append("  ".join(cells).rstrip())
        lines += [f"  {remark}" for remark in remarks(evaluation)]
        lines.append("")
    return "\n".join(lines).rstrip()


def as_markdown(evaluations: Sequence[Evaluation], model: dict[str, Any] | None = None) -> str:
    """The same as one Markdown table, for a page or a paper."""
    lines = []
    if model is not None:
        lines += ["\n".join(f"{line}  " for line in _model_lines(model)).rstrip(), ""]
    lines.append("| data set | convention | " + " | ".join(FIGURES.values()) + " |")
    lines.append("|---|---|" + "---:|" * len(FIGURES))
    for evaluation in evaluations:
        for key, convention in CONVENTIONS.items():
            figures = evaluation.figures()[key] if evaluation.maps else {}
            cells = (_number(figures.get(figure)) for figure in FIGURES)
            lines.append(f"| {evaluation.name} | {convention} | " + " | ".join(cells) + " |")
    lines.append("")
    for evaluation in evaluations:
        lines += [f"- {text}" for text in (_headline(evaluation), *remarks(evaluation))]
    return "\n".join(lines).rstrip()


def as_json(
    evaluations: Sequence[Evaluation], model: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Everything, ready for json.dumps. Keys: those of CONVENTIONS and FIGURES."""
    from . import __version__

    sets = []
    for evaluation in evaluations:
        results = evaluation.scores
        figures: dict[str, dict[str, float]] = {}
        curves: dict[str, Any] = {}
        if evaluation.maps:
            figures = evaluation.figures()
            figures["salmetric"]["threshold"] = results.salmetric.result().threshold
            for key in CONVENTIONS:
                result = getattr(results, key).result()
                curves[key] = {
                    name: [round(float(value), 6) for value in getattr(result, name)]
                    for name in ("precision", "recall", "f_measure", "e_measure")
                    if hasattr(result, name)
                }
        sets.append(
            {
                "name": evaluation.name,
                "truths": evaluation.truths,
                "scored": len(evaluation.maps),
                "seconds": round(evaluation.seconds, 3),
                "figures": _without_nan(figures),
                "missing": evaluation.missing,
                "surplus": evaluation.surplus,
                "failures": [
                    {"source": str(failure.source), "reason": failure.reason}
                    for failure in evaluation.failures
                ],
                "notes": evaluation.notes,
                "curves": _without_nan(curves),
            }
        )
    return {"sodfast": __version__, "format": 1, "model": model, "datasets": sets}


def csv_per_image(evaluations: Sequence[Evaluation]) -> str:
    """A line per map: its figures in the PySODMetrics convention, and SalMetric's MAE."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = ["data_set", "name", "height", "width", "truth_share"]
    writer.writerow([*columns, *FIGURES, "salmetric_mae", "notes"])
    for evaluation in evaluations:
        for scored in evaluation.maps:
            scores = scored.scores
            share = scores.positives / (scores.height * scores.width)
            row = [evaluation.name, scored.name, scores.height, scores.width, f"{share:.6f}"]
            row += [f"{getattr(scores.pysodmetrics, figure):.6f}" for figure in FIGURES]
            row += [f"{scores.salmetric.mae:.6f}", "; ".join(scored.notes)]
            writer.writerow(row)
    return file.getvalue()


def remarks(evaluation: Evaluation) -> list[str]:
    """A sentence for everything that was unusual or was left out, with names."""
    lines = []
    if evaluation.missing:
        lines.append(f"without a map: {_some(evaluation.missing)}")
    for failure in evaluation.failures[:10]:
        lines.append(f"not scored: {failure.source}: {failure.reason}")
    if evaluation.failures[10:]:
        lines.append(f"not scored: {len(evaluation.failures) - 10} more")
    if evaluation.surplus:
        lines.append(f"maps without a truth, not scored: {_some(evaluation.surplus)}")
    explained = {
        "empty truth": "; F is 0 or left out, see the conventions",
        "truth with grey values": "; foreground is > 128",
        "truth of zeros and ones": "; read as 0 and 255",
    }
    for note, names in evaluation.notes.items():
        lines.append(f"{note}{explained.get(note, '')}: {_some(names)}")
    return lines


def _headline(evaluation: Evaluation) -> str:
    return f"{evaluation.name}: {len(evaluation.maps):,} of {evaluation.truths:,} maps scored"


def _model_lines(model: dict[str, Any]) -> list[str]:
    height, width = model["input_size"]
    file = f"; the file {model['file_mib']:.2f} MiB" if model["file_mib"] is not None else ""
    lines = [
        f"{model['name']} from {model['weights']}: {model['parameters']:,} parameters "
        f"({model['parameters_mib']:.2f} MiB{file})",
        f"work at {height} x {width}: {model['conv_macs'] / 1e9:.4f} G MACs of convolutions, "
        f"{model['paper_macs'] / 1e9:.4f} G as the CSNet papers count",
    ]
    speed = model.get("images_per_second")
    if speed is not None:
        threads = "1 thread" if speed["threads"] == 1 else f"{speed['threads']} threads"
        lines.append(
            f"speed: {speed['network']:.1f} images/s the network alone, "
            f"{speed['file_to_map']:.1f} from file to map; {threads}, {speed['machine']}"
        )
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if value == value else "undefined"


def _some(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown:,} more" if names[shown:] else ""
    return f"{len(names):,} ({', '.join(names[:shown])}{more})"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what is undefined becomes null."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and value != value else value
