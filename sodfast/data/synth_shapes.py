"""What synthetic scenes are made of: palettes, textures and shapes from random numbers."""

from __future__ import annotations

import numpy as np

__all__ = ["bytes_of", "contrasting", "generator", "noise", "palette_of", "shape", "texture"]


def generator(seed: int, index: int) -> np.random.Generator:
    """The random numbers of one scene."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, index]))


def bytes_of(array: np.ndarray) -> np.ndarray:
    """0–1 to 0–255, what is outside cut off."""
    return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)


def palette_of(random: np.random.Generator) -> np.ndarray:
    """(3, 3): three RGB colours around one hue."""
    return np.clip(random.uniform(0.1, 0.9, 3) + random.normal(0, 0.12, (3, 3)), 0, 1)


def contrasting(random: np.random.Generator, other: np.ndarray) -> np.ndarray:
    """A palette away from `other`, sometimes only just."""
    apart = random.uniform(0.25, 0.6)
    for _ in range(20):
        palette = palette_of(random)
        if np.abs(palette.mean(0) - other.mean(0)).max() > apart:
            break
    return palette


def noise(random: np.random.Generator, x: np.ndarray, y: np.ndarray, cells: int) -> np.ndarray:
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


def texture(
    random: np.random.Generator, x: np.ndarray, y: np.ndarray, palette: np.ndarray
) -> np.ndarray:
    """(H, W, 3) in about 0–1: a pattern that blends the palette's colours, with grain."""
    angle, frequency = random.uniform(0, np.pi), random.uniform(3, 25)
    along = np.cos(angle) * x + np.sin(angle) * y
    kind = random.integers(5)
    if kind == 0:
        pattern = noise(random, x, y, int(random.integers(2, 8)))
    elif kind == 1:  # stripes, bent by noise
        pattern = 0.5 + 0.5 * np.sin(frequency * along + 4 * noise(random, x, y, 4))
    elif kind == 2:  # checks
        across = -np.sin(angle) * x + np.cos(angle) * y
        pattern = 0.5 + 0.5 * np.sign(np.sin(frequency * along) * np.sin(frequency * across))
    elif kind == 3:  # two octaves
        cells = int(random.integers(6, 14))
        pattern = 0.6 * noise(random, x, y, cells) + 0.4 * noise(random, x, y, 3 * cells)
    else:  # a gradient
        pattern = 0.5 + 0.5 * along
    grain = noise(random, x, y, int(random.integers(15, 40)))[..., None]
    blend = np.clip(pattern, 0, 1)[..., None]
    colour = palette[0] * blend + palette[1] * (1 - blend)
    strength = random.uniform(0, 0.35)
    return (1 - strength) * colour + strength * (palette[2] * grain)


def shape(
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
