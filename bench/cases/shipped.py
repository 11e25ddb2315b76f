"""The networks whose weights ship: one image of the size that each was trained for."""

from functools import partial

import torch

import sodfast
from cases import Case, Work
from sodfast.pretrained import pretrained_names


def shipped_work(name: str) -> Work:
    model = sodfast.from_pretrained(name).to(torch.get_default_device())  # meta, to count its work
    return Work(model, (torch.randn(1, 3, *model.preprocessing["size"]),))


CASES = [
    Case("model", name, name, False, partial(shipped_work, name)) for name in pretrained_names()
]
