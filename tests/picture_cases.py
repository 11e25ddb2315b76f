"""Pictures and a small network for the tests of prediction, and its maps by torch alone."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

import sodfast
from sodfast.nn import NormAct
from sodfast.preprocess import to_input

IMAGENET = {
    "size": [224, 224],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "resample": "bilinear",
}


def small_model() -> nn.Module:
    """A small CSNet whose maps are not flat, for pictures of 64 x 64; a new copy each time."""
    return copy.deepcopy(_small_model())


@functools.cache
def _small_model() -> nn.Module:
    torch.manual_seed(3)
    model = sodfast.create_model("csnet", width=0.5).train()
    norms = [module for module in model.modules() if isinstance(module, NormAct)]
    for norm in norms:
        norm.momentum = 1.0  # the statistics become those of the next batch
    with torch.no_grad():
        model(torch.cat([to_input(picture(seed=s), IMAGENET, (64, 64)) for s in range(4)]))
        model.get_parameter("head.weight").mul_(5)
    for norm in norms:
        norm.momentum = 0.1
    model.eval()
    model.preprocessing = {**IMAGENET, "size": [64, 64]}
    return model


def picture(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def saved(image: Image.Image, file_format: str, **options: Any) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, format=file_format, **options)
    stream.seek(0)
    return stream


def by_hand(model: nn.Module, rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The map by torch alone: no fusing, no code of preprocess.py."""
    tensor = torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float() / 255
    tensor = functional.interpolate(tensor, size=size, mode="bilinear", align_corners=False)
    mean = torch.tensor(IMAGENET["mean"]).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET["std"]).view(1, 3, 1, 1)
    with torch.no_grad():
        saliency = model((tensor - mean) / std).sigmoid()
    saliency = functional.interpolate(saliency, rgb.shape[:2], mode="bilinear")
    return (saliency[0, 0] * 255).byte().numpy()
