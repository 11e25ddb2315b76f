"""Baselines: the tests' reference under torch.compile, in both memory layouts.

Freezing makes the weights constants, so that inductor can fold and repack them; it is for
inference only.
"""

from __future__ import annotations

from functools import partial

import torch
from cases import Case, Work

from variants import Variant
from variants.eager import channels_last, folded


def compiled(case: Case, work: Work, last: bool, freezing: bool) -> Work:
    work = folded(case, work)
    if last:
        work = channels_last(work)
    torch._inductor.config.freezing = freezing
    # A graph break would be the reference's fault, not torch.compile's: it must not go unseen.
    return Work(torch.compile(work.module, fullgraph=True), work.args)


def inference(case: Case) -> bool:
    return not case.training


def _variant(name: str, last: bool, freezing: bool) -> Variant:
    prepare = partial(compiled, last=last, freezing=freezing)
    if freezing:
        return Variant(name, True, "reference", prepare, inference)
    return Variant(name, True, "reference", prepare)


VARIANTS = [
    _variant("compile", last=False, freezing=False),
    _variant("compile channels_last", last=True, freezing=False),
    _variant("freezing", last=False, freezing=True),
    _variant("freezing channels_last", last=True, freezing=True),
]
