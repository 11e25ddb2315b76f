"""Edges of maps moved onto their photos': against the formula, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sodfast import pictures
from sodfast import refine as module
from sodfast.refine import EPSILON, HIGH, LOW, refine


def leaf(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A photo (H, W, 3) uint8 of something green on noisy sand, and its true mask, bool."""
    y, x = np.mgrid[:height, :width]
    y, x = (y + 0.5) / height - 0.5, (x + 0.5) / width - 0.5
    mask = x**2 / 0.1 + y**2 / 0.06 + 0.25 * np.sin(14 * x) * np.cos(11 * y) < 1
    colours = np.where(mask[:, :, None], (60, 120, 50), (190, 170, 130))
    noise = np.random.default_rng(seed).normal(0, 6, (height, width, 3))
    return np.clip(colours + noise, 0, 255).astype(np.uint8), mask


def soft(mask: np.ndarray, coarser: int) -> np.ndarray:
    """What a network with that much fewer pixels a side says of the mask, enlarged."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    small = image.resize((mask.shape[1] // coarser, mask.shape[0] // coarser), Image.BOX)
    return np.asarray(small.resize(image.size, Image.BILINEAR))


def by_the_formula(rgb: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """The guided filter pixel by pixel, where a cell is a pixel."""
    colour, p = rgb / 255, saliency / 255
    height, width = p.shape

    def window(y: int, x: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.clip(np.arange(y - 1, y + 2), 0, height - 1)
        columns = np.clip(np.arange(x - 1, x + 2), 0, width - 1)
        return np.repeat(rows, 3), np.tile(columns, 3)

    a, b = np.empty((height, width, 3)), np.empty((height, width))
    for y, x in np.ndindex(height, width):
        colours, values = colour[window(y, x)], p[window(y, x)]
        deviation = colours - colours.mean(0)
        spread = deviation.T @ deviation / 9 + EPSILON * np.eye(3)
        a[y, x] = np.linalg.solve(spread, deviation.T @ (values - values.mean()) / 9)
        b[y, x] = values.mean() - a[y, x] @ colours.mean(0)
    alpha = np.empty((height, width))
    for y, x in np.ndindex(height, width):
        alpha[y, x] = a[window(y, x)].mean(0) @ colour[y, x] + b[window(y, x)].mean()
    return np.clip((alpha - LOW) / (HIGH - LOW), 0, 1) * 255


@pytest.mark.parametrize("size", [(13, 9), (1, 7), (5, 1), (1, 1), (2, 2)])
def test_it_is_the_guided_filter(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    rgb = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    saliency = rng.integers(0, 256, size, dtype=np.uint8)
    found = refine(rgb, saliency)
    assert found.dtype == np.uint8 and found.shape == size
    assert np.abs(found - by_the_formula(rgb, saliency)).max() <= 0.51


@pytest.mark.parametrize("coarser", [1, 2, 4])
@pytest.mark.parametrize("size", [(448, 672), (900, 333)])
def test_the_edge_is_found_again(size: tuple[int, int], coarser: int) -> None:
    """What an enlarged map has lost, the photo still has. `coarser` is of the grid's cells."""
    photo, mask = leaf(*size)
    saliency = soft(mask, coarser * max(1, max(size) // 224))
    alpha = refine(photo, saliency)

    def error(map_: np.ndarray) -> float:
        return float(np.abs(map_ / 255.0 - mask).mean())

    levels = np.clip((saliency / 255.0 - LOW) / (HIGH - LOW), 0, 1) * 255
    assert error(alpha) < 0.5 * error(saliency)
    assert error(alpha) < 0.85 * error(levels)
    assert (alpha[soft(mask, 64) == 0] == 0).all()
    assert (alpha[soft(mask, 64) == 255] == 255).all()


@pytest.mark.parametrize("texture", ["noise", "checker"])
def test_texture_is_no_edge(texture: str) -> None:
    """What the cells average away explains nothing, even where the map has no better guide."""
    y, x = np.mgrid[:1000, :1000]
    distance = np.hypot(y - 500, x - 500) - 300
    saliency = np.round(255 / (1 + np.exp(-np.clip(distance / 9, -50, 50)))).astype(np.uint8)
    if texture == "noise":
        photo = np.random.default_rng(0).normal(128, 26, (1000, 1000, 3)).clip(0, 255)
    else:
        photo = np.where((y // 3 + x // 3) % 2, 120, 240)[:, :, None].repeat(3, 2)
    alpha = refine(photo.astype(np.uint8), saliency)
    levels = np.clip((saliency / 255.0 - LOW) / (HIGH - LOW), 0, 1) * 255
    assert np.abs(alpha - levels).mean() < 1.5
    steps = np.abs(np.diff(alpha.astype(float), axis=1)).mean()
    assert steps < 2.5 * np.abs(np.diff(levels, axis=1)).mean()


def test_nothing_of_the_photo_shows_where_the_map_is_flat() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    for value, expected in ((0, 0), (30, 0), (51, 0), (128, 128.4), (204, 255), (255, 255)):
        alpha = refine(photo, np.full(photo.shape[:2], value, np.uint8))
        assert np.abs(alpha - float(expected)).max() <= 1


def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    photo, mask = leaf(310, 270)
    saliency = soft(mask, 5)
    whole = refine(photo, saliency)
    monkeypatch.setattr(pictures, "_STRIP_PIXELS", 7 * 270)
    assert np.array_equal(refine(photo, saliency), whole)


def test_views_and_empty_pictures() -> None:
    photo, mask = leaf(120, 90)
    saliency = soft(mask, 3)
    turned = refine(photo.transpose(1, 0, 2), saliency.T)
    assert np.abs(turned.T.astype(int) - refine(photo, saliency)).max() <= 1
    photo.flags.writeable = saliency.flags.writeable = False
    refine(photo, saliency)
    assert refine(photo[:0], saliency[:0]).shape == (0, 90)


def test_what_it_refuses() -> None:
    photo, mask = leaf(20, 30)
    for rgb, saliency, name in (
        (photo, mask, "saliency"),
        (photo, np.zeros((20, 30, 1), np.uint8), "saliency"),
        (photo / 255, np.zeros((20, 30), np.uint8), "rgb"),
        (photo, np.zeros((30, 20), np.uint8), "rgb"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            module.refine(rgb, saliency)
