"""Times a few layers in three forms: eager torch, compiled ops, fused."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sodfast
from sodfast.nn import GOctConvBNAct, ILBlock

WARM_UP = 3
ROUNDS = 15


@dataclass(frozen=True)
class Case:
    """A layer and the size of the finest scale it is tried at."""

    name: str
    build: Callable[[], nn.Module]
    in_channels: tuple[int, ...]
    out_channels: tuple[int, ...]
    size: int

    @property
    def shapes(self) -> str:
        return " → ".join(
            " + ".join(f"{c}×{self.size >> i}²" for i, c in enumerate(channels))
            for channels in (self.in_channels, self.out_channels)
        )

    def inputs(self) -> list[Tensor]:
        return [
            torch.randn(1, c, self.size >> i, self.size >> i)
            for i, c in enumerate(self.in_channels)
        ]


@dataclass(frozen=True)
class Times:
    milliseconds: dict[str, float]
    difference: float  # largest absolute difference of any form from eager torch


CASES = (
    Case(
        "ILBlock, stage 1 of CSNet ×2 as pruned by its authors",
        lambda: ILBlock((18, 11), (18, 12)),
        (18, 11),
        (18, 12),
        224,
    ),
    Case(
        "ILBlock, stage 2 of CSNet ×1, unpruned",
        lambda: ILBlock((20, 20), (20, 20)),
        (20, 20),
        (20, 20),
        112,
    ),
    Case(
        "GOctConvBNAct 3×3, in a ResNet stage (docs/resnet_stage.md)",
        lambda: GOctConvBNAct((64, 64), (64, 64), kernel_size=3),
        (64, 64),
        (64, 64),
        28,
    ),
)


def randomise_norms(module: nn.Module) -> None:
    """Give batch normalisation statistics to fold; fresh ones are all 0 and 1."""
    for layer in module.modules():
        if isinstance(layer, sodfast.nn.NormAct):
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)


def measure(case: Case) -> Times:
    """Median milliseconds of each form of a layer, taken turn by turn, and their difference."""
    torch.manual_seed(0)
    layer = case.build().eval()
    randomise_norms(layer)
    fused = sodfast.fuse(layer)
    xs = case.inputs()

    def eager() -> list[Tensor]:
        with sodfast.use_backend("reference"):
            return layer(xs)

    forms = {"eager torch": eager, "ops": lambda: layer(xs), "fused": lambda: fused(xs)}
    taken: dict[str, list[float]] = {name: [] for name in forms}
    with torch.inference_mode():
        expected = eager()
        difference = max(
            float((y - e).abs().max())
            for form in forms.values()
            for y, e in zip(form(), expected)
            if e.numel()
        )
        for turn in range(WARM_UP + ROUNDS):
            for name, form in forms.items():
                start = time.perf_counter()
                form()
                if turn >= WARM_UP:
                    taken[name].append(1e3 * (time.perf_counter() - start))
    return Times({name: statistics.median(t) for name, t in taken.items()}, difference)
