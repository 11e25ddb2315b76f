"""In which form a case is run: every file in this folder that has a list VARIANTS adds its own.

Each variant of a case runs in processes of its own, so prepare may change process-wide settings.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from cases import Case, Work


def general(case: Case) -> bool:
    """Every case that has no variants of its own."""
    return not case.own


@dataclass(frozen=True)
class Variant:
    """A form of running a case.

    Attributes:
        name: in the rows.
        baseline: what ours is compared with.
        backend: of sodfast, asked for by name in this variant's processes.
        prepare: (case, work) to the work that is timed, warmed up or not; may raise, with a
            sentence that then stands in the row.
        serves: whether the variant has anything to say about a case.
    """

    name: str
    baseline: bool
    backend: str
    prepare: Callable[[Case, Work], Work]
    serves: Callable[[Case], bool] = general


def all_variants() -> list[Variant]:
    """The variants of all files in this folder, baselines first."""
    variants: list[Variant] = []
    for module in pkgutil.iter_modules(__path__):
        variants += importlib.import_module(f"{__name__}.{module.name}").VARIANTS
    return sorted(variants, key=lambda variant: not variant.baseline)


def find_variant(name: str) -> Variant:
    """The variant with a name."""
    return next(variant for variant in all_variants() if variant.name == name)
