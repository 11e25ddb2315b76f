"""What a run learns from: labelled pairs, pictures that a teacher labels, pairs to validate on."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .data.batches import Batches, hold_out
from .data.cache import Cache, open_data, open_images
from .distill import Mixture, Teacher, weak_labels
from .launch import Launch
from .recipe import Recipe

__all__ = ["Sources", "open_sources"]

_TAUGHT_STREAM = 0x746561636820  # so that the two parts' random numbers are not the same


@dataclass(frozen=True)
class Sources:
    """Decoded pictures, and the teacher where there is one."""

    labelled: Cache | None
    validation: Cache | None  # of a folder of their own
    unlabelled: Cache | None = None
    teacher: Teacher | None = None

    @property
    def bad(self) -> dict[str, str]:
        """Names of training pictures that were left out, and why."""
        found: dict[str, str] = {}
        for cache in (self.labelled, self.unlabelled):
            found |= {} if cache is None else cache.bad
        return found

    def split(self, part: float) -> tuple[np.ndarray, tuple[Cache, np.ndarray]]:
        """Rows of the labelled pairs to train on; the cache and rows to validate on, which are
        this part of them where there is no folder of their own."""
        rows = held = np.array([], int)
        if self.labelled is not None:
            names = self.labelled.names
            rows, held = hold_out(names, part if self.validation is None else 0.0)
        if self.validation is not None:
            return rows, (self.validation, np.arange(len(self.validation)))
        cache = self.labelled or self.unlabelled
        assert cache is not None
        return rows, (cache, held)

    def identity(self, rows: np.ndarray) -> str:
        """A hash of what is trained on: a resumed run must have the same."""
        names = [] if self.labelled is None else [self.labelled.names[row] for row in rows]
        if self.teacher is not None:
            names += ["", self.teacher.identity]
        if self.unlabelled is not None:
            names += self.unlabelled.names
        return hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()

    def batches(
        self, rows: np.ndarray, recipe: Recipe, pre: dict[str, Any], device: torch.device,
        launch: Launch,
    ) -> Batches | Mixture:  # fmt: skip
        """The training batches of this process; pre: the student's preprocessing.

        With depth in the fourth channel where the student or the teacher takes it.
        """
        if self.labelled is not None and self.labelled.depths is not None and len(pre["mean"]) == 3:
            pre = {**pre, "mean": [*pre["mean"], 0.0], "std": [*pre["std"], 1.0]}

        def of(cache: Cache, rows: np.ndarray, size: int, seed: int) -> Batches:
            return Batches(
                cache, rows, size, seed, pre["mean"], pre["std"], recipe.crop,
                recipe.horizontal_flip, recipe.vertical_flip, device, launch.rank, launch.world,
                recipe.blur, recipe.brightness, recipe.rotation,
            )  # fmt: skip

        if self.unlabelled is None:
            assert self.labelled is not None
            return of(self.labelled, rows, recipe.batch_size, recipe.seed)
        taught = recipe.batch_size
        if self.labelled is not None:
            taught = round(recipe.batch_size * recipe.unlabelled_part)
        if not taught or (self.labelled is not None and taught == recipe.batch_size):
            raise ValueError(
                f"unlabelled_part {recipe.unlabelled_part} of a batch_size of "
                f"{recipe.batch_size} leaves no picture of one kind"
            )
        own = None
        if self.labelled is not None:
            own = of(self.labelled, rows, recipe.batch_size - taught, recipe.seed)
        every = np.arange(len(self.unlabelled))
        other = of(self.unlabelled, every, taught, recipe.seed ^ _TAUGHT_STREAM)
        teacher = self.teacher if recipe.teach == "online" else None
        return Mixture(own, other, teacher, recipe.distill_threshold, dict(pre))


def open_sources(
    recipe: Recipe,
    launch: Launch,
    data: str | os.PathLike[str] | None,
    val: str | os.PathLike[str] | None,
    images: str | os.PathLike[str] | None,
    teacher: str | os.PathLike[str] | None,
    cache_folder: str | os.PathLike[str] | None,
    skip_bad: bool,
    progress: bool,
    channels: int = 3,
) -> Sources:
    """Decodes what is not decoded yet, and writes weak labels where the recipe wants them.

    channels: that the student takes, 4 with depth. Other arguments, and errors, as of
    `sodfast.train.train`.
    """
    if recipe.loss == "dkd":
        if teacher is None or data is None:
            missing = "teacher" if teacher is None else "data"
            raise ValueError(
                f"dynamic distillation needs a teacher and labelled data: no {missing} "
                "(sodfast distill RECIPE --teacher W --data DIR)"
            )
    elif (images is None) != (teacher is None):
        raise ValueError("images without ground truth and a teacher go together: one is missing")
    if data is None and images is None:
        raise ValueError("there is nothing to learn from: neither data nor images")
    judge = None if teacher is None else Teacher(teacher, launch.device)
    depth = channels == 4 or (judge is not None and judge.channels == 4)
    if depth and images is not None:
        who = "network" if channels == 4 else "teacher"
        raise ValueError(f"the {who} takes depth maps, and images without ground truth have none")
    side = recipe.cache_size or recipe.size
    options = (side, cache_folder, skip_bad, progress)
    seen = recipe.disparity
    with launch.main_first():  # one process decodes, the others open what it wrote
        labelled = None if data is None else open_data(data, *options, depth, seen)
        separate = None if val is None else open_data(val, *options, channels == 4, seen)
        unlabelled = None if images is None else open_images(images, *options)
    if judge is not None and unlabelled is not None and recipe.teach == "offline":
        unlabelled = weak_labels(judge, unlabelled, launch, progress)
    return Sources(labelled, separate, unlabelled, judge)
