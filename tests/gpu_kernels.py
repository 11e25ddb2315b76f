"""The kernels for GPUs under test, wherever they can run, and their comparison with the reference.

"cuda-on-host" are the CUDA kernels run on the CPU by tests/native/cuda_on_host.h: `make
cuda-on-host` builds them into a library with a namespace of its own, and inside
:func:`running` they take the place of the CPU's kernels. "cuda" are the same kernels on a GPU.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from op_cases import Run, Tensors, doubled, results, threads
from torch import Tensor
from torch.utils._pytree import tree_map_only

import sodfast
from sodfast.ops import _backend

LIBRARY = Path(__file__).parents[1] / "build/cuda_on_host/libsodfast_cuda_on_host.so"
OPS = (
    "goctconv", "goctconv_grad_input", "goctconv_grad_weight", "goctconv_depthwise",
    "goctconv_depthwise_grad_input", "goctconv_depthwise_grad_weight", "goctconv_dilated",
    "goctconv_dilated_grad_input", "goctconv_dilated_grad_weight", "goctconv_norm_act",
    "goctconv_norm_act_backward", "goctconv_update_stats_", "decay_", "adam_decay_", "dkd_theta",
    "dkd_loss", "dkd_loss_backward", "scfm", "scfm_backward", "boundary", "boundary_backward",
    "structure_polishing_sums", "structure_polishing_sums_backward", "ilblock",
    "goctconv_measured", "goctconv_norm_depthwise", "goctconv_norm_depthwise_backward",
)  # fmt: skip
HALVES = (torch.float16, torch.bfloat16)
BACKENDS = ("cuda-on-host", "cuda")

_definitions: list[torch.library.Library] = []  # torch forgets what these define when they go


def available() -> dict[str, str]:
    """Every backend of BACKENDS with the reason why it cannot run; an empty string when it can."""
    missing = "" if LIBRARY.exists() else f"{LIBRARY.name} was not built (make cuda-on-host)"
    on_host = _backend.available()["cpu"] or missing
    return {"cuda-on-host": on_host, "cuda": _backend.available()["cuda"]}


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "cuda" else "cpu")


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    if backend == "cpu":
        return torch.float32, torch.float64
    wide = (torch.float64,) if backend == "cuda-on-host" else ()
    return (torch.float32, *HALVES, *wide)


@contextlib.contextmanager
def running(backend: str) -> Iterator[None]:
    """Runs the ops by a backend that is available."""
    if backend != "cuda-on-host":
        with sodfast.use_backend(backend):
            yield
        return
    _load()
    library = torch.library.Library("sodfast", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that a kernel is overridden: as is meant
        for op in OPS:
            kernel = getattr(torch.ops.sodfast_cuda_on_host, op).default
            library.impl(op, kernel, "CPU", allow_override=True)
    dtypes = mock.patch.object(_backend, "_CPU_DTYPES", dtypes_of(backend))
    kernels = mock.patch.dict(_backend._KERNELS, cpu=_backend._KERNELS["cpu"] | set(OPS))
    try:
        with dtypes, kernels, sodfast.use_backend("cpu"):
            yield
    finally:
        library._destroy()


def _load() -> None:
    """Defines the ops of the library with the schemas of ours, and loads its kernels."""
    if _definitions:
        return
    definitions = torch.library.Library("sodfast_cuda_on_host", "DEF")
    for op in OPS:
        schema = str(getattr(torch.ops.sodfast, op).default._schema)
        definitions.define(schema.removeprefix("sodfast::"))
    torch.ops.load_library(str(LIBRARY))
    _definitions.append(definitions)


def check_kernels(
    backend: str, run: Run, reference: Run, tensors: Tensors, grads: Sequence[Tensor],
    terms: dict[str, float], layout: torch.memory_format = torch.contiguous_format,
) -> None:  # fmt: skip
    """Compares outputs and gradients of a backend's kernels with the reference, in every dtype.

    Eager is the reference in that dtype, exact the reference in float64 on the same tensors.
    With both divided by sqrt(terms), the number of products that each value sums up, and

        error(t) = max |t - exact| / max(1, max |exact|)

    error(result) must be at most 2 error(eager) + 1e-6, plus the rounding of one stored
    number; in float64 at most 1e-11. NaN must be where exact has it. Results lie in `layout`.
    """
    device = device_of(backend)
    for dtype in dtypes_of(backend):
        given = tree_map_only(Tensor, lambda t, dtype=dtype: t.to(dtype), tensors)
        incoming = [grad.to(dtype) for grad in grads]
        with threads(1):
            exact = results(reference, doubled(given), [grad.double() for grad in incoming])
            eager = results(reference, given, incoming)
        with running(backend):
            moved = tree_map_only(Tensor, lambda t: t.to(device), given)
            found = results(run, moved, [grad.to(device) for grad in incoming])
        slack = 1e-11 if dtype == torch.float64 else 1e-6
        slack += torch.finfo(dtype).eps if dtype in HALVES else 0
        for name, group in found.items():
            unit = max(terms.get(name, 1), 1) ** 0.5
            assert len(group) == len(exact[name])
            for i, (t, e, x) in enumerate(zip(group, eager[name], exact[name])):
                label = f"{dtype} {name}[{i}]"
                assert t.is_contiguous(memory_format=layout), label
                assert t.dtype == dtype and t.shape == x.shape, label
                t, e, x = (v.double().cpu() / unit for v in (t, e, x))
                assert torch.equal(t.isnan(), x.isnan()), f"{label}: NaN in other places"
                if x.numel() == 0:
                    continue
                t, e, x = (v.nan_to_num(posinf=float("inf")) for v in (t, e, x))
                magnitude = max(1.0, x.abs().max().item())
                error, allowed = ((v - x).abs().max().item() / magnitude for v in (t, e))
                assert error <= 2 * allowed + slack, f"{label}: {error:.2e}, eager {allowed:.2e}"
