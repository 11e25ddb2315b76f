"""Masks, saliency maps and depth maps from files: one grey channel of 8 bits."""

from __future__ import annotations

import os

import numpy as np

from ..jobs import describe
from ..pictures import read_image

__all__ = ["read_depth", "read_grey"]

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


def read_depth(path: str | os.PathLike[str], disparity: bool = True) -> np.ndarray:
    """A depth map as (H, W) uint8: 0 far … 255 near.

    disparity: the file's larger values are nearer, as in the usual data sets; False: they are
    distances. 8 bits are taken as they are. Of wider files the unit is unknown, and often a small
    part of the range is used: least and greatest value become 1 and 255, and 0, which sensors
    write where they measured nothing, stays 0 (far) in either case. A constant map stays one.
    Raises FileNotFoundError, and ValueError that names the file where it cannot be read, is cut, in
    colours, or holds values that are not finite.
    """
    try:
        return _read_depth(path, disparity)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # else the picture would be blamed
        raise ValueError(f"the depth map {path}: {describe(error)}") from error


def _read_depth(path: str | os.PathLike[str], disparity: bool) -> np.ndarray:
    from PIL import Image, TiffImagePlugin  # noqa: F401

    with Image.open(path, formats=_FORMATS) as image:
        wide = image.mode in ("I", "F") or image.mode.startswith("I;16")
        values = np.asarray(image) if wide else None
    if values is None:
        grey = read_grey(path)
        return grey if disparity else 255 - grey
    numbers = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError("it holds NaN or infinite values")
    measured = numbers != 0
    low, high = (numbers[measured].min(), numbers[measured].max()) if measured.any() else (0, 0)
    # One distance alone is near, or it would look like what was not measured.
    part = (numbers - low) / (high - low) if high > low else np.ones_like(numbers)
    if not disparity and high > low:
        part = 1 - part
    return np.where(measured, np.rint(1 + 254 * part), 0).astype(np.uint8)
