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

from .encoder_names import surplus, their_names

_LISTED = 20  # names in an error message

# What a file may lack: batch counters, which are not used here; and of transformers' backbones
# the norms of the features, which their classifiers do not have and which stay fresh.
_OPTIONAL = ("num_batches_tracked", "hidden_states_norms", "relative_position_index")

logger = logging.getLogger(__name__)


DEPTH_KERNELS = ("mean", "zero", "random")


def load_encoder_weights(
    encoder: nn.Module, path: str | os.PathLike[str], depth_kernel: str = "mean"
) -> list[str]:
    """Fill an encoder with pretrained weights, all of them or none.

    Args:
        encoder: of :func:`sodfast.models.encoders.make_encoder`, for example the ``encoder`` of
            a CSF or SCFNet model.
        path: a local .safetensors, .pth, .pt or .bin file with a state dict. Pickled files are
            read with ``weights_only=True``; a state dict inside ``{"state_dict": …}`` and names
            that all begin with ``module.`` are understood. The names are those of

            - ResNet-50: torchvision, timm (``layer1.0.conv1.weight``) or transformers
              (``encoder.stages.0.layers.0.layer.0.convolution.weight``, with or without
              ``resnet.`` before it);
            - Res2Net-50: timm's res2net50d, the "v1b" form;
            - VGG: torchvision or timm, without batch normalisation;
            - MobileNetV3 in the form "torchvision": torchvision's mobilenet_v3_large or timm's
              mobilenetv3_large_100; in the form "paddle" PaddleClas's names
              (``blocks.0.expand_conv.conv.weight``). The two forms are different networks, see
              :class:`~sodfast.models.mobilenet_v3.MobileNetV3Large`;
            - EfficientNet-Lite0: timm's tf_efficientnet_lite0, or the names of the package
              efficientnet_pytorch (``_blocks.0._depthwise_conv.weight``);
            - a backbone of transformers: transformers, of the backbone or the classifier.

        depth_kernel: what an encoder of four input channels gets in the fourth, depth, when the
            file is for RGB: the "mean" of the RGB kernels, "zero" (at first it does as the file's
            encoder does), or "random" (it stays as it was initialised).

    Returns:
        The names that were left out: the classifier's, which an encoder does not have. They
        are logged too. Batch counters, which some files lack, are not used here and start at
        0; norms of the features that only transformers' backbones have stay as they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown depth_kernel; or the file cannot be read, or is not exactly this
            encoder: the message lists what is missing, what is unexpected and what has another
            shape. The encoder is then unchanged.
    """
    path = Path(path)
    if depth_kernel not in DEPTH_KERNELS:
        raise ValueError(f"depth_kernel must be {', '.join(DEPTH_KERNELS)}, not {depth_kernel!r}")
    given = _read(path)
    dropped = surplus(encoder, given)
    state = {name: tensor for name, tensor in given.items() if name not in dropped}
    wanted = encoder.state_dict()
    theirs = their_names(encoder, state)
    problems = []
    missing = [
        theirs[name]
        for name in wanted
        if theirs[name] not in state and not any(word in name for word in _OPTIONAL)
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
        if tensor is not None and _lacks_depth(tensor, ours):
            tensor = _with_depth(tensor, ours, depth_kernel)
        if tensor is None:
            # Or already a problem.
            ready[name] = torch.zeros_like(ours) if name.endswith(_OPTIONAL[0]) else ours
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


def _lacks_depth(tensor: Tensor, ours: Tensor) -> bool:
    """Whether this is the first convolution, of RGB in the file and of RGB and depth here."""
    if tensor.dim() != 4 or ours.dim() != 4 or (tensor.shape[1], ours.shape[1]) != (3, 4):
        return False
    return tensor.shape[0] == ours.shape[0] and tensor.shape[2:] == ours.shape[2:]


def _with_depth(tensor: Tensor, ours: Tensor, kernel: str) -> Tensor:
    if kernel == "mean":
        return torch.cat([tensor, tensor.mean(1, keepdim=True)], 1)
    depth = ours[:, 3:].to(tensor)
    return torch.cat([tensor, torch.zeros_like(depth) if kernel == "zero" else depth], 1)


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


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
