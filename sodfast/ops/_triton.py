"""How the Triton kernels become backends of torch.ops.sodfast: for which ops, where, or why not.

Triton is imported when the first kernel runs, not before.
"""

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

OPS = frozenset(
    f"goctconv{op}"
    for op in (
        "", "_grad_input", "_grad_weight",
        "_depthwise", "_depthwise_grad_input", "_depthwise_grad_weight",
        "_dilated", "_dilated_grad_input", "_dilated_grad_weight",
        "_norm_act", "_norm_act_backward", "_update_stats_",
    )
) | {
    "decay_", "adam_decay_", "dkd_theta", "dkd_loss", "dkd_loss_backward", "scfm", "scfm_backward",
    "boundary", "boundary_backward", "structure_polishing_sums",
    "structure_polishing_sums_backward",
}  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GPUS = ("cuda", "xpu")  # "cuda" is torch's name for ROCm's devices too

INSTALLED = find_spec("triton") is not None
# As Triton reads it; it must be set before triton is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
DEVICES = (*GPUS, "cpu") if INTERPRETED else GPUS

# Holds the registrations; torch forgets them when this object goes.
_LIBRARY = torch.library.Library("sodfast", "IMPL")
_registered: set[tuple[str, str]] = set()  # (op, key) where Triton's kernel can be reached


def absent() -> str:
    """Why no Triton kernel can run in this process; an empty string when one can."""
    if not INSTALLED:
        return "Triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available() and not torch.xpu.is_available():
        return (
            "torch finds no GPU here (TRITON_INTERPRET=1, set before Python starts, runs the "
            "kernels on the CPU, slowly)"
        )
    return ""


def refusal(op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why Triton cannot run an op on a device and dtype; None when it can."""
    if not INSTALLED:
        return "Triton is not installed"
    if op not in OPS:
        return f"sodfast has no Triton kernel for {op}"
    if device not in DEVICES:
        return f"{op} got a tensor on {device}, and Triton runs on GPUs"
    if dtype not in DTYPES:
        return f"the Triton kernels take float32, float16 and bfloat16, not {dtype}"
    return None


def serve(op: str) -> None:
    """Register the Triton kernel of an op for the kinds of GPU that have no compiled one."""
    if op in OPS and INSTALLED:
        for key in (device.upper() for device in GPUS):
            if not _has_kernel(op, key):
                _registered.add((op, key))
                _LIBRARY.impl(op, _kernel(op), key)


def share(op: str, asked: Callable[[], bool]) -> None:
    """Where an op has a compiled kernel, let Triton's run instead whenever `asked` says so."""
    if op not in OPS or not INSTALLED:
        return
    for key in (device.upper() for device in DEVICES):
        if (op, key) in _registered or not _has_kernel(op, key):
            continue
        _registered.add((op, key))
        compiled, kernel = torch.library.get_kernel(f"sodfast::{op}", key), _kernel(op)

        def route(keyset: Any, *args: Any, compiled: Any = compiled, kernel: Any = kernel) -> Any:
            return kernel(*args) if asked() else compiled.call_boxed(keyset, *args)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it overrides, as it should
            _LIBRARY.impl(op, route, key, with_keyset=True, allow_override=True)


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sodfast::{op}", key)


def _kernel(op: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        kernel = getattr(importlib.import_module("sodfast.kernels"), op)
        with _on_device_of(args):
            return kernel(*args)

    return run


def _on_device_of(args: tuple) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: makes it that of the first tensor."""
    device = next(leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)
