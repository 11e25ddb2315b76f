"""From a picture to the network's input, and from its output back to a map.

What a network expects is a small dictionary that travels with its weights::

    {"size": [224, 224], "mean": [r, g, b], "std": [r, g, b], "resample": "bilinear"}

size is [height, width] in pixels; mean and std are on the 0 … 1 scale, in the order RGB.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["check_preprocessing", "read_image", "to_input", "to_map"]

# Named, so that Pillow tries nothing else: its EPS reader, for one, starts another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_ORIENTATION = 0x0112  # the EXIF tag

# How to mirror and turn an (H, W, C) array for each EXIF orientation.
_UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


def check_preprocessing(preprocessing: Any) -> dict[str, Any]:
    """Returns a clean copy of a preprocessing dictionary.

    Raises ValueError that names the entry which is missing, unknown or out of range.
    """
    if not isinstance(preprocessing, dict):
        raise ValueError(f"preprocessing must be a dict, got {type(preprocessing).__name__}")
    expected = {"size", "mean", "std", "resample"}
    if set(preprocessing) != expected:
        odd = sorted(map(str, expected.symmetric_difference(preprocessing)))
        raise ValueError(f"preprocessing has missing or unknown entries: {', '.join(odd)}")

    def numbers(name: str, length: int | None) -> list[float]:
        values = preprocessing[name]
        good = isinstance(values, (list, tuple)) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
            for v in values
        )
        if not good or not values or (length is not None and len(values) != length):
            count = length if length is not None else "a list of"
            raise ValueError(f"preprocessing {name} must be {count} numbers, got {values!r:.60}")
        return list(values)

    size = numbers("size", 2)
    if any(v != int(v) or not 1 <= v <= 65536 for v in size):
        raise ValueError(f"preprocessing size must be [height, width] in pixels, got {size}")
    mean = numbers("mean", None)
    std = numbers("std", len(mean))
    if any(v <= 0 for v in std):
        raise ValueError(f"preprocessing std must be positive, got {std}")
    if preprocessing["resample"] != "bilinear":
        raise ValueError(
            f"preprocessing resample must be 'bilinear', got {preprocessing['resample']!r:.60}"
        )
    return {"size": [int(v) for v in size], "mean": mean, "std": std, "resample": "bilinear"}


def read_image(source: str | os.PathLike[str] | Image.Image | np.ndarray) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB, upright.

    source: a path; a PIL image; or an array, (H, W), (H, W, 1), (H, W, 3) RGB, (H, W, 2) or
    (H, W, 4) with alpha last, of uint8, uint16 (0 … 65535), bool, or floats in 0 … 1.

    EXIF orientation is applied. Transparency is laid over white. Palettes, grey, CMYK and
    YCbCr become RGB; 16 bits become 8 by division by 257; 32-bit integers and floats are
    scaled by their range (see `_wide_grey`). Of an animation the first frame is taken.

    Raises OSError or PIL.UnidentifiedImageError for a file that cannot be read or is cut,
    ValueError for an array that is none of the above, TypeError for another kind of object.
    """
    # The two plugins that Pillow does not load by itself before it has failed once.
    from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401

    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if isinstance(source, (str, os.PathLike)):
        with Image.open(source, formats=_FORMATS) as image:
            return _from_pil(image)
    raise TypeError(
        f"an image must be a path, a PIL image or a numpy array, got {type(source).__name__}"
    )


def _from_pil(image: Image.Image) -> np.ndarray:
    from PIL import Image

    image.load()  # before EXIF: some formats know it only now
    if min(image.size) < 1:
        raise ValueError(f"the image holds no pixel: {image.width} x {image.height}")
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # a damaged EXIF block is no reason to refuse the picture
        orientation = None

    if image.mode == "I" or image.mode == "F" or image.mode.startswith("I;16"):
        rgb = _grey_to_rgb(_wide_grey(np.asarray(image), image.format))
    else:
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        rgb = np.asarray(image.convert("RGB"))
    upright = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return np.ascontiguousarray(upright(rgb) if upright else rgb)


