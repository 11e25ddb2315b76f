"""Synthetic scenes: textured objects over textured backgrounds, with masks and depth.

Enough to learn from without a data set, and free of any licence: for the demo, for tests, for
a first look at a change. Every scene is a function of (seed, index), so the first n scenes of
a larger set are the smaller set.

A scene has one to three salient objects (star-shaped blobs, ellipses, rectangles, polygons and
rings, shaded, partly off-centre and of very different sizes) whose texture and colours differ
from the background's. The background may hold clutter of its own colours, which is not
salient; light varies over the picture and some noise lies over all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..weights import atomic_write

__all__ = ["make_scene", "write_scenes"]


def make_scene(seed: int, index: int, size: int = 160) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One scene: image (H, W, 3), mask (H, W) of 0 and 255, depth (H, W), all uint8.

    H and W are between 3/4 of `size` and `size`, one of them is `size`. Depth: 0 far, 255 near.
    Raises ValueError for a size under 16.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    random = np.random.Generator(np.random.Philox(key=[seed % 2**64, index]))
    shape = [size, round(size * random.uniform(0.75, 1))]
    height, width = shape if random.random() < 0.3 else shape[::-1]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = (x - width / 2) / (size / 2), (y - height / 2) / (size / 2)

    behind = _palette(random)
    image = _texture(random, x, y, behind)
    # Far at the top, near at the bottom, as floors are; sometimes the other way round.
    far = random.uniform(0.1, 0.3)
    depth = far + random.uniform(-0.05, 0.3) * (y + 1) / 2
    for _ in range(random.integers(0, 6)):  # clutter in the background's own colours
        inside, _ = _shape(random, x, y, random.uniform(0.08, 0.3))
        patch = _texture(random, x, y, behind)
        image = np.where(inside[..., None], 0.4 * image + 0.6 * patch, image)

    mask = np.zeros((height, width), bool)
    palette = _contrasting(random, behind)
    for number in range(random.choice([1, 1, 1, 2, 3])):
        radius = random.uniform(0.2, 0.6) if number == 0 else random.uniform(0.12, 0.3)
        inside, bulge = _shape(random, x, y, radius)
        if not inside.any():
            continue
        shade = 1 - random.uniform(0, 0.5) * (1 - bulge)
        patch = np.clip(_texture(random, x, y, palette) * shade[..., None], 0, 1)
        image = np.where(inside[..., None], patch, image)
        near = random.uniform(0.5, 0.8)
        depth = np.where(inside, near + 0.2 * bulge, depth)
        mask |= inside
    if not mask.any():  # every object fell outside the picture: put one into the middle
        inside, bulge = x**2 + y**2 < 0.16, np.ones_like(x)
        image = np.where(inside[..., None], _texture(random, x, y, palette), image)
        depth, mask = np.where(inside, 0.7, depth), inside

    light = 1 + random.uniform(-0.3, 0.3) * x + random.uniform(-0.3, 0.3) * y
    image = image * light[..., None] + random.normal(0, random.uniform(0, 0.05), image.shape)
    return _bytes(image), mask.astype(np.uint8) * 255, _bytes(depth)


def write_scenes(
    folder: str | os.PathLike[str],
    n: int,
    seed: int = 0,
    depth: bool = False,
    size: int = 160,
    step: Callable[[], object] = lambda: None,
) -> None:
    """Writes images/000000.png …, masks/ and, with `depth`, depth/ below `folder`.

    step: called after each scene. Raises ValueError for n under 1 or a folder that is not
    empty, and OSError when it cannot be written.
    """
    from PIL import Image

    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    kinds = ["images", "masks"] + (["depth"] if depth else [])
    for kind in kinds:
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for index in range(n):
        for kind, array in zip(kinds, make_scene(seed, index, size)):
            with atomic_write(folder / kind / f"{index:06d}.png", sync=False) as file:
                # Level 1: the textures hardly shrink, and speed matters more.
                Image.fromarray(array).save(file, format="PNG", compress_level=1)
        step()


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)


def _palette(random: np.random.Generator) -> np.ndarray:
    """(3, 3): three RGB colours around one hue."""
    return np.clip(random.uniform(0.1, 0.9, 3) + random.normal(0, 0.12, (3, 3)), 0, 1)


def _contrasting(random: np.random.Generator, other: np.ndarray) -> np.ndarray:
    """A palette away from `other`, sometimes only just."""
    apart = random.uniform(0.25, 0.6)
    for _ in range(20):
        palette = _palette(random)
        if np.abs(palette.mean(0) - other.mean(0)).max() > apart:
            break
    return palette


def _noise(random: np.random.Generator, x: np.ndarray, y: np.ndarray, cells: int) -> np.ndarray:
    """Smooth noise in 0–1: a random grid of cells x cells, blended between its points."""
    grid = random.random((cells + 2, cells + 2)).astype(np.float32)
    u, v = (x + 1) / 2 * cells, (y + 1) / 2 * cells
    left = np.clip(u.astype(int), 0, cells)
    top = np.clip(v.astype(int), 0, cells)
    across, down = np.clip(u - left, 0, 1), np.clip(v - top, 0, 1)
    across, down = across**2 * (3 - 2 * across), down**2 * (3 - 2 * down)
    upper = grid[top, left] * (1 - across) + grid[top, left + 1] * across
    lower = grid[top + 1, left] * (1 - across) + grid[top + 1, left + 1] * across
    return upper * (1 - down) + lower * down


def _texture(
    random: np.random.Generator, x: np.ndarray, y: np.ndarray, palette: np.ndarray
) -> np.ndarray:
    """(H, W, 3) in about 0–1: a pattern that blends the palette's colours, with grain."""
    angle, frequency = random.uniform(0, np.pi), random.uniform(3, 25)
    along = np.cos(angle) * x + np.sin(angle) * y
    kind = random.integers(5)
    if kind == 0:
        pattern = _noise(random, x, y, int(random.integers(2, 8)))
    elif kind == 1:  # stripes, bent by noise
        pattern = 0.5 + 0.5 * np.sin(frequency * along + 4 * _noise(random, x, y, 4))
    elif kind == 2:  # checks
        across = -np.sin(angle) * x + np.cos(angle) * y
        pattern = 0.5 + 0.5 * np.sign(np.sin(frequency * along) * np.sin(frequency * across))
    elif kind == 3:  # two octaves
        cells = int(random.integers(6, 14))
        pattern = 0.6 * _noise(random, x, y, cells) + 0.4 * _noise(random, x, y, 3 * cells)
    else:  # a gradient
        pattern = 0.5 + 0.5 * along
    grain = _noise(random, x, y, int(random.integers(15, 40)))[..., None]
    blend = np.clip(pattern, 0, 1)[..., None]
    colour = palette[0] * blend + palette[1] * (1 - blend)
    strength = random.uniform(0, 0.35)
    return (1 - strength) * colour + strength * (palette[2] * grain)


