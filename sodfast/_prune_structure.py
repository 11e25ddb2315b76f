"""CSNet's tensors by layer: what belongs to a channel, and a network with fewer of them.

A layer here is what shares one set of channels: "stages.s.b" (a block: gOctConv, its norm, and
the two depthwise layers that follow it), "fusion.mix", "fusion.bank" and "fusion.merge". A mask
holds one boolean per channel of a layer, all scales concatenated, high resolution first; the
bank's are in the order of its rows, dilation by dilation inside each scale.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .models import CSNet
from .nn import NormAct
from .plan import Plan

Tensors = dict[str, Tensor]
Masks = dict[str, Tensor]
NORM_ENTRIES = ("weight", "bias", "slope", "running_mean", "running_var")
FUSION = ("fusion.mix", "fusion.bank", "fusion.merge")


def check_csnet(model: nn.Module) -> CSNet:
    """The model, if it is a CSNet as its configuration describes it; otherwise a TypeError."""
    whole = model.network if isinstance(model, Plan) else model
    if not isinstance(whole, CSNet):
        raise TypeError(f"model must be a CSNet, not {type(model).__name__}")
    if not any(isinstance(module, NormAct) for module in whole.modules()):
        raise TypeError("model is fused for inference: prune the one that it was made from")
    return whole


def blocks(channels: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Name and channels per scale of every block."""
    for s, stage in enumerate(channels["stages"]):
        for b, counts in enumerate(stage):
            yield f"stages.{s}.{b}", list(counts)


def fused_blocks(model: CSNet) -> list[str]:
    """The blocks that the fusion reads: the last of every fused stage, high resolution first."""
    stages = model.config["channels"]["stages"]
    return [f"stages.{s}.{len(stages[s]) - 1}" for s in model.fused_stages]


def scales(channels: dict[str, Any]) -> dict[str, list[int]]:
    """Channels per scale of every layer."""
    counts = dict(blocks(channels))
    bank = [sum(row) for row in channels["bank"]]
    return {**counts, **dict(zip(FUSION, (channels["fuse"], bank, [channels["merge"]])))}


def norms(layer: str) -> list[str]:
    """The NormActs that a layer's channels pass; the first is the one that decides."""
    if layer.startswith("fusion"):
        return [f"{layer}.norm"]
    return [f"{layer}.norm{n}" for n in (1, 2, 3)]


def cut(model: CSNet, tensors: Tensors, keep: Masks) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the channel configuration of the network with only the channels to keep."""
    channels, new = model.config["channels"], {}
    counts = {
        layer: [int(part.sum()) for part in keep[layer].split(per_scale)]
        for layer, per_scale in scales(channels).items()
    }
    for layer, mask in keep.items():
        for norm in norms(layer):
            for entry in NORM_ENTRIES:
                new[f"{norm}.{entry}"] = tensors[f"{norm}.{entry}"][mask]

    inputs = torch.ones(tensors["stages.0.0.conv1.weight"].shape[1], dtype=torch.bool)
    for layer, _ in blocks(channels):
        mask = keep[layer]
        new[f"{layer}.conv1.weight"] = tensors[f"{layer}.conv1.weight"][mask][:, inputs]
        for conv in ("conv2", "conv3"):
            new[f"{layer}.{conv}.weight"] = tensors[f"{layer}.{conv}.weight"][mask]
        inputs = mask

    mix, bank, merge = (keep[layer] for layer in FUSION)
    fused = torch.cat([keep[layer] for layer in fused_blocks(model)])
    new["fusion.mix.conv.weight"] = tensors["fusion.mix.conv.weight"][mix][:, fused]
    new_bank = []
    per_scale = scales(channels)
    rows = bank.split(per_scale["fusion.bank"])
    columns = mix.split(per_scale["fusion.mix"])
    for s, branches in enumerate(channels["bank"]):
        weight = tensors[f"fusion.bank.weights.{s}"]
        new[f"fusion.bank.weights.{s}"] = weight[rows[s]][:, columns[s]]
        new_bank.append([int(part.sum()) for part in rows[s].split(branches)])
    new["fusion.merge.conv.weight"] = tensors["fusion.merge.conv.weight"][merge][:, bank]
    new["head.weight"] = tensors["head.weight"][:, merge]
    new["head.bias"] = tensors["head.bias"]

    stages = [
        [counts[f"stages.{s}.{b}"] for b in range(len(stage))]
        for s, stage in enumerate(channels["stages"])
    ]
    fuse, merged = counts["fusion.mix"], counts["fusion.merge"][0]
    return new, {"stages": stages, "fuse": fuse, "bank": new_bank, "merge": merged}
