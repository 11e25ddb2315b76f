"""From samples to rows: statistics, shares of the limits, the table and the files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sodfast.weights import atomic_write

# docs/bench.md says what each one is.
COLUMNS = """
    date revision machine cores isa os python torch compiler malloc kind name case pass shape
    variant baseline threads dtype rounds samples median_ms p20_ms p80_ms macs gmac_per_s
    sgemm_gmac_per_s share_of_sgemm conv_gmac_per_s share_of_conv bytes gb_per_s copy_level
    copy_gb_per_s share_of_copy peak_mb best_baseline ratio reason
""".split()

Row = dict[str, Any]


def fill_times(row: Row, seconds: Sequence[float]) -> None:
    """Add median and quantiles, and from the row's macs, bytes and limits all that follows."""
    p20, middle, p80 = np.percentile(seconds, [20, 50, 80])
    row["samples"] = len(seconds)
    row["median_ms"], row["p20_ms"], row["p80_ms"] = 1e3 * middle, 1e3 * p20, 1e3 * p80
    for work, rate, limits in (
        ("macs", "gmac_per_s", ("sgemm", "conv")),
        ("bytes", "gb_per_s", ("copy",)),
    ):
        if row[work]:
            row[rate] = 1e-9 * row[work] / middle
            for limit in limits:
                row[f"share_of_{limit}"] = row[rate] / row[f"{limit}_{rate}"]


def fill_ratios(rows: list[Row]) -> None:
    """Compare the rows of one case with its fastest baseline: 2 is twice as fast."""
    baselines = [row for row in rows if row["baseline"] and "median_ms" in row]
    if not baselines:
        return
    best = min(baselines, key=lambda row: row["median_ms"])
    for row in rows:
        if "median_ms" in row:
            row["best_baseline"] = best["variant"]
            row["ratio"] = best["median_ms"] / row["median_ms"]


def table(rows: list[Row]) -> str:
    """The rows of one case, readable."""
    first = rows[0]
    work = f"{1e-6 * first['bytes']:.1f} MB"
    if first["macs"]:
        work = f"{1e-6 * first['macs']:.1f} MMAC, {work}"
    lines = [
        f"{first['name']} · {first['case']} · {first['pass']} · {first['shape']} · {work}",
        f"  {'variant':<28}{'median':>9}{'p20':>9}{'p80':>9}{'GMAC/s':>9}{'sgemm':>7}"
        f"{'conv':>7}{'GB/s':>8}{'copy':>7}{'peak MB':>9}{'× best':>8}",
    ]
    for row in rows:
        line = f"  {row['variant']:<28}"
        if row.get("reason"):
            lines.append(f"{line}  not measured: {row['reason']}")
            continue
        line += "".join(f"{row[key]:9.3f}" for key in ("median_ms", "p20_ms", "p80_ms"))
        line += _cell(row, "gmac_per_s", 9, ".1f") + _cell(row, "share_of_sgemm", 7, ".0%")
        line += _cell(row, "share_of_conv", 7, ".0%")
        line += _cell(row, "gb_per_s", 8, ".1f") + _cell(row, "share_of_copy", 7, ".0%")
        line += _cell(row, "peak_mb", 9, ".1f") + _cell(row, "ratio", 8, ".2f")
        lines.append(line)
    return "\n".join(lines)


def _cell(row: Row, key: str, width: int, form: str) -> str:
    value = row.get(key)
    return f"{'–' if value is None else format(value, form):>{width}}"


def append_csv(path: Path, rows: list[Row]) -> None:
    """Append rows to a table that may have been begun with fewer columns."""
    old: list[Row] = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            old = list(csv.DictReader(file))
    columns = COLUMNS + [key for key in (old[0] if old else ()) if key not in COLUMNS]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(old)
    writer.writerows({key: _short(value) for key, value in row.items()} for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def write_json(path: Path, rows: list[Row], limits: dict[str, float]) -> None:
    """All rows of a run, every column in each, and the limits they are measured by."""
    full = [{column: row.get(column) for column in COLUMNS} for row in rows]
    with atomic_write(path) as file:
        file.write(json.dumps({"limits": limits, "rows": full}, indent=1).encode())


def _short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value
