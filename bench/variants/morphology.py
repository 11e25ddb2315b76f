"""Baselines of the boundary from libraries of morphology, where they are installed."""

from __future__ import annotations

import numpy as np
import torch
from cases import Case, Work
from torch import Tensor

from variants import Variant


def opencv(case: Case, work: Work) -> Work:
    """OpenCV's erosion, difference and dilation of one map after the other."""
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    small, large = np.ones((3, 3), np.uint8), np.ones((work.module.k,) * 2, np.uint8)
    maps = list(work.args[0].flatten(0, 1).numpy())
    results = [np.empty_like(z) for z in maps]
    thin = np.empty_like(maps[0])

    def run() -> list[np.ndarray]:
        for z, result in zip(maps, results):
            cv2.erode(z, small, thin)
            cv2.subtract(z, thin, thin)
            cv2.dilate(thin, large, result)
        return results

    return Work(run, ())


def kornia(case: Case, work: Work) -> Work:
    from kornia.morphology import dilation, erosion

    small, large = torch.ones(3, 3), torch.ones((work.module.k,) * 2)

    def run(z: Tensor) -> Tensor:
        # The other engine, unfold, is slower.
        thin = z - erosion(z, small, engine="convolution")
        return dilation(thin, large, engine="convolution")

    return Work(run, work.args)


VARIANTS = [
    Variant(
        "opencv", True, "reference", opencv,
        lambda case: case.name == "boundary" and not case.training,
    ),
    Variant(
        "kornia", True, "reference", kornia,
        # It makes k² copies of its argument: 4 GB at k = 31.
        lambda case: case.name == "boundary" and case.label in ("k 3", "k 13"),
    ),
]  # fmt: skip
