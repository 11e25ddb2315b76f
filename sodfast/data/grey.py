"""Masks and saliency maps from files: one grey channel of 8 bits."""

from __future__ import annotations

import os

import numpy as np

from ..pictures import read_image

__all__ = ["read_grey"]

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


def read_grey(path: str | os.PathLike[str]) -> np.ndarray:
    """A mask or a map as (H, W) uint8, its values as they are in the file.

    1 bit becomes 0 and 255, 16 bits become 8. A file with three equal channels is grey. Raises
    OSError or PIL.UnidentifiedImageError for a file that cannot be read or is cut, and
    ValueError for a picture in colours.
    """
    from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401

    with Image.open(path, formats=_FORMATS) as image:
        image.load()
        if image.mode == "1":
            return np.asarray(image).astype(np.uint8) * 255
        if image.mode == "L":
            return np.asarray(image)
        # Whatever transparency is for, it is no part of the values.
        transparent = image.mode in ("LA", "La", "RGBA", "RGBa", "PA")
        rgb = read_image(image.convert("RGBA").convert("RGB") if transparent else image)
    if np.ptp(rgb.astype(np.int16), axis=2).max() > 0:
        raise ValueError("a picture in colours, where a mask or a map is grey")
    return np.ascontiguousarray(rgb[:, :, 0])
