"""What is timed: every file in this folder that has a list CASES adds its own.

A file here says which op or model, on which shapes, forward only or with the backward; the
variants (the other folder) say in which form that is run.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Work(NamedTuple):
    """One call to be timed, ``module(*args)``."""

    module: Callable[..., Any]  # as the library's user writes it: a torch module, not fused
    args: tuple[Any, ...]  # tensors, or lists with a tensor per scale
    step: Callable[[], Any] | None = None  # timed instead, where a variant has more to do


@dataclass(frozen=True)
class Case:
    """A row of the benchmark, once per variant.

    Attributes:
        kind: "op" or "model".
        name: of the op or model; what --op and --model go by.
        label: which network and layer the shapes are from; unique within name and pass.
        training: time forward and backward (no optimizer) instead of inference. Arguments
            that require a gradient get one, and so do all parameters.
        build: makes the work, with the same numbers every time (the seed is set before).
        slow: only run when asked for by name, or with --all.
        own: has variants of its own, and the general ones have nothing to say about it.
    """

    kind: str
    name: str
    label: str
    training: bool
    build: Callable[[], Work]
    slow: bool = False
    own: bool = False

    @property
    def pass_name(self) -> str:
        return "training" if self.training else "inference"

    @property
    def key(self) -> str:
        return f"{self.name}: {self.label}, {self.pass_name}"


def all_cases() -> list[Case]:
    """The cases of all files in this folder, file by file."""
    cases: list[Case] = []
    for module in pkgutil.iter_modules(__path__):
        cases += importlib.import_module(f"{__name__}.{module.name}").CASES
    keys = [case.key for case in cases]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"cases that cannot be told apart: {twice}")
    return cases


def find_case(key: str) -> Case:
    """The case with a key."""
    return next(case for case in all_cases() if case.key == key)
