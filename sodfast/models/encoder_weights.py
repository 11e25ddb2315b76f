"""Pretrained encoder weights from local files, in the names that others gave them."""

import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sodfast.weights import flush_denormals

from .resnet import ResNet50

_LISTED = 20  # names in an error message

# The classifier: torchvision's and timm's name, transformers' name.
_CLASSIFIER = ("fc.weight", "fc.bias", "classifier.1.weight", "classifier.1.bias")

logger = logging.getLogger(__name__)


def load_encoder_weights(encoder: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Fill an encoder with pretrained weights, all of them or none.

    Args:
        encoder: the ``encoder`` of a CSF model, ResNet-50 or Res2Net-50.
        path: a local .safetensors, .pth, .pt or .bin file, a state dict in the naming of
            torchvision or timm (``layer1.0.conv1.weight``) or, for ResNet-50, transformers
            (``encoder.stages.0.layers.0.layer.0.convolution.weight``, with or without
            ``resnet.`` before it). Pickled files are read with ``weights_only=True``; a state
            dict inside ``{"state_dict": …}`` and names that all begin with ``module.`` are
            understood. Res2Net-50 is the "v1b" form, timm's res2net50d.

    Returns:
        The names that were left out: the classifier's, which an encoder does not have. They
        are logged too. (Batch counters, which some files lack, are not used here and start at
        0.)

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or is not exactly this encoder: the message lists
            what is missing, what is unexpected and what has another shape. The encoder is then
            unchanged.
    """
    path = Path(path)
    given = _read(path)
    dropped = [name for name in _CLASSIFIER if name in given]
    state = {name: tensor for name, tensor in given.items() if name not in dropped}
    wanted = encoder.state_dict()
    theirs = {name: name for name in wanted}
    if isinstance(encoder, ResNet50):
        theirs = _theirs(state, wanted)
    problems = []
    missing = [
        theirs[name]
        for name in wanted
        if theirs[name] not in state and not name.endswith("num_batches_tracked")
    ]
    if missing:
        problems.append(f"missing: {_listing(missing)}")
    unexpected = sorted(state.keys() - set(theirs.values()))
    if unexpected:
        problems.append(f"unexpected: {_listing(unexpected)}")
    ready = {}
    wrong = []
    for name, ours in wanted.items():
        tensor = state.get(theirs[name])
        if tensor is None:
            ready[name] = torch.zeros_like(ours)  # a batch counter, or already a problem
        elif tensor.shape != ours.shape or tensor.is_floating_point() != ours.is_floating_point():
            wrong.append(f"{theirs[name]} is {_kind(tensor)}, the encoder's {_kind(ours)}")
        else:
            ready[name] = flush_denormals(tensor.to(ours.dtype))
    if wrong:
        problems.append(f"different: {_listing(wrong)}")
    if problems:
        raise ValueError(
            f"{path}: not the weights of {type(encoder).__name__}; {'; '.join(problems)}"
        )
    encoder.load_state_dict(ready, strict=True)
    if dropped:
        logger.info("%s: the classifier is left out: %s", path, ", ".join(dropped))
    return dropped


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    if not path.exists():
        raise FileNotFoundError(f"encoder weights not found: {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: no safetensors file, or cut or damaged ({error})") from error
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise ValueError(f"{path}: encoder weights must be .safetensors, .pth, .pt or .bin")
    try:
        given: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: cannot be read as plain weights ({reason})") from error
    if isinstance(given, Mapping) and isinstance(given.get("state_dict"), Mapping):
        given = given["state_dict"]
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{path}: holds a {type(given).__name__}, not a state dict")
    strange = [
        str(k) for k, v in given.items() if not (isinstance(k, str) and isinstance(v, Tensor))
    ]
    if strange:
        raise ValueError(f"{path}: no tensors: {_listing(strange)}")
    # torch.nn.DataParallel puts this before every name.
    if all(name.startswith("module.") for name in given):
        return {name.removeprefix("module."): tensor for name, tensor in given.items()}
    return dict(given)


def _theirs(state: Mapping[str, Tensor], names: Mapping[str, Any]) -> dict[str, str]:
    """For every name of our ResNet-50, which is torchvision's and timm's, the file's."""
    for prefix in ("", "resnet."):
        if f"{prefix}embedder.embedder.convolution.weight" in state:
            return {name: prefix + _transformers_name(name) for name in names}
    return {name: name for name in names}


def _transformers_name(name: str) -> str:
    """conv1.weight, layer2.0.bn3.bias, layer2.0.downsample.1.bias … in transformers' words."""
    *place, module, leaf = name.split(".")
    if not place:
        kind = "convolution" if module == "conv1" else "normalization"
        return f"embedder.embedder.{kind}.{leaf}"
    layer, block = int(place[0].removeprefix("layer")) - 1, place[1]
    if place[2:] == ["downsample"]:
        kind = "convolution" if module == "0" else "normalization"
        part = f"shortcut.{kind}"
    else:
        kind = "convolution" if module.startswith("conv") else "normalization"
        part = f"layer.{int(module[-1]) - 1}.{kind}"
    return f"encoder.stages.{layer}.layers.{block}.{part}.{leaf}"


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
