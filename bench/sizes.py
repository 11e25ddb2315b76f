"""Nanoseconds per pixel of a plan over image sizes: no size should cost more than its pixels.

    python bench/sizes.py [--network csnet-x2-L] [--threads 1] [--seconds 1]

Sizes are measured in turn, several rounds of them; the row of a size is the median of its calls
and its ratio to the median over all sizes. Writes bench/results/sizes.csv (bench/plot.py draws it).
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))

import torch  # noqa: E402
from measure import samples_of  # noqa: E402
from networks import NETWORKS, build_network  # noqa: E402
from tqdm import tqdm  # noqa: E402

import sodfast  # noqa: E402
from sodfast.weights import atomic_write  # noqa: E402

SIDES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 448, 512, 640, 768, 1024, 1536, 2048)
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="csnet-x2-L")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="per size and round")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "sizes.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    fused = sodfast.fuse(build_network(options.network))
    samples: dict[int, list[float]] = {side: [] for side in SIDES}
    with torch.inference_mode():
        for side in tqdm([side for _ in range(ROUNDS) for side in SIDES], disable=None):
            image = torch.randn(1, 3, side, side)
            samples[side] += samples_of(lambda image=image: fused(image), options.seconds)
    ms = {side: 1e3 * statistics.median(samples[side]) for side in SIDES}
    per_pixel = {side: 1e6 * ms[side] / side**2 for side in SIDES}
    middle = statistics.median(per_pixel.values())
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["network", "threads", "side", "ms", "ns_per_pixel", "ratio_to_median"])
    for side in SIDES:
        ratio = per_pixel[side] / middle
        print(f"{side:5d}²  {ms[side]:9.3f} ms  {per_pixel[side]:7.1f} ns/pixel  {ratio:5.2f}")
        numbers = [f"{value:.5g}" for value in (ms[side], per_pixel[side], ratio)]
        writer.writerow([options.network, options.threads, side, *numbers])
    with atomic_write(options.output) as file:
        file.write(table.getvalue().encode())


if __name__ == "__main__":
    main()
