"""A sheet of photos, their saliency maps and what they cut out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sodfast.refine import refine
from sodfast.weights import atomic_write

if TYPE_CHECKING:
    from sodfast.predict import Predictor

# These are in the public domain (astronaut: NASA) or CC0, and lie inside scikit-image's
# package, so that nothing is downloaded.
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
HEIGHT = 240  # of a row of the sheet, in pixels
GAP = 8


def checkerboard(height: int, width: int, square: int = 8) -> np.ndarray:
    """(height, width, 1) of two light greys: what a transparent background looks like."""
    rows, columns = np.indices((height, width)) // square
    return np.where((rows + columns) % 2, 232, 204)[:, :, None]


def cutout(photo: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """The photo (H, W, 3) uint8 over a checkerboard, with its map (H, W) uint8, refined, as
    opacity."""
    alpha = refine(photo, saliency)[:, :, None] / 255
    return (photo * alpha + checkerboard(*saliency.shape) * (1 - alpha)).astype(np.uint8)


def panel(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture).convert("RGB")
    return image.resize((round(HEIGHT * image.width / image.height), HEIGHT), Image.LANCZOS)


def make_sheet(predictor: Predictor, target: Path) -> Iterator[tuple[str, str, float]]:
    """Yields name, size and milliseconds of each photo; then writes the sheet to target."""
    from skimage import data

    predictor(getattr(data, PHOTOS[0])())  # not timed: the first call allocates
    rows = []
    for name in PHOTOS:
        photo = getattr(data, name)()
        start = time.perf_counter()
        saliency = predictor(photo)
        milliseconds = 1e3 * (time.perf_counter() - start)
        rows.append([panel(photo), panel(saliency), panel(cutout(photo, saliency))])
        yield name, f"{photo.shape[1]} × {photo.shape[0]}", milliseconds

    columns = [max(row[i].width for row in rows) for i in range(3)]
    sheet = Image.new("RGB", (sum(columns) + 4 * GAP, len(rows) * (HEIGHT + GAP) + GAP), "white")
    for y, row in enumerate(rows):
        x = GAP
        for image, width in zip(row, columns):
            sheet.paste(image, (x + (width - image.width) // 2, GAP + y * (HEIGHT + GAP)))
            x += width + GAP
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target, sync=False) as file:
        sheet.save(file, format="PNG")
