"""The maps and truths of the golden metric values, made from seeds; needs numpy alone.

Integer arithmetic only: the same on every machine. `digest` proves that it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np


def blobs(rng: np.random.Generator, height: int, width: int, count: int) -> np.ndarray:
    """A truth (H, W) uint8, 0 or 255: some ellipses and rectangles."""
    y, x = np.mgrid[:height, :width]
    inside = np.zeros((height, width), bool)
    for _ in range(count):
        cy, cx = int(rng.integers(height)), int(rng.integers(width))
        ry = int(rng.integers(1, max(2, height // 3)))
        rx = int(rng.integers(1, max(2, width // 3)))
        if rng.integers(3):
            inside |= ((y - cy) * rx) ** 2 + ((x - cx) * ry) ** 2 <= (rx * ry) ** 2
        else:
            inside |= (abs(y - cy) <= ry) & (abs(x - cx) <= rx)
    return inside.astype(np.uint8) * 255


def soften(truth: np.ndarray, radius: int) -> np.ndarray:
    """A box blur in whole numbers."""
    side = 2 * radius + 1
    padded = np.pad(truth.astype(np.int64), radius, mode="edge")
    total = sum(
        padded[i : i + truth.shape[0], j : j + truth.shape[1]]
        for i in range(side)
        for j in range(side)
    )
    return total // side**2


def to_8_bit(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def cases() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, prediction (H, W) uint8, truth (H, W) uint8."""
    rng = np.random.default_rng(20201123)

    for number in range(16):  # what networks give: soft, noisy, not quite in place
        height, width = (int(n) for n in rng.integers(24, 110, size=2))
        truth = blobs(rng, height, width, int(rng.integers(1, 5)))
        truth[height // 2, width // 2] = 255  # never empty
        moved = np.roll(truth, tuple(int(n) for n in rng.integers(-6, 7, size=2)), (0, 1))
        noise = rng.integers(-60, 61, size=truth.shape)
        prediction = to_8_bit(soften(moved, int(rng.integers(1, 5))) + noise)
        yield f"soft {number}", prediction, truth

    truth = blobs(rng, 300, 400, 3)
    yield "large", to_8_bit(soften(truth, 6) + rng.integers(-20, 21, size=truth.shape)), truth

    for number in range(8):  # small, with any values
        height, width = (int(n) for n in rng.integers(3, 14, size=2))
        truth = rng.integers(2, size=(height, width)).astype(np.uint8) * 255
        truth[:2, :2], truth[-1, -1] = ((255, 0), (0, 255)), 0
        yield f"small {number}", to_8_bit(rng.integers(256, size=truth.shape)), truth

    truth = blobs(rng, 60, 80, 2)
    for low, high in ((0, 1), (60, 111), (100, 185), (7, 250), (0, 254), (200, 203)):
        prediction = rng.integers(low, high + 1, size=truth.shape)
        prediction = np.where(
            truth > 0, np.maximum(prediction, rng.integers(low, high + 1)), prediction
        )
        yield f"range {low} to {high}", to_8_bit(prediction), truth

    yield "perfect", truth, truth
    yield "inverted", 255 - truth, truth
    yield "binary", blobs(rng, 60, 80, 3), truth
    for value in (0, 77, 255):  # a truth that fills a part of every quadrant
        checks = (np.add.outer(np.arange(40) // 5, np.arange(50) // 5) % 2 * 255).astype(np.uint8)
        yield f"constant {value}", np.full(checks.shape, value, np.uint8), checks

    noise = to_8_bit(rng.integers(-100, 300, size=(45, 35)))
    for name, value in (("empty", 0), ("full", 255)):
        constant = np.full((45, 35), value, np.uint8)
        yield f"{name} truth", noise, constant
        yield f"{name} truth, map 0", np.zeros_like(constant), constant
        yield f"{name} truth, map 255", np.full_like(constant, 255), constant

    for number in range(3):  # grey masks, on both sides of the threshold at 128
        truth = to_8_bit(soften(blobs(rng, 50, 70, 3), 4) + rng.integers(-3, 4, size=(50, 70)))
        truth[:2, :3] = (126, 127, 128), (129, 130, 255)
        yield f"graded {number}", to_8_bit(soften(truth, 2) + rng.integers(-40, 41)), truth

    one = np.zeros((21, 33), np.uint8)
    one[5, 9] = 255
    yield "one pixel", to_8_bit(rng.integers(256, size=one.shape)), one
    edges = np.zeros((40, 64), np.uint8)
    edges[0], edges[:, 0] = 255, 255
    yield "two edges", to_8_bit(soften(edges, 3) * 2), edges
    thin = np.zeros((64, 48), np.uint8)
    np.fill_diagonal(thin, 255)
    thin[::9, 40] = 255
    yield "thin lines", to_8_bit(rng.integers(256, size=thin.shape)), thin


def digest() -> str:
    """SHA-256 of all cases: the same inputs, to the bit."""
    state = hashlib.sha256()
    for name, prediction, truth in cases():
        state.update(f"{name} {prediction.shape}".encode())
        state.update(prediction.tobytes() + truth.tobytes())
    return state.hexdigest()
