"""The one place that chooses what an op runs on: cpu, cuda, triton or the reference.

Every refusal is a sentence with the value that caused it. The choice is process-wide.
"""

import os
import platform
import warnings
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import _triton
from ._autograd import differentiable

try:
    import sodfast._C as _C
except ModuleNotFoundError:
    _C = None
    _NO_MODULE = "the compiled module sodfast._C is not there (sodfast was not built here)"
except ImportError as error:  # built against something else, or a damaged file
    _C = None
    _NO_MODULE = f"the compiled module sodfast._C could not be loaded ({error})"
else:
    _NO_MODULE = ""


def _load_cuda() -> str:
    """Register the CUDA kernels where torch can run them; otherwise say why not."""
    if _C is None:
        return _NO_MODULE
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    try:
        import sodfast._C_cuda  # noqa: F401
    except ModuleNotFoundError:
        return "the module sodfast._C_cuda is not there (sodfast was built without nvcc)"
    except ImportError as error:
        return f"the module sodfast._C_cuda could not be loaded ({error})"
    return ""


_NO_CUDA_MODULE = _load_cuda()

BACKENDS = ("cpu", "cuda", "triton", "reference")

# Which ops have a compiled kernel for which device, read once from torch's dispatcher.
_KERNELS: dict[str, frozenset[str]] = {
    device: frozenset(
        name.removeprefix("sodfast::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("sodfast::")
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())
    )
    for device in ("cpu", "cuda")
}
_CPU_DTYPES = (torch.float32, torch.float64)
_CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Holds what register() adds for in-place ops; torch forgets it when this object goes.
_LIBRARY = torch.library.Library("sodfast", "IMPL")

_requested: str | None = os.environ.get("SODFAST_BACKEND") or None
_warned: set[str] = set()
_registered: list[str] = []  # the ops that register() has seen


def choose(op: str, x: Tensor) -> str:
    """The backend that runs ``op`` on tensors like ``x``.

    Returns "cpu", "cuda", "triton" or "reference". Without a request it is the compiled kernel
    of x's device, on a GPU without one Triton's, or, with a warning the first time, the reference.

    Raises:
        RuntimeError: the backend asked for by name cannot run this op on this tensor.
        ValueError: SODFAST_BACKEND holds an unknown name.
    """
    device = x.device.type
    if _requested == "reference" or device == "meta":
        return "reference"
    candidate = _requested or _first_choice(op, device)
    reason = _refusal(candidate, op, device, x.dtype)
    if reason is None:
        return candidate
    if _requested is not None:
        _known(_requested)
        raise RuntimeError(f"the backend {_requested!r} was asked for, but {reason}")
    if not torch.compiler.is_compiling() and reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"sodfast runs on the slower reference: {reason}", stacklevel=3)
    return "reference"


def has_kernel(op: str, x: Tensor) -> bool:
    """Whether a compiled kernel would run ``op`` on tensors like ``x``.

    For whoever can do without: an op that fuses others, where these run on every backend.
    """
    device = x.device.type
    return _requested in (None, device) and _refusal(device, op, device, x.dtype) is None


def _first_choice(op: str, device: str) -> str:
    """The backend to try when none was asked for; a device's own has its name."""
    compiled = op in _KERNELS.get(device, ())
    triton = device in _triton.GPUS and op in _triton.OPS and _triton.INSTALLED
    return "triton" if triton and not compiled else device


