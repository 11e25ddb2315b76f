"""Ours: the compiled ops as they stand in a user's network, and the fused network."""

from cases import Case, Work

from variants import Variant
from variants.eager import folded


def as_is(case: Case, work: Work) -> Work:
    return work


def fusable(case: Case) -> bool:
    # An op's inference case is a layer of the fused network as it is.
    return case.kind == "model" and not case.training


VARIANTS = [
    Variant("cpu", False, "cpu", as_is),
    Variant("cpu fused", False, "cpu", folded, fusable),
]