def _shape(
    random: np.random.Generator, x: np.ndarray, y: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """A random shape: (inside, bulge); bulge falls from 1 in its middle to 0 at its rim."""
    spread = max(0.0, 0.85 - radius)
    u = x - random.uniform(-spread, spread)
    v = y - random.uniform(-spread, spread)
    angle, stretch = random.uniform(0, np.pi), random.uniform(0.5, 1)
    u, v = np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u
    v = v / stretch
    kind = random.integers(5)
    if kind == 0:  # ellipse
        distance = np.hypot(u, v) / radius
    elif kind == 1:  # rectangle
        distance = np.maximum(np.abs(u), np.abs(v)) / radius
    elif kind == 2:  # convex polygon: cut by half planes
        sides = int(random.integers(3, 8))
        turns = np.arange(sides) * 2 * np.pi / sides + random.uniform(0, 0.5, sides)
        planes = [np.cos(t) * u + np.sin(t) * v for t in turns]
        distance = np.max(planes, axis=0) / (0.8 * radius)
    elif kind == 3:  # ring
        distance = np.abs(np.hypot(u, v) - 0.7 * radius) / (0.3 * radius)
    else:  # a blob: the radius is a short Fourier series of the angle
        turn = np.arctan2(v, u)
        edge = np.ones_like(turn)
        for order in range(2, 6):
            edge += random.normal(0, 0.35 / order) * np.cos(order * turn + random.uniform(0, 7))
        distance = np.hypot(u, v) / (radius * np.maximum(edge, 0.25))
    return distance < 1, np.sqrt(np.clip(1 - distance**2, 0, 1)).astype(np.float32)
