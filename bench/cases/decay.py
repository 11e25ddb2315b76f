"""Dynamic weight decay: all γ of a network at once, and its share of a whole training step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from networks import TRAINING_BATCH, build_network, network_work

from cases import Case, Work
from sodfast import ops
from sodfast.optim import decaying_norms

STRENGTH = 1e-12  # γ must be the same in every call


def op_work(op: Callable[..., None], vectors: int) -> Work:
    """An op of the family on every γ of CSNet x1 (54 vectors), with the means of a batch.

    vectors: how many more vectors of each γ's length it takes (the gradient, Adam's state).
    """
    gammas = [norm.weight.detach().clone() for _, norm in decaying_norms(build_network("csnet-x1"))]
    means = [torch.rand(TRAINING_BATCH, len(gamma)) for gamma in gammas]
    own = [[1e-3 * torch.rand_like(gamma) for gamma in gammas] for _ in range(vectors)]

    def call(weights: Any, means: Any, *own: Any) -> None:
        if vectors == 1:
            op(weights, means, STRENGTH, *own)
        else:
            op(weights, *own, means, STRENGTH, 1e-12, 10)

    return Work(call, (gammas, means, *own))


CASES = [
    Case("op", "decay", "csnet-x1 decay_", False, partial(op_work, ops.decay_, 1)),
    Case("op", "decay", "csnet-x1 adam_decay_", False, partial(op_work, ops.adam_decay_, 3)),
    # Forward, loss, backward and Adam: seconds for each call. Its variants: variants/decay.py.
    Case(
        "op", "decay", "csnet-x1 whole step", True,
        partial(network_work, "csnet-x1", training=True), slow=True, own=True,
    ),
]  # fmt: skip