def _refusal(backend: str, op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run an op on a device and dtype; None when it can."""
    if backend == "triton":
        return _NO_MODULE or _triton.refusal(op, device, dtype)
    if backend != device:
        return f"{op} got a tensor on {device}"
    if backend not in _KERNELS or op not in _KERNELS[backend]:
        if backend == "cpu" and _NO_MODULE:
            return _NO_MODULE
        if backend == "cuda" and _NO_CUDA_MODULE:
            return _NO_CUDA_MODULE
        return f"this build of sodfast has no {backend} kernel for {op}"
    if backend == "cpu" and dtype not in _CPU_DTYPES and not torch.is_autocast_enabled("cpu"):
        return f"the cpu kernels take float32 and float64, not {dtype}"
    if backend == "cuda" and dtype not in _CUDA_DTYPES:
        return f"the cuda kernels take float32, float16 and bfloat16, not {dtype}"
    return None


def _triton_is_asked_for() -> bool:
    return _requested == "triton"


def _known(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known are {', '.join(BACKENDS)}")


class use_backend:
    """Ask for a backend by name, or with None let sodfast choose again.

    ``use_backend("reference")`` holds from now on; ``with use_backend("reference"):`` until
    the block ends. The environment variable SODFAST_BACKEND sets the first value. The request
    is process-wide: other threads see it too. A backend that cannot run raises a RuntimeError
    that says why, here when it can never run in this process and otherwise when an op is
    called.

    Args:
        name: "cpu", "cuda", "triton", "reference" or None.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend is not available in this process.
    """

    def __init__(self, name: str | None) -> None:
        global _requested
        if name is not None:
            _known(name)
            reason = available()[name]
            if reason:
                raise RuntimeError(f"the backend {name!r} was asked for, but {reason}")
            if name == "triton":
                for op in _registered:
                    _triton.share(op, _triton_is_asked_for)
        self._previous, _requested = _requested, name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _requested
        _requested = self._previous


def available() -> dict[str, str]:
    """Every backend with the reason why it cannot run here; an empty string when it can."""
    no_cuda = _NO_CUDA_MODULE
    if not no_cuda and not torch.cuda.is_available():
        no_cuda = "torch finds no CUDA device here"
    no_cpu = "" if _KERNELS["cpu"] else _NO_MODULE or "sodfast._C registered no cpu kernel"
    no_triton = _NO_MODULE or _triton.absent()
    return {"cpu": no_cpu, "cuda": no_cuda, "triton": no_triton, "reference": ""}


def info() -> str:
    """What sodfast runs on here, one sentence per line: versions, backends, the request."""
    from sodfast import __version__

    lines = [
        f"sodfast {__version__} with torch {torch.__version__}, Python "
        f"{platform.python_version()}, {torch.get_num_threads()} threads."
    ]
    for name, reason in available().items():
        if reason:
            lines.append(f"{name}: not available, because {reason}.")
        elif name == "cpu" and _C is not None:
            build = _C.build_info()
            lines.append(
                f"cpu: compiled kernels and plans run as {_C.cpu_isa()} (this machine and build "
                f"offer {', '.join(_C.cpu_isas())}; version {build['version']}, built by "
                f"{build['compiler']})."
            )
            if _C.cpu_isa_unknown():
                wanted = os.environ.get("SODFAST_CPU_ISA")
                lines.append(f"cpu: SODFAST_CPU_ISA is {wanted!r}, which is none of them.")
        elif name == "reference":
            lines.append("reference: plain torch, always available.")
        elif name == "triton":
            how = "interpreted on the CPU, slowly" if _triton.INTERPRETED else "compiled when used"
            lines.append(f"triton: kernels of all ops, {how}.")
        elif name == "cuda":
            import sodfast._C_cuda as cuda

            build = cuda.build_info()
            lines.append(
                f"cuda: compiled kernels for {build['architectures'].replace(' ', ', ')}, built by "
                f"{build['compiler']}."
            )
        else:
            lines.append(f"{name}: compiled kernels.")
    if _requested is None:
        lines.append("No backend was asked for: each op takes the first that serves its tensors.")
    else:
        lines.append(f"The backend {_requested!r} was asked for.")
    return "\n".join(lines)


def _refuse_second_derivative(op: str, *_: Any) -> None:
    raise RuntimeError(
        f"sodfast::{op} has no gradient: the compiled ops can be differentiated once; "
        'use_backend("reference") can more often'
    )


def register(
    op: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    autocast: bool = True,
    cuda_autocast: str = "",
) -> None:
    """Add the Python side of a compiled op: fake, autograd formula, autocast rule.

    An op without a backward is a gradient itself: differentiating it is refused, where torch
    would warn and go on with zeros. An op whose name ends in "_" works in place: it has no
    gradient, and a graph that still needs the old values raises. Does nothing when no compiled
    module has defined the op. Under autocast an op runs in float32 on the CPU; on CUDA it takes
    its tensors as they come, or where `cuda_autocast` is "half" in the dtype of the autocast, and
    where it is "float32" in that.
    """
    if not hasattr(torch.ops.sodfast, op):
        return
    _registered.append(op)
    _triton.serve(op)
    if _requested == "triton":
        _triton.share(op, _triton_is_asked_for)
    name = f"sodfast::{op}"
    torch.library.register_fake(name, partial(_on_one_device, op, fake))
    if op.endswith("_"):
        _tell_autograd_of_changes(op)
    else:
        formula = backward or partial(_refuse_second_derivative, op)
        overload = getattr(torch.ops.sodfast, op).default
        kernel = differentiable(overload, formula, setup_context)
        _LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)
    if autocast:  # tiny activations and variances: half precision is no good on the CPU
        torch.library.register_autocast(name, "cpu", torch.float32)
    if cuda_autocast:
        _register_autocast_on_cuda(op, cuda_autocast == "half")


def _register_autocast_on_cuda(op: str, half: bool) -> None:
    """As torch.library.register_autocast, but to the dtype that each autocast asks for."""
    overload = getattr(torch.ops.sodfast, op).default
    key = torch._C.DispatchKey.AutocastCUDA

    def cast(x: Tensor) -> Tensor:
        eligible = x.is_cuda and x.is_floating_point() and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype("cuda") if half else torch.float32
        return x.to(dtype) if eligible else x

    def run(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return overload(*tree_map_only(Tensor, cast, args))

    overload.py_kernels.pop(key, None)  # what register_autocast("cpu") put there, for CUDA too
    overload.py_impl(key)(run)
    _LIBRARY.impl(op, lambda _, *args: run(*args), "AutocastCUDA", with_keyset=True)


def _on_one_device(op: str, fake: Callable[..., Any], *args: Any) -> Any:
    """The fake of an op, which a single meta tensor among real ones would otherwise reach."""
    lists = [arg if isinstance(arg, (list, tuple)) else [arg] for arg in args]
    devices = {str(x.device) for xs in lists for x in xs if isinstance(x, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"sodfast::{op} got tensors on {' and '.join(sorted(devices))}")
    return fake(*args)


def _tell_autograd_of_changes(op: str) -> None:
    """Bump the version of every tensor that an in-place op writes, as torch's own ops do."""
    overload = getattr(torch.ops.sodfast, op).default
    arguments = enumerate(overload._schema.arguments)
    written = [i for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]

    def bump_versions(keyset: Any, *args: Any) -> Any:
        for position in written:
            torch.autograd.graph.increment_version(args[position])
        return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _LIBRARY.impl(op, bump_versions, "ADInplaceOrView", with_keyset=True)
