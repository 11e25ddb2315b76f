"""Contact sheets: photo, truth and map side by side, a row per picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .data.grey import read_grey
from .evaluate import ScoredMap
from .pictures import read_image
from .weights import atomic_write

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

__all__ = ["draw_sheet"]

_CELL = 240  # pixels, width and height of a picture's place
_GAP = 8
_CAPTION = 22
_INK, _PAPER, _FAINT = "#22282e", "#ffffff", "#eceff2"


def draw_sheet(
    maps: Sequence[ScoredMap],
    path: str | os.PathLike[str],
    predict: Callable[..., np.ndarray] | None = None,
) -> None:
    """Writes a PNG with a row for each map: photo | truth | map, and its figures above.

    maps: from `sodfast.evaluate.worst_maps`. predict: makes the map of a photo (and its depth map)
    anew where none was written to a file (a `Predictor`). Without any photo that column is left
    out. Whole or not at all; raises ValueError for an empty list, OSError when the file cannot be
    written.
    """
    from PIL import Image, ImageDraw

    if not maps:
        raise ValueError("maps must not be empty")
    photos = any(scored.photo is not None for scored in maps)
    titles = [*(["photo"] if photos else []), "truth", "map"]
    rows = [_pictures(scored, photos, predict) for scored in maps]
    heights = [max(picture.height for picture in row if picture is not None) for row in rows]
    width = _GAP + len(titles) * (_CELL + _GAP)
    height = _CAPTION + sum(_CAPTION + height + _GAP for height in heights)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    columns = [_GAP + number * (_CELL + _GAP) for number in range(len(titles))]
    for x, title in zip(columns, titles):
        draw.text((x, 3), title, fill=_INK, font=_font(15))
    top = _CAPTION
    for scored, row, height in zip(maps, rows, heights):
        draw.text((_GAP, top + 4), _fit(_caption(scored), width - 2 * _GAP), _INK, _font(13))
        top += _CAPTION
        for x, picture in zip(columns, row):
            draw.rectangle((x, top, x + _CELL - 1, top + height - 1), fill=_FAINT)
            if picture is not None:
                indent = (_CELL - picture.width) // 2
                sheet.paste(picture, (x + indent, top + (height - picture.height) // 2))
        top += height + _GAP
    with atomic_write(path, sync=False) as file:
        sheet.save(file, format="PNG")


def _caption(scored: ScoredMap) -> str:
    figures = scored.scores.pysodmetrics
    text = f"MAE {figures.mae:.3f}   weighted F {figures.weighted_f:.3f}   S {figures.s:.3f}"
    notes = f"   ({', '.join(scored.notes)})" if scored.notes else ""
    return f"{text}   {scored.name}{notes}"


def _pictures(
    scored: ScoredMap,
    photos: bool,
    predict: Callable[..., np.ndarray] | None,
) -> list[Image.Image | None]:
    """What stands in a row, at most _CELL pixels wide and high each; None where it is missing."""
    from PIL import Image

    truth = Image.fromarray(read_grey(scored.truth))
    photo = Image.fromarray(read_image(scored.photo)) if scored.photo is not None else None
    prediction: Image.Image | None = None
    if scored.prediction is not None:
        prediction = Image.fromarray(read_grey(scored.prediction))
    elif predict is not None and scored.photo is not None:
        extra = () if scored.depth is None else (scored.depth,)
        prediction = Image.fromarray(predict(scored.photo, *extra))
    pictures = [*([photo] if photos else []), truth, prediction]
    for picture in pictures:
        if picture is not None:
            picture.thumbnail((_CELL, _CELL))
    return pictures


def _font(size: int):  # type: ignore[no-untyped-def]  # one of two unrelated classes of Pillow
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _fit(text: str, width: int) -> str:
    """The text, cut with an ellipsis where it is too long for the sheet."""
    font = _font(13)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
