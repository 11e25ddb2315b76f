"""Dynamic weight decay of many γ in one call, alone or fused with Adam's step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._backend import choose, register


def decay_(
    weights: Sequence[Tensor],
    means: Sequence[Tensor],
    strength: float,
    grads: Sequence[Tensor] = (),
    factors: Sequence[Tensor] = (),
    absolute: bool = True,
) -> None:
    r"""Let every γ decay by how strongly its channel answers, in place.

    .. math:: d = \lambda f\, \frac1B \sum_b |S_b|\, \gamma, \qquad
              g \leftarrow g + d \;\text{ with grads (coupled)}, \quad
              \gamma \leftarrow \gamma - d \;\text{ without (decoupled)}

    With the means of :func:`goctconv_norm_act` as S this is CSNet's Eq. 3 and 4: no loss term
    and no graph. :class:`sodfast.optim.DynamicWeightDecay` calls it.

    Args:
        weights: γ, n vectors (C_i,); modified when there are no grads.
        means: S, n tensors (B_i, C_i): the channel means of B_i samples.
        strength: λ, already multiplied by the learning rate where that is wanted.
        grads: the gradients of γ, (C_i,), modified; or empty.
        factors: f, (C_i,); empty: 1.
        absolute: average |S| instead of S.

    All tensors share one device and one dtype (float32 or float64 in the CPU kernels, float32,
    float16 or bfloat16 in the CUDA kernels, other floating dtypes by the reference), and what
    is modified is contiguous. NaN and infinity propagate; a γ without samples becomes NaN, as
    0/0.

    Raises:
        TypeError: an integer dtype, or dtypes that differ.
        ValueError: lists of different lengths, a wrong shape or device, a modified tensor that
            is not contiguous.
        RuntimeError: a backend that was asked for by name cannot run.
    """
    weights, means, grads, factors = list(weights), list(means), list(grads), list(factors)
    if not weights:
        return
    modified = {"grads": grads} if grads else {}
    _check(weights, means, factors, modified)
    if choose("decay_", weights[0]) == "reference":
        decay_reference_(weights, means, strength, grads, factors, absolute)
    else:
        torch.ops.sodfast.decay_(weights, grads, means, factors, strength, absolute)


@torch.no_grad()
def decay_reference_(
    weights: Sequence[Tensor],
    means: Sequence[Tensor],
    strength: float,
    grads: Sequence[Tensor] = (),
    factors: Sequence[Tensor] = (),
    absolute: bool = True,
) -> None:
    """:func:`decay_` in plain torch: the specification, and the fallback."""
    for i, (weight, mean) in enumerate(zip(weights, means)):
        s = (mean.abs() if absolute else mean).mean(0)
        if factors:
            s = s * factors[i]
        if grads:
            grads[i].addcmul_(s, weight, value=strength)
        else:
            weight.addcmul_(s, weight, value=-strength)


def adam_decay_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    means: Sequence[Tensor],
    strength: float,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    factors: Sequence[Tensor] = (),
    absolute: bool = True,
    decoupled: bool = False,
) -> None:
    r""":func:`decay_` and then Adam's step for the same γ, in one pass.

    .. math:: m \leftarrow \beta_1 m + (1-\beta_1)\,g, \qquad
              v \leftarrow \beta_2 v + (1-\beta_2)\,g^2, \qquad
              \gamma \leftarrow \gamma - \eta\,
              \frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)}+\epsilon}

    with d of :func:`decay_` added to g before (coupled) or taken from γ (decoupled).

    Args:
        weights: γ, n vectors (C_i,), modified.
        grads: the gradients of γ, (C_i,); unlike decay_, this leaves them as they are.
        exp_avgs, exp_avg_sqs: m and v, (C_i,), modified.
        means, strength, factors, absolute: as of :func:`decay_`.
        lr, step, betas, eps: η, t (1 at the first step), β and ε, as of torch.optim.Adam.
        decoupled: where the decay goes.

    Raises:
        TypeError, ValueError, RuntimeError: as of :func:`decay_`; and ValueError for a step
            below 1 or a beta outside [0, 1).
    """
    if step < 1:
        raise ValueError(f"step must be at least 1, not {step}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), not {betas}")
    weights, grads, means, factors = list(weights), list(grads), list(means), list(factors)
    exp_avgs, exp_avg_sqs = list(exp_avgs), list(exp_avg_sqs)
    if not weights:
        return
    _check(weights, means, factors, {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs})
    _check_vectors(grads, "grads", weights)
    if choose("adam_decay_", weights[0]) == "reference":
        adam_decay_reference_(
            weights, grads, exp_avgs, exp_avg_sqs, means, strength, lr, step, betas, eps,
            factors, absolute, decoupled,
        )  # fmt: skip
    else:
        torch.ops.sodfast.adam_decay_(
            weights, grads, exp_avgs, exp_avg_sqs, means, factors, strength, absolute, decoupled,
            lr, *betas, eps, step,
        )  # fmt: skip


@torch.no_grad()
def adam_decay_reference_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    means: Sequence[Tensor],
    strength: float,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    factors: Sequence[Tensor] = (),
    absolute: bool = True,
    decoupled: bool = False,
) -> None:
    """:func:`adam_decay_` in plain torch: the specification, and the fallback."""
    grads = [grad.clone() for grad in grads]
    decay_reference_(weights, means, strength, () if decoupled else grads, factors, absolute)
    (beta1, beta2), rate = betas, lr / (1 - betas[0] ** step)
    root = (1 - beta2**step) ** 0.5
    for weight, grad, exp_avg, exp_avg_sq in zip(weights, grads, exp_avgs, exp_avg_sqs):
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        weight.addcdiv_(exp_avg, (exp_avg_sq.sqrt() / root).add_(eps), value=-rate)


def _check(
    weights: list[Tensor],
    means: list[Tensor],
    factors: list[Tensor],
    modified: dict[str, list[Tensor]],
) -> None:
    for i, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            raise TypeError(f"weights[{i}] must be a tensor, not {type(weight).__name__}")
        if weight.dim() != 1:
            raise ValueError(f"weights[{i}] must be (channels,), not {tuple(weight.shape)}")
        if not weight.is_floating_point():
            raise TypeError(f"weights[{i}] must be floating point, not {weight.dtype}")
    _check_vectors(weights, "weights", weights)
    if factors:
        _check_vectors(factors, "factors", weights)
    for name, tensors in modified.items():
        _check_vectors(tensors, name, weights)
    for name, tensors in {"weights": weights, **modified}.items():
        for i, tensor in enumerate(tensors):
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{i}] must be contiguous; its stride is {tensor.stride()}")
    if len(means) != len(weights):
        raise ValueError(f"means must hold {len(weights)} tensors, not {len(means)}")
    for i, mean in enumerate(means):
        _check_like(mean, f"means[{i}]", weights[0])
        if mean.dim() != 2 or mean.shape[1] != weights[i].shape[0]:
            raise ValueError(
                f"means[{i}] must be (samples, {weights[i].shape[0]}), not {tuple(mean.shape)}"
            )


def _check_vectors(tensors: list[Tensor], name: str, weights: list[Tensor]) -> None:
    if len(tensors) != len(weights):
        raise ValueError(f"{name} must hold {len(weights)} tensors, not {len(tensors)}")
    for i, tensor in enumerate(tensors):
        _check_like(tensor, f"{name}[{i}]", weights[0])
        if tensor.shape != weights[i].shape:
            raise ValueError(
                f"{name}[{i}] must have shape {tuple(weights[i].shape)}, not {tuple(tensor.shape)}"
            )


def _check_like(tensor: Tensor, name: str, like: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, weights[0] is on {like.device}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, weights[0] is {like.dtype}")


def _fake(*arguments: Any) -> None:
    """Nothing comes out; what would be refused for its devices is refused here too."""
    devices = {str(t.device) for a in arguments if isinstance(a, (list, tuple)) for t in a}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device, not on {' and '.join(devices)}")


register("decay_", fake=_fake, autocast=False)
register("adam_decay_", fake=_fake, autocast=False)
