"""Writes checkpoints and configurations the way the authors of CSNet published theirs."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sodfast

# One channel configuration with a branch, a bank scale's first branch, and scales that vanished.
PRUNED = {
    "stages": [
        [[3, 2]],
        [[2, 3], [4, 1], [3, 3]],
        [[4, 3], [5, 0], [3, 4], [6]],
        [[5, 4], [0, 6], [4, 4], [7]],
        [[6, 2], [3, 5], [8]],
    ],
    "fuse": [4, 3, 5],
    "bank": [[1, 1, 0, 1, 1], [0, 2, 1, 0, 3], [2, 0, 0, 0, 1]],
    "merge": 7,
}


def published_state(model: nn.Module, channels: dict[str, Any]) -> dict[str, Tensor]:
    """A model's tensors under the published names, split per scale, depthwise and dilated
    weights divided by 100."""
    ours = model.state_dict()
    theirs: dict[str, Tensor] = collections.OrderedDict()

    def norm(source: str, counts: list[int], norm_name: str, slope_name: str) -> None:
        for i, count in enumerate(counts):
            if not count:
                continue
            rows = slice(sum(counts[:i]), sum(counts[: i + 1]))
            for entry in ("weight", "bias", "running_mean", "running_var"):
                theirs[f"{norm_name.format(i)}.{entry}"] = ours[f"{source}.{entry}"][rows].clone()
            theirs[f"{norm_name.format(i)}.num_batches_tracked"] = torch.tensor(3)
            theirs[f"{slope_name.format(i)}.weight"] = ours[f"{source}.slope"][rows].clone()

    for s, stage in enumerate(channels["stages"]):
        for b, counts in enumerate(stage):
            to, source = f"stage{s}.{b}", f"stages.{s}.{b}"
            theirs[f"{to}.conv1x1.conv.weight"] = ours[f"{source}.conv1.weight"]
            norm(f"{source}.norm1", counts, to + ".conv1x1.bns.{}", to + ".conv1x1.prelus.{}")
            for n in (1, 2):
                layer = f"{to}.conv3x3_{n}"
                for i, part in enumerate(ours[f"{source}.conv{n + 1}.weight"].split(counts)):
                    if counts[i]:
                        theirs[f"{layer}.convs.{i}.weight"] = part / 100
                norm(f"{source}.norm{n + 1}", counts, layer + ".bns.{}", layer + ".prelus.{}")
    fuse = "oct_fuse.fuse"
    theirs[f"{fuse}.conv.weight"] = ours["fusion.mix.conv.weight"]
    norm("fusion.mix.norm", channels["fuse"], fuse + ".bns.{}", fuse + ".prelus.{}")
    for s, row in enumerate(channels["bank"]):
        for d, part in enumerate(ours[f"fusion.bank.weights.{s}"].split(row)):
            if row[d]:
                theirs[f"oct_fuse.ms.convs.{s}.msconv.{d}.weight"] = part / 100
    scales = "oct_fuse.ms.convs.{}"
    totals = [sum(row) for row in channels["bank"]]
    norm("fusion.bank.norm", totals, scales + ".bn", scales + ".prelu")
    theirs["oct_fuse.fuse1x1.conv.weight"] = ours["fusion.merge.conv.weight"]
    norm(
        "fusion.merge.norm",
        [channels["merge"]],
        "oct_fuse.fuse1x1.bns.{}",
        "oct_fuse.fuse1x1.prelus.{}",
    )
    theirs["cls_layer.weight"], theirs["cls_layer.bias"] = ours["head.weight"], ours["head.bias"]
    return theirs


def published_configuration(channels: dict[str, Any]) -> list[Any]:
    entries: list[Any] = []
    previous: Any = 3
    for stage in channels["stages"]:
        for counts in stage:
            entries.append([previous, np.array(counts, dtype=float)])
            previous = np.array(counts, dtype=float)
    inputs = np.array([stage[-1][0] for stage in channels["stages"][2:]], dtype=float)
    middle = np.array(channels["fuse"], dtype=float)
    table = np.array(channels["bank"], dtype=float)
    merge = np.array([channels["merge"]], dtype=float)
    entries += [[inputs, middle], [middle, table.sum(axis=1), table], [table.sum(axis=1), merge]]
    return [*entries, [len(stage) for stage in channels["stages"][1:]]]


def write_pair(folder: Path, state: Any, entries: Any) -> tuple[Path, Path]:
    checkpoint, configuration = folder / "net.pth.tar", folder / "net.bin"
    content = {"epoch": 3, "arch": "net", "state_dict": state, "optimizer": {"lr": 1e-4, "n": []}}
    torch.save(content, checkpoint, _use_new_zipfile_serialization=False)
    configuration.write_bytes(pickle.dumps(entries, protocol=3))
    return checkpoint, configuration


def random_model(channels: dict[str, Any] | None) -> nn.Module:
    torch.manual_seed(0)
    model = sodfast.create_model("csnet", channels=channels).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(0.1 * torch.rand_like(tensor))
    return model
