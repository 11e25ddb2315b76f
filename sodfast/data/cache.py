"""Pictures decoded once, to squares of uint8 in memory-mapped files.

Decoding costs several times more than a training step of a tiny network can wait for. So all
pairs are decoded and resized once, in parallel, into two files; training maps them and reads
rows. The cache is valid as long as every source file has the size and the modification time
that it had then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..preprocess import check_depth, read_image
from ..weights import atomic_write
from .folders import Pair, Unlabelled, find_data, find_images
from .grey import read_depth

__all__ = ["BadPairs", "Cache", "build_cache", "default_folder", "open_data", "open_images"]

_FORMAT = 1


class BadPairs(ValueError):
    """Pairs that cannot be used; `reasons` maps the name to why."""

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = reasons
        lines = [f"{name}: {reason}" for name, reason in sorted(reasons.items())]
        more = f"\n  and {len(lines) - 20} more" if lines[20:] else ""
        super().__init__(
            f"{len(lines)} bad {'pair' if len(lines) == 1 else 'pairs'}:\n  "
            + "\n  ".join(lines[:20])
            + more
        )


@dataclass(frozen=True)
class Cache:
    """Decoded pairs. images (N, S, S, 3) uint8 RGB, masks (N, S, S) uint8 0–255 (0 where there
    is no ground truth), both memory maps; depths: (N, S, S) uint8, 0 far … 255 near, of pairs with
    depth maps, else None; names: N stems, in the order of the rows; bad: name
    to reason for pairs left out; place: the files' common path without ending."""

    images: np.ndarray
    masks: np.ndarray
    names: list[str]
    bad: dict[str, str]
    place: Path
    depths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def size(self) -> int:
        """Side of the squares in pixels."""
        return int(self.images.shape[1])


