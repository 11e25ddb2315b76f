"""A whole training step, forward to Adam, with dynamic weight decay in three forms.

"Adam alone" is what the others are compared with: its median over theirs is one minus the
decay's share of the step. The hooks and the loss term are how one writes the decay in plain
torch: each feature map is read again for its average, and autograd carries the penalty.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from cases import Case, Work
from torch import Tensor, nn

from sodfast.optim import DynamicWeightDecay, decaying_norms, parameter_groups
from variants import Variant

LAMBDA = 3.0


class Penalty:
    """R of CSNet's Eq. 3 and 4 as a loss term, fed by forward hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.found: list[tuple[Tensor, Tensor]] = []
        for _, norm in decaying_norms(model):
            norm.register_forward_hook(self.hook)

    def hook(self, norm: nn.Module, inputs: tuple, ys: list[Tensor]) -> None:
        means = torch.cat([y.detach().mean((2, 3)).abs() for y in ys], 1)
        self.found.append((means, norm.weight))

    def take(self) -> Tensor:
        terms = [0.5 * (means * weight.square()).sum() / len(means) for means, weight in self.found]
        self.found.clear()
        return torch.stack(terms).sum()


def whole_step(case: Case, work: Work, form: str) -> Work:
    """form: "" (no decay), "hooks" or "ours"."""
    model, (images,) = work.module, work.args
    assert isinstance(model, nn.Module)
    truth = (torch.rand(len(images), 1, *images.shape[2:]) > 0.7).float()
    penalty = Penalty(model) if form == "hooks" else None
    # A rate at which the weights stay what they are, call after call.
    optimizer = torch.optim.Adam(parameter_groups(model, 5e-3), lr=1e-9, betas=(0.9, 0.99))
    if form == "ours":
        optimizer = DynamicWeightDecay(optimizer, model, LAMBDA)

    def step() -> None:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(images), truth)
        if penalty is not None:
            loss = loss + LAMBDA * penalty.take()
        loss.backward()
        optimizer.step()

    return Work(model, work.args, step)


def serves(case: Case) -> bool:
    return (case.name, case.own) == ("decay", True)


VARIANTS = [
    Variant("Adam alone", True, "cpu", partial(whole_step, form=""), serves),
    Variant("hooks and loss term", True, "cpu", partial(whole_step, form="hooks"), serves),
    Variant("DynamicWeightDecay", False, "cpu", partial(whole_step, form="ours"), serves),
]
