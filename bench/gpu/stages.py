"""make gpu: everything there is to do on a machine with a GPU, in stages under ten minutes.

    python bench/gpu/stages.py                  all stages that are not done yet
    python bench/gpu/stages.py build tests      these, done or not
    python bench/gpu/stages.py --limit 420 --keep DIR
    python bench/gpu/stages.py --list

A stage that succeeds leaves a file under build/gpu; the next call goes on behind it. What a stage
prints also goes to NAME.log there or under --keep. Uses the Python that runs it: its torch must
have CUDA, and nvcc, cmake and ninja must be on the PATH. The benchmark's rows go to
bench/results/gpu.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "gpu.csv"
DONE = ROOT / "build" / "gpu"
LIMIT = 600  # seconds per stage
GRACE = 15  # seconds that a stopped stage has to say how far it came
PYTHON = sys.executable
BENCH = [PYTHON, "bench/gpu/run.py"]
SANITIZER = ["compute-sanitizer", "--error-exitcode", "9"]
OURS = ["--kernel-name", "kns=sodfast"]  # but initcheck must see what torch's kernels write
EXERCISE = [PYTHON, "bench/gpu/exercise.py"]
CUDA_TESTS = ("gpu_kernels", "gpu_edges", "gpu_maps", "goctconv_norm_depthwise", "ilblock", "decay",
              "cuda_graph", "predictor", "predict_command")  # fmt: skip
TRITON_TESTS = ("triton", "triton_maps", "decay")

# What is timed, the most telling first: name, kind, words of its cases, dtype ("": all).
TIMED = [
    *((f"{name}-{dtype}", kind, case, dtype)
      for name, kind, case in (
          ("x2-L", "inference", "csnet: x2-L"), ("training-24", "training", "csnet: batch 24"),
          ("ilblock", "op", "ilblock:"), ("training-128", "training", "csnet: batch 128"),
          ("scfnet", "inference", "scfnet:"), ("ops", "op", "goctconv inference"),
          ("ops-training", "op", "goctconv training"),
          ("distillation", "training", "kd-scfnet:"), ("x1-L", "inference", "csnet: x1-L"),
          ("scfm", "op", "scfm:"),
      )
      for dtype in ("bf16", "fp32")),
    *((op, "op", f"{op}:", "") for op in ("boundary", "structure_polishing_sums", "dkd")),
]  # fmt: skip


def _tests(names: tuple[str, ...], words: str) -> list[str]:
    """pytest on what runs on a GPU; most of its time is the CPU's reference, one core per test."""
    options = ["-q", "--durations=5", "-p", "no:cacheprovider", "--tb=short", "--maxfail=15",
               "--continue-on-collection-errors", "--hypothesis-profile=unshrunk",
               "-m", "gpu", "-k", words]  # fmt: skip
    if find_spec("xdist"):
        options += ["-n", str(min(len(os.sched_getaffinity(0)), 12)), "--dist", "worksteal"]
    if find_spec("pytest_timeout"):
        # A kernel that hangs answers no signal. The thread ends its process, for which xdist
        # starts another; without xdist it ends them all.
        options += ["--timeout=120", "--timeout-method=thread"]
    return [PYTHON, "-m", "pytest", *options, *(f"tests/test_{name}.py" for name in names)]


def _timings(prefix: str, *variants: str) -> dict[str, list[str]]:
    asked = ["--variants", ",".join(variants)] if variants else []
    return {
        f"{prefix}-{name}": [
            *BENCH, "--kind", kind, "--case", case, *(["--dtype", dtype] if dtype else []), *asked
        ]
        for name, kind, case, dtype in TIMED
    }  # fmt: skip


