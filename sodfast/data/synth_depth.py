"""Synthetic scenes with depth: neither the picture nor the depth map alone says what is salient.

A scene has three to six objects at different depths. The salient one is the one that is both
near and of colours that differ from the background's. Beside it there are

- objects of colours as striking as its own that stand far off (the picture alone cannot tell),
- objects as near as it that are coloured like the background (depth alone cannot tell).

A chosen share of the depth maps is damaged in the three ways that Ren et al. (dynamic
distillation, section 3.3) found in theirs; picture and mask stay what they were:

- "dominated": another object dominates: a far one (where none is seen, a patch of the ground)
  seems near, the salient one lies in the background;
- "contrast": hardly any contrast between the object and what is around it;
- "distorted": the camera's distortion: shifted, warped, and with holes.

Every scene is a function of (seed, index), so the first n scenes of a larger set are the smaller
set, and a scene differs between two shares in its depth map at most.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np

from ..weights import atomic_write
from .synth_shapes import bytes_of, contrasting, generator, noise, palette_of, shape, texture

__all__ = ["DAMAGES", "DepthScene", "damage_of", "make_depth_scene", "read_damage", "write_damage"]

DAMAGES = ("dominated", "contrast", "distorted")
_LEAST_VISIBLE = 0.02  # part of the picture that the salient object covers at least, and what
# dominates a damaged depth map
_MOST_DRAWS = 1000  # of a patch that dominates; a handful is enough where there is room
_DAMAGE_STREAM = 0x64616D616765  # so that damage does not change the scene's random numbers


@dataclass(frozen=True)
class DepthScene:
    """image (H, W, 3), mask (H, W) of 0 and 255, depth (H, W) 0 far … 255 near, all uint8; damage:
    one of DAMAGES, or "" for a depth map that is as it should be."""

    image: np.ndarray
    mask: np.ndarray
    depth: np.ndarray
    damage: str


def damage_of(seed: int, index: int, share: float) -> str:
    """What is wrong with a scene's depth map: of every n scenes in a row share · n, within one,
    are damaged, and each way is as likely. Raises ValueError for a share outside 0–1."""
    if not 0 <= share <= 1:
        raise ValueError(f"damage must be from 0 to 1, got {share}")
    if int((index + 1) * share) == int(index * share):
        return ""
    random = generator(seed ^ _DAMAGE_STREAM, index)
    return DAMAGES[int(random.integers(len(DAMAGES)))]


def make_depth_scene(
    seed: int, index: int, size: int = 160, damage: float | str = 0.0
) -> DepthScene:
    """One scene. H and W are between 3/4 of `size` and `size`, one of them is `size`.

    damage: the share of damaged depth maps (`damage_of`), or one of DAMAGES for this one. Raises
    ValueError for a size under 16 and another damage.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    kind = damage if isinstance(damage, str) else damage_of(seed, index, damage)
    if kind and kind not in DAMAGES:
        raise ValueError(f"damage must be a share or one of {', '.join(DAMAGES)}, got {damage!r}")
    random = generator(seed, index)
    sides = [size, round(size * random.uniform(0.75, 1))]
    height, width = sides if random.random() < 0.3 else sides[::-1]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = (x - width / 2) / (size / 2), (y - height / 2) / (size / 2)

    behind = palette_of(random)
    image = texture(random, x, y, behind)
    # Far at the top, near at the bottom, as floors are; sometimes the other way round.
    ground = random.uniform(0.05, 0.2) + random.uniform(-0.05, 0.2) * (y + 1) / 2
    layers = _layers(random, x, y, behind)

    depth, number = ground.copy(), np.full(x.shape, -1)
    for place, layer in sorted(enumerate(layers), key=lambda entry: entry[1].near):
        image = np.where(layer.inside[..., None], layer.patch, image)
        depth = np.where(layer.inside, layer.near + 0.1 * layer.bulge, depth)
        number = np.where(layer.inside, place, number)
    mask = number == 0
    light = 1 + random.uniform(-0.3, 0.3) * x + random.uniform(-0.3, 0.3) * y
    image = image * light[..., None] + random.normal(0, random.uniform(0, 0.05), image.shape)
    depth = depth + random.normal(0, 0.01, depth.shape)
    if kind:
        other = generator(seed ^ _DAMAGE_STREAM, index)
        depth = _damaged(other, kind, depth, ground, number, x, y)
    return DepthScene(bytes_of(image), mask.astype(np.uint8) * 255, bytes_of(depth), kind)


@dataclass(frozen=True)
class _Layer:
    """An object: where it is (H, W), how it bulges, its colours (H, W, 3), how near it is."""

    inside: np.ndarray
    bulge: np.ndarray
    patch: np.ndarray
    near: float


