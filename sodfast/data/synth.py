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
from .synth_depth import damage_of, make_depth_scene, write_damage
from .synth_shapes import bytes_of, contrasting, generator, palette_of, shape, texture

__all__ = ["make_scene", "write_scenes"]


def make_scene(seed: int, index: int, size: int = 160) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One scene: image (H, W, 3), mask (H, W) of 0 and 255, depth (H, W), all uint8.

    H and W are between 3/4 of `size` and `size`, one of them is `size`. Depth: 0 far, 255 near.
    Raises ValueError for a size under 16.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    random = generator(seed, index)
    sides = [size, round(size * random.uniform(0.75, 1))]
    height, width = sides if random.random() < 0.3 else sides[::-1]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = (x - width / 2) / (size / 2), (y - height / 2) / (size / 2)

    behind = palette_of(random)
    image = texture(random, x, y, behind)
    # Far at the top, near at the bottom, as floors are; sometimes the other way round.
    far = random.uniform(0.1, 0.3)
    depth = far + random.uniform(-0.05, 0.3) * (y + 1) / 2
    for _ in range(random.integers(0, 6)):  # clutter in the background's own colours
        inside, _ = shape(random, x, y, random.uniform(0.08, 0.3))
        patch = texture(random, x, y, behind)
        image = np.where(inside[..., None], 0.4 * image + 0.6 * patch, image)

    mask = np.zeros((height, width), bool)
    palette = contrasting(random, behind)
    for number in range(random.choice([1, 1, 1, 2, 3])):
        radius = random.uniform(0.2, 0.6) if number == 0 else random.uniform(0.12, 0.3)
        inside, bulge = shape(random, x, y, radius)
        if not inside.any():
            continue
        shade = 1 - random.uniform(0, 0.5) * (1 - bulge)
        patch = np.clip(texture(random, x, y, palette) * shade[..., None], 0, 1)
        image = np.where(inside[..., None], patch, image)
        near = random.uniform(0.5, 0.8)
        depth = np.where(inside, near + 0.2 * bulge, depth)
        mask |= inside
    if not mask.any():  # every object fell outside the picture: put one into the middle
        inside, bulge = x**2 + y**2 < 0.16, np.ones_like(x)
        image = np.where(inside[..., None], texture(random, x, y, palette), image)
        depth, mask = np.where(inside, 0.7, depth), inside

    light = 1 + random.uniform(-0.3, 0.3) * x + random.uniform(-0.3, 0.3) * y
    image = image * light[..., None] + random.normal(0, random.uniform(0, 0.05), image.shape)
    return bytes_of(image), mask.astype(np.uint8) * 255, bytes_of(depth)


def write_scenes(
    folder: str | os.PathLike[str],
    n: int,
    seed: int = 0,
    depth: bool = False,
    size: int = 160,
    step: Callable[[], object] = lambda: None,
    damage: float = 0.0,
) -> None:
    """Writes images/000000.png … and masks/ below `folder`.

    depth: other scenes, in which the picture alone does not tell what is salient
    (`synth_depth.make_depth_scene`), with depth/ (255 near) and damage.csv, which names the damage
    of every depth map; damage: the share of damaged ones. step: called after each scene. Raises
    ValueError for n under 1, a damage outside 0–1 or without depth, or a folder that is not
    empty, and OSError when it cannot be written.
    """
    from PIL import Image

    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    if damage and not depth:
        raise ValueError(f"damage is that of depth maps, and there are none: got {damage}")
    kinds = ["images", "masks"] + (["depth"] if depth else [])
    damages = {f"{i:06d}": damage_of(seed, i, damage) for i in range(n)}
    for kind in kinds:
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for index in range(n):
        scene: tuple[np.ndarray, ...]
        if depth:
            made = make_depth_scene(seed, index, size, damage)
            scene = made.image, made.mask, made.depth
        else:
            scene = make_scene(seed, index, size)
        for kind, array in zip(kinds, scene):
            with atomic_write(folder / kind / f"{index:06d}.png", sync=False) as file:
                # Level 1: the textures hardly shrink, and speed matters more.
                Image.fromarray(array).save(file, format="PNG", compress_level=1)
        step()
    if depth:
        write_damage(folder / "damage.csv", damages)
