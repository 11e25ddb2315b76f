"""Draws bench/results: bars of the networks, a roofline, and the sweep over sizes.

    python bench/plot.py [--output docs/images/cpu.png]

Of every network of the papers and variant the newest row counts (inference, one thread).
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from sodfast.pretrained import pretrained_names  # noqa: E402
from sodfast.weights import atomic_write  # noqa: E402

OURS, OTHERS = "tab:blue", "lightgrey"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "cpu.png")
    options = parser.parse_args()
    rows = newest(options.results / "cpu.csv")
    if not rows:
        sys.exit(f"plot: {options.results / 'cpu.csv'} has no row of a network's inference")
    sizes = options.results / "sizes.csv"
    figure, axes = plt.subplots(1, 2 + sizes.exists(), figsize=(15, 4.2), layout="constrained")
    bars(axes[0], rows)
    roofline(axes[1], rows)
    if sizes.exists():
        sweep(axes[2], sizes)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.output) as file:
        file.write(picture.getvalue())
    print(options.output)


def newest(path: Path) -> list[Row]:
    """The newest measured row of every network and variant, fastest last."""
    latest: dict[tuple[str, str], Row] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            chosen = (row["kind"], row["pass"], row["threads"]) == ("model", "inference", "1")
            chosen = chosen and row["name"] not in pretrained_names()
            if chosen and not row.get("reason") and "@" not in row["variant"]:
                latest[row["case"], row["variant"]] = row
    return sorted(latest.values(), key=lambda row: (row["case"], -float(row["median_ms"])))


def name(row: Row) -> str:
    """The network and the side of its input."""
    return f"{row['case'].removeprefix('csnet-')}, {row['shape'].split('×')[-1]}"


def bars(axis: Any, rows: list[Row]) -> None:
    labels = [f"{name(row)}  {row['variant']}" for row in rows]
    times = [float(row["median_ms"]) for row in rows]
    spread = [
        [t - float(row["p20_ms"]) for t, row in zip(times, rows)],
        [float(row["p80_ms"]) - t for t, row in zip(times, rows)],
    ]
    colours = [OTHERS if row["baseline"] == "1" else OURS for row in rows]
    axis.barh(labels, times, color=colours, xerr=spread, ecolor="dimgrey")
    for y, t in enumerate(times):
        axis.text(t, y, f" {t:.1f}", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="ms per image, one thread", title=rows[-1]["machine"])
    axis.tick_params(axis="y", labelsize=8)
    axis.margins(x=0.12)


def roofline(axis: Any, rows: list[Row]) -> None:
    """MACs per byte that must be moved (arguments, weights and result once) against GMAC/s."""
    last = rows[-1]
    intensity = [float(row["macs"]) / float(row["bytes"]) for row in rows]
    sgemm, conv = float(last["sgemm_gmac_per_s"]), float(last["conv_gmac_per_s"])
    copy = float(last["copy_gb_per_s"])
    knee = max(sgemm, conv) / copy
    left, right = knee / 12, max(intensity) * 8
    for peak, what in ((sgemm, "sgemm"), (conv, "3×3 convolution of oneDNN")):
        axis.plot([peak / copy, right], [peak, peak], color="dimgrey", lw=1)
        axis.text(peak / copy * 1.1, peak * 1.04, f"{what}: {peak:.0f} GMAC/s", fontsize=8)
    axis.plot([left, knee], [left * copy, knee * copy], color="dimgrey", lw=1, ls="--")
    axis.text(left * 1.3, left * copy, f"copy in {last['copy_level']}: {copy:.0f} GB/s", fontsize=8)
    for x, row in zip(intensity, rows):
        ours = row["baseline"] != "1"
        axis.scatter(
            x, float(row["gmac_per_s"]), color=OURS if ours else "grey", s=40 if ours else 15
        )
        if ours or row["variant"] == "OpenVINO":
            # x1-L and x2-L lie side by side: one label to the left, one to the right.
            side, sign = ("right", " ") if "x1" in row["case"] else ("left", "")
            label = f"{'' if sign else '  '}{name(row).split(',')[0]} {row['variant']}{2 * sign}"
            height = float(row["gmac_per_s"]) * 0.86
            axis.text(x, height, label, fontsize=8, horizontalalignment=side)
    axis.set(xscale="log", yscale="log", xlabel="MACs per byte", ylabel="GMAC/s", title="Roofline")


def sweep(axis: Any, path: Path) -> None:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sides = [int(row["side"]) for row in rows]
    axis.plot(sides, [float(row["ns_per_pixel"]) for row in rows], "o-", color=OURS)
    axis.set(xscale="log", xlabel="side of the image, pixels", ylabel="ns per pixel")
    axis.set(ylim=(0, None), title=f"{rows[0]['network']} over sizes")
    axis.set_xticks([64, 128, 256, 512, 1024, 2048], ["64", "128", "256", "512", "1024", "2048"])
    axis.minorticks_off()


if __name__ == "__main__":
    main()
