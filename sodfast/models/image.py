"""What the networks ask of an image: its preprocessing, its shape."""

import copy
from typing import Any

from torch import Tensor

# ImageNet statistics, RGB in 0–1; the size of CSNet's tables.
PREPROCESSING: dict[str, Any] = {
    "size": [224, 224],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "resample": "bilinear",
}


def preprocessing_for(base: dict[str, Any], in_channels: int) -> dict[str, Any]:
    """A copy of a preprocessing dictionary for RGB, extended by depth where there are 4 channels.

    Depth is a number in 0–1, 1 near, and stays as it is (mean 0, standard deviation 1).
    """
    own = copy.deepcopy(base)
    if in_channels == 4:
        own["mean"].append(0.0)
        own["std"].append(1.0)
    return own


def check_image(image: Tensor, channels: int, multiple: int) -> None:
    """Refuse what is not (B, channels, H, W) with H and W multiples of ``multiple``.

    Raises:
        ValueError: names the shape, or the size and the nearest sizes that will do.
    """
    if image.dim() != 4 or image.shape[1] != channels:
        raise ValueError(f"image must be (B, {channels}, H, W), not {tuple(image.shape)}")
    height, width = image.shape[-2:]
    if height % multiple or width % multiple or not height or not width:
        near = [
            sorted({max(1, n // multiple + up) * multiple for up in (0, n % multiple > 0)})
            for n in (height, width)
        ]
        raise ValueError(
            f"image is {height}x{width}, but height and width must be multiples of "
            f"{multiple}; the nearest sizes are "
            + ", ".join(f"{h}x{w}" for h in near[0] for w in near[1])
        )
