"""Learned channels: take out of a CSNet what dynamic weight decay has driven to nothing."""

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ._prune_exact import fold_constants
from ._prune_structure import FUSION, Masks, Tensors, blocks, check_csnet, cut, norms, scales
from .models import CSNet, count, create_model
from .nn import NormAct

__all__ = ["CRITERIA", "MODES", "PruneReport", "estimate_statistics", "mask", "prune"]

CRITERIA = ("threshold", "ratio", "norm", "median")
MODES = ("exact", "paper")
THRESHOLD = 1e-20  # of the papers


@dataclasses.dataclass(frozen=True)
class PruneReport:
    """What :func:`prune` did.

    Attributes:
        criterion, mode: as given.
        amount: the threshold or the ratio.
        before, after: channel configurations, as of :class:`sodfast.models.CSNet`.
        keep: per layer ("stages.0.0" … "fusion.mix", "fusion.bank", "fusion.merge") which of
            the old channels are left: booleans, scales concatenated, high resolution first.
        stayed: per layer the old channels that the criterion chose and that had to stay, as they
            still emit something that has no other place (exact mode), or as the layer's last.
        config: the network's configuration besides its channels.
    """

    criterion: str
    mode: str
    amount: float
    before: dict[str, Any]
    after: dict[str, Any]
    keep: Masks
    stayed: dict[str, list[int]]
    config: dict[str, Any]

    @property
    def removed(self) -> int:
        """How many channels are gone."""
        return sum(int((~mask).sum()) for mask in self.keep.values())

    @property
    def total(self) -> int:
        """How many channels there were."""
        return sum(len(mask) for mask in self.keep.values())

    def costs(self, size: tuple[int, int] = (224, 224)) -> tuple[dict[str, int], dict[str, int]]:
        """:func:`sodfast.count` before and after, for an image of (H, W)."""
        found = []
        for channels in (self.before, self.after):
            with torch.device("meta"):
                twin = create_model("csnet", **{**self.config, "channels": channels})
            found.append(count(twin, size))
        return found[0], found[1]

    def table(self, size: tuple[int, int] = (224, 224)) -> str:
        """Channels per block and scale, parameters and work, before and after, as text."""
        old, new = scales(self.before), scales(self.after)
        lines = [f"{'layer':14}{'channels':>12}{'left':>14}{'stayed':>10}"]
        for layer in old:
            label = layer.replace("stages.", "stage ").replace(".", " block ", 1)
            label = layer.replace(".", " ") if layer in FUSION else label
            stayed = str(len(self.stayed[layer])) if self.stayed.get(layer) else ""
            row = f"{label:14}{_joined(old[layer]):>12}{_joined(new[layer]):>14}{stayed:>10}"
            lines.append(row.rstrip())
        for s, branches in enumerate(self.after["bank"]):
            lines.append(
                f"  bank {s}, by dilation: {_joined(self.before['bank'][s])} → {_joined(branches)}"
            )
        before, after = self.costs(size)
        lines.append(f"channels     {self.total:>13,} → {self.total - self.removed:>13,}")
        for label, key in (
            ("parameters", "params"), ("conv MACs", "conv_macs"), ("paper MACC", "paper_macs"),
        ):  # fmt: skip
            share = after[key] / before[key]
            lines.append(f"{label:13}{before[key]:>13,} → {after[key]:>13,}  ({share:.1%})")
        if any(self.stayed.values()):
            number = sum(len(channels) for channels in self.stayed.values())
            why = "what they emit has no other place" if self.mode == "exact" else "a layer's last"
            lines.append(f"{number} channels were chosen but stay: {why}")
        return "\n".join(lines)


def _joined(counts: list[int]) -> str:
    return ", ".join(str(number) for number in counts)


