"""Times the ops and models against eager torch and torch.compile.

Every variant of a case runs in fresh processes, one per round, and the rounds are interleaved:
A, B, C, A, B, C, … docs/bench.md has the whole story.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))  # this tree's sodfast, whichever is installed

from base import build_revision, revision_of  # noqa: E402
from cases import Case, all_cases  # noqa: E402
from cost import cost_of  # noqa: E402
from limits import LEVELS, cache_bytes, level_of  # noqa: E402
from rows import Row, append_csv, fill_ratios, fill_times, table, write_json  # noqa: E402
from tqdm import tqdm  # noqa: E402
from variants import Variant, all_variants  # noqa: E402

from sodfast.ops._backend import BACKENDS, available  # noqa: E402

ROUNDS, SECONDS = 5, 0.5  # per variant, and of sampling per round
QUICK_ROUNDS, QUICK_SECONDS = 2, 0.1
# glibc's malloc hands large tensors back to the system each time they are freed, and the next
# call pays for it in page faults: CSNet ×2-L in eager channels_last takes 1.6 times as long.
# Every process keeps its memory instead; set these yourself for another choice.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
TIMEOUT = 1800  # seconds for one process: torch.compile of a training step takes minutes


class Contestant(NamedTuple):
    """A variant of a case, run with the sodfast of a source tree."""

    variant: Variant
    tree: Path
    revision: str
    label: str


def main() -> int:
    options = parse()
    cases, variants = choose_cases(options), choose_variants(options)
    if options.list:
        print("\n".join(case.key + (" (slow)" if case.slow else "") for case in cases))
        print("variants: " + ", ".join(variant.name for variant in variants))
        return 0
    contestants = [Contestant(v, ROOT, revision_of(ROOT), v.name) for v in variants]
    if options.base:
        tree = build_revision(ROOT, options.base)
        revision = revision_of(tree)
        contestants += [
            Contestant(v, tree, revision, f"{v.name} @{revision}")
            for v in variants
            if not v.baseline
        ]

    first = [start(options, ROOT) for _ in range(options.rounds)]
    measured = [result["limits"] for result in first if "limits" in result]
    if not measured:
        sys.exit(f"bench: the machine's limits could not be measured: {first[0]['reason']}")
    limits = {name: max(result[name] for result in measured) for name in measured[0]}
    print(
        f"{machine()}, {options.threads} of {os.cpu_count()} cores: sgemm {limits['sgemm']:.1f} "
        f"GMAC/s, 3x3 convolution {limits['conv']:.1f} GMAC/s, copy "
        + ", ".join(f"{limits[level]:.1f} GB/s in {level}" for level in LEVELS)
        + "\n"
    )

    everything: list[Row] = []
    for case in cases:
        rows = run_case(options, case, contestants, limits)
        if not rows:
            continue
        everything += rows
        print(table(rows) + "\n", flush=True)
        append_csv(options.results / "cpu.csv", rows)
    if options.json:
        write_json(options.json, everything, limits)
    # A baseline that cannot run here is a fact about the machine; ours that cannot is a failure.
    return any(row.get("reason") and not row["baseline"] for row in everything)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--op", metavar="NAME", help="only this op")
    what.add_argument("--model", metavar="NAME", help="only this model")
    what.add_argument("--all", action="store_true", help="the slow cases too")
    parser.add_argument("--case", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--variants", metavar="A,B", help="only these variants")
    parser.add_argument("--backend", choices=BACKENDS, help="of ours, only this backend")
    parser.add_argument("--base", metavar="REV", help="also build and time this git revision")
    parser.add_argument("--threads", type=int, default=1, help="1 by default")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS} by default")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write this run's rows here too")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", default=ROOT / "bench" / "results",
        help="the folder whose cpu.csv grows; bench/results by default",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print what would run")
    options = parser.parse_args()
    if options.threads < 1 or (options.rounds is not None and options.rounds < 1):
        parser.error("--threads and --rounds must be at least 1")
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.seconds = QUICK_SECONDS if options.quick else SECONDS
    return options


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """The cases asked for; without a wish all that are not slow."""
    cases = all_cases()
    for kind in ("op", "model"):
        name = getattr(options, kind)
        if name is not None:
            known = list(dict.fromkeys(case.name for case in cases if case.kind == kind))
            if name not in known:
                sys.exit(f"bench: unknown {kind} {name!r}; known are {', '.join(known)}")
            cases = [case for case in cases if (case.kind, case.name) == (kind, name)]
    if not (options.all or options.op or options.model):
        cases = [case for case in cases if not case.slow]
    if options.case:
        chosen = [case for case in cases if options.case in case.key]
        if not chosen:
            known = "\n".join(case.key for case in cases)
            sys.exit(f"bench: no case has {options.case!r} in its name; known are\n{known}")
        return chosen
    return cases


def choose_variants(options: argparse.Namespace) -> list[Variant]:
    """The variants asked for; of ours, those whose backend can run here."""
    reasons = available()
    if options.backend and reasons[options.backend]:
        sys.exit(f"bench: --backend {options.backend}: {reasons[options.backend]}")
    variants = all_variants()
    if options.variants:
        wanted, known = options.variants.split(","), [variant.name for variant in variants]
        for name in wanted:
            if name not in known:
                sys.exit(f"bench: unknown variant {name!r}; known are {', '.join(known)}")
        variants = [variant for variant in variants if variant.name in wanted]
    if options.backend:
        variants = [v for v in variants if v.baseline or v.backend == options.backend]
    return variants


def run_case(
    options: argparse.Namespace,
    case: Case,
    contestants: list[Contestant],
    limits: dict[str, float],
) -> list[Row]:
    """Run one case in all its variants, round by round, and return a row for each."""
    contestants = [c for c in contestants if c.variant.serves(case)]
    results: dict[str, list[dict[str, Any]]] = {c.label: [] for c in contestants}
    turns = [contestant for _ in range(options.rounds) for contestant in contestants]
    for contestant in tqdm(turns, desc=case.key, leave=False, disable=None):
        earlier = results[contestant.label]
        if not (earlier and "reason" in earlier[-1]):
            earlier.append(start(options, contestant.tree, case, contestant.variant))

    cost = cost_of(case)
    level = level_of(cost.bytes, cache_bytes(options.threads))
    rows = []
    for contestant in contestants:
        own = results[contestant.label]
        row: Row = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "revision": contestant.revision,
            "machine": machine(),
            "cores": os.cpu_count(),
            "os": operating_system(),
            "malloc": " ".join(f"{name}={os.environ.get(name, MALLOC[name])}" for name in MALLOC),
            "kind": case.kind,
            "name": case.name,
            "case": case.label,
            "pass": case.pass_name,
            "shape": cost.shape,
            "variant": contestant.label,
            "baseline": int(contestant.variant.baseline),
            "threads": options.threads,
            "dtype": "float32",
            "rounds": len(own),
            "macs": cost.macs,
            "sgemm_gmac_per_s": limits["sgemm"],
            "conv_gmac_per_s": limits["conv"],
            "bytes": cost.bytes,
            "copy_level": level,
            "copy_gb_per_s": limits[level],
            **{key: own[0].get(key, "") for key in ("isa", "python", "torch", "compiler")},
        }
        if "reason" in own[-1]:
            row["reason"] = own[-1]["reason"]
        else:
            fill_times(row, [sample for result in own for sample in result["samples"]])
            peaks = [r["peak_bytes"] for r in own if r["peak_bytes"] is not None]
            row["peak_mb"] = 1e-6 * max(peaks) if peaks else None
        rows.append(row)
    fill_ratios(rows)
    return rows


def start(
    options: argparse.Namespace,
    tree: Path,
    case: Case | None = None,
    variant: Variant | None = None,
) -> dict[str, Any]:
    """Run worker.py in a fresh process and return what it reports, or the reason why not."""
    command = [
        sys.executable, str(ROOT / "bench" / "worker.py"), "--tree", str(tree),
        "--threads", str(options.threads), "--seconds", str(options.seconds),
    ]  # fmt: skip
    if case and variant:
        command += ["--case", case.key, "--variant", variant.name]
    threads = str(options.threads)
    # Inductor compiles a thread count into its code, so that each has a cache of its own.
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "torchinductor"))
    environment = {
        **MALLOC,
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,  # numpy's
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/bench-{threads}",
    }
    environment.pop("SODFAST_BACKEND", None)  # the variant says which
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"reason": f"took longer than {TIMEOUT} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"reason": f"the process ended with status {done.returncode}: {last}"[:300]}


def machine() -> str:
    """The processor's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def operating_system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.system()} {platform.release()}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nbench: stopped; the rows of finished cases are kept")
