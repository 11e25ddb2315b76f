"""Reads pictures: whatever the file, upright RGB of 8 bits comes out.

Memory is bounded twice. A picture of more than a number of pixels is refused by its header,
before anything is decoded; and threads that decode at the same time share an allowance of
pixels (`pixels_at_once`), so that a folder of large photos does not need as many times the
memory of one as there are threads.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Union

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Picture", "Source", "pixels_at_once", "read_image", "read_picture", "row_strips"]

Source = Union[str, os.PathLike[str], BinaryIO, "Image.Image", np.ndarray]

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

_STRIP_PIXELS = 1 << 20  # converted at a time: the temporaries stay small for any picture
_PIXELS_AT_ONCE = 100_000_000  # about 7 bytes each while a picture is decoded


@dataclass(frozen=True)
class Picture:
    """rgb: (H, W, 3) uint8, upright. icc_profile: the file's colour profile where it is one for
    RGB, so that a cutout can keep its colours; None otherwise."""

    rgb: np.ndarray
    icc_profile: bytes | None = None


class _Allowance:
    """A semaphore that counts pixels. Who asks for more than there is waits to be alone."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def __call__(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


# Hold it for one picture at a time and wait for nothing else meanwhile: then it cannot lock up.
pixels_at_once = _Allowance(_PIXELS_AT_ONCE)


def row_strips(height: int, width: int) -> Iterator[slice]:
    """Slices of rows that cover a picture in pieces of about a million pixels."""
    rows = max(1, _STRIP_PIXELS // max(1, width))
    for top in range(0, height, rows):
        yield slice(top, min(top + rows, height))


def read_image(source: Source, max_pixels: int | None = None) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB, upright.

    source: a path or a binary file object; a PIL image; or an array, (H, W), (H, W, 1),
    (H, W, 3) RGB, (H, W, 2) or (H, W, 4) with alpha last, of uint8, uint16 (0 … 65535), bool,
    or floats in 0 … 1. max_pixels: the largest file to decode, in pixels; None takes Pillow's
    ``Image.MAX_IMAGE_PIXELS`` (89 million; two thirds of it for WebP, of which Pillow keeps
    several copies while it decodes). Pillow itself refuses more than twice that.

    EXIF orientation is applied. Transparency is laid over white. Palettes, grey, CMYK and
    YCbCr become RGB; 16 bits become 8 by division by 257; 32-bit integers and floats are
    scaled by their range (see `_wide_grey`). Of an animation the first frame is taken.

    Raises OSError or PIL.UnidentifiedImageError for a file that cannot be read or is cut,
    ValueError for one with too many pixels and for an array that is none of the above,
    TypeError for another kind of object.
    """
    return read_picture(source, max_pixels).rgb


def read_picture(source: Source, max_pixels: int | None = None) -> Picture:
    """The same as `read_image`, with the colour profile where the source has one."""
    # The two plugins that Pillow does not load by itself before it has failed once.
    from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401

    if isinstance(source, np.ndarray):
        return Picture(_from_array(source))
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if not isinstance(source, (str, os.PathLike)) and not hasattr(source, "read"):
        raise TypeError(
            "an image must be a path, a binary file, a PIL image or a numpy array, "
            f"got {type(source).__name__}"
        )
    limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    try:
        image = Image.open(source, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"has over twice the {Image.MAX_IMAGE_PIXELS:,} pixels that "
            "PIL.Image.MAX_IMAGE_PIXELS, or --max-pixels, allows"
        ) from error
    # closing, not "with image": that closes the file, this gives the memory back too, which a
    # cycle of references would keep.
    with contextlib.closing(image):
        pixels = image.width * image.height
        webp = image.format == "WEBP"
        if webp and max_pixels is None and limit is not None:
            limit = limit * 2 // 3
        if limit is not None and pixels > limit:
            raise ValueError(
                f"has {image.width} x {image.height} = {pixels:,} pixels, more than the "
                f"{limit:,} allowed (max_pixels, or --max-pixels, raises that)"
            )
        with pixels_at_once(2 * pixels if webp else pixels):
            return _from_pil(image)


def _from_pil(image: Image.Image) -> Picture:
    image.load()  # before EXIF: some formats know it only now
    if min(image.size) < 1:
        raise ValueError(f"the image holds no pixel: {image.width} x {image.height}")
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # a damaged EXIF block is no reason to refuse the picture
        orientation = None

    rgb = np.empty((image.height, image.width, 3), dtype=np.uint8)
    if image.mode == "I" or image.mode == "F" or image.mode.startswith("I;16"):
        top = _wide_top(image)
        for rows, strip in _strips(image):
            rgb[rows] = _wide_grey(np.asarray(strip), top)[:, :, None]
    else:
        for rows, strip in _strips(image):
            rgb[rows] = _strip_to_rgb(strip)
    upright = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    profile = image.info.get("icc_profile")
    # Bytes 16 to 19 of a profile name the colour space that it is for.
    if not isinstance(profile, bytes) or profile[16:20] != b"RGB ":
        profile = None
    return Picture(np.ascontiguousarray(upright(rgb)) if upright else rgb, profile)


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    for rows in row_strips(image.height, image.width):
        whole = rows == slice(0, image.height)
        yield rows, image if whole else image.crop((0, rows.start, image.width, rows.stop))


def _strip_to_rgb(strip: Image.Image) -> np.ndarray:
    from PIL import Image

    if strip.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in strip.info:
        strip = strip.convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
    return np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))


def _wide_top(image: Image.Image) -> float:
    """What becomes 255 in a grey picture of more than 8 bits.

    Floats: 1 if nothing exceeds 1, else 255 if nothing exceeds 255, else their maximum.
    Integers: 65535, unless something exceeds that: then their maximum.
    """
    top, kind = 0.0, "u"
    for _, strip in _strips(image):
        values = np.asarray(strip)
        kind = values.dtype.kind
        if kind == "f" and not np.isfinite(values).all():
            raise ValueError("the image holds NaN or infinite values")
        top = max(top, float(values.max()))
    # Integers: Pillow hands some 16-bit files out as 32-bit integers.
    steps = [1.0, 255.0] if kind == "f" else [65535.0]
    return next((step for step in steps if top <= step), top)


def _wide_grey(values: np.ndarray, top: float) -> np.ndarray:
    """Grey of more than 8 bits to 8 bits: 0 … top to 0 … 255."""
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # of either byte order
        return _from_16_bit(values)
    return np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8)


def _from_16_bit(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


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
        array = np.repeat(array[:, :, :1], 3, axis=2)
    return np.ascontiguousarray(array)
