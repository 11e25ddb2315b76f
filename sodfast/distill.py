"""Distillation: any network teaches any other (KD-SCFNet, section 3; dynamic distillation).

The pictures need no ground truth: a trained teacher's maps, soft or thresholded, take its
place. *Online* the teacher sees every augmented batch (as the authors' program does); *offline*
its maps of the whole pictures are written once, as weak labels, and augmented with the picture
(as the paper has it). Labelled pictures may be mixed in. The loop is that of `sodfast.train`.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .data.augment import augment
from .data.batches import Batches
from .data.cache import Cache
from .fuse import fuse
from .launch import Launch
from .pretrained import weights_file
from .recipe import Recipe
from .weights import atomic_write, load

__all__ = ["Mixture", "Teacher", "distill", "weak_labels"]

SHARD = 256  # pictures per file of weak labels while they are being written


def distill(
    recipe: Recipe,
    teacher: str | os.PathLike[str],
    images: str | os.PathLike[str] | None,
    run: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains the recipe's network on what a teacher says of pictures.

    recipe: its settings under "distillation" say how. teacher: a weight file of any registered
    model. images: pictures without ground truth, see `sodfast.data.folders.find_images`; None
    where the recipe's loss is "dkd", which weighs teacher and truth of labelled pairs. run, and
    options: as of `sodfast.train.train`. data: labelled pairs, beside images to mix in; without
    them nothing is validated, unless `val` names some. Teacher and student may take depth, or one
    of them may: see `sodfast.data.folders` for the maps.

    Raises what `train` raises, and ValueError for a teacher that cannot be loaded.
    """
    from .train import train

    return train(recipe, data, run, teacher=teacher, images=images, **options)


