"""Which pictures come when, and how they reach the training device.

The order of an epoch is a function of (seed, epoch), the batch one of the step: nothing needs
to be remembered to resume, and every rank can work out its share alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .augment import augment, draw, draw_colour, uniform
from .cache import Cache

__all__ = ["Batches", "hold_out"]

_ORDER_STREAM = 0x6F72646572  # so that the order's random numbers are not the augmentation's


def hold_out(names: Sequence[str], part: float) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (training, held out), both sorted: `part` of the names, chosen by their hash.

    The choice depends on the names alone, so it stays the same for every seed and order.
    """
    ranked = sorted(range(len(names)), key=lambda i: hashlib.sha256(os.fsencode(names[i])).digest())
    count = round(part * len(names))
    return np.array(sorted(ranked[count:]), int), np.array(sorted(ranked[:count]), int)


class Batches:
    """The training batches of one process.

    cache: decoded pairs. rows: which of them to train on. batch_size: of all processes
    together. seed: of order and augmentation. mean, std: normalisation of RGB, or of RGB and
    depth, which the cache must hold then. crop, flips, rotation: see `augment.draw`; blur,
    brightness: see `augment.draw_colour`. rank, world: this process and how many there are; a
    process takes every world-th row of each batch.
    Raises ValueError where the batch does not divide, or there are too few rows for one.

    On a GPU the whole cache is put into its memory where it fits in half of what is free;
    otherwise the next batch is fetched by a thread while this one is trained on.
    """

    def __init__(
        self,
        cache: Cache,
        rows: np.ndarray,
        batch_size: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        crop: float = 15 / 224,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        blur: float = 0.0,
        brightness: float = 0.0,
        rotation: float = 0.0,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} must be a multiple of {world} processes")
        if len(rows) < batch_size:
            raise ValueError(f"batch_size is {batch_size}, but there are {len(rows)} pairs only")
        self.cache, self.rows, self.batch_size, self.seed = cache, rows, batch_size, seed
        self.mean, self.std = mean, std
        self.moves = (crop, horizontal_flip, vertical_flip, rotation)
        self.colours = (blur, brightness)
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.labelled = batch_size // world  # how many of a batch have ground truth: all
        self.per_epoch = len(rows) // batch_size  # an incomplete last batch is left out
        self._parts = [cache.images, cache.masks]
        if len(mean) == 4:
            if cache.depths is None:
                raise ValueError("depth maps are wanted, and these pictures have none")
            self._parts.append(cache.depths)
        self._order: tuple[int, np.ndarray] = (-1, rows)
        self._on_device = self._upload()
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[list[Tensor]]] | None = None

    def indices(self, number: int) -> tuple[int, np.ndarray]:
        """The epoch and the rows (of all processes) of batch `number`, counted from 0."""
        epoch, place = divmod(number, self.per_epoch)
        if self._order[0] != epoch:
            keys = uniform(self.seed ^ _ORDER_STREAM, epoch, self.rows, 1)[:, 0]
            self._order = (epoch, self.rows[np.argsort(keys, kind="stable")])
        return epoch, self._order[1][place * self.batch_size :][: self.batch_size]

    def names(self, number: int) -> list[str]:
        """The names of the pictures in batch `number`, of all processes."""
        return [self.cache.names[row] for row in self.indices(number)[1]]

    def labelled_names(self, number: int) -> list[str]:
        """Of batch `number` the names of this process's share with ground truth, in its order."""
        return self.names(number)[self.rank :: self.world]

    def get(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        """This process's share of batch `number`, augmented, on the device.

        Returns (B, len(mean), size, size) float32, normalised, and the truth
        (B, 1, size, size) in 0–1.
        """
        epoch, rows = self.indices(number)
        mine = rows[self.rank :: self.world]
        images, masks, *depths = self._rows(number, mine)
        theta = draw(self.seed, epoch, mine, *self.moves)
        moved = torch.from_numpy(theta).to(self.device)
        colour = draw_colour(self.seed, epoch, mine, *self.colours) if any(self.colours) else None
        depth = depths[0] if depths else None
        batch = augment(images, masks, moved, size, self.mean, self.std, colour, depth)
        self._prefetch(number + 1)
        return batch

    def _upload(self) -> list[Tensor] | None:
        if self.device.type != "cuda":
            return None
        needed = sum(part.size for part in self._parts)
        if needed > torch.cuda.mem_get_info(self.device)[0] // 2:
            return None
        return [torch.from_numpy(np.asarray(part)).to(self.device) for part in self._parts]

    def _rows(self, number: int, mine: np.ndarray) -> list[Tensor]:
        if self._on_device is not None:
            where = torch.from_numpy(mine).to(self.device)
            return [part[where] for part in self._on_device]
        if self._next is not None and self._next[0] == number:
            return self._next[1].result()
        return self._fetch(mine)

    def _fetch(self, mine: np.ndarray) -> list[Tensor]:
        fetched = [torch.from_numpy(part[mine]) for part in self._parts]
        if self.device.type == "cuda":
            fetched = [part.pin_memory() for part in fetched]
        return [part.to(self.device, non_blocking=True) for part in fetched]

    def _prefetch(self, number: int) -> None:
        if self._on_device is None:
            mine = self.indices(number)[1][self.rank :: self.world]
            self._next = (number, self._pool.submit(self._fetch, mine))

    def close(self) -> None:
        """Ends the fetching thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
