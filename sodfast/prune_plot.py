"""What dynamic weight decay and pruning do to a network, as pictures and as numbers.

After the figures of the CSNet papers: the learned channels (ECCV fig. 7, TPAMI fig. 10), the
distribution of γ (fig. 4b; 5) and the spread of outputs among channels (fig. 4a; 4). Each takes
several networks with a name, so that standard and dynamic decay stand side by side. matplotlib
is an optional extra, imported when something is drawn.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nn import NormAct
from .optim import decaying_norms
from .plot import require_matplotlib
from .weights import atomic_write

__all__ = [
    "draw_channels",
    "draw_gammas",
    "draw_spread",
    "gamma_gap",
    "output_spread",
    "smooth_pictures",
]

_COLOURS = ("#9aa3ab", "#009e73", "#e69f00", "#0072b2", "#cc79a7")
_ZERO = -46.0  # where log10 of 0 is drawn: below the smallest subnormal float, 1.4e-45


def gamma_gap(model: nn.Module) -> tuple[float, float]:
    """The widest gap among the |γ| that decide over channels, as its lower and upper end.

    Of the gOctConv's norm in each ILBlock, on a logarithmic scale; |γ| under 1e-45 count as
    1e-45. Every threshold between the two gives the same channels there. (1.0, 1.0) when there
    are fewer than two.
    """
    deciding = [norm for name, norm in decaying_norms(model) if name.endswith("norm1")]
    if not deciding:
        return 1.0, 1.0
    logs = torch.cat([_log_gamma(norm) for norm in deciding]).sort().values
    if len(logs) < 2:
        return 1.0, 1.0
    widest = int((logs[1:] - logs[:-1]).argmax())
    return 10 ** float(logs[widest]), 10 ** float(logs[widest + 1])


def _log_gamma(norm: NormAct) -> Tensor:
    return norm.weight.detach().double().abs().cpu().clamp_min(1e-45).log10()


@torch.no_grad()
def output_spread(model: nn.Module, images: Tensor) -> dict[str, tuple[float, float]]:
    """The standard deviation among channels at a pixel, averaged over pixels and images.

    Args:
        model: any network with NormActs; measured in eval mode, left in the mode that it had.
        images: (B, C, H, W), as the network takes them.

    Returns:
        For each NormAct of more than one channel: after batch normalisation, and after PReLU.
    """
    found: dict[str, tuple[float, float]] = {}
    handles = []

    def measure(name: str) -> Any:
        def hook(norm: NormAct, inputs: tuple, ys: list[Tensor]) -> None:
            xs = inputs[0] if isinstance(inputs[0], (list, tuple)) else [inputs[0]]
            counts = list(norm.channels)
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            shift = norm.bias - norm.running_mean * scale
            zs = [
                x * a[:, None, None] + b[:, None, None]
                for x, a, b in zip(xs, scale.split(counts), shift.split(counts))
            ]
            if max(counts) > 1:
                found[name] = (_spread(zs), _spread(ys))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, NormAct):
            handles.append(module.register_forward_hook(measure(name)))
    training = model.training
    try:
        model.eval()(images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


def _spread(maps: Sequence[Tensor]) -> float:
    """Of all scales, each with the weight of its channels."""
    several = [x for x in maps if x.shape[1] > 1]
    total = sum(x.shape[1] for x in several)
    return sum(float(x.std(1).mean()) * x.shape[1] for x in several) / total


def smooth_pictures(count: int, preprocessing: Mapping[str, Any], seed: int = 0) -> Tensor:
    """Random colour (and depth) gradients as a network's input, where no photos are given;
    (count, channels, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, len(preprocessing["mean"]), 7, 7, generator=generator)
    pictures = F.interpolate(coarse, tuple(preprocessing["size"]), mode="bicubic").clamp(0, 1)
    mean, std = (torch.tensor(preprocessing[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    return (pictures - mean) / std


# ---- pictures -----------------------------------------------------------------------------------


def draw_channels(networks: Mapping[str, dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Writes a PNG: channels of every block, high resolution upwards and low downwards.

    Args:
        networks: name to channel configuration (``model.config["channels"]``), of the same
            numbers of blocks.
        path: of the picture; whole or not at all.

    Raises:
        ValueError: nothing to draw, or networks of different depths.
        ImportError: matplotlib is not installed.
    """
    depths = {tuple(len(stage) for stage in c["stages"]) for c in networks.values()}
    if len(depths) != 1:
        raise ValueError(f"networks must be one or more of the same depth, not {len(depths)}")
    plt = require_matplotlib()
    (depth,) = depths
    figure, axes = plt.subplots(figsize=(10, 4.4), layout="constrained")
    width = 0.8 / len(networks)
    for i, (label, channels) in enumerate(networks.items()):
        blocks = [block for stage in channels["stages"] for block in stage]
        at = [n - 0.4 + (i + 0.5) * width for n in range(len(blocks))]
        colour = _COLOURS[i % len(_COLOURS)]
        axes.bar(at, [block[0] for block in blocks], width, color=colour, label=label)
        low = [-block[1] if len(block) > 1 else 0 for block in blocks]
        axes.bar(at, low, width, color=colour, alpha=0.75)
    edge = 0
    for stage, count in enumerate(depth):
        if edge:
            axes.axvline(edge - 0.5, color="#c5cbd1", linewidth=0.8)
        middle = edge + (count - 1) / 2
        axes.annotate(
            f"stage {stage}", (middle, 1.01), xycoords=("data", "axes fraction"), ha="center"
        )
        edge += count
    axes.axhline(0, color="#22282e", linewidth=0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set(xlabel="block, from the image on", ylabel="channels: low ← | → high resolution")
    axes.set_xticks(range(edge))
    axes.legend(loc="upper left", fontsize=9)
    _save(figure, path)


def draw_gammas(
    networks: Mapping[str, nn.Module],
    path: str | os.PathLike[str],
    threshold: float | None = None,
) -> None:
    """Writes a PNG: how many γ of the ILBlocks' norms have which magnitude.

    Args:
        networks: name to model.
        path: of the picture; whole or not at all.
        threshold: marked by a line.

    Raises:
        ValueError: nothing to draw.
        ImportError: matplotlib is not installed.
    """
    logs = {}
    for label, model in networks.items():
        parts = [norm.weight.detach().double().abs().cpu() for _, norm in decaying_norms(model)]
        if parts:
            gammas = torch.cat(parts)
            logs[label] = torch.where(gammas > 0, gammas.clamp_min(1e-45).log10(), _ZERO)
    if not logs:
        raise ValueError("networks must hold at least one model with ILBlocks")
    plt = require_matplotlib()
    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    low = math.floor(min(float(values.min()) for values in logs.values()))
    high = math.ceil(max(float(values.max()) for values in logs.values()))
    steps = 4 if high - low <= 20 else 2  # per decade
    edges = [low + i / steps for i in range(steps * max(high - low, 1) + 1)]
    for i, (label, values) in enumerate(logs.items()):
        colour = _COLOURS[(i + 1) % len(_COLOURS)]
        axes.hist(values.numpy(), edges, color=colour, alpha=0.7, label=f"{label}: {len(values):,}")
    if threshold is not None:
        axes.axvline(math.log10(threshold), color="#d55e00", linewidth=1, linestyle="--")
        axes.annotate(
            f" threshold {threshold:g}", (math.log10(threshold), 0.96),
            xycoords=("data", "axes fraction"), color="#d55e00", fontsize=9,
        )  # fmt: skip
    axes.set_yscale("log")
    zeros = any(float(values.min()) == _ZERO for values in logs.values())
    step = 5 if high - low <= 25 else 10
    ticks = [v for v in range(-45, high + 1) if v % step == 0 and v >= low and v > _ZERO + 2]
    axes.set_xticks([_ZERO, *ticks] if zeros else ticks)
    axes.xaxis.set_major_formatter(lambda v, _: "0" if v == _ZERO else f"$10^{{{v:g}}}$")
    axes.set(xlabel="|γ|", ylabel="number of γ")
    axes.legend(fontsize=9)
    _save(figure, path)


def draw_spread(
    networks: Mapping[str, Mapping[str, tuple[float, float]]],
    path: str | os.PathLike[str],
    title: str = "",
) -> None:
    """Writes a PNG: the spread of outputs among channels, layer by layer.

    Args:
        networks: name to what :func:`output_spread` returned.
        path: of the picture; whole or not at all.
        title: above the picture, for example which images.

    Raises:
        ValueError: nothing to draw.
        ImportError: matplotlib is not installed.
    """
    if not any(networks.values()):
        raise ValueError("networks must hold at least one layer")
    plt = require_matplotlib()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for panel, which, place in zip(panels, (0, 1), ("batch normalisation", "PReLU")):
        for i, (label, layers) in enumerate(networks.items()):
            values = [pair[which] for pair in layers.values()]
            colour = _COLOURS[i % len(_COLOURS)]
            mean = sum(values) / max(len(values), 1)
            panel.plot(values, color=colour, marker=".", label=f"{label}, mean {mean:.3g}")
        panel.set(xlabel="norm, from the image on", title=f"after {place}")
        panel.set_yscale("log")
        panel.legend(fontsize=9)
    panels[0].set_ylabel("standard deviation among channels")
    if title:
        figure.suptitle(title)
    _save(figure, path)


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    import matplotlib.pyplot as plt

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    try:
        with atomic_write(path, sync=False) as file:
            figure.savefig(file, format="png", dpi=150)
    finally:
        plt.close(figure)
