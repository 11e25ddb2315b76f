"""Losses of KD-SCFNet, section 3.3: Dice on the map and on its boundary, at several levels.

They take logits and a truth in 0–1 that may be soft, and suit any segmentation network::

    structure_polishing = StructurePolishingLoss()
    criterion = MultiLevelLoss(structure_polishing)     # for a network with several outputs
    thickness = ProgressiveBoundary("paper", epochs)
    for epoch in range(epochs):
        structure_polishing.k = thickness(epoch)        # thick boundaries first, thin ones last
        for image, truth in batches:
            loss = criterion(network(image), truth)

Distillation (Eq. 7) is :class:`DiceLoss` with the teacher's map, sigmoid(logits), as the truth.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sodfast import ops

__all__ = [
    "BoundaryDiceLoss",
    "DiceLoss",
    "MultiLevelLoss",
    "ProgressiveBoundary",
    "StructurePolishingLoss",
]

EPOCHS = 69  # of the paper's schedule
THICKEST = 13  # side of the pooling window at first, pixels


class DiceLoss(nn.Module):
    r"""1 minus the Dice overlap of map and truth (KD-SCFNet, Eq. 1), averaged over the images.

    .. math:: L = 1 - \frac{1 + 2 \sum p g}{1 + \sum p + \sum g}, \qquad p = \sigma(z)

    The sums run over one image and one channel. The 1 is a constant, not a proportion: an empty
    truth has a loss near 1 until the map is empty too.

    Shape: logits and truth (B, C, H, W), the truth in 0–1; a scalar comes out.

    Raises:
        ValueError: logits and truth have different shapes, or not four dimensions.
    """

    def forward(self, logits: Tensor, truth: Tensor) -> Tensor:
        _check(logits, truth)
        # Half precision cannot hold the sums.
        p, g = logits.float().sigmoid() if logits.dtype.itemsize < 4 else logits.sigmoid(), truth
        over = (-2, -1)
        return _dice(torch.stack([(p * g).sum(over), p.sum(over), g.sum(over)], -1)).mean()


class BoundaryDiceLoss(nn.Module):
    """:class:`DiceLoss` between the boundaries of map and truth (KD-SCFNet, Eq. 2–4).

    Args:
        k: side of the max-pooling window that thickens both boundaries, pixels; odd, 1 to 31.
            May be set while training.

    A boundary is what a 3x3 erosion takes away; the image's border is none. Shapes and errors
    as of DiceLoss.
    """

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        self.k = k

    def forward(self, logits: Tensor, truth: Tensor) -> Tensor:
        return _dice(_sums(logits, truth, self.k)[:, 1]).mean()

    def extra_repr(self) -> str:
        return f"k={self.k}"


class StructurePolishingLoss(nn.Module):
    """Dice of the map plus ``boundary_weight`` times Dice of its boundary (KD-SCFNet, Eq. 5).

    One op computes all sums and one its gradient, see
    :func:`sodfast.ops.structure_polishing_sums`.

    Args:
        boundary_weight: the paper's λ.
        k: as of :class:`BoundaryDiceLoss`; :class:`ProgressiveBoundary` says which in which epoch.

    Shapes and errors as of DiceLoss.
    """

    def __init__(self, boundary_weight: float = 1.0, k: int = 1) -> None:
        super().__init__()
        self.boundary_weight, self.k = boundary_weight, k

    def forward(self, logits: Tensor, truth: Tensor) -> Tensor:
        of_map, of_boundary = _dice(_sums(logits, truth, self.k)).mean(0)
        return of_map + self.boundary_weight * of_boundary

    def extra_repr(self) -> str:
        return f"boundary_weight={self.boundary_weight}, k={self.k}"


class ProgressiveBoundary:
    """How thick the boundaries of an epoch are (PBSM): 13, 11, 9, 7, 5, 3, 1 pixels.

    Args:
        schedule: "paper": ten epochs each, nine for the last. "code": as the authors' program
            has it, one epoch earlier each, so that the first lasts nine and the last ten.
        epochs: length of the training. Other than the paper's 69 it stretches the schedule.

    Raises:
        ValueError: an unknown schedule, or fewer than one epoch.
    """

    def __init__(self, schedule: str = "paper", epochs: float = EPOCHS) -> None:
        if schedule not in ("paper", "code"):
            raise ValueError(f"schedule must be 'paper' or 'code', not {schedule!r}")
        if not epochs > 0:
            raise ValueError(f"epochs must be above 0, not {epochs}")
        self.schedule, self.epochs = schedule, epochs

    def __call__(self, epoch: float) -> int:
        """k of an epoch, counted from 0; parts of an epoch may be given."""
        # 1e-6: what has been computed as 9.9999999 is the tenth epoch's beginning.
        position = int(epoch * EPOCHS / self.epochs + 1e-6) + (self.schedule == "code")
        return max(1, THICKEST - 2 * (position // 10))

    def __repr__(self) -> str:
        return f"ProgressiveBoundary({self.schedule!r}, epochs={self.epochs})"


class MultiLevelLoss(nn.Module):
    """A weighted sum of one loss over a network's several maps (KD-SCFNet, Eq. 6 and 7).

    Args:
        loss: called with (logits, truth) per map.
        weights: of the maps, the main one first; halved from map to map as in the paper.

    Shape: a sequence of at most len(weights) logits, or the logits of a network with one map;
    the truth as the loss takes it. A scalar comes out.

    Raises:
        ValueError: no maps, or more than there are weights.
    """

    def __init__(self, loss: nn.Module, weights: Sequence[float] = (1.0, 0.5, 0.25, 0.125)) -> None:
        super().__init__()
        self.loss, self.weights = loss, tuple(weights)

    def forward(self, logits: Tensor | Sequence[Tensor], truth: Tensor) -> Tensor:
        maps = [logits] if isinstance(logits, Tensor) else list(logits)
        if not 1 <= len(maps) <= len(self.weights):
            raise ValueError(f"logits must be 1 to {len(self.weights)} maps, got {len(maps)}")
        total: Tensor = self.weights[0] * self.loss(maps[0], truth)
        for weight, one in zip(self.weights[1:], maps[1:]):
            total = total + weight * self.loss(one, truth)
        return total

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def _check(logits: Tensor, truth: Tensor) -> None:
    if logits.dim() != 4 or logits.shape != truth.shape:
        raise ValueError(
            f"logits and truth must both be (B, C, H, W), not {tuple(logits.shape)} and "
            f"{tuple(truth.shape)}"
        )


def _sums(logits: Tensor, truth: Tensor, k: int) -> Tensor:
    """(B * C, 2, 3): of map and boundary Σpg, Σp, Σg."""
    _check(logits, truth)
    if logits.dtype.itemsize < 4:  # half precision cannot hold the sums
        logits, truth = logits.float(), truth.float()
    shape = (-1, 1, *logits.shape[-2:])
    return ops.structure_polishing_sums(logits.reshape(shape), truth.reshape(shape), k)


def _dice(sums: Tensor) -> Tensor:
    """The loss from Σpg, Σp, Σg in the last dimension."""
    both, p, g = sums.unbind(-1)
    return 1 - (1 + 2 * both) / (1 + p + g)
