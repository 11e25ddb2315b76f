"""What a checkpoint of a run holds, and the network that a run begins or goes on with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .launch import Launch
from .models import create_model
from .pretrained import from_pretrained
from .recipe import Recipe

__all__ = ["State", "begin", "capture", "network_of", "restore"]

Found = tuple[Path, dict[str, Any], list[str]]  # what checkpoint.latest returns


@dataclass
class State:
    """Where a run stands; with the tensors, all that a checkpoint holds."""

    step: int = 0
    seconds: float = 0.0  # spent so far, of all sessions
    eliminated_at: float = -1.0  # part of the schedule that was done then; -1: not yet
    best: float = -1.0  # max-F of the phase's best validation
    loss: float = 0.0  # running mean for the log


def network_of(
    recipe: Recipe, found: Found | None, init: str | os.PathLike[str] | None
) -> tuple[str, dict[str, Any]]:
    """The network's name and configuration: the checkpoint's (whatever the run began with), those
    of the weights to start from, or the recipe's."""
    if found is not None:
        return found[1]["model"]["name"], found[1]["model"]["config"]
    if init is not None:
        model: Any = _started(init, recipe)
        return model.name, model.config
    return recipe.model, recipe.config


def _started(init: str | os.PathLike[str], recipe: Recipe) -> nn.Module:
    model = from_pretrained(init)
    if model.name != recipe.model:
        raise ValueError(f"init: {init} holds {model.name}, and the recipe trains {recipe.model}")
    return model


def begin(
    recipe: Recipe, found: Found | None, init: str | os.PathLike[str] | None, names: str
) -> nn.Module:
    """The network to train.

    found: what `checkpoint.latest` found where a run goes on; names: the identity of what is
    trained on. The weights are the checkpoint's only after `restore`. Raises ValueError where
    the run had another recipe or other pictures.
    """
    if found is not None:
        path, saved, _ = found
        then = {**Recipe().as_dict(), **saved["recipe"]}  # a setting may be younger than it
        changed = [key for key, value in recipe.as_dict().items() if then[key] != value]
        if changed:
            raise ValueError(f"{path}: the run had another recipe; differs: {changed}")
        if saved["names"] != names:
            raise ValueError(
                f"{path}: the run was trained on other pictures than these, or by another teacher"
            )
    elif init is not None:
        return _started(init, recipe).train().requires_grad_(True)
    name, config = network_of(recipe, found, init)
    return create_model(name, **config)


def capture(
    recipe: Recipe, names: str, state: State, model: nn.Module, average: nn.Module | None,
    optimizer: Any, launch: Launch,
) -> dict[str, Any]:  # fmt: skip
    """All that a run needs to go on to the bit, ready for `checkpoint.save`."""
    return {
        "recipe": recipe.as_dict(),
        "names": names,
        "state": vars(state).copy(),
        "model": {"name": model.name, "config": model.config},
        "parameters": model.state_dict(),
        "average": None if average is None else average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": launch.scaler_state(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(
    saved: dict[str, Any], model: nn.Module, average: nn.Module | None, optimizer: Any,
    launch: Launch,
) -> None:  # fmt: skip
    """Puts back what `capture` took."""
    model.load_state_dict(saved["parameters"])
    if average is not None:
        average.load_state_dict(saved["average"])
    optimizer.load_state_dict(saved["optimizer"])
    launch.load_scaler_state(saved["scaler"])
    torch.set_rng_state(saved["random"])
    if torch.cuda.is_available() and saved["random_cuda"]:
        torch.cuda.set_rng_state_all(saved["random_cuda"])
