"""The loss of dynamic distillation with noise elimination, for any teacher and any student.

The teacher's map counts where the teacher is right and the student is not::

    criterion = DynamicDistillationLoss()
    for image, truth in batches:
        with torch.no_grad():
            taught = teacher(image)                    # logits (B, 1, H, W)
        loss, theta, alpha, beta = criterion(student(image), taught, truth)
        loss.backward()

Paper: Ren et al., Dynamic Knowledge Distillation With Noise Elimination for RGB-D Salient
Object Detection.
"""

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sodfast import ops

__all__ = ["DynamicDistillation", "DynamicDistillationLoss"]


class DynamicDistillation(NamedTuple):
    """What :class:`DynamicDistillationLoss` returns; only the loss has a gradient."""

    loss: Tensor  # scalar
    theta: Tensor  # (B,), weight of the distillation, 0 to tanh(1) or the fixed weight
    alpha: Tensor  # (B,), the teacher's soft IoU with the truth
    beta: Tensor  # (B,), 1 minus the student's soft IoU with the truth


class DynamicDistillationLoss(nn.Module):
    r"""Distillation and cross-entropy, weighted per image by how teacher and student do.

    .. math:: L = \theta L_{KL} + (1 - \theta) L_{CE} \quad (5), \qquad
              \theta = \begin{cases} \tanh(\alpha^p \beta^{1-p}) & \alpha > \text{threshold} \\
                       \epsilon & \text{else} \end{cases} \quad (3, 6)

    α is the soft IoU of the teacher's map with the truth (Eq. 1), β one minus that of the
    student's (Eq. 2); the maps are sigmoids of the logits, without temperature. Where truth and
    map are both nothing but zeros the IoU is 1. θ is a constant: no gradient goes through it.
    :math:`L_{CE}` is the mean over pixels of the binary cross-entropy of student and truth,
    :math:`L_{KL}` that of the divergence KL(teacher || student) of the pixel's two-valued
    distributions at a temperature T, times T². The batch's loss is the mean over its images.

    (The paper's algorithm box has β to the power of -1-p; the text and this have 1-p. The
    paper does not say which KL it takes: the options are the usual ones.)

    Args:
        p: weight of the teacher's factor in the geometric mean, 0 to 1.
        temperature: T, above 0; the paper has 5, and 10 for pictures without depth.
        threshold: the noise elimination; a teacher whose α is not above it is hardly listened
            to. None: without, Eq. 3.
        epsilon: the weight of the distillation then, 0 to 1.
        fixed_weight: θ for all images, 0 to 1, as in ordinary distillation: the baseline. p,
            threshold and epsilon then have no say.
        temperature_squared: whether :math:`L_{KL}` is multiplied by T².
        kl_mean: "pixels", or "pixels_and_classes": also over the two values of a pixel's
            distribution, as a mean over the elements of two-class maps is; that is half.

    Shape: student_logits, teacher_logits and truth (B, 1, H, W), the truth in 0–1 and possibly
    soft; teacher and truth are taken as constants. Half precision is computed in float32. A
    batch of nothing has the loss 0. NaN in one of the three makes the loss NaN.

    Raises:
        ValueError: an option out of its range, shapes or devices that differ.
        TypeError: an integer dtype (a truth of bool will do), an option of another type.
    """

    def __init__(
        self,
        p: float = 0.7,
        temperature: float = 5.0,
        threshold: float | None = 0.5,
        epsilon: float = 0.01,
        fixed_weight: float | None = None,
        temperature_squared: bool = True,
        kl_mean: str = "pixels",
    ) -> None:
        super().__init__()
        shares: dict[str, Any] = {
            "p": p, "threshold": threshold, "epsilon": epsilon, "fixed_weight": fixed_weight
        }  # fmt: skip
        for name, value in {**shares, "temperature": temperature}.items():
            if value is None and name in ("threshold", "fixed_weight"):
                continue
            # From a recipe comes whatever stands there.
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, not {value!r}")
            if name in shares and not 0 <= float(value) <= 1:
                raise ValueError(f"{name} must be in 0–1, not {value}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be above 0 and finite, not {temperature}")
        if not isinstance(temperature_squared, bool):
            raise TypeError(f"temperature_squared must be a bool, not {temperature_squared!r}")
        if kl_mean not in ("pixels", "pixels_and_classes"):
            raise ValueError(f"kl_mean must be 'pixels' or 'pixels_and_classes', not {kl_mean!r}")
        self.p, self.temperature, self.threshold = p, temperature, threshold
        self.epsilon, self.fixed_weight = epsilon, fixed_weight
        self.temperature_squared, self.kl_mean = temperature_squared, kl_mean

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, truth: Tensor
    ) -> DynamicDistillation:
        maps = {"student_logits": student_logits, "teacher_logits": teacher_logits, "truth": truth}
        for name, x in maps.items():  # what is converted below would not be refused any more
            if not (x.is_floating_point() or (name == "truth" and x.dtype == torch.bool)):
                raise TypeError(f"{name} must be floating point, not {x.dtype}")
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        student = student_logits.to(dtype)
        teacher, truth = (x.detach().to(dtype) for x in (teacher_logits, truth))
        rule = self.p, self.threshold, self.epsilon
        theta, alpha, beta = ops.dkd_theta(student, teacher, truth, *rule)
        if self.fixed_weight is not None:
            theta = torch.full_like(alpha, self.fixed_weight)
        factor = self.temperature**2 if self.temperature_squared else 1.0
        if self.kl_mean == "pixels_and_classes":
            factor /= 2
        per_image = ops.dkd_loss(student, teacher, truth, theta, self.temperature, factor)
        loss = per_image.mean() if len(per_image) else per_image.sum()
        return DynamicDistillation(loss, theta, alpha, beta)

    def extra_repr(self) -> str:
        return (
            f"p={self.p}, temperature={self.temperature}, threshold={self.threshold}, "
            f"epsilon={self.epsilon}, fixed_weight={self.fixed_weight}, "
            f"temperature_squared={self.temperature_squared}, kl_mean={self.kl_mean!r}"
        )