class Teacher:
    """A trained network that says what is salient; it is not trained further.

    weights: as of `sodfast.from_pretrained`, with its errors. identity: the SHA-256 of the file.
    """

    def __init__(self, weights: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        path = weights_file(weights)
        network = load(path)
        self.model: nn.Module = fuse(network).to(device)
        self.identity = hashlib.sha256(path.read_bytes()).hexdigest()
        self.preprocessing: dict[str, Any] = network.preprocessing  # type: ignore[assignment]
        self.multiple = int(getattr(network, "size_multiple", 1))

    @property
    def channels(self) -> int:
        """What it takes: 3, or 4 with depth."""
        return len(self.preprocessing["mean"])

    def __call__(self, x: Tensor) -> Tensor:
        """Maps (B, 1, H, W) in 0–1 of pictures (B, channels, H, W) that are normalised for the
        teacher.

        It sees them at the next size that its network takes.
        """
        return _resize(self._logits(x).sigmoid(), (x.shape[-2], x.shape[-1]))

    def of_student(self, x: Tensor, preprocessing: dict[str, Any]) -> Tensor:
        """As a call, for pictures that are normalised with that preprocessing."""
        return self(self._renormalised(x, preprocessing))

    def logits_of_student(self, x: Tensor, preprocessing: dict[str, Any]) -> Tensor:
        """As of_student, but logits."""
        logits = self._logits(self._renormalised(x, preprocessing))
        return _resize(logits, (x.shape[-2], x.shape[-1]))

    @torch.no_grad()
    def _logits(self, x: Tensor) -> Tensor:
        height, width = (-(-n // self.multiple) * self.multiple for n in x.shape[-2:])
        return self.model(_resize(x, (height, width))).float()

    def _renormalised(self, x: Tensor, preprocessing: dict[str, Any]) -> Tensor:
        """x may have depth that the teacher does not take."""
        count = self.channels
        theirs, ours = (
            [torch.tensor(p[k][:count], device=x.device).view(1, -1, 1, 1) for k in ("mean", "std")]
            for p in (preprocessing, self.preprocessing)
        )
        return (x[:, :count] * theirs[1] + theirs[0] - ours[0]) / ours[1]


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def weak_labels(
    teacher: Teacher,
    cache: Cache,
    launch: Launch,
    progress: bool = True,
) -> Cache:
    """The cache with the teacher's maps of its pictures as masks (8 bits).

    They lie beside the cache, under a name that holds the hash of the teacher's file: another
    teacher writes others, the same one finds its own. Written in shards of 256 pictures, of
    which every process does its share; those of a stopped run are kept and the rest is done.
    The teacher sees whole pictures at its own size. Raises OSError when the disk is full.
    """
    side = cache.size
    stem = f"{cache.place.name}.labels-{teacher.identity[:16]}"
    path = cache.place.with_name(f"{stem}.masks")
    starts = range(0, len(cache), SHARD)
    shards = [cache.place.with_name(f"{stem}.{start:07d}.npy") for start in starts]
    if not (path.is_file() and path.stat().st_size == len(cache) * side * side):
        mine = list(zip(starts, shards))[launch.rank :: launch.world]
        size = int(teacher.preprocessing["size"][0])
        bar = tqdm(mine, unit="shard", desc="weak labels", disable=None if progress else True)
        for start, shard in bar:
            if not shard.is_file():
                labels = _label(teacher, cache, range(start, min(start + SHARD, len(cache))), size)
                with atomic_write(shard) as file:
                    np.save(file, labels)
        launch.wait()
        if launch.is_main:
            with atomic_write(path) as file:
                for shard in shards:
                    file.write(np.load(shard).tobytes())
        launch.wait()
    if launch.is_main:
        for shard in shards:
            shard.unlink(missing_ok=True)
    masks = np.memmap(path, np.uint8, "r", shape=(len(cache), side, side))
    return replace(cache, masks=masks)


@torch.no_grad()
def _label(teacher: Teacher, cache: Cache, rows: range, size: int) -> np.ndarray:
    """(len(rows), S, S) uint8."""
    device = next(teacher.model.parameters()).device
    pre, found = teacher.preprocessing, []
    for start in range(rows.start, rows.stop, 16):
        some = slice(start, min(start + 16, rows.stop))
        images = torch.from_numpy(np.array(cache.images[some])).to(device)
        whole = torch.eye(2, 3, device=device).expand(len(images), 2, 3)
        x, _ = augment(images, images[..., 0], whole, size, pre["mean"], pre["std"])
        maps = _resize(teacher(x), (cache.size, cache.size))
        found.append(maps[:, 0].mul(255).round().to(torch.uint8).cpu().numpy())
    return np.concatenate(found)


class Mixture:
    """Training batches of labelled pictures, if any, and of pictures that a teacher labels.

    Used as `sodfast.data.batches.Batches`; an epoch is one pass over the unlabelled pictures.
    labelled: None, or batches with ground truth, which come first in every batch. taught: the
    unlabelled ones, whose masks are weak labels. teacher: makes labels now instead; None: the
    masks are the labels. threshold: see the recipe's distill_threshold.
    """

    def __init__(
        self, labelled: Batches | None, taught: Batches, teacher: Teacher | None,
        threshold: float, preprocessing: dict[str, Any],
    ) -> None:  # fmt: skip
        self.parts = [part for part in (labelled, taught) if part is not None]
        self.taught, self.teacher, self.threshold = taught, teacher, threshold
        self.preprocessing = preprocessing
        self.mean, self.std = taught.mean, taught.std
        self.per_epoch = taught.per_epoch
        self.labelled = 0 if labelled is None else labelled.batch_size // labelled.world

    def get(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        """As of Batches."""
        x, truth = self.taught.get(number, size)
        if self.teacher is not None:
            truth = self.teacher.of_student(x, self.preprocessing)
        if self.threshold:
            truth = (truth > self.threshold).to(truth.dtype)
        if self.labelled:
            own_x, own_truth = self.parts[0].get(number, size)
            x, truth = torch.cat([own_x, x]), torch.cat([own_truth, truth])
        return x, truth

    def names(self, number: int) -> list[str]:
        """As of Batches."""
        return [name for part in self.parts for name in part.names(number)]

    def labelled_names(self, number: int) -> list[str]:
        """As of Batches."""
        return self.parts[0].labelled_names(number) if self.labelled else []

    def close(self) -> None:
        """As of Batches."""
        for part in self.parts:
            part.close()
