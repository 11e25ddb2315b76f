"""How well `sodfast predict` hides decoding and encoding, and how it scales with threads.

    python bench/predict_folder.py --weights W FOLDER [--limit N] [--rounds N] [--threads N]

Times, in fresh interleaved processes and without start-up:

    predict, T      the folder to maps, as the command does it
    network, T      the fused network alone on as many inputs, one after the other, T threads
                    inside the network: what somebody would write who calls it in a loop
    parallel, T     the fused network alone, inputs shared among T threads: the lower limit

for T = 1 and T = --threads; all keep freed memory, as the command does. Prints medians and
the ratios: predict with one thread to predict with T, and predict with T to the network with one
thread (what the other threads can hide) and with T (which leaves no thread to hide behind).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))  # this tree's sodfast, whichever is installed

INPUTS = 64  # different ones for the bare network; they take turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--limit", type=int, help="only the first N pictures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--what", help=argparse.SUPPRESS)  # set in the fresh processes
    options = parser.parse_args()
    if options.what:
        print(measure(options))
        return

    seconds: dict[tuple[str, int], list[float]] = {
        (what, threads): []
        for threads in dict.fromkeys((1, options.threads))
        for what in ("predict", "network", "parallel")
    }
    for _ in range(options.rounds):
        for (what, threads), measured in seconds.items():
            command = [sys.executable, __file__, *sys.argv[1:]]
            command += ["--what", what, "--threads", str(threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            measured.append(float(done.stdout.split()[-1]))
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    for (what, threads), values in seconds.items():
        print(
            f"{what:10}{threads:3} threads{medians[what, threads]:9.2f} ms per picture "
            f"({', '.join(f'{value:.2f}' for value in values)})"
        )
    several = options.threads
    scaling = medians["predict", 1] / medians["predict", several]
    print(f"predict, {several} threads: {scaling:.2f} times as fast as with one")
    for threads in dict.fromkeys((1, several)):
        share = medians["predict", several] / medians["network", threads]
        print(f"predict, {several} threads: {share:.2f} times the network alone, {threads} threads")


def measure(options: argparse.Namespace) -> float:
    """Milliseconds per picture of one of the three, in this process."""
    import torch

    from sodfast.parallel import keep_freed_memory, ordered_map
    from sodfast.predict import Predictor, find_jobs, predict_files

    keep_freed_memory()
    predictor = Predictor(options.weights, threads=options.threads)
    with tempfile.TemporaryDirectory() as folder:
        jobs, failures = find_jobs([options.folder], folder)
        jobs = jobs[: options.limit]
        predict_files(predictor, jobs[: 2 * options.threads])  # a warm-up
        if options.what == "predict":
            start = time.perf_counter()
            failures += predict_files(predictor, jobs)
            elapsed = time.perf_counter() - start
            if failures:
                sys.exit(f"{failures[0].source}: {failures[0].reason}")
        else:
            inputs = [predictor.prepare(job.source)[0] for job in jobs[:INPUTS]]
            inputs = list(islice(cycle(inputs), len(jobs)))
            workers = options.threads if options.what == "parallel" else 1
            inner = options.threads if options.what == "network" else 1
            start = time.perf_counter()
            if workers == 1:
                torch.set_num_threads(inner)
                for one in inputs:
                    predictor.run(one)
            else:
                with contextlib.closing(ordered_map(predictor.run, inputs, workers)) as results:
                    for _ in results:
                        pass
            elapsed = time.perf_counter() - start
    return 1e3 * elapsed / len(jobs)


if __name__ == "__main__":
    main()