TIMINGS = _timings("bench")
# What tells most comes first; a stage takes its first place in the list.
STAGES: dict[str, list[str]] = {
    "build": [PYTHON, "setup.py", "build_ext", "--inplace"],
    "exercise": EXERCISE,
    "tests": _tests(CUDA_TESTS, "not triton"),
    "memcheck": [*SANITIZER, *OURS, "--tool", "memcheck", *EXERCISE],
    **{name: TIMINGS[name] for name in ("bench-x2-L-bf16", "bench-training-24-bf16")},
    "racecheck": [*SANITIZER, *OURS, "--tool", "racecheck", *EXERCISE],
    "initcheck": [*SANITIZER, "--tool", "initcheck", *EXERCISE],
    "synccheck": [*SANITIZER, *OURS, "--tool", "synccheck", *EXERCISE],
    "tests-triton": _tests(TRITON_TESTS, "triton"),
    **TIMINGS,
    # Compiling takes most of these: apart, and last.
    **_timings("triton", "triton", "triton graph"),
    **_timings("autotune", "compile max-autotune"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, test, check and time on a GPU.")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="only these, done or not")
    parser.add_argument("--list", action="store_true", help="print the stages")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), metavar="SECONDS",
        help=f"of the whole call; a stage stops after {LIMIT} in any case, within {GRACE} more",
    )  # fmt: skip
    parser.add_argument(
        "--keep", type=Path, default=DONE, metavar="DIR",
        help="the folder for each stage's log and a copy of the results (build/gpu)",
    )  # fmt: skip
    args = parser.parse_args()
    unknown = [name for name in args.stages if name not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; known are {', '.join(STAGES)}")
    if args.list:
        for name, command in STAGES.items():
            print(f"{name:<32}{'done' if (DONE / name).exists() else '':<6}{' '.join(command)}")
        return 0
    reason = why_not()
    if reason:
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    # Stages are sessions of their own, which are to end with this process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for folder in (DONE, args.keep):
        folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.limit
    failed, late = [], []
    for name in args.stages or STAGES:
        if not args.stages and (DONE / name).exists():
            print(f"== {name}: done before", flush=True)
            continue
        seconds = min(LIMIT, end - time.monotonic())
        if seconds <= 0:
            late.append(name)
        elif not run(name, seconds, args.keep):
            failed.append(name)
            if name == "build":
                break
    words = [f"{word}: {', '.join(names)}"
             for word, names in (("failed", failed), ("no time for", late)) if names]  # fmt: skip
    print("make gpu: " + ("; ".join(words) or "all stages passed"))
    return 1 if words else 0


def why_not() -> str:
    """What is missing here; empty when nothing is."""
    check = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    found = subprocess.run([PYTHON, "-c", check], capture_output=True)
    if found.returncode:
        return f"{PYTHON} has no torch that finds a CUDA device (PYTHON=… names another)"
    for tool in ("nvcc", "cmake", "ninja"):
        if shutil.which(tool) is None and not (Path(PYTHON).parent / tool).exists():
            return f"{tool} is not on the PATH"
    return ""


def run(name: str, seconds: float, keep: Path) -> bool:
    command = STAGES[name]
    print(f"== {name}: {' '.join(command)}", flush=True)
    if shutil.which(command[0]) is None:
        print(f"== {name}: {command[0]} is not on the PATH")
        return False
    start = time.monotonic()
    status = watch(command, environment_of(name), keep / f"{name}.log", seconds)
    reason = {0: "passed", None: f"stopped after {seconds:.0f} s"}.get(status, "failed")
    print(f"== {name}: {reason} in {time.monotonic() - start:.0f} s", flush=True)
    if RESULTS.exists():
        shutil.copy(RESULTS, keep)
    if status == 0:
        (DONE / name).touch()
    return status == 0


def environment_of(name: str) -> dict[str, str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
        "PATH": os.pathsep.join([str(Path(PYTHON).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "SODFAST_REQUIRE": "cpu,cuda",
    }
    if name == "build":
        given = os.environ.get("SODFAST_CMAKE_ARGS", "")
        environment["SODFAST_CMAKE_ARGS"] = f"-DSODFAST_CUDA=ON {given}".strip()
    if STAGES[name][0] == "compute-sanitizer":
        # Every tensor an allocation of its own, so that one past its end is out of bounds.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return environment


def watch(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> int | None:
    """Run a command and all that it starts, its output here and in a file; None: it was stopped."""
    tee = subprocess.Popen(["tee", str(log)], stdin=subprocess.PIPE)
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=tee.stdin, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    assert tee.stdin is not None
    tee.stdin.close()
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)  # pytest then tells what has failed so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        with contextlib.suppress(subprocess.TimeoutExpired):
            tee.wait(GRACE)  # what has left the session may hold the pipe for longer
        tee.kill()


if __name__ == "__main__":
    sys.exit(main())