def prune(
    model: nn.Module,
    criterion: str = "threshold",
    mode: str = "exact",
    threshold: float = THRESHOLD,
    ratio: float = 0.5,
) -> tuple[nn.Module, PruneReport]:
    """A smaller CSNet without the channels that a criterion rejects; the model stays as it is.

    One decision is made per channel of a gOctConv, of a branch of the dilated bank, and of the
    merged feature: a block's depthwise layers follow its gOctConv, the inputs of what comes
    next follow its outputs. A scale or a branch may vanish; of every layer one channel is left.

    Criteria, on γ of the gOctConv's norm or on its filters:

    - "threshold" (the papers', after training with dynamic weight decay): |γ| < threshold.
    - "ratio" (network slimming, Liu et al. 2017): the given share of all channels, those with the
      smallest |γ| in the whole network.
    - "norm" (Li et al. 2017): of each layer that share, those with the smallest Σ|w|.
    - "median" (He et al. 2019): of each layer that share, those nearest to the geometric median,
      that is with the smallest sum of distances to the layer's other filters.

    Modes:

    - "exact": the result computes what :func:`mask` of the same arguments computes, to rounding:
      for "threshold" that is the network as it is, with every |γ| < threshold taken as 0. The
      statistics are kept. What a removed channel still emits is folded into what follows, and
      where zero padding forbids that, the channel stays; the rules are in
      ``sodfast/_prune_exact.py``. Also channels go that the criterion did not name but that emit
      a constant (as γ is 0 in one of their depthwise layers). No fine-tuning is needed.
    - "paper": what the authors' program does. The criterion alone decides; running statistics
      are reset to 0 and 1, and the removed channels' constants are dropped, so that at least
      the statistics must be estimated anew (:func:`estimate_statistics`).

    Args:
        model: a :class:`sodfast.models.CSNet`.
        criterion: one of "threshold", "ratio", "norm", "median".
        mode: "exact" or "paper".
        threshold: for "threshold", above 0. The papers: 1e-20.
        ratio: for the others, in [0, 1).

    Returns:
        The pruned network (its ``config`` holds the learned channels; dtype, device and
        training mode as the model's), and a :class:`PruneReport`.

    Raises:
        TypeError: the model is no CSNet, or a fused one.
        ValueError: an unknown criterion or mode, a threshold or ratio out of range.
    """
    csnet = check_csnet(model)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    chosen = _choose(csnet, criterion, threshold, ratio)
    channels = csnet.config["channels"]
    if mode == "exact":
        # In float64 until the end, as variances are near 1e-4.
        tensors = {
            name: tensor.cpu().double().masked_fill(tensor.cpu().abs() < THRESHOLD, 0.0)
            for name, tensor in _masked(csnet, chosen, criterion, threshold).items()
        }
        keep = fold_constants(csnet, tensors)
    else:
        tensors = _state(csnet)
        keep = _with_survivors(csnet, chosen, criterion)
    tensors, after = cut(csnet, tensors, keep)
    if mode == "paper":
        for name, tensor in tensors.items():
            if name.endswith("running_mean"):
                tensor.zero_()
            elif name.endswith("running_var"):
                tensor.fill_(1.0)
    stayed = {
        layer: [int(i) for i in (keep[layer] & ~mask).nonzero()[:, 0]]
        for layer, mask in chosen.items()
    }
    report = PruneReport(
        criterion,
        mode,
        threshold if criterion == "threshold" else ratio,
        copy.deepcopy(channels),
        after,
        keep,
        {layer: indices for layer, indices in stayed.items() if indices},
        {name: value for name, value in csnet.config.items() if name != "channels"},
    )
    return _build(csnet, tensors, after), report


def mask(
    model: nn.Module,
    criterion: str = "threshold",
    threshold: float = THRESHOLD,
    ratio: float = 0.5,
) -> nn.Module:
    """A copy of a CSNet with γ = 0 where :func:`prune` (exact) takes it as 0.

    "threshold": every γ with |γ| < threshold. The other criteria: the γ of the chosen channels,
    in their gOctConv's norm and in those of the depthwise layers that follow. Arguments and
    errors as of :func:`prune`.
    """
    csnet = check_csnet(model)
    chosen = _choose(csnet, criterion, threshold, ratio)
    masked = copy.deepcopy(csnet)
    masked.load_state_dict(_masked(csnet, chosen, criterion, threshold))
    return masked


