"""Weight files: safetensors, with the model's configuration and preprocessing inside.

The file's metadata has one entry of ours, "sodfast": JSON with

    format          1
    model           the registered name, "csnet"
    config          keyword arguments for `sodfast.create_model`
    preprocessing   size, mean, std, resample (see `sodfast.preprocess`)

so that a file is enough to build the network and to feed it. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from .preprocess import check_preprocessing

__all__ = ["atomic_write", "build", "flush_denormals", "load", "save"]

_FORMAT = 1
_KEY = "sodfast"
# Dynamic weight decay drives weights down to 1e-42. Arithmetic on subnormal floats is many
# times slower, and nothing this small can reach the output.
_TINY = 1e-30


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], sync: bool = True) -> Iterator[BinaryIO]:
    """A binary file that appears under its name whole, or not at all.

    Written under a hidden temporary name in the same folder and renamed at the end; on any
    exception (Ctrl-C too) the temporary file is removed and an existing `path` stays as it
    was. sync: also wait until the data are on the disk, so that a power cut cannot leave an
    empty file under the final name. Raises OSError, with `path` as its filename, where the
    folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            # Under the name that the caller knows (the class follows from the number).
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def flush_denormals(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` in which values with magnitude under 1e-30 are zero.

    Integer tensors come back as a plain copy. NaN stays NaN.
    """
    if not tensor.is_floating_point():
        return tensor.clone()
    return torch.where(tensor.abs() < _TINY, torch.zeros_like(tensor), tensor)


def build(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], source: str
) -> nn.Module:
    """Creates the registered model `name` and gives it `tensors`, in eval mode.

    tensors: every parameter and buffer of the model by its name, no more and no less; they
    become the model's own, denormals flushed. source: what to call their origin in messages.
    Raises ValueError when the configuration is refused or a tensor is missing, left over, or
    of the wrong shape or kind; nothing the size of the model is allocated before that check.
    """
    model = _outline(name, config, source)
    expected = model.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - expected.keys())
    if missing or surplus:
        parts = []
        if missing:
            parts.append(f"lacks {_listing(missing)}")
        if surplus:
            parts.append(f"has {_listing(surplus)}, which the model does not know")
        raise ValueError(f"{source}: the file {' and '.join(parts)}")
    for key, wanted in expected.items():
        got = tensors[key]
        if got.shape != wanted.shape:
            raise ValueError(
                f"{source}: {key} has shape {tuple(got.shape)}, "
                f"but the model's configuration wants {tuple(wanted.shape)}"
            )
        if got.is_floating_point() != wanted.is_floating_point():
            raise ValueError(f"{source}: {key} is {got.dtype}, but the model wants {wanted.dtype}")
    ready = {
        key: flush_denormals(tensors[key].to(wanted.dtype)).contiguous()
        for key, wanted in expected.items()
    }
    model.load_state_dict(ready, strict=True, assign=True)
    return model.eval()


def _outline(name: Any, config: Any, source: str) -> nn.Module:
    """The model without numbers: on the meta device, where a tensor is only a shape, so that
    a configuration that lies about its size costs no memory, and no random numbers are drawn.
    """
    from .models import create_model

    if not isinstance(name, str) or not isinstance(config, Mapping):
        raise ValueError(f"{source}: the model's name or configuration is of the wrong type")
    try:
        with torch.device("meta"):
            return create_model(name, **config)
    except (
        ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
    ) as error:  # fmt: skip
        raise ValueError(
            f"{source}: no model {name[:40]!r} can be made of its configuration: {_short(error)}"
        ) from error


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a model's weights, configuration and preprocessing to one safetensors file.

    model: from `sodfast.create_model`, `load` or `convert_csnet`; a fused model cannot be
    saved this way (save the model it was made from). The file appears whole or not at all.
    Raises TypeError for another kind of module, OSError when the file cannot be written.
    """
    from safetensors.torch import save as serialise

    name, config = getattr(model, "name", None), getattr(model, "config", None)
    if not isinstance(name, str) or not isinstance(config, Mapping):
        raise TypeError(
            f"model must come from sodfast.create_model (it needs .name and .config), "
            f"got {type(model).__name__}; of a fused model, save the one it was made from"
        )
    state = model.state_dict()
    if _outline(name, config, "model").state_dict().keys() != state.keys():
        raise TypeError(
            f"model is not the {name!r} that its configuration describes; "
            "a fused model cannot be saved, save the one it was made from"
        )
    description = {
        "format": _FORMAT,
        "model": name,
        "config": dict(config),
        "preprocessing": check_preprocessing(getattr(model, "preprocessing", None)),
    }
    # clone: safetensors refuses tensors that share memory.
    tensors = {key: value.detach().to("cpu").contiguous().clone() for key, value in state.items()}
    data = serialise(tensors, metadata={_KEY: json.dumps(description)})
    with atomic_write(path) as file:
        file.write(data)


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Reads a file written by `save` and returns the model, on the CPU and in eval mode.

    Weights with magnitude under 1e-30 become zero (see docs on denormals). Raises
    FileNotFoundError, or ValueError that names the file when it is cut, damaged, no
    safetensors file, not written by sodfast, or does not fit its own configuration.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"weights file not found: {path}")
    if not path.is_file():
        raise ValueError(f"{path}: is not a file")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise ValueError(
                    f"{path}: a safetensors file, but not written by sodfast "
                    f"(its metadata has no {_KEY!r} entry)"
                )
            # clone: a tensor of safe_open may be a view of the file, which can change under us.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        if path.suffix == ".sodfast":
            raise ValueError(
                f"{path}: a plan, not weights: sodfast.load_plan and the C library run it"
            ) from error
        raise ValueError(
            f"{path}: not a safetensors file, or cut or damaged ({_short(error)})"
        ) from error

    try:
        description = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its {_KEY!r} entry is no JSON ({_short(error)})") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        found = description.get("format") if isinstance(description, dict) else description
        raise ValueError(
            f"{path}: its format is {found!r:.40}; this version of sodfast reads {_FORMAT}"
        )
    for entry in ("model", "config", "preprocessing"):
        if entry not in description:
            raise ValueError(f"{path}: its {_KEY!r} entry lacks {entry!r}")
    try:
        preprocessing = check_preprocessing(description["preprocessing"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model = build(description["model"], description["config"], tensors, str(path))
    # setattr: to the type checker a module's attributes are tensors and modules.
    setattr(model, "preprocessing", preprocessing)  # noqa: B010
    return model


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _listing(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
