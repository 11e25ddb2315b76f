"""Pictures to the network's input and its output to maps, against torch's own resize."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from picture_cases import IMAGENET, picture
from torch.nn import functional

from sodfast.preprocess import to_input, to_map


@pytest.mark.parametrize("source", [(1, 1), (1, 9), (7, 3), (40, 56), (224, 224), (631, 480)])
@pytest.mark.parametrize("size", [(16, 16), (224, 224), (32, 208)])
def test_input_is_torchs_resize_without_antialiasing(
    source: tuple[int, int], size: tuple[int, int]
) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    tensor = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
    resized = functional.interpolate(tensor, size=size, mode="bilinear", align_corners=False)
    mean = torch.tensor(IMAGENET["mean"]).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET["std"]).view(1, 3, 1, 1)
    got = to_input(rgb, IMAGENET, size)
    assert got.shape == (1, 3, *size)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    # Positions in float32 are good to 631 * 2^-24 or so, times a step of 1 / std.
    assert (got - (resized - mean) / std).abs().max() < 5e-4
    assert (got - (resized - mean) / std).abs().mean() < 2e-6


def test_input_takes_its_size_from_the_preprocessing() -> None:
    assert to_input(picture(), {**IMAGENET, "size": [48, 96]}).shape == (1, 3, 48, 96)
    with pytest.raises(ValueError, match="3 values"):
        to_input(picture(), {**IMAGENET, "mean": [0.5], "std": [0.5]})


def test_map_is_resized_sigmoid_truncated() -> None:
    logits = torch.tensor([[[[-100.0, 100.0], [0.0, 1.0]]]])
    assert to_map(logits, (2, 2)).tolist() == [[0, 255], [127, 186]]  # 127.5 and 186.4
    # Twice as wide: the weights are 1, 3/4, 1/4 and 0.
    assert to_map(logits, (2, 4))[0].tolist() == [0, 63, 191, 255]
    assert to_map(torch.full((1, 1, 16, 16), 100.0), (1, 1)).tolist() == [[255]]


def test_map_refuses_nan_and_wrong_shapes() -> None:
    logits = torch.zeros(1, 1, 4, 4)
    logits[0, 0, 2, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        to_map(logits, (4, 4))
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\)"):
        to_map(torch.zeros(2, 1, 4, 4), (4, 4))
