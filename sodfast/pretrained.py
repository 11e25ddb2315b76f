"""Weights by name or by path; the ones that ship with the package."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from .weights import load

__all__ = ["DEFAULT", "from_pretrained", "pretrained_names", "weights_file"]

# What is taken where no weights are named; docs/weights.md tells how they were trained.
DEFAULT = "scfnet-lite"

# Weights that ship with the package: one file NAME.safetensors each.
_FOLDER = Path(__file__).with_name("pretrained_weights")


def pretrained_names() -> list[str]:
    """The names that `from_pretrained` knows, in alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def from_pretrained(weights: str | os.PathLike[str] = DEFAULT) -> nn.Module:
    """A trained model, in eval mode.

    weights: a name (see `pretrained_names`), or the path of a file that `sodfast.save` or
    ``sodfast convert`` wrote. Whatever has a folder or an ending, or is there as a file, is a
    path. Nothing is downloaded.

    Raises ValueError for an unknown name, and for a path what `sodfast.load` raises.
    """
    return load(weights_file(weights))


def weights_file(weights: str | os.PathLike[str]) -> Path:
    """The file of weights, which may not be there; names and errors as of `from_pretrained`."""
    path = Path(weights)
    names = pretrained_names()
    if isinstance(weights, str) and weights in names:
        return _FOLDER / f"{weights}.safetensors"
    if str(weights) and (path.suffix or path.name != str(weights) or path.exists()):
        return path
    known = f"known are {', '.join(names)}" if names else "this version of sodfast ships none"
    raise ValueError(
        f"unknown weights {str(weights)!r}: {known}; the path of a .safetensors file works too"
    )
