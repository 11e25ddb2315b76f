"""Scores while training: quick, on the decoded squares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .data.augment import augment
from .data.cache import Cache
from .metrics import SalMetric
from .models import count
from .optim import parameter_groups
from .preprocess import to_map
from .weights import load

__all__ = ["gamma_quantiles", "results", "validate"]


@torch.no_grad()
def validate(
    model: nn.Module, cache: Cache, rows: np.ndarray, size: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """{"max_f", "mae"} in the SalMetric convention, over rows of a cache.

    The pictures are the cache's squares, resized to size x size; the maps are resized back and
    compared with the cache's masks. So these are not the figures of `sodfast eval`, which
    keeps each picture's own size; they are near them and much faster. Leaves model in eval.
    Raises ValueError for a model that takes depth and a cache without it.
    """
    model.eval()
    metric = SalMetric()
    pre: dict[str, Any] = model.preprocessing  # type: ignore[assignment]
    for start in range(0, len(rows), 32):
        some = rows[start : start + 32]
        images = torch.from_numpy(cache.images[some]).to(device)
        masks = torch.from_numpy(cache.masks[some])
        whole = torch.eye(2, 3, device=device).expand(len(some), 2, 3)
        depths = None if cache.depths is None else torch.from_numpy(cache.depths[some]).to(device)
        x, _ = augment(
            images, masks.to(device), whole, size, pre["mean"], pre["std"], depths=depths
        )
        logits = model(x)
        for one, truth in zip(logits, masks):
            side = (truth.shape[0], truth.shape[1])
            metric.add(to_map(one[None], side), truth.numpy())
    result = metric.result()
    return {"max_f": float(result.max_f), "mae": float(result.mae)}


def results(
    run: Path, cache: Cache, rows: np.ndarray, size: int, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The closing table: per weight file of a run its parameters, work and scores as `validate`.

    Rows "trained" (before the elimination, where there was one) and "result".
    """
    table: dict[str, Any] = {}
    for label, name in (("trained", "trained.safetensors"), ("result", "weights.safetensors")):
        if (run / name).is_file():
            model = load(run / name).to(device)
            table[label] = {"file": name, **count(model, (size, size))}
            if len(rows):
                table[label].update(validate(model, cache, rows, size, device))
    return table


def gamma_quantiles(model: nn.Module) -> list[float]:
    """Minimum, 10, 25, 50, 75, 90 % quantiles and maximum of |γ| in the ILBlocks' norms.

    Empty for a network without ILBlocks.
    """
    chosen = [p.detach().abs().flatten() for p in parameter_groups(model)[1]["params"]]
    if not chosen:
        return []
    values = torch.cat(chosen).double().cpu().numpy()
    return [float(v) for v in np.quantile(values, (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1))]
