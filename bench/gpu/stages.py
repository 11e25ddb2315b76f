"""make gpu: everything there is to do on a machine with a GPU, in stages under ten minutes.

    python bench/gpu/stages.py                  all stages that are not done yet
    python bench/gpu/stages.py build tests      these, done or not
    python bench/gpu/stages.py --list

A stage that succeeds leaves a file under build/gpu; the next call goes on behind it. Uses the
Python that runs it: its torch must have CUDA, and nvcc, cmake and ninja must be on the PATH.
The benchmark's rows go to bench/results/gpu.csv.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DONE = ROOT / "build" / "gpu"
LIMIT = 600  # seconds per stage
PYTHON = sys.executable
BENCH = [PYTHON, "bench/gpu/run.py"]
SANITIZER = ["compute-sanitizer", "--error-exitcode", "9"]
OURS = ["--kernel-name", "kns=sodfast"]  # but initcheck must see what torch's kernels write
EXERCISE = [PYTHON, "bench/gpu/exercise.py"]

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


def _timing(kind: str, case: str, dtype: str) -> list[str]:
    return [*BENCH, "--kind", kind, "--case", case, *(["--dtype", dtype] if dtype else [])]


STAGES: dict[str, list[str]] = {
    "build": [PYTHON, "setup.py", "build_ext", "--inplace"],
    "tests": [PYTHON, "-m", "pytest", "-q", "--durations=5", "-p", "no:cacheprovider",
              "tests/test_gpu_kernels.py", "tests/test_gpu_maps.py", "tests/test_decay.py",
              "tests/test_ilblock.py", "tests/test_goctconv_norm_depthwise.py",
              "tests/test_cuda_graph.py", "tests/test_cuda_sources.py"],
    "tests-triton": [PYTHON, "-m", "pytest", "-q", "--durations=5", "-p", "no:cacheprovider",
                     "tests/test_triton.py", "tests/test_triton_maps.py"],
    **{tool: [*SANITIZER, *OURS, "--tool", tool, *EXERCISE]
       for tool in ("memcheck", "racecheck", "synccheck")},
    "initcheck": [*SANITIZER, "--tool", "initcheck", *EXERCISE],
    **{f"bench-{name}": _timing(kind, case, dtype) for name, kind, case, dtype in TIMED},
    # It takes most of a stage: last, and alone.
    **{f"autotune-{name}": [*_timing(kind, case, dtype), "--variants", "compile max-autotune"]
       for name, kind, case, dtype in TIMED},
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, test, check and time on a GPU.")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="only these, done or not")
    parser.add_argument("--list", action="store_true", help="print the stages")
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
    DONE.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.stages or STAGES:
        if not args.stages and (DONE / name).exists():
            print(f"== {name}: done before", flush=True)
            continue
        if not run(name):
            failed.append(name)
            if name == "build":
                break
    print("make gpu: " + (f"failed: {', '.join(failed)}" if failed else "all stages passed"))
    return 1 if failed else 0


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


def run(name: str) -> bool:
    command = STAGES[name]
    print(f"== {name}: {' '.join(command)}", flush=True)
    if shutil.which(command[0]) is None:
        print(f"== {name}: {command[0]} is not on the PATH")
        return False
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
        "PATH": os.pathsep.join([str(Path(PYTHON).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "SODFAST_REQUIRE": "cpu,cuda",
    }
    if name == "build":
        environment["SODFAST_CMAKE_ARGS"] = "-DSODFAST_CUDA=ON"
    if command[0] == "compute-sanitizer":
        # Every tensor an allocation of its own, so that one past its end is out of bounds.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start = time.monotonic()
    try:
        passed = subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMIT).returncode == 0
        reason = "passed" if passed else "failed"
    except subprocess.TimeoutExpired:
        passed, reason = False, f"stopped after {LIMIT} s"
    print(f"== {name}: {reason} in {time.monotonic() - start:.0f} s", flush=True)
    if passed:
        (DONE / name).touch()
    return passed


if __name__ == "__main__":
    sys.exit(main())
