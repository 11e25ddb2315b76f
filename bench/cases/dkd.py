"""The loss of dynamic distillation, forward and backward: maps of 256x256, the paper's size.

4 is the paper's batch. The cases are the whole loss as a training loop calls it: both ops and
the arithmetic per image between them.
"""

from functools import partial

import torch

from cases import Case, Work
from sodfast.nn import DynamicDistillationLoss


def loss_work(batch: int) -> Work:
    size = (batch, 1, 256, 256)
    truth = torch.randint(0, 2, size).float()
    student, teacher = (4 * truth - 2 + 3 * torch.randn(size) for _ in range(2))
    return Work(DynamicDistillationLoss(), (student.requires_grad_(), teacher, truth))


CASES = [Case("op", "dkd", f"batch {n}", True, partial(loss_work, n)) for n in (4, 32)]
