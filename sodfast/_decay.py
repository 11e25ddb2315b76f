"""What stands behind DynamicWeightDecay: where means come from, which γ are meant, the ops."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .nn import ILBlock, NormAct

Metric = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Entry:
    """One γ and the means of its channel that the gradients seen so far belong to."""

    weight: nn.Parameter
    source: Callable[[], Tensor | None]  # the last forward's means, (B, C)
    factors: Tensor | None  # f, (C,)
    group: int  # of the optimizer's param_groups
    name: str
    means: Tensor | None = None  # of all samples since the last step, (samples, C)
    last: Tensor | None = None  # what the last step used

    def collect(self, _: Tensor) -> None:
        """Called by autograd when a backward has added to γ's gradient."""
        means = self.source()
        if means is None:
            return
        if means.dim() != 2 or means.shape[1] != len(self.weight):
            raise ValueError(
                f"{self.name}: the means must be (samples, {len(self.weight)}), "
                f"not {tuple(means.shape)}"
            )
        means = means.detach().to(self.weight.dtype)  # under autocast it may be another
        self.means = means if self.means is None else torch.cat((self.means, means))


class Watch:
    """A forward hook that keeps the metric of a module's output, where no NormAct has it."""

    def __init__(self, metric: Metric | None, activation: Callable[[Tensor], Tensor] | None):
        self.metric, self.activation = metric, activation
        self.means: Tensor | None = None
        self.active = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watch":
        # A copy of the model (an average of the weights, say) is not what is being trained.
        twin = Watch(None, None)
        twin.active = False
        return twin

    @torch.no_grad()
    def __call__(self, module: nn.Module, inputs: Any, output: Tensor | Sequence[Tensor]) -> None:
        if not (self.active and module.training):
            return
        metric = _global_average if self.metric is None else self.metric
        ys = [output] if isinstance(output, Tensor) else output
        if self.activation is not None:
            ys = [self.activation(y.detach()) for y in ys]
        self.means = torch.cat([metric(y.detach()) for y in ys], dim=1)


def _global_average(x: Tensor) -> Tensor:
    """(B, C, …) to (B, C)."""
    return x.flatten(2).mean(2) if x.dim() > 2 else x


def _blocks(model: nn.Module) -> Iterator[tuple[ILBlock, list[tuple[str, NormAct]]]]:
    """Every ILBlock with its NormActs by their names in the model."""
    for prefix, block in model.named_modules():
        if isinstance(block, ILBlock):
            named = block.named_modules(prefix=prefix)
            yield block, [(name, norm) for name, norm in named if isinstance(norm, NormAct)]


