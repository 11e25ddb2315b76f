"""The published CSNet checkpoints as models of ours.

`sodfast.legacy_pickle` reads the files; here their tensors and their channel configuration
get our names. The published code has one module per scale where ours has one tensor.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .legacy_pickle import Array, CheckpointError, read_bytes, read_checkpoint, run_pickle
from .weights import build

__all__ = ["CheckpointError", "convert_csnet", "read_checkpoint", "read_configuration"]

_MAX_CHANNELS = 4096
_GAIN = 100.0  # the authors' factor on depthwise and dilated convolutions


def read_configuration(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The channel configuration from a published .bin file.

    Returns the `channels` argument of ``create_model("csnet", channels=…)``: "stages" (per
    stage and block the output channels per scale), "fuse", "bank" (per scale, per dilation)
    and "merge". Raises FileNotFoundError, or CheckpointError naming the file.
    """
    path = Path(path)
    data = read_bytes(path)
    try:
        return _configuration(run_pickle(io.BytesIO(data)))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _channels(value: Any, where: str) -> Any:
    """An array of whole numbers, or one such number, as a (nested) list of int."""
    array = value.value if isinstance(value, Array) else None
    if array is None and type(value) is int:
        array = np.array([value])
    if array is None or array.ndim == 0 or not 0 < array.size <= 64:
        raise CheckpointError(f"its configuration is malformed at {where}")
    if not all(0 <= v <= _MAX_CHANNELS and v == int(v) for v in array.ravel().tolist()):
        raise CheckpointError(f"its configuration has impossible channel counts at {where}")
    return array.astype(np.int64).tolist()


def _configuration(entries: Any) -> dict[str, Any]:
    # One entry per block, each [in, out]; then mix, dilated bank, merge, blocks per stage.
    if type(entries) is not list or len(entries) < 5 or any(type(e) is not list for e in entries):
        raise CheckpointError("is not a CSNet configuration (a list of lists of arrays)")
    *blocks, mix, bank, merge, depths = entries
    if not (all(type(n) is int and n > 0 for n in depths) and len(blocks) == 1 + sum(depths)):
        raise CheckpointError("its configuration's number of blocks contradicts its last entry")
    if any(len(entry) != 2 for entry in (*blocks, mix, merge)) or len(bank) != 3:
        raise CheckpointError("its configuration has an entry of the wrong length")

    stages: list[list[list[int]]] = []
    rest = iter(enumerate(blocks))
    previous = None
    for depth in (1, *depths):
        stage = []
        for _, (number, (inputs, outputs)) in zip(range(depth), rest):
            got = _channels(inputs, f"block {number}")
            if previous is not None and got != previous:
                raise CheckpointError(
                    f"its configuration's block {number} takes {got} channels, "
                    f"but the block before it gives {previous}"
                )
            previous = _channels(outputs, f"block {number}")
            stage.append(previous)
        stages.append(stage)
    branches = _channels(bank[2], "the dilated bank")
    if not isinstance(branches[0], list):
        raise CheckpointError("its configuration's dilated bank is no table")
    return {
        "stages": stages,
        "fuse": _channels(mix[1], "the fusion"),
        "bank": branches,
        "merge": _channels(merge[1], "the merge")[0],
    }


