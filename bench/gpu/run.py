"""The benchmark on a GPU: ops, CSNet's inference and training step, against torch and the limit.

    python bench/gpu/run.py --kind op|inference|training [--case TEXT] [--dtype fp32|bf16]

A row is one case in one form: median, p20 and p80 of the time on the device, peak memory, and
the share of the limit (the bytes that must move over the measured bandwidth of a copy). Every
row is appended to bench/results/gpu.csv as it is measured; docs/gpu.md says what they mean.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from base import revision_of  # noqa: E402
from rows import fill_ratios  # noqa: E402

from gpu.forms import FORMS, limit_bytes  # noqa: E402
from gpu.scfnet_works import scfnet_works  # noqa: E402
from gpu.works import DTYPES, Work, works  # noqa: E402
from sodfast.ops import _backend  # noqa: E402
from sodfast.weights import atomic_write  # noqa: E402

COLUMNS = """
    date revision device torch kind name case batch dtype variant baseline samples median_ms
    p20_ms p80_ms bytes copy_gb_per_s limit_ms share_of_limit peak_mb best_baseline ratio reason
    note
""".split()
CASE = ("revision", "device", "torch", "kind", "name", "case", "dtype")  # what rows compare within
RESULTS = ROOT / "bench" / "results" / "gpu.csv"


class Machine(NamedTuple):
    bandwidth: float  # bytes per second of a copy, read and written
    l2: int  # bytes


class Timed(NamedTuple):
    seconds: list[float]
    peak: int  # bytes above what was allocated before
    skips: int  # of CUDA graphs that torch.compile was to make and did not


def main() -> int:
    parser = argparse.ArgumentParser(description="Times sodfast on a GPU.")
    parser.add_argument("--kind", choices=("op", "inference", "training"), required=True)
    parser.add_argument("--case", default="", help="only cases with these words")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="only this; both by default")
    parser.add_argument(
        "--variants",
        default="",
        help="only these, separated by commas; by default all but Triton's and autotuning",
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing per row")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu: torch finds no CUDA device here", file=sys.stderr)
        return 2
    known = [form.name for form in FORMS]
    usual = [form.name for form in FORMS if form.usual]
    chosen = args.variants.split(",") if args.variants else usual
    for name in chosen:
        if name not in known:
            parser.error(f"unknown variant {name!r}; known are {', '.join(known)}")
    torch.backends.cudnn.benchmark = True  # shapes are fixed: every form gets cuDNN's best
    machine = Machine(copy_bandwidth(), torch.cuda.get_device_properties(0).L2_cache_size)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: a copy moves "
          f"{machine.bandwidth / 1e9:.0f} GB/s, L2 holds {machine.l2 / 2**20:.0f} MB")  # fmt: skip
    status = 0
    for work in (*works(args.kind), *scfnet_works(args.kind)):
        text = f"{work.name}: {work.label}"
        if all(word in text for word in args.case.split()) and args.dtype in (None, work.dtype):
            rows = []
            for row in rows_of(work, chosen, machine, args.seconds):
                append(row)
                rows.append(row)
                status |= bool(row.get("failed"))
            print(table(rows), flush=True)
    return status


def rows_of(
    work: Work, chosen: list[str], machine: Machine, seconds: float
) -> Iterator[dict[str, Any]]:
    moved = limit_bytes(work)
    for form in FORMS:
        if form.name not in chosen or not form.serves(work):
            continue
        row: dict[str, Any] = {
            "date": datetime.date.today().isoformat(), "revision": revision(),
            "device": torch.cuda.get_device_name(), "torch": torch.__version__,
            "kind": work.kind, "name": work.name, "case": work.label, "batch": work.batch,
            "dtype": work.dtype, "variant": form.name, "baseline": form.baseline, "bytes": moved,
            "copy_gb_per_s": machine.bandwidth / 1e9, "limit_ms": 1e3 * moved / machine.bandwidth,
        }  # fmt: skip
        missing = _backend.available()[form.backend]
        if missing:
            yield {**row, "reason": missing}
            continue
        try:
            timed = time_of(lambda form=form: form.prepare(work), seconds)
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            row["failed"] = not form.baseline
        else:
            p20, middle, p80 = (1e3 * t for t in np.percentile(timed.seconds, [20, 50, 80]))
            row.update(
                samples=len(timed.seconds), median_ms=middle, p20_ms=p20, p80_ms=p80,
                share_of_limit=row["limit_ms"] / middle,
                peak_mb=None if form.replays else timed.peak / 2**20,
                note="; ".join(filter(None, (
                    moved < 2 * machine.l2 and "fits twice L2",
                    timed.skips and f"{timed.skips} CUDA graphs skipped",
                ))),
            )  # fmt: skip
        yield row


def time_of(prepare: Callable[[], Callable[[], Any]], seconds: float) -> Timed:
    """Times each call on the device, after a warm-up that compiles and fills torch's caches."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    step = prepare()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    one = min(event_seconds(step, 3))
    samples = event_seconds(step, int(min(max(seconds / max(one, 1e-6), 10), 2000)))
    return Timed(samples, peak, torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def event_seconds(step: Callable[[], Any], calls: int) -> list[float]:
    """Seconds on the device of each call.

    Before each, memory larger than L2 is read: the call then finds its arguments in memory, and
    the host can launch it meanwhile.
    """
    other = torch.zeros(2**26, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        other.sum()
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in events]


def revision() -> str:
    """The git revision; SODFAST_REVISION says it where the sources came without git's folder."""
    return os.environ.get("SODFAST_REVISION") or revision_of(ROOT)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy far larger than any cache."""
    source = torch.rand(2**28, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = event_seconds(lambda: target.copy_(source), 20)
    return 2 * source.numel() * source.element_size() / float(np.median(seconds))


def table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    first = rows[0]
    # the last row was compared with the baselines of every stage
    best = next((r["ratio"] * r["median_ms"] for r in reversed(rows) if r.get("ratio")), None)
    lines = [f"{first['name']} · {first['case']} · {first['dtype']} · "
             f"limit {first['limit_ms']:.4f} ms"]  # fmt: skip
    for row in rows:
        if row.get("reason"):
            lines.append(f"  {row['variant']:<24}  not measured: {row['reason']}")
            continue
        peak, ratio = row["peak_mb"], best and best / row["median_ms"]
        lines.append(
            f"  {row['variant']:<24}{row['median_ms']:10.4f}{row['p20_ms']:10.4f}"
            f"{row['p80_ms']:10.4f} ms{row['share_of_limit']:8.1%} of the limit"
            f"{'–' if peak is None else f'{peak:.1f}':>9} MB"
            f"{'–' if ratio is None else f'{ratio:.2f}':>7} x best  {row['note']}".rstrip()
        )
    return "\n".join(lines)


def append(row: dict[str, Any]) -> None:
    """Add a row to the results, and compare anew what was measured of its case before."""
    rows: list[dict[str, Any]] = []
    if RESULTS.exists():
        with open(RESULTS, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    same = [old for old in rows if all(old[key] == str(row[key]) for key in CASE)]
    measured = [old for old in [*same, row] if old.get("median_ms")]
    compared = [
        {
            "variant": old["variant"], "baseline": str(old["baseline"]) == "True",
            "median_ms": float(old["median_ms"]),
        }
        for old in measured
    ]  # fmt: skip
    fill_ratios(compared)
    for old, ratios in zip(measured, compared):
        old.update({key: ratios[key] for key in ("best_baseline", "ratio") if key in ratios})
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for old in [*rows, row]:
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in old.items()})
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(RESULTS) as file:
        file.write(text.getvalue().encode())


if __name__ == "__main__":
    sys.exit(main())