@torch.no_grad()
def estimate_statistics(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Gives every norm the mean of its batch statistics over some batches, in place.

    For a network that ``prune(mode="paper")`` has left without statistics, or whose weights are
    an average, which no other network's statistics fit. Without them its activations grow or
    vanish from layer to layer, in evaluation, until they overflow or nothing is left.

    Args:
        model: left in the mode that it had.
        inputs: batches as the network takes them; at least one.

    Raises:
        ValueError: there is no batch.
    """
    kinds = (NormAct, nn.BatchNorm2d)
    norms = [module for module in model.modules() if isinstance(module, kinds)]
    momenta = [norm.momentum for norm in norms]
    training, number = model.training, 0
    model.train()
    try:
        for number, x in enumerate(inputs, 1):
            for norm in norms:
                norm.momentum = 1 / number  # the first batch's replace what was there
            model(x)
    finally:
        model.train(training)
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
    if number == 0:
        raise ValueError("inputs must hold at least one batch")


# ---- the criteria -------------------------------------------------------------------------------


def _choose(model: CSNet, criterion: str, threshold: float, ratio: float) -> Masks:
    """Per layer which channels a criterion accepts."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, not {criterion!r}")
    scores = _scores(model, criterion)
    if criterion == "threshold":
        if not threshold > 0:
            raise ValueError(f"threshold must be above 0, not {threshold}")
        return {layer: ~(score < threshold) for layer, score in scores.items()}  # NaN stays
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), not {ratio}")
    if criterion == "ratio":
        best = _best(torch.cat(list(scores.values())), ratio)
        parts = best.split([len(score) for score in scores.values()])
        return dict(zip(scores, parts))
    accepted = {}
    per_scale = scales(model.config["channels"])
    for layer, score in scores.items():
        # Filters of the bank's scales read different inputs: not comparable.
        groups = per_scale[layer] if layer == "fusion.bank" else [len(score)]
        accepted[layer] = torch.cat([_best(part, ratio) for part in score.split(groups)])
    return accepted


def _scores(model: CSNet, criterion: str) -> Masks:
    """Per layer what the criterion makes of each channel; less is worse."""
    tensors = _state(model)
    per_scale = scales(model.config["channels"])
    if criterion in ("threshold", "ratio"):
        return {layer: tensors[f"{norms(layer)[0]}.weight"].abs().cpu() for layer in per_scale}
    filters: dict[str, list[Tensor]] = {}
    for layer, _ in blocks(model.config["channels"]):
        filters[layer] = [tensors[f"{layer}.conv1.weight"]]
    filters["fusion.mix"] = [tensors["fusion.mix.conv.weight"]]
    filters["fusion.bank"] = [
        tensors[f"fusion.bank.weights.{s}"] for s in range(len(per_scale["fusion.bank"]))
    ]
    filters["fusion.merge"] = [tensors["fusion.merge.conv.weight"]]
    measure = _norm if criterion == "norm" else _distance
    return {
        layer: torch.cat([measure(weight.double().flatten(1).cpu()) for weight in weights])
        for layer, weights in filters.items()
    }


def _norm(filters: Tensor) -> Tensor:
    return filters.abs().sum(1)


def _distance(filters: Tensor) -> Tensor:
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def _best(score: Tensor, ratio: float) -> Tensor:
    """All but the given share of smallest scores; of equals the later ones go last."""
    accepted = torch.ones(len(score), dtype=torch.bool)
    order = torch.sort(score, descending=False, stable=True).indices
    accepted[order[: int(ratio * len(score))]] = False
    return accepted


def _with_survivors(model: CSNet, chosen: Masks, criterion: str) -> Masks:
    """The masks with at least one channel per layer, and no branch of the bank without input."""
    scores = _scores(model, criterion)
    keep = {layer: mask.clone() for layer, mask in chosen.items()}
    per_scale = scales(model.config["channels"])

    def one_at_least(layer: str) -> None:
        if not keep[layer].any():
            keep[layer][scores[layer].argmax()] = True

    for layer in keep:
        one_at_least(layer)
    mid = keep["fusion.mix"].split(per_scale["fusion.mix"])
    for part, has_input in zip(keep["fusion.bank"].split(per_scale["fusion.bank"]), mid):
        if not has_input.any():
            part[:] = False
    one_at_least("fusion.bank")
    return keep


# ---- tensors ------------------------------------------------------------------------------------


def _state(model: CSNet) -> Tensors:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _masked(model: CSNet, chosen: Masks, criterion: str, threshold: float) -> Tensors:
    tensors = {name: tensor.clone() for name, tensor in _state(model).items()}
    for layer, accepted in chosen.items():
        for norm in norms(layer):
            gamma = tensors[f"{norm}.weight"]
            if criterion == "threshold":
                gamma[gamma.abs() < threshold] = 0
            else:
                gamma[~accepted.to(gamma.device)] = 0
    return tensors


def _build(model: CSNet, tensors: Tensors, channels: dict[str, Any]) -> nn.Module:
    """A CSNet of these channels and tensors, of the model's dtype, device and training mode."""
    with torch.device("meta"):  # no memory, no random numbers
        pruned = create_model(model.name, **{**model.config, "channels": channels})
    like = model.head.weight
    pruned.load_state_dict(
        {name: t.to(like.device, like.dtype).clone() for name, t in tensors.items()}, assign=True
    )
    setattr(pruned, "preprocessing", copy.deepcopy(model.preprocessing))  # noqa: B010
    return pruned.train(model.training)
