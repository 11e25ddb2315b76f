"""Which pictures come when, and how they reach the training device.

The order of an epoch is a function of (seed, epoch), the batch one of the step: nothing needs
to be remembered to resume, and every rank can work out its share alone.
"""

from __future__ import annotations

import hashlib
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
    ranked = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    count = round(part * len(names))
    return np.array(sorted(ranked[count:]), int), np.array(sorted(ranked[:count]), int)


class Batches:
    """The training batches of one process.

    cache: decoded pairs. rows: which of them to train on. batch_size: of all processes
    together. seed: of order and augmentation. mean, std: normalisation. crop, flips: see
    `augment.draw`; blur, brightness: see `augment.draw_colour`. rank, world: this process and
    how many there are; a process takes every world-th row of each batch.
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
    ) -> None:
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} must be a multiple of {world} processes")
        if len(rows) < batch_size:
            raise ValueError(f"batch_size is {batch_size}, but there are {len(rows)} pairs only")
        self.cache, self.rows, self.batch_size, self.seed = cache, rows, batch_size, seed
        self.mean, self.std = mean, std
        self.crop, self.flips = crop, (horizontal_flip, vertical_flip)
        self.colours = (blur, brightness)
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.labelled = batch_size // world  # how many of a batch have ground truth: all
        self.per_epoch = len(rows) // batch_size  # an incomplete last batch is left out
        self._order: tuple[int, np.ndarray] = (-1, rows)
        self._on_device = self._upload()
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[tuple[Tensor, Tensor]]] | None = None

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

    def get(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        """This process's share of batch `number`, augmented, on the device.

        Returns (B, 3, size, size) float32, normalised, and the truth (B, 1, size, size) in 0–1.
        """
        epoch, rows = self.indices(number)
        mine = rows[self.rank :: self.world]
        images, masks = self._rows(number, mine)
        theta = draw(self.seed, epoch, mine, self.crop, *self.flips)
        moved = torch.from_numpy(theta).to(self.device)
        colour = draw_colour(self.seed, epoch, mine, *self.colours) if any(self.colours) else None
        batch = augment(images, masks, moved, size, self.mean, self.std, colour)
        self._prefetch(number + 1)
        return batch

    def _upload(self) -> tuple[Tensor, Tensor] | None:
        if self.device.type != "cuda":
            return None
        needed = self.cache.images.size + self.cache.masks.size
        if needed > torch.cuda.mem_get_info(self.device)[0] // 2:
            return None
        both = (self.cache.images, self.cache.masks)
        images, masks = (torch.from_numpy(np.asarray(part)).to(self.device) for part in both)
        return images, masks

    def _rows(self, number: int, mine: np.ndarray) -> tuple[Tensor, Tensor]:
        if self._on_device is not None:
            where = torch.from_numpy(mine).to(self.device)
            return self._on_device[0][where], self._on_device[1][where]
        if self._next is not None and self._next[0] == number:
            return self._next[1].result()
        return self._fetch(mine)

    def _fetch(self, mine: np.ndarray) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(self.cache.images[mine])
        masks = torch.from_numpy(self.cache.masks[mine])
        if self.device.type == "cuda":
            images, masks = images.pin_memory(), masks.pin_memory()
        return (
            images.to(self.device, non_blocking=True),
            masks.to(self.device, non_blocking=True),
        )

    def _prefetch(self, number: int) -> None:
        if self._on_device is None:
            mine = self.indices(number)[1][self.rank :: self.world]
            self._next = (number, self._pool.submit(self._fetch, mine))

    def close(self) -> None:
        """Ends the fetching thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