def _layers(
    random: np.random.Generator, x: np.ndarray, y: np.ndarray, behind: np.ndarray
) -> list[_Layer]:
    """The salient object, one or two striking ones far off, one to three near ones in the
    background's colours; the salient one keeps enough that is not covered."""

    def layer(radius: float, palette: np.ndarray, near: float) -> _Layer:
        inside, bulge = shape(random, x, y, radius)
        shade = 1 - random.uniform(0, 0.5) * (1 - bulge)
        patch = np.clip(texture(random, x, y, palette) * shade[..., None], 0, 1)
        return _Layer(inside, bulge, patch, near)

    salient = layer(
        random.uniform(0.22, 0.5), contrasting(random, behind), random.uniform(0.55, 0.85)
    )
    others = [
        layer(random.uniform(0.2, 0.45), contrasting(random, behind), random.uniform(0.2, 0.35))
        for _ in range(random.integers(1, 3))
    ]
    others += [
        layer(random.uniform(0.15, 0.4), behind, random.uniform(0.5, 0.9))
        for _ in range(random.integers(1, 4))
    ]
    covers = [other.inside for other in others if other.near > salient.near]
    visible = salient.inside & ~np.logical_or.reduce([np.zeros_like(salient.inside), *covers])
    if visible.mean() < _LEAST_VISIBLE:  # hidden, or outside of the picture: an ellipse in front
        distance = np.hypot(x, 1.4 * y) / 0.45
        bulge = np.sqrt(np.clip(1 - distance**2, 0, 1)).astype(np.float32)
        salient = _Layer(distance < 1, bulge, salient.patch, 0.9)
    return [salient, *others]


def _damaged(
    random: np.random.Generator, kind: str, depth: np.ndarray, ground: np.ndarray,
    number: np.ndarray, x: np.ndarray, y: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """The depth map in 0–1 with a damage of this kind. number: which object is seen, 0 the salient
    one, −1 none."""
    random.integers(len(DAMAGES))  # which damage_of has used
    if kind == "dominated":
        rise, dominating = random.uniform(0.45, 0.6), number == 1  # the first of the far ones
        # Hidden, or outside of the picture: a patch of what is far, until enough of it is seen.
        far = (number != 0) & (depth < 0.4)
        for _ in range(_MOST_DRAWS):
            if dominating.mean() >= _LEAST_VISIBLE:
                break
            dominating = shape(random, x, y, random.uniform(0.2, 0.45))[0] & far
        swapped = np.where(number == 0, ground + 0.03, depth)
        return np.where(dominating, depth + rise, swapped)
    if kind == "contrast":
        level, part = random.uniform(0.2, 0.8), random.uniform(0.01, 0.04)
        stains = 0.08 * (noise(random, x, y, int(random.integers(3, 8))) - 0.5)
        grain = random.normal(0, 0.015, depth.shape)
        return level + part * (depth - depth.mean()) + stains + grain
    # Each pixel shows what lies elsewhere; then blobs of nothing, and one of the nearest.
    height, width = depth.shape
    angle, far = random.uniform(0, 2 * np.pi), random.uniform(0.35, 0.7)
    bend = random.uniform(0.2, 0.5)
    u = x + far * np.cos(angle) + bend * (noise(random, x, y, 3) - 0.5)
    v = y + far * np.sin(angle) + bend * (noise(random, x, y, 3) - 0.5)
    half = max(height, width) / 2
    columns = np.clip(np.rint(u * half + width / 2), 0, width - 1).astype(int)
    rows = np.clip(np.rint(v * half + height / 2), 0, height - 1).astype(int)
    warped = depth[rows, columns]
    holes = noise(random, x, y, int(random.integers(4, 9)))
    warped = np.where(holes < random.uniform(0.15, 0.3), 0.0, warped)
    return np.where(holes > random.uniform(0.85, 0.95), 0.9, warped)


def write_damage(path: Path, damages: dict[str, str]) -> None:
    """A CSV file with a line per scene: its name, and what is wrong with its depth map."""
    text = StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("name", "damage"))
    lines.writerows(damages.items())
    with atomic_write(path, sync=False) as file:
        file.write(text.getvalue().encode())


def read_damage(path: Path) -> dict[str, str]:
    """What `write_damage` wrote. Raises FileNotFoundError, and ValueError for another file."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0] != ["name", "damage"] or any(len(row) != 2 for row in rows):
        raise ValueError(f"{path}: not a list of name and damage")
    return {row[0]: row[1] for row in rows[1:]}