def _wide_grey(values: np.ndarray, file_format: str | None) -> np.ndarray:
    """Grey of more than 8 bits to 8 bits.

    Floats: 0 … 1 if nothing exceeds 1, else 0 … 255 if nothing exceeds 255, else up to their
    maximum. Integers: 16 bits, unless something exceeds 65535: then up to their maximum.
    """
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # of either byte order
        return _from_16_bit(values)
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError("the image holds NaN or infinite values")
        steps = [1.0, 255.0]
    else:
        # Pillow hands some 16-bit files out as 32-bit integers.
        steps = [65535.0]
    top = float(values.max())
    top = next((step for step in steps if top <= step), top)
    return np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8)


def _from_16_bit(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4):
        raise ValueError(
            f"an image array must be (H, W) or (H, W, 1 to 4 channels), got shape {array.shape}"
        )
    if array.size == 0:
        raise ValueError(f"the image array holds no pixel: shape {array.shape}")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = _from_16_bit(array)
    elif array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("an image array of floats must lie in 0 ... 1 and hold no NaN")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"an image array must be uint8, uint16, bool or float, got {array.dtype}")
    channels = array.shape[2]
    if channels in (2, 4):
        colour, alpha = array[:, :, :-1].astype(np.uint32), array[:, :, -1:].astype(np.uint32)
        array = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    if channels < 3:
        array = _grey_to_rgb(array[:, :, 0])
    return np.ascontiguousarray(array)


def _taps(length: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two neighbours and the weight of the second, for `count` samples of `length` pixels.

    In float32, step by step as torch.nn.functional.interpolate(align_corners=False) does it.
    """
    scale = np.float32(length) / np.float32(count)
    position = scale * (np.arange(count, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    position = np.maximum(position, np.float32(0))
    first = np.minimum(position.astype(np.int64), length - 1)
    second = np.minimum(first + 1, length - 1)
    return first, second, np.clip(position - first.astype(np.float32), 0, 1)


def to_input(
    rgb: np.ndarray, preprocessing: dict[str, Any], size: tuple[int, int] | None = None
) -> torch.Tensor:
    """(H, W, 3) uint8 to the network's input, (1, 3, height, width) float32.

    (resize(rgb / 255) − mean) / std, the resize bilinear **without** antialiasing, as the
    published CSNet was trained and tested: the same as torch's ``interpolate(…,
    mode="bilinear", align_corners=False)``. Without antialiasing each output pixel sees four
    input pixels, so only those are read and converted: a 12-megapixel photo costs no more
    than a small one.

    size: (height, width); None takes preprocessing["size"].
    """
    height, width = size if size is not None else preprocessing["size"]
    top, bottom, down = _taps(rgb.shape[0], height)
    left, right, across = _taps(rgb.shape[1], width)
    across = across[None, :, None]

    def row_pair(rows: np.ndarray) -> np.ndarray:
        picked = rgb[rows]
        a = picked[:, left].astype(np.float32)
        b = picked[:, right].astype(np.float32)
        return (1 - across) * a + across * b

    weight = down[:, None, None]
    resized = ((1 - weight) * row_pair(top) + weight * row_pair(bottom)) / np.float32(255)
    mean = np.asarray(preprocessing["mean"], dtype=np.float32)
    std = np.asarray(preprocessing["std"], dtype=np.float32)
    if mean.size != 3:
        raise ValueError(f"preprocessing mean must have 3 values for RGB, got {mean.size}")
    normalised = (resized - mean) / std
    return torch.from_numpy(np.ascontiguousarray(normalised.transpose(2, 0, 1)))[None]


def to_map(logits: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Logits (1, 1, h, w) to the 8-bit map (H, W) uint8 of size = (H, W).

    resize(sigmoid(logits)) · 255, truncated (not rounded), the resize bilinear with
    align_corners=False. Raises ValueError when the logits hold NaN: 8 bits cannot show it.
    """
    if logits.ndim != 4 or logits.shape[:2] != (1, 1):
        raise ValueError(f"logits must be (1, 1, h, w), got shape {tuple(logits.shape)}")
    probability = torch.sigmoid(logits.detach().float())
    if bool(probability.isnan().any()):
        raise ValueError("the network's output holds NaN")
    probability = functional.interpolate(
        probability, size=tuple(size), mode="bilinear", align_corners=False
    )
    return probability[0, 0].mul_(255).to(torch.uint8).cpu().numpy()
