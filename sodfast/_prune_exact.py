"""Exact pruning: which channels emit a constant, and where that constant can go.

Let γ be 0 in a norm: its channel then is c = PReLU(β), everywhere and whatever the input. A
channel can be taken out without changing the network if what it finally emits is a constant,
and if what reads it can do with a number in its place. How a constant fares, layer by layer:

================================  ==========================================================
max-pool, average-pool, bilinear  stays c: they average or choose among equal values
1x1 convolution                   exact: adds W c to every pixel of an output channel
norm                              exact: adding W c before it is taking W c from its running
                                  mean (in training the batch mean swallows it all by itself)
PReLU                             stays a constant
head (1x1 with a bias)            exact: its bias takes W c
3x3, dense, depthwise or dilated  pads with zeros, so that pixels near the border see c in
                                  fewer than nine taps: no constant any more, unless c is 0 or
                                  all taps but the central one are
================================  ==========================================================

So, inside a block, γ = 0 in the first norm alone is not enough: PReLU(β1) runs into the zero
padding of the first depthwise layer, and β1 = 0 is needed to get through (as the constant 0,
which the second norm turns into another constant, with which the same begins again). γ = 0 in
the third norm is always enough. Between blocks, c can be folded where the readers are 1x1:
everywhere but in front of stages 2, 3 and 4, whose first convolutions are 3x3, and in front of
the dilated bank. There c = 0 is needed. If c is not 0, one channel per scale stays and speaks
for all others, since they differ by a factor only: its column becomes Σ_i (c_i / c) W_i. At
least one channel of each layer always stays.

All this holds in training too, but for norms that see a constant (they then return PReLU(β)).

The code carries intervals from layer to layer: what values a channel may have, at any pixel of
any image. A constant is an interval without extent, or with less than float32 can show:
trained networks have β of 1e-25 where a 0 is meant.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ._prune_structure import Masks, Tensors, blocks, fused_blocks, scales
from .models import CSNet

# In units of activations, which are 1e-4 and more: below float32's resolution of such numbers.
_NO_EXTENT = 1e-12

Interval = tuple[Tensor, Tensor]  # the least and the largest value of each channel


def fold_constants(model: CSNet, tensors: Tensors) -> Masks:
    """Find all channels that emit a constant, fold these, and say which channels are left.

    Args:
        model: only its settings are read (channels, fused stages, eps, weight gains).
        tensors: its state, with γ = 0 where a channel is masked; in float64, modified.
            Numbers that are to count as 0 (in weights and β) must be.

    Returns:
        What to keep. The network that these channels form, with the modified tensors, computes
        what the given tensors do.
    """
    keep: Masks = {}
    channels = model.config["channels"]
    per_scale = scales(channels)
    names = [name for name, _ in blocks(channels)]
    fused = fused_blocks(model)
    in_channels = tensors["stages.0.0.conv1.weight"].shape[1]
    anything = torch.full((in_channels,), math.inf, dtype=torch.float64)
    emitted: Interval = (-anything, anything)
    kept = torch.ones(in_channels, dtype=torch.bool)
    fused_emitted, fused_kept, fused_columns = [], [], 0

    for position, name in enumerate(names):
        is_fused = name in fused
        y = _conv_norm(model, tensors, f"{name}.conv1", f"{name}.norm1", emitted, kept)
        for n in (2, 3):
            z = _depthwise(model, tensors, f"{name}.conv{n}", y)
            y = _norm(model, tensors, f"{name}.norm{n}", z)
        readers = []  # (weight, the first of its columns that reads this block)
        if position + 1 < len(names):
            readers.append((tensors[f"{names[position + 1]}.conv1.weight"], 0))
        if is_fused:
            readers.append((tensors["fusion.mix.conv.weight"], fused_columns))
            fused_columns += sum(per_scale[name])
        emitted, kept = _decide(y, per_scale[name], readers)
        keep[name] = kept
        if is_fused:
            fused_emitted.append(emitted)
            fused_kept.append(kept)

    y = _conv_norm(
        model, tensors, "fusion.mix.conv", "fusion.mix.norm",
        _join(fused_emitted), torch.cat(fused_kept),
    )  # fmt: skip
    mid, bank = per_scale["fusion.mix"], per_scale["fusion.bank"]
    # Each scale of the bank reads its own scale only: as readers that begin before column 0.
    weights = [tensors[f"fusion.bank.weights.{s}"] for s in range(len(mid))]
    readers = [(weight, -sum(mid[:s])) for s, weight in enumerate(weights)]
    emitted, keep["fusion.mix"] = _decide(y, mid, readers)

    parts = zip(weights, emitted[0].split(mid), emitted[1].split(mid))
    z = _join([_conv(weight, (low, high)) for weight, low, high in parts])
    y = _norm(model, tensors, "fusion.bank.norm", z)
    emitted, keep["fusion.bank"] = _decide(y, bank, [(tensors["fusion.merge.conv.weight"], 0)])
    y = _conv_norm(
        model, tensors, "fusion.merge.conv", "fusion.merge.norm", emitted, keep["fusion.bank"]
    )
    merge = per_scale["fusion.merge"]
    emitted, keep["fusion.merge"] = _decide(y, merge, [(tensors["head.weight"], 0)])
    tensors["head.bias"] += _shift(tensors["head.weight"], emitted, keep["fusion.merge"])
    return keep


def _join(intervals: list[Interval]) -> Interval:
    low, high = zip(*intervals)
    return torch.cat(low), torch.cat(high)


def _conv_norm(
    model: nn.Module, tensors: Tensors, conv: str, norm: str, emitted: Interval, kept: Tensor
) -> Interval:
    """What a gOctConv and its norm emit; the norm's running mean takes what is removed."""
    weight = tensors[f"{conv}.weight"]
    y = _norm(model, tensors, norm, _conv(weight, emitted))
    tensors[f"{norm}.running_mean"] -= _shift(weight, emitted, kept)
    return y