class _Source:
    """A checkpoint's tensors, handed out once each, so that none is forgotten silently."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}

    def take(self, *names: str) -> torch.Tensor:
        """The named tensors, joined along their first axis (the published code has one
        module per scale where ours has one tensor)."""
        absent = next((name for name in names if name not in self.tensors), None)
        if absent is not None or not names:
            raise CheckpointError(f"lacks the tensor {absent}" if names else "has an empty layer")
        parts = [self.tensors.pop(name) for name in names]
        if len({(part.shape[1:], part.ndim > 0) for part in parts}) != 1:
            raise CheckpointError(f"the shapes of {names[0]} and its neighbours do not fit")
        return torch.cat(parts)

    def take_norm(self, norms: list[str], slopes: list[str]) -> dict[str, torch.Tensor]:
        ours = {
            entry: self.take(*(f"{name}.{entry}" for name in norms))
            for entry in ("weight", "bias", "running_mean", "running_var")
        }
        ours["slope"] = self.take(*(f"{name}.weight" for name in slopes))
        return ours


def _map_names(source: _Source, channels: dict[str, Any]) -> dict[str, torch.Tensor]:
    ours: dict[str, torch.Tensor] = {}

    def norm(target: str, origin: str, outputs: list[int]) -> None:
        scales = [i for i, count in enumerate(outputs) if count]
        taken = source.take_norm(
            [f"{origin}.bns.{i}" for i in scales], [f"{origin}.prelus.{i}" for i in scales]
        )
        ours.update({f"{target}.{entry}": tensor for entry, tensor in taken.items()})

    for s, stage in enumerate(channels["stages"]):
        for b, outputs in enumerate(stage):
            origin, target = f"stage{s}.{b}", f"stages.{s}.{b}"
            ours[f"{target}.conv1.weight"] = source.take(f"{origin}.conv1x1.conv.weight")
            norm(f"{target}.norm1", f"{origin}.conv1x1", outputs)
            scales = [i for i, count in enumerate(outputs) if count]
            for n in (1, 2):
                depthwise = f"{origin}.conv3x3_{n}"
                stored = source.take(*(f"{depthwise}.convs.{i}.weight" for i in scales))
                ours[f"{target}.conv{n + 1}.weight"] = stored * _GAIN
                norm(f"{target}.norm{n + 1}", depthwise, outputs)

    ours["fusion.mix.conv.weight"] = source.take("oct_fuse.fuse.conv.weight")
    norm("fusion.mix.norm", "oct_fuse.fuse", channels["fuse"])
    for s, branches in enumerate(channels["bank"]):
        origin = f"oct_fuse.ms.convs.{s}"
        names = [f"{origin}.msconv.{d}.weight" for d, count in enumerate(branches) if count]
        empty = torch.zeros(0, channels["fuse"][s], 3, 3)
        ours[f"fusion.bank.weights.{s}"] = source.take(*names) * _GAIN if names else empty
    origins = [f"oct_fuse.ms.convs.{s}" for s, row in enumerate(channels["bank"]) if any(row)]
    taken = source.take_norm([f"{o}.bn" for o in origins], [f"{o}.prelu" for o in origins])
    ours.update({f"fusion.bank.norm.{entry}": tensor for entry, tensor in taken.items()})
    ours["fusion.merge.conv.weight"] = source.take("oct_fuse.fuse1x1.conv.weight")
    norm("fusion.merge.norm", "oct_fuse.fuse1x1", [channels["merge"]])
    ours["head.weight"] = source.take("cls_layer.weight")
    ours["head.bias"] = source.take("cls_layer.bias")
    return ours


def convert_csnet(
    checkpoint_path: str | os.PathLike[str], config_path: str | os.PathLike[str]
) -> nn.Module:
    """A published CSNet checkpoint and its .bin configuration as a model of ours.

    The stored weights of the depthwise and dilated convolutions are multiplied by 100 once,
    where the published code multiplies them in every forward pass; the model has
    weight_gain = 1. Weights under 1e-30 become zero. Returns the model in eval mode.

    Raises FileNotFoundError, or CheckpointError (a ValueError) naming the file: damaged,
    hostile, of another kind, or a checkpoint and a configuration that do not belong together.
    Executes nothing from either file.
    """
    channels = read_configuration(config_path)
    source = _Source(read_checkpoint(checkpoint_path))
    try:
        tensors = _map_names(source, channels)
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint_path}: {error} (is {config_path} its configuration?)"
        ) from error
    if source.tensors:
        first = next(iter(source.tensors))
        raise CheckpointError(
            f"{checkpoint_path}: has the tensor {first[:80]!r} and {len(source.tensors) - 1} more "
            f"that the configuration {config_path} does not name"
        )
    return build("csnet", {"channels": channels}, tensors, str(checkpoint_path))
