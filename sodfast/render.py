"""What is written for a picture: its map, the object cut out, or the object highlighted.

mask      the map, grey
cutout    the picture with the map as its opacity
overlay   the picture in colour where the object is, dark and grey elsewhere

For the last two the map's edge is first moved onto the picture's, see `sodfast.refine`.
"""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np

from .pictures import Picture, row_strips
from .refine import refine

__all__ = ["FORMATS", "TYPES", "cutout", "encode", "needs_picture", "overlay", "render"]

TYPES = ("mask", "cutout", "overlay")
FORMATS = ("png", "webp")

_WEBP_SIDE = 16383
_DIMMED = 0.3  # how bright the surroundings stay in an overlay


def render(
    picture: Picture | np.ndarray, saliency: np.ndarray, kind: str, refined: bool | None = None
) -> np.ndarray:
    """One of `TYPES`: (H, W) for "mask", (H, W, 4) for "cutout", (H, W, 3) for "overlay".

    picture: (H, W, 3) uint8 RGB, or what `sodfast.pictures.read_picture` gives; saliency:
    (H, W) uint8. refined: whether the map goes through `sodfast.refine.refine` before; None: but
    for a mask, which is then the network's own. Raises ValueError for another kind or for sizes
    that differ.
    """
    if kind not in TYPES:
        raise ValueError(f"type must be {', '.join(TYPES)}, got {kind!r}")
    rgb = picture.rgb if isinstance(picture, Picture) else picture
    if kind != "mask" if refined is None else refined:
        saliency = refine(rgb, saliency)
    if kind == "mask":
        return saliency
    return cutout(rgb, saliency) if kind == "cutout" else overlay(rgb, saliency)


def needs_picture(kind: str, refined: bool | None) -> bool:
    """Whether `render` looks at the picture: not for a mask that is not refined."""
    return kind != "mask" or bool(refined)


def cutout(rgb: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """The picture with its map as opacity: (H, W, 3) and (H, W) uint8 to RGBA (H, W, 4) uint8.

    Alpha is straight (not premultiplied) and equals the map. Where it is not zero the colours
    are the picture's own, also along the edge: what shone through there from the old
    background is not removed. Where it is zero the colour is zero too: nothing of the
    background stays hidden in the file.
    """
    _check(rgb, saliency)
    rgba = np.dstack([rgb, saliency])
    rgba[saliency == 0] = 0
    return rgba


def overlay(rgb: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """The object in colour, its surroundings grey and dark: (H, W, 3) and (H, W) uint8 to
    (H, W, 3) uint8. Between them the map mixes the two."""
    from PIL import Image

    _check(rgb, saliency)
    out = np.empty_like(rgb)
    for rows in row_strips(*saliency.shape):  # Pillow's own copies take four bytes per pixel
        photo = Image.fromarray(rgb[rows])
        dimmed = photo.convert("L").point([round(_DIMMED * v) for v in range(256)]).convert("RGB")
        out[rows] = np.asarray(Image.composite(photo, dimmed, Image.fromarray(saliency[rows])))
    return out


def _check(rgb: np.ndarray, saliency: np.ndarray) -> None:
    for name, array, shape in (
        ("rgb", rgb, (*saliency.shape[:2], 3)),
        ("saliency", saliency, rgb.shape[:2]),
    ):
        if array.dtype != np.uint8 or array.shape != shape:
            raise ValueError(
                f"{name} must be uint8 of shape {shape}, got {array.dtype} of {array.shape}"
            )


def encode(image: np.ndarray, file_format: str, icc_profile: bytes | None = None) -> bytes:
    """An image (H, W), (H, W, 3) or (H, W, 4) uint8 as the bytes of a file of one of `FORMATS`.

    PNG is lossless. WebP is lossless for a grey image and for opacity; colours are compressed
    with quality 90. icc_profile is stored with colours. Raises ValueError for another format,
    and for an image that WebP cannot hold (over 16,383 pixels a side).
    """
    from PIL import Image

    if file_format not in FORMATS:
        raise ValueError(f"format must be {', '.join(FORMATS)}, got {file_format!r}")
    if file_format == "webp" and max(image.shape[:2]) > _WEBP_SIDE:
        raise ValueError(
            f"WebP holds {_WEBP_SIDE:,} pixels a side, this is {image.shape[1]} x "
            f"{image.shape[0]}: PNG holds more"
        )
    grey = image.ndim == 2
    options: dict[str, Any] = {}
    if icc_profile and not grey:
        options["icc_profile"] = icc_profile
    if file_format == "png":
        # A map is smooth: runs of equal differences compress best, and three times as fast.
        options.update({"compress_type": zlib.Z_RLE} if grey else {"compress_level": 3})
    elif grey:
        options.update(lossless=True, quality=0, method=1)
    else:
        options.update(quality=90, method=2)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format=file_format, **options)
    return stream.getvalue()
