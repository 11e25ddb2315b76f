"""The fusion of SCFNet's SCFM, at the shapes of its decoder for batches of 8 at 352x352."""

from functools import partial

import torch
from torch import Tensor, nn

import sodfast
from cases import Case, Work

BATCH, CHANNELS = 8, 16


class Fusion(nn.Module):
    def __init__(self, multiply: bool) -> None:
        super().__init__()
        self.multiply = multiply

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return sodfast.ops.scfm(x, y, self.multiply)


def scfm_work(size: int, ratio: int, multiply: bool, training: bool) -> Work:
    x, y = (torch.randn(BATCH, CHANNELS, n, n) for n in (size, size // ratio))
    return Work(Fusion(multiply), (x.requires_grad_(training), y.requires_grad_(training)))


CASES = [
    Case("op", "scfm", f"{what} ×{ratio}", training, partial(scfm_work, *arguments, training))
    for what, ratio, arguments in (
        ("x + x up(y)", 2, (88, 2, True)),
        ("x + x up(y)", 8, (88, 8, True)),
        ("x + x up(y) at 44²", 2, (44, 2, True)),
        ("x + up(y)", 2, (88, 2, False)),
    )
    for training in (False, True)
]
