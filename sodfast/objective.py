"""The loss of a recipe: of labelled pictures, of what a teacher says, of one map or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .nn import (
    DiceLoss,
    DynamicDistillation,
    DynamicDistillationLoss,
    MultiLevelLoss,
    ProgressiveBoundary,
    StructurePolishingLoss,
)
from .recipe import Recipe

__all__ = ["Objective"]


class Objective:
    """A recipe's loss as a function of a network's output and the truth.

    Of a batch's pictures the first `labelled` have ground truth and the others a teacher's map;
    each part has its own loss, and their sum is taken with the recipe's weight. Raises ValueError
    for settings of the dynamic distillation that it does not take.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._losses = {name: _loss(name, recipe) for name in {recipe.loss, recipe.distill_loss}}
        self._fixed = int(recipe.boundary) if recipe.boundary.isdigit() else 0
        self._thickness = None if self._fixed else ProgressiveBoundary(recipe.boundary, 1.0)

    def boundary(self, done: float) -> int | None:
        """How thick boundaries are when this part of the schedule is done; None without any."""
        if not any("sp" in name.split("+") for name in self._losses):
            return None
        return self._thickness(done) if self._thickness is not None else self._fixed

    def weights(self) -> DynamicDistillation | None:
        """θ, α and β of the last call's labelled pictures (of the main map), each (B,); None
        without dynamic distillation."""
        criterion = self._losses[self.recipe.loss].loss
        return criterion.first if isinstance(criterion, _Taught) else None

    def __call__(
        self, output: Tensor | Sequence[Tensor], truth: Tensor, labelled: int, done: float,
        taught: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """output: logits (B, 1, H, W), or several of the network's maps, the main one first.
        truth: (B, 1, H, W) in 0–1. labelled: how many of the B have ground truth. done: part
        of the schedule. taught: the teacher's logits of the labelled ones, for dynamic
        distillation. Returns a scalar, in float32."""
        maps = [output] if isinstance(output, Tensor) else list(output)
        maps = [one.float() for one in maps]
        k = self.boundary(done)
        for criterion in self._losses.values():
            for part in criterion.modules():
                if isinstance(part, StructurePolishingLoss) and k is not None:
                    part.k = k
            if isinstance(criterion.loss, _Taught):
                criterion.loss.taught, criterion.loss.first = taught, None
        total = torch.zeros((), device=truth.device)
        if labelled:
            own = [one[:labelled] for one in maps]
            total = total + self._losses[self.recipe.loss](own, truth[:labelled])
        if labelled < len(truth):
            rest = [one[labelled:] for one in maps]
            other = self._losses[self.recipe.distill_loss](rest, truth[labelled:])
            total = total + self.recipe.distill_weight * other
        return total


class _Taught(nn.Module):
    """Dynamic distillation as a loss of a map and the truth, for each of a network's maps."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        # TOML has no word for "none".
        threshold = settings.get("threshold", 0.5) or None
        try:
            self.loss = DynamicDistillationLoss(**{**settings, "threshold": threshold})
        except TypeError as error:  # a name that it does not know
            raise ValueError(f"dkd: {str(error).split('() ')[-1]}") from None
        self.taught: Tensor | None = None
        self.first: DynamicDistillation | None = None

    def forward(self, logits: Tensor, truth: Tensor) -> Tensor:
        assert self.taught is not None
        found = self.loss(logits, self.taught, truth)
        self.first = self.first or found
        return found.loss


class _Sum(nn.Module):
    """Several losses of a map and the truth, added up."""

    def __init__(self, *losses: nn.Module) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)

    def forward(self, logits: Tensor, truth: Tensor) -> Tensor:
        first, *others = (loss(logits, truth) for loss in self.losses)
        return sum(others, first)


def _loss(name: str, recipe: Recipe) -> MultiLevelLoss:
    parts: dict[str, Callable[[], nn.Module]] = {
        "dkd": lambda: _Taught(recipe.dkd),
        "sp": lambda: StructurePolishingLoss(recipe.boundary_weight),
        "dice": DiceLoss,
        "bce": nn.BCEWithLogitsLoss,
    }
    losses = [parts[part]() for part in name.split("+")]
    return MultiLevelLoss(losses[0] if len(losses) == 1 else _Sum(*losses))
