"""The loss of a recipe: of labelled pictures, of what a teacher says, of one map or several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .nn import DiceLoss, MultiLevelLoss, ProgressiveBoundary, StructurePolishingLoss
from .recipe import Recipe

__all__ = ["Objective"]


class Objective:
    """A recipe's loss as a function of a network's output and the truth.

    Of a batch's pictures the first `labelled` have ground truth and the others a teacher's map;
    each part has its own loss, and their sum is taken with the recipe's weight.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._losses = {name: _loss(name, recipe) for name in {recipe.loss, recipe.distill_loss}}
        self._fixed = int(recipe.boundary) if recipe.boundary.isdigit() else 0
        self._thickness = None if self._fixed else ProgressiveBoundary(recipe.boundary, 1.0)

    def boundary(self, done: float) -> int | None:
        """How thick boundaries are when this part of the schedule is done; None without any."""
        if "sp" not in self._losses:
            return None
        return self._thickness(done) if self._thickness is not None else self._fixed

    def __call__(
        self, output: Tensor | Sequence[Tensor], truth: Tensor, labelled: int, done: float
    ) -> Tensor:
        """output: logits (B, 1, H, W), or several of the network's maps, the main one first.
        truth: (B, 1, H, W) in 0–1. labelled: how many of the B have ground truth. done: part
        of the schedule. Returns a scalar, in float32."""
        maps = [output] if isinstance(output, Tensor) else list(output)
        maps = [one.float() for one in maps]
        k = self.boundary(done)
        for criterion in self._losses.values():
            if isinstance(criterion.loss, StructurePolishingLoss) and k is not None:
                criterion.loss.k = k
        total = torch.zeros((), device=truth.device)
        if labelled:
            own = [one[:labelled] for one in maps]
            total = total + self._losses[self.recipe.loss](own, truth[:labelled])
        if labelled < len(truth):
            rest = [one[labelled:] for one in maps]
            taught = self._losses[self.recipe.distill_loss](rest, truth[labelled:])
            total = total + self.recipe.distill_weight * taught
        return total


def _loss(name: str, recipe: Recipe) -> MultiLevelLoss:
    if name == "sp":
        return MultiLevelLoss(StructurePolishingLoss(recipe.boundary_weight))
    return MultiLevelLoss(DiceLoss() if name == "dice" else nn.BCEWithLogitsLoss())
