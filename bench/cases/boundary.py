"""The boundary of soft maps, and the sums of the structure polishing loss: 8 maps of 352x352.

That is the size SCFNet is tested at; k goes from 13 to 1 while it trains.
"""

from functools import partial

import torch
from torch import Tensor, nn

import sodfast
from cases import Case, Work

SIZE = (8, 1, 352, 352)
WINDOWS = {False: (3, 5, 7, 13, 21, 31), True: (3, 13, 31)}  # by training or not


class Boundary(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, z: Tensor) -> Tensor:
        return sodfast.ops.boundary(z, self.k)


class StructurePolishingSums(Boundary):
    def forward(self, logits: Tensor, truth: Tensor) -> Tensor:
        return sodfast.ops.structure_polishing_sums(logits, truth, self.k)


def boundary_work(k: int, training: bool) -> Work:
    return Work(Boundary(k), (torch.rand(SIZE).requires_grad_(training),))


def sums_work(k: int, training: bool) -> Work:
    logits, truth = 3 * torch.randn(SIZE), torch.randint(0, 2, SIZE).float()
    return Work(StructurePolishingSums(k), (logits.requires_grad_(training), truth))


CASES = [
    Case("op", "boundary", f"k {k}", training, partial(boundary_work, k, training))
    for training, windows in WINDOWS.items()
    for k in windows
] + [
    Case("op", "structure_polishing_sums", "k 13", training, partial(sums_work, 13, training))
    for training in (False, True)
]
