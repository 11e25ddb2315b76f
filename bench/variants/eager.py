"""Baselines: the tests' reference in eager torch, in both memory layouts.

For inference the reference runs the fused network, so that it need not normalise either.
"""

from __future__ import annotations

from typing import Any

import torch
from cases import Case, Work
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import sodfast
from variants import Variant


def folded(case: Case, work: Work) -> Work:
    """The work with batch normalisation folded where that is possible: not in training."""
    if case.training or not isinstance(work.module, nn.Module):
        return work
    return Work(sodfast.fuse(work.module), work.args)


def channels_last(work: Work) -> Work:
    """The work with weights and arguments in torch's channels_last layout."""

    def convert(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() != 4:
            return x
        x_last = x.detach().contiguous(memory_format=torch.channels_last)
        return x_last.requires_grad_(x.requires_grad)

    module = work.module
    if isinstance(module, nn.Module):
        module = module.to(memory_format=torch.channels_last)
    return Work(module, tree_map(convert, work.args))


VARIANTS = [
    Variant("eager", True, "reference", folded),
    Variant(
        "eager channels_last", True, "reference",
        lambda case, work: channels_last(folded(case, work)),
    ),
]  # fmt: skip
