"""Ours: the compiled ops as they stand in a user's network, and the fused network."""

from cases import Case, Work

from variants import Variant
from variants.eager import channels_last, folded


def as_is(case: Case, work: Work) -> Work:
    return work


def fusable(case: Case) -> bool:
    # An op's inference case is a layer of the fused network as it is.
    return case.kind == "model" and not case.training


def has_both_layouts(case: Case) -> bool:
    return case.name == "scfm"  # the other ops copy such tensors first


VARIANTS = [
    Variant("cpu", False, "cpu", as_is),
    Variant(
        "cpu channels_last", False, "cpu", lambda case, work: channels_last(work), has_both_layouts
    ),
    Variant("cpu fused", False, "cpu", folded, fusable),
]
