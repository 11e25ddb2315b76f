"""The machine's limits, measured: how fast it multiplies, and how fast it copies by size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import samples_of

SIZES = (256, 384, 512, 1024)  # of the matrices; the best counts
CHANNELS = (256, 384, 512)  # of the convolution
LEVELS = ("L2", "L3", "memory")


def cache_bytes(threads: int) -> dict[str, int]:
    """Bytes of L2 (of all threads' cores together) and L3; typical ones where Linux is silent."""
    sizes = {"L2": 1 << 20, "L3": 32 << 20}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level = "L" + (index / "level").read_text().strip()
        if level in sizes:
            sizes[level] = int((index / "size").read_text().strip().removesuffix("K")) << 10
    sizes["L2"] *= threads
    return sizes


def level_of(size: int, caches: dict[str, int]) -> str:
    """The smallest level that holds so many bytes."""
    return next((level for level in ("L2", "L3") if size <= caches[level]), "memory")


def measure_limits(threads: int, seconds: float) -> dict[str, float]:
    """What this machine reaches on so many threads, float32.

    ``sgemm``: GMAC/s of a square matrix product, the better of torch's and numpy's library.
    ``conv``: GMAC/s of torch's dense 3x3 convolution of many channels, which may know
    instructions that those libraries do not use on this processor.
    ``L2``, ``L3``, ``memory``: GB/s, read and written together, of a copy within each.
    """

    def rate(work: float, call: Callable[[], Any]) -> float:
        # A limit is what the machine can do, so the fast end of the samples counts.
        return 1e-9 * work / float(np.percentile(samples_of(call, seconds), 10))

    limits = {"sgemm": 0.0, "conv": 0.0}
    for n in SIZES:
        a, b, c = (torch.randn(n, n) for _ in range(3))
        torch_rate = rate(n**3, lambda a=a, b=b, c=c: torch.mm(a, b, out=c))
        a, b, c = a.numpy(), b.numpy(), c.numpy()
        numpy_rate = rate(n**3, lambda a=a, b=b, c=c: np.matmul(a, b, out=c))
        limits["sgemm"] = max(limits["sgemm"], torch_rate, numpy_rate)
    with torch.inference_mode():
        for n in CHANNELS:
            x = torch.randn(1, n, 28, 28).contiguous(memory_format=torch.channels_last)
            kernel = torch.randn(n, n, 3, 3).contiguous(memory_format=torch.channels_last)
            conv_rate = rate(
                28 * 28 * kernel.numel(), lambda x=x, k=kernel: F.conv2d(x, k, padding=1)
            )
            limits["conv"] = max(limits["conv"], conv_rate)
    caches = cache_bytes(threads)
    # Source and target together fill half a cache, or four times the last one.
    totals = {"L2": caches["L2"] // 2, "L3": caches["L3"] // 2, "memory": 4 * caches["L3"]}
    for level in LEVELS:
        source = torch.randn(totals[level] // 8)
        target = torch.empty_like(source)
        limits[level] = rate(
            8 * source.numel(), lambda source=source, target=target: target.copy_(source)
        )
    return limits
