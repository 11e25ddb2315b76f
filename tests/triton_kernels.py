"""The Triton kernels under test: on a GPU, or interpreted on the CPU where there is none.

"triton-interpreted" puts them in the place of the CPU's kernels inside :func:`running`. Whether
Triton interprets is decided for a process when the kernels are first imported: here.
"""

import contextlib
import importlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from op_cases import Run, Tensors, doubled, results, threads
from torch import Tensor

import sodfast
from sodfast.ops import _backend, _triton

# Before a test of torch.compile imports Triton: its own library is then made to be compiled.
if _triton.INSTALLED and not torch.cuda.is_available():
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        importlib.import_module("sodfast.kernels")

BACKENDS = ("triton-interpreted", "triton")
HALVES = (torch.float16, torch.bfloat16)


def available() -> dict[str, str]:
    """Both with the reason why they cannot run; an empty string when they can."""
    reason = "" if _triton.INSTALLED else "Triton is not installed"
    on_gpu = "the kernels run on this machine's GPU" if torch.cuda.is_available() else ""
    return {
        "triton-interpreted": reason or on_gpu or _backend.available()["cpu"],
        "triton": _backend.available()["triton"],
    }


def device_of(backend: str) -> torch.device:
    return torch.device("cpu" if backend == "triton-interpreted" else "cuda")


@contextlib.contextmanager
def running(backend: str) -> Iterator[None]:
    """Runs the ops by a backend that is available."""
    if backend == "triton":
        with sodfast.use_backend("triton"):
            yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, TRITON_INTERPRET="1"))
        kernels = importlib.import_module("sodfast.kernels")
        library = torch.library.Library("sodfast", "IMPL")
        stack.callback(library._destroy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that they override the CPU's
            for op in _triton.OPS:
                library.impl(op, getattr(kernels, op), "CPU", allow_override=True)
        stack.enter_context(mock.patch.object(_backend, "_CPU_DTYPES", _triton.DTYPES))
        stack.enter_context(sodfast.use_backend("cpu"))
        yield


def check_kernels(
    backend: str, dtype: torch.dtype, run: Run, reference: Run, tensors: Tensors,
    grads: Sequence[Tensor], terms: dict[str, float],
    layout: torch.memory_format = torch.contiguous_format,
) -> None:  # fmt: skip
    """Compares outputs and gradients of the kernels with the reference's, in one dtype.

    Eager is the reference in that dtype, exact the reference in float64 on the same tensors.
    With all divided by sqrt(terms), the number of products that each value sums up, and

        error(t) = max |t - exact| / max(1, max |exact|)

    error(result) must be at most 2 error(eager) + 1e-6, plus the rounding of one stored number
    in half precision. NaN must be where exact has it. Results lie in `layout`.
    """
    given = {name: [t.to(dtype) for t in group] for name, group in tensors.items()}
    incoming = [grad.to(dtype) for grad in grads]
    with threads(1), sodfast.use_backend("reference"):
        exact = results(reference, doubled(given), [grad.double() for grad in incoming])
        eager = results(reference, given, incoming)
    device = device_of(backend)
    with running(backend):
        moved = {name: [t.to(device) for t in group] for name, group in given.items()}
        found = results(run, moved, [grad.to(device) for grad in incoming])
    slack = 1e-6 + (torch.finfo(dtype).eps if dtype in HALVES else 0)
    for name, group in found.items():
        unit = math.sqrt(max(terms.get(name, 1), 1))
        assert len(group) == len(exact[name])
        for i, triple in enumerate(zip(group, eager[name], exact[name])):
            label = f"{dtype} {name}[{i}]"
            assert group[i].is_contiguous(memory_format=layout), label
            assert group[i].dtype == dtype, label
            t, e, x = (v.cpu().double() / unit for v in triple)
            assert t.shape == x.shape, label
            assert torch.equal(t.isnan(), x.isnan()), f"{label}: NaN in other places"
            if x.numel():
                t, e, x = (v.nan_to_num(posinf=math.inf, neginf=-math.inf) for v in (t, e, x))
                magnitude = max(1.0, x.abs().max().item())
                error, allowed = ((v - x).abs().max().item() / magnitude for v in (t, e))
                assert error <= 2 * allowed + slack, f"{label}: {error:.2e}, eager {allowed:.2e}"