def _conv(weight: Tensor, emitted: Interval) -> Interval:
    """What a dense convolution emits."""
    low, high = _padded(emitted) if weight.shape[-1] > 1 else emitted
    finite = low.isfinite() & high.isfinite()
    anything = (weight[:, ~finite] != 0).flatten(1).any(1)
    up, down = (
        weight[:, finite].clamp_min(0).sum((2, 3)),
        weight[:, finite].clamp_max(0).sum((2, 3)),
    )
    least = up @ low[finite] + down @ high[finite]
    most = up @ high[finite] + down @ low[finite]
    return least.masked_fill(anything, -math.inf), most.masked_fill(anything, math.inf)


def _padded(emitted: Interval) -> Interval:
    """The same with the zeros around it."""
    return emitted[0].clamp_max(0), emitted[1].clamp_min(0)


def _shift(weight: Tensor, emitted: Interval, kept: Tensor) -> Tensor:
    """What removed inputs add to each output channel."""
    constants = (emitted[0][~kept] + emitted[1][~kept]) / 2
    return weight[:, ~kept].sum((2, 3)) @ constants


def _depthwise(model: nn.Module, tensors: Tensors, conv: str, y: Interval) -> Interval:
    """What a depthwise 3x3 emits: the sum over taps, of which only the central one is always in."""
    taps = tensors[f"{conv}.weight"].flatten(1)  # (C, 9)
    gain: Any = model.get_submodule(conv).weight_gain
    least = torch.zeros_like(y[0])
    most = torch.zeros_like(y[0])
    for tap in range(9):
        low, high = _scaled(y if tap == 4 else _padded(y), gain * taps[:, tap])
        least, most = least + low, most + high
    return least, most


def _scaled(y: Interval, factor: Tensor) -> Interval:
    # 0 times anything is 0 here, also where the interval is infinite.
    ends = [torch.where(factor == 0, torch.zeros_like(factor), end * factor) for end in y]
    return torch.minimum(*ends), torch.maximum(*ends)


def _norm(model: nn.Module, tensors: Tensors, norm: str, z: Interval) -> Interval:
    """What batch normalisation and PReLU emit."""
    gamma, beta, slope, mean, var = (
        tensors[f"{norm}.{entry}"]
        for entry in ("weight", "bias", "slope", "running_mean", "running_var")
    )
    eps: Any = model.get_submodule(norm).eps
    ends = _scaled((z[0] - mean, z[1] - mean), gamma / (var + eps).sqrt())
    low, high = ends[0] + beta, ends[1] + beta
    # PReLU is monotonous on either side of 0, but with a negative slope its ends may swap.
    a, b = (torch.where(x > 0, x, _scaled((x, x), slope)[0]) for x in (low, high))
    turn = torch.where((low < 0) & (high > 0), torch.zeros_like(a), a)
    return torch.minimum(torch.minimum(a, b), turn), torch.maximum(torch.maximum(a, b), turn)


def _decide(
    emitted: Interval, counts: list[int], readers: list[tuple[Tensor, int]]
) -> tuple[Interval, Tensor]:
    """Which channels of a layer stay, given what each emits.

    Where a reader is 3x3, one channel per scale comes to stand for all whose constant is not 0:
    the readers' weights are modified, and the others' constants become 0.

    Returns:
        (what they emit now, which channels stay)
    """
    low, high = emitted
    kept = ~(high - low <= _NO_EXTENT)
    y = torch.where(kept, torch.zeros_like(low), (low + high) / 2)  # the constants
    if any(weight.shape[-1] > 1 for weight, _ in readers):
        y[y.abs() <= _NO_EXTENT] = 0
        begin = 0
        for count in counts:
            part = torch.arange(begin, begin + count)
            begin += count
            part = part[y[part] != 0]
            if not len(part):
                continue
            speaker = part[y[part].abs().argmax()]
            share, constant = y[part] / y[speaker], y[speaker].clone()
            for weight, first in readers:
                columns = part + first
                if 0 <= int(columns[0]) < weight.shape[1]:
                    column = torch.einsum("oikl,i->okl", weight[:, columns], share)
                    weight[:, speaker + first] = column
            y[part] = 0
            y[speaker], kept[speaker] = constant, True
    constants = high - low <= _NO_EXTENT
    if not kept.any():
        kept[y.abs().argmax()] = True
    return (torch.where(constants, y, low), torch.where(constants, y, high)), kept