def average_over_ranks(entries: list[Entry], absolute: bool, group: Any) -> None:
    """Replace every entry's means by the average of all ranks' S̄, as (1, C)."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_world_size(group) == 1:
        return
    # One buffer: S̄ of every entry, then for each whether this rank has any. The average of the
    # ranks, not of the samples: DDP averages gradients that way.
    parts, present = [], []
    for entry in entries:
        if entry.means is None:
            parts.append(torch.zeros_like(entry.weight))
        else:
            parts.append((entry.means.abs() if absolute else entry.means).mean(0))
        present.append(float(entry.means is not None))
    buffer = torch.cat([*parts, parts[0].new_tensor(present)])
    distributed.all_reduce(buffer, group=group)
    *sums, ranks = buffer.split([*(len(part) for part in parts), len(present)])
    for entry, total, number in zip(entries, sums, ranks.tolist()):
        entry.means = (total / number).unsqueeze(0) if number else None


def decay_alone(bucket: list[Entry], strength: float, absolute: bool, decoupled: bool) -> None:
    """Decay the gradients (coupled) or the γ of entries that share device and dtype."""
    weights, grads, means, factors = _tensors(bucket)
    with torch.no_grad():
        ops.decay_(weights, means, strength, () if decoupled else grads, factors, absolute)


def decay_and_adam(
    bucket: list[Entry],
    strength: float,
    absolute: bool,
    decoupled: bool,
    group: dict[str, Any],
    states: dict[Tensor, dict[str, Any]],
) -> None:
    """Decay and Adam's step of one parameter group, on torch.optim.Adam's own state."""
    by_step: dict[int, list[Entry]] = {}
    for entry in bucket:
        state = states[entry.weight]
        if not state:  # as Adam begins
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(entry.weight)
            state["exp_avg_sq"] = torch.zeros_like(entry.weight)
        state["step"] += 1
        by_step.setdefault(int(state["step"]), []).append(entry)
    for step, entries in by_step.items():
        weights, grads, means, factors = _tensors(entries)
        exp_avgs = [states[weight]["exp_avg"] for weight in weights]
        exp_avg_sqs = [states[weight]["exp_avg_sq"] for weight in weights]
        rate, betas, eps = float(group["lr"]), group["betas"], group["eps"]
        with torch.no_grad():
            ops.adam_decay_(
                weights, grads, exp_avgs, exp_avg_sqs, means, strength, rate, step, betas, eps,
                factors, absolute, decoupled,
            )  # fmt: skip


def _tensors(bucket: list[Entry]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """γ, gradients and means, and f (nothing where all are 1)."""
    weights: list[Tensor] = [entry.weight for entry in bucket]
    grads = [entry.weight.grad for entry in bucket if entry.weight.grad is not None]
    means = [entry.last for entry in bucket if entry.last is not None]
    factors: list[Tensor] = []
    if any(entry.factors is not None for entry in bucket):
        factors = [torch.ones_like(e.weight) if e.factors is None else e.factors for e in bucket]
    return weights, grads, means, factors


def decaying_norms(model: nn.Module) -> list[tuple[str, NormAct]]:
    """Every NormAct inside an ILBlock, whose γ dynamic weight decay acts on, with its name."""
    return [item for _, norms in _blocks(model) for item in norms]


def per_channel(factor: Sequence[float], channels: Sequence[int], name: str) -> list[float]:
    """One factor per scale or per channel as one per channel."""
    values = list(factor)
    if len(values) == len(channels):
        return [value for value, count in zip(values, channels) for _ in range(count)]
    if len(values) != sum(channels):
        raise ValueError(
            f"flops_weights[{name!r}] must hold {len(channels)} numbers (one per scale) or "
            f"{sum(channels)} (one per channel), not {len(values)}"
        )
    return values


def flops_weights(model: nn.Module, factor: float = 2.0) -> dict[str, list[float]]:
    """f by cost: a channel weighs ``factor`` times more per finer scale and per finer stage.

    A channel's work grows with its resolution, so this makes expensive channels decay faster
    (the authors' option, with 2). The coarsest scale after the last ILBlock of stride 2 has
    weight 1. Within a block the coarsest scale counts as the stage's, also where it is the only
    one.

    Args:
        model: its ILBlocks are taken in the order in which they were defined.
        factor: above 0.

    Returns:
        The name of every NormAct inside an ILBlock, with one number per scale.
    """
    if not factor > 0:
        raise ValueError(f"factor must be above 0, not {factor}")
    found, level = [], 0
    for block, norms in _blocks(model):
        level += block.conv1.stride == 2
        found += [(level, name, norm) for name, norm in norms]
    return {
        name: [
            float(factor) ** (level - own + len(norm.channels) - 1 - scale)
            for scale in range(len(norm.channels))
        ]
        for own, name, norm in found
    }


def parameter_groups(
    model: nn.Module,
    weight_decay: float = 5e-3,
    encoder_lr: float = 1.0,
    encoder_norm_decay: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups as the papers train: which weights decay, and how fast an encoder learns.

    Args:
        model: the γ of every NormAct inside an ILBlock, which dynamic weight decay acts on, form
            the second group, without decay.
        weight_decay: of all others. CSNet: 5e-3; KD-SCFNet: 5e-4.
        encoder_lr: of ``model.encoder``, where there is one, as a part of the learning rate; it
            stands in the group's "lr_scale". KD-SCFNet: 0.1.
        encoder_norm_decay: whether the encoder's batch norms decay too. KD-SCFNet: no.

    Returns:
        Two groups; with encoder_lr or encoder_norm_decay set, two more: the encoder's norms, and
        its other parameters.

    Raises:
        ValueError: encoder_lr or encoder_norm_decay is set, but the model has no encoder.
    """
    gammas = [norm.weight for _, norm in decaying_norms(model)]
    known = {id(weight) for weight in gammas}
    extra: list[dict[str, Any]] = []
    if encoder_lr != 1.0 or not encoder_norm_decay:
        encoder = getattr(model, "encoder", None)
        if not isinstance(encoder, nn.Module):
            raise ValueError("encoder_lr and encoder_norm_decay need a model with an encoder")
        norms = [
            p for module in encoder.modules() if isinstance(module, _NORMS)
            for p in module.parameters()
        ]  # fmt: skip
        of_norms = {id(p) for p in norms}
        convolutions = [p for p in encoder.parameters() if id(p) not in of_norms]
        decays = weight_decay if encoder_norm_decay else 0.0
        extra = [
            {"params": norms, "weight_decay": decays, "lr_scale": encoder_lr},
            {"params": convolutions, "weight_decay": weight_decay, "lr_scale": encoder_lr},
        ]
        known |= {id(p) for p in encoder.parameters()}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        {"params": others, "weight_decay": weight_decay},
        {"params": gammas, "weight_decay": 0.0},
        *extra,
    ]


_NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, NormAct)
