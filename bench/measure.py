"""Times one call and finds its memory."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import Work
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

MIN_WARM_UP, MIN_CALLS = 2, 3  # even when one call takes longer than all the time there is
MAX_CALLS = 2000


def step_of(work: Work, training: bool) -> Callable[[], Any]:
    """What is timed: the call, in training with the gradients of everything that wants one; or
    the work's own step."""
    module, args, whole = work
    if whole is not None:
        return whole
    if not training:
        return torch.inference_mode()(lambda: module(*args))
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    leaves = [x for x in [*tree_leaves(args), *parameters] if _wants_gradient(x)]
    # As a loss would send them back, in the layout of the results.
    grads = [1e-3 * torch.randn_like(y) for y in _roots(module(*args))]

    def step() -> Any:
        return torch.autograd.grad(_roots(module(*args)), leaves, grads)

    return step


def samples_of(step: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each of many calls in a row, after a warm-up of half the time."""
    _repeat(step, seconds / 2, MIN_WARM_UP)
    return _repeat(step, seconds, MIN_CALLS)


def peak_bytes(step: Callable[[], Any]) -> int | None:
    """How far one call raises this process's memory at most; None where Linux does not tell."""
    peak = Path("/proc/self/clear_refs")
    gc.collect()
    try:
        # What earlier calls have freed goes back to the system, or this one would reuse it unseen.
        ctypes.CDLL(None).malloc_trim(0)
        peak.write_text("5")  # resets the peak to what is resident now
    except (AttributeError, OSError):
        return None
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def _repeat(step: Callable[[], Any], seconds: float, at_least: int) -> list[float]:
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < at_least or (time.perf_counter() < end and len(samples) < MAX_CALLS):
        start = time.perf_counter()
        step()
        samples.append(time.perf_counter() - start)
    return samples


def _roots(result: Any) -> list[Tensor]:
    return [y for y in tree_leaves(result) if _wants_gradient(y)]


def _wants_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(match[1]) if match else 0