def default_folder() -> Path:
    """Where caches go: $SODFAST_CACHE, or sodfast in the user's cache folder."""
    chosen = os.environ.get("SODFAST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sodfast"


def build_cache(
    pairs: Sequence[Pair] | Sequence[Unlabelled],
    size: int,
    folder: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    skip_bad: bool = False,
    progress: bool = True,
    disparity: bool = True,
) -> Cache:
    """Opens the cache of `pairs` at `size`, building it first where it is missing or stale.

    pairs: from `find_pairs` or `find_images`. size: side of the squares in pixels; pictures are
    squeezed to them as the network's preprocessing does (bilinear, without antialiasing).
    folder: where caches live; None takes `default_folder()`. workers: decoding threads, None:
    all cores. skip_bad: leave out pairs that cannot be decoded, whose sizes differ or whose
    depth map is constant, instead of refusing. disparity: what the depth maps are, where the
    pairs have any; see `grey.read_depth`. Raises BadPairs (a
    ValueError) that lists them, OSError when the disk is full.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if not pairs:
        raise ValueError("pairs must not be empty")
    folder = Path(folder) if folder is not None else default_folder()
    signature = [_stamp(pair) for pair in pairs]
    described: list[Any] = [_FORMAT, size, sorted(str(pair.image.absolute()) for pair in pairs)]
    kind = "pairs" if pairs[0].mask is not None else "images"
    with_depth = pairs[0].depth is not None
    if with_depth:
        described += ["disparity" if disparity else "distance"]
        kind = "depth"
    places = json.dumps(described)
    place = folder / f"{kind}-{size}-{hashlib.sha256(places.encode()).hexdigest()[:16]}"
    cache = _open(place, signature, size, with_depth)
    if cache is None:
        folder.mkdir(parents=True, exist_ok=True)
        _build(place, pairs, signature, size, workers, progress, with_depth, disparity)
        cache = _open(place, signature, size, with_depth)
        if cache is None:
            raise OSError(f"{place}: the cache changed while it was built")
    if cache.bad and not skip_bad:
        raise BadPairs(cache.bad)
    if not cache.names:
        raise BadPairs(cache.bad)
    return cache


def open_data(
    source: str | os.PathLike[str],
    size: int,
    folder: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
    progress: bool = True,
    depth: bool = False,
    disparity: bool = True,
) -> Cache:
    """The cache of all pairs that `folders.find_data` finds in `source`.

    depth: with depth maps. Other arguments as of `build_cache`. Raises
    ValueError that lists files without a partner and bad pairs (unless skip_bad), and what
    `find_data` raises.
    """
    found = find_data(source, depth=depth)
    if found.problems and not skip_bad:
        listed = "\n  ".join(found.problems[:20])
        more = f"\n  and {len(found.problems) - 20} more" if found.problems[20:] else ""
        partners = "masks or depth maps" if depth else "masks"
        raise ValueError(f"{source}: images and {partners} do not match:\n  {listed}{more}")
    cache = build_cache(found.pairs, size, folder, None, skip_bad, progress, disparity)
    if found.problems:
        return replace(cache, bad={**cache.bad, **dict.fromkeys(found.problems, "left out")})
    return cache


def open_images(
    source: str | os.PathLike[str],
    size: int,
    folder: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
    progress: bool = True,
) -> Cache:
    """The cache of all pictures that `folders.find_images` finds in `source`, masks all 0.

    Other arguments, and errors, as of `build_cache`; also what `find_images` raises.
    """
    return build_cache(find_images(source), size, folder, None, skip_bad, progress)


def _stamp(pair: Pair | Unlabelled) -> list[str | int]:
    stamp: list[str | int] = [pair.name]
    for path in (pair.image, pair.mask, pair.depth):
        if path is not None:
            try:
                status = path.stat()
                stamp += [status.st_size, status.st_mtime_ns]
            except OSError:  # a broken link: a bad file, as it will turn out
                stamp += [0, 0]
    return stamp


def _open(
    place: Path, signature: list[list[str | int]], size: int, with_depth: bool
) -> Cache | None:
    """The cache at `place`, or None where it is missing, of other files, or incomplete."""
    try:
        index = json.loads((place.with_suffix(".json")).read_text(encoding="utf-8"))
        if index["format"] != _FORMAT or index["files"] != signature:
            return None
        bad = index["bad"]
        count = len(signature)
        # The name carries the content's hash of stamps, so that a rebuild never changes a file
        # that another process has mapped.
        stem = index["stem"]
        files = {kind: place.with_name(f"{stem}.{kind}") for kind in _kinds(with_depth)}
        shapes = {kind: (count, size, size) + ((3,) if kind == "images" else ()) for kind in files}
        for kind, path in files.items():
            if path.stat().st_size != math.prod(shapes[kind]):
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    keep = np.array([entry[0] not in bad for entry in signature])
    maps: dict[str, np.ndarray] = {
        kind: np.memmap(path, np.uint8, "r", shape=shapes[kind]) for kind, path in files.items()
    }
    names = [str(entry[0]) for entry in signature]
    if bad:  # rare: a copy in memory without the bad rows is simplest
        names = [name for name in names if name not in bad]
        maps = {kind: whole[keep] for kind, whole in maps.items()}
    return Cache(
        maps["images"], maps["masks"], names, bad, place.with_name(stem), maps.get("depths")
    )


def _kinds(with_depth: bool) -> tuple[str, ...]:
    """The files of a cache, by their endings."""
    return ("images", "masks", "depths") if with_depth else ("images", "masks")


def _build(
    place: Path,
    pairs: Sequence[Pair] | Sequence[Unlabelled],
    signature: list[list[str | int]],
    size: int,
    workers: int | None,
    progress: bool,
    with_depth: bool,
    disparity: bool,
) -> None:
    from tqdm import tqdm

    stem = f"{place.name}-{hashlib.sha256(json.dumps(signature).encode()).hexdigest()[:8]}"
    count, bad = len(pairs), {}
    rows = size * size
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(atomic_write(place.with_name(f"{stem}.{kind}")))
            for kind in _kinds(with_depth)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(workers or os.cpu_count()))
        for file, channels in zip(files, (3, 1, 1)):
            file.truncate(count * rows * channels)

        def decode(number: int) -> None:
            try:
                parts = _decode(pairs[number], size, disparity)
            except (OSError, ValueError) as error:
                bad[pairs[number].name] = " ".join(str(error).split())[:200]
                return
            # Written, not mapped: a full disk is then an error, where a map would crash.
            for file, part in zip(files, parts):
                if part is not None:
                    _write(file.fileno(), part, number * part.size)

        jobs = pool.map(decode, range(count))
        for _ in tqdm(jobs, total=count, unit="pair", desc="decode", disable=not progress or None):
            pass
    index = {"format": _FORMAT, "stem": stem, "bad": bad, "files": signature}
    with atomic_write(place.with_suffix(".json")) as file:
        file.write(json.dumps(index).encode())


def _write(descriptor: int, array: np.ndarray, offset: int) -> None:
    data = memoryview(np.ascontiguousarray(array).data).cast("B")
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


def _decode(
    pair: Pair | Unlabelled, size: int, disparity: bool
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Image (S, S, 3), mask and depth (S, S) uint8; None for what the pair has not.

    Raises ValueError or OSError that says what is wrong.
    """
    image = read_image(pair.image)
    if pair.mask is None:
        return _squeeze(image, size), None, None
    mask = read_image(pair.mask)[:, :, 0]
    if image.shape[:2] != mask.shape:
        raise ValueError(
            f"the image is {image.shape[1]}x{image.shape[0]}, "
            f"the mask {mask.shape[1]}x{mask.shape[0]}"
        )
    depth = None
    if pair.depth is not None:
        depth = read_depth(pair.depth, disparity)
        check_depth(depth, image)
        if not np.ptp(depth):
            raise ValueError(f"the depth map is constant ({depth.flat[0]} of 255)")
        depth = _squeeze(depth[:, :, None], size)[:, :, 0]
    return _squeeze(image, size), _squeeze(mask[:, :, None], size)[:, :, 0], depth


def _squeeze(array: np.ndarray, size: int) -> np.ndarray:
    """(H, W, C) uint8 to (S, S, C), bilinear without antialiasing (preprocess.to_input's way)."""
    from ..preprocess import bilinear_taps

    top, bottom, down = bilinear_taps(array.shape[0], size)
    left, right, across = bilinear_taps(array.shape[1], size)
    across, down = across[None, :, None], down[:, None, None]

    def row_pair(rows: np.ndarray) -> np.ndarray:
        picked = array[rows]
        a, b = picked[:, left].astype(np.float32), picked[:, right].astype(np.float32)
        return a + across * (b - a)

    upper, lower = row_pair(top), row_pair(bottom)
    return np.rint(upper + down * (lower - upper)).astype(np.uint8)
