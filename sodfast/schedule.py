"""The optimizer of a recipe, and what changes while a run goes on: rate and picture size.

These two are functions of how much of the schedule is done, 0 to 1, so that a run that is bounded
by the clock (`max_minutes`) follows the same curves as one that is bounded by its epochs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from .data.augment import uniform
from .recipe import Recipe

_SIZE_STREAM = 0x73697A65  # so that these random numbers are not the augmentation's

__all__ = [
    "check_sizes",
    "decay_strength",
    "image_size",
    "learning_rate",
    "make_optimizer",
    "split_biases",
]


def learning_rate(recipe: Recipe, done: float, eliminated_at: float, per_epoch: int) -> float:
    """The rate of a step: of the schedule, or of the fine-tuning once channels are eliminated.

    done: part of the schedule that is behind us. eliminated_at: the part that was when the
    channels went, or -1.
    """
    if eliminated_at >= 0 and recipe.finetune_lr:
        local = (done - eliminated_at) / max(1 - eliminated_at, 1e-9)
        # A fresh optimizer knows no gradient's size yet: a short start from 0.
        return recipe.finetune_lr * min(1.0, (local + 1e-3) / 0.05) * _cosine(local)
    epoch = done * recipe.epochs
    if recipe.schedule == "warmup_cosine":
        end = recipe.warmup_epochs
        if epoch < end:
            part = epoch / end
            return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * part)
        falling = _cosine((epoch - end) / max(recipe.epochs - end, 1e-9))
        return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * falling)
    warm = 1.0
    if recipe.warmup_epochs:
        warm = min(1.0, (epoch + 1 / per_epoch) / recipe.warmup_epochs)
    if recipe.schedule == "steps":
        passed = sum(epoch >= milestone for milestone in recipe.milestones)
        return recipe.lr * warm * 0.1**passed
    end = 1.0
    if recipe.finetune_lr and recipe.prune:
        end = 1 - recipe.finetune_epochs / recipe.epochs  # the fine-tuning has its own
    part = min(1.0, done / end) if end > 0 else 1.0
    left = (1 - part) ** recipe.poly_power if recipe.schedule == "poly" else _cosine(part)
    return recipe.lr * warm * (recipe.final_lr + (1 - recipe.final_lr) * left)


def _cosine(part: float) -> float:
    return (1 + math.cos(math.pi * min(max(part, 0.0), 1.0))) / 2


def image_size(recipe: Recipe, done: float, step: int = 0) -> int:
    """The side that a training step uses: small first, or any of some, where the recipe says so.

    step: number of the step; which of `random_sizes` it gets depends on it and the seed alone.
    """
    if recipe.random_sizes:
        drawn = uniform(recipe.seed ^ _SIZE_STREAM, 0, np.array([step]), 1).item()
        return recipe.random_sizes[int(drawn * len(recipe.random_sizes))]
    sides = [int(side) for start, side in sorted(recipe.sizes) if done >= start]
    return sides[-1] if sides else recipe.size


def check_sizes(recipe: Recipe, multiple: int) -> None:
    """Raises ValueError for a picture size that the network does not take."""
    for side in (recipe.size, *(int(side) for _, side in recipe.sizes), *recipe.random_sizes):
        if side % multiple:
            below = side // multiple * multiple
            near = " and ".join(str(n) for n in (below, below + multiple) if n)
            raise ValueError(
                f"{recipe.model} takes multiples of {multiple} pixels, got size {side}; "
                f"the nearest: {near}"
            )


def decay_strength(recipe: Recipe, done: float) -> float:
    """λ_d of a training step: none at first and stronger later, where the recipe says so."""
    if not recipe.lambda_steps:
        return recipe.lambda_d
    reached = [strength for start, strength in sorted(recipe.lambda_steps) if done >= start]
    return float(reached[-1]) if reached else 0.0


def split_biases(
    recipe: Recipe, model: nn.Module, groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The groups with their biases apart, where the recipe treats them in another way.

    What counts are the parameters called "bias", those of norms included.
    """
    if recipe.bias_lr == 1 and recipe.bias_decay:
        return groups
    biases = {id(p) for name, p in model.named_parameters() if name.split(".")[-1] == "bias"}
    ready = []
    for group in groups:
        own = [p for p in group["params"] if id(p) in biases]
        ready.append({**group, "params": [p for p in group["params"] if id(p) not in biases]})
        if own:
            decay = group["weight_decay"] if recipe.bias_decay else 0.0
            scale = group.get("lr_scale", 1.0) * recipe.bias_lr
            ready.append({**group, "params": own, "weight_decay": decay, "lr_scale": scale})
    return ready


def make_optimizer(recipe: Recipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD over parameter groups, with the recipe's settings."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    first, second = recipe.betas
    return kind(groups, lr=recipe.lr, betas=(first, second), eps=recipe.eps)
