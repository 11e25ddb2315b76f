"""What the loss of dynamic distillation is made of: the sums behind its weight, and the loss."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._backend import choose, register


def dkd_sums(student_logits: Tensor, teacher_logits: Tensor, truth: Tensor) -> Tensor:
    r"""The sums behind the soft IoU of two networks' maps with the truth, in one pass.

    With p = sigmoid(logits) of a network and g = truth, per image and over its pixels

    .. math:: I = \sum p g, \qquad D = \sum \left(p (1 - g) + (1 - p) g\right)

    Then the IoU of Eq. 1 and 2 is I / (I + D), as I + D = Σ (p + g - pg), and one minus the IoU
    is D / (I + D), without the cancellation that would drown the small error of a good network.
    (Dynamic Knowledge Distillation With Noise Elimination for RGB-D SOD.)

    Args:
        student_logits: (B, 1, H, W).
        teacher_logits: (B, 1, H, W).
        truth: (B, 1, H, W), in [0, 1], soft or not.

    All are constants here: the result has no gradient. They share one device and one dtype
    (float32 or float64 in compiled kernels, other floating dtypes by the reference; under
    autocast on the CPU everything runs in float32). NaN propagates within its image.

    Returns:
        (B, 2, 2): per image, of the student and of the teacher, I and D.

    Raises:
        TypeError: an integer dtype, or dtypes that differ.
        ValueError: a wrong shape or device, or an empty size.
        RuntimeError: a backend that was asked for by name cannot run.
    """
    _check_maps(student_logits, teacher_logits, truth)
    maps = [x.detach() for x in (student_logits, teacher_logits, truth)]
    if choose("dkd_sums", student_logits) == "reference":
        return dkd_sums_reference(*maps)
    return torch.ops.sodfast.dkd_sums(*maps)


@torch.no_grad()
def dkd_sums_reference(student_logits: Tensor, teacher_logits: Tensor, truth: Tensor) -> Tensor:
    """:func:`dkd_sums` in plain torch: the specification, and the fallback."""
    rows = []
    for logits in (student_logits, teacher_logits):
        p, not_p = logits.sigmoid(), (-logits).sigmoid()
        pair = [p * truth, p * (1 - truth) + not_p * truth]
        rows.append(torch.stack([x.sum((1, 2, 3)) for x in pair], 1))
    return torch.stack(rows, 1)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    truth: Tensor,
    theta: Tensor,
    temperature: float = 5.0,
    kl_factor: float = 1.0,
) -> Tensor:
    r"""Distillation and cross-entropy weighted per image, with the gradient in the same pass.

    With z, t = student's and teacher's logits, g = truth, σ = sigmoid, T = temperature,
    q = σ(z/T) and p = σ(t/T), per image the mean over its pixels of

    .. math:: \theta f \left(p \log\frac{p}{q} + (1 - p) \log\frac{1 - p}{1 - q}\right)
              + (1 - \theta) \left(-g \log \sigma(z) - (1 - g) \log(1 - \sigma(z))\right)

    that is Eq. 5 with :math:`L_{KL}` the divergence of a pixel's two-valued distributions
    times f = kl_factor. (Dynamic Knowledge Distillation With Noise Elimination for RGB-D SOD.)

    Args:
        student_logits: (B, 1, H, W); the only argument that gets a gradient.
        teacher_logits: (B, 1, H, W).
        truth: (B, 1, H, W), in [0, 1], soft or not.
        theta: (B,), the weight of the distillation per image.
        temperature: T, above 0.
        kl_factor: f, from 0 on; T² keeps the gradient's size whatever the temperature.

    All tensors share one device and one dtype (float32 or float64 in compiled kernels, other
    floating dtypes by the reference; under autocast on the CPU everything runs in float32).
    Any finite logits are exact: logarithms are taken of nothing below 1. NaN propagates within
    its image. Where the student needs a gradient one map of its size is kept.

    Returns:
        (B,): the loss per image.

    Raises:
        TypeError: an integer dtype, or dtypes that differ.
        ValueError: a wrong shape or device, an empty size, a temperature or kl_factor out of
            range; a teacher, truth or theta that requires a gradient.
        RuntimeError: a backend that was asked for by name cannot run.
    """
    _check_maps(student_logits, teacher_logits, truth)
    if not isinstance(theta, Tensor):
        raise TypeError(f"theta must be a tensor, not {type(theta).__name__}")
    if theta.shape != student_logits.shape[:1]:
        raise ValueError(
            f"theta must have shape ({student_logits.shape[0]},), not {tuple(theta.shape)}"
        )
    _check.same_place(theta, "theta", student_logits, "student_logits")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, not {temperature}")
    if not 0 <= kl_factor < math.inf:
        raise ValueError(f"kl_factor must be finite and from 0 on, not {kl_factor}")
    for name, x in (("teacher_logits", teacher_logits), ("truth", truth), ("theta", theta)):
        if x.requires_grad:
            raise ValueError(f"{name} requires a gradient, which is not computed: detach it")
    maps = (student_logits, teacher_logits, truth)
    if choose("dkd_loss", student_logits) == "reference":
        return dkd_loss_reference(*maps, theta, temperature, kl_factor)
    with_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    return torch.ops.sodfast.dkd_loss(*maps, theta, temperature, kl_factor, with_gradient)[0]


def dkd_loss_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    truth: Tensor,
    theta: Tensor,
    temperature: float = 5.0,
    kl_factor: float = 1.0,
) -> Tensor:
    """:func:`dkd_loss` in plain torch: the specification, and the fallback."""
    z, t = student_logits / temperature, teacher_logits / temperature
    p, theta = t.sigmoid(), theta[:, None, None, None]
    cross_entropy = F.binary_cross_entropy_with_logits
    # KL(p || q) is the cross-entropy of p and q less the entropy of p.
    kl = cross_entropy(z, p, reduction="none") - cross_entropy(t, p, reduction="none")
    ce = cross_entropy(student_logits, truth, reduction="none")
    return (theta * kl_factor * kl + (1 - theta) * ce).mean((1, 2, 3))


def _check_maps(student_logits: Tensor, teacher_logits: Tensor, truth: Tensor) -> None:
    _check.maps(student_logits, "student_logits")
    if student_logits.shape[1] != 1:
        raise ValueError(f"student_logits must be (B, 1, H, W), not {tuple(student_logits.shape)}")
    for x, name in ((teacher_logits, "teacher_logits"), (truth, "truth")):
        _check.maps(x, name)
        _check.same_place(x, name, student_logits, "student_logits")
        if x.shape != student_logits.shape:
            raise ValueError(
                f"{name} must have the shape of student_logits, {tuple(student_logits.shape)}, "
                f"not {tuple(x.shape)}"
            )


def _fake_sums(student_logits: Tensor, teacher_logits: Tensor, truth: Tensor) -> Tensor:
    return student_logits.new_empty((student_logits.shape[0], 2, 2))


def _fake_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    truth: Tensor,
    theta: Tensor,
    temperature: float,
    kl_factor: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    loss = student_logits.new_empty(student_logits.shape[:1])
    return loss, student_logits.new_empty(student_logits.shape if with_gradient else (0,))


def _fake_loss_backward(grad: Tensor, gradient: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)  # or its own would be made, a whole map of zeros
    ctx.save_for_backward(gradient)
    ctx.with_gradient = inputs[-1]


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple:
    names = ("teacher_logits", "truth", "theta")
    for name, needed in zip(names, ctx.needs_input_grad[1:]):
        if needed:
            raise RuntimeError(f"sodfast::dkd_loss has no gradient to {name}: detach it")
    if not ctx.with_gradient:
        raise RuntimeError("sodfast::dkd_loss ran with_gradient=False: there is no gradient")
    to_student = None
    if grad is not None:
        to_student = torch.ops.sodfast.dkd_loss_backward(grad, *ctx.saved_tensors)
    return to_student, None, None, None, None, None, None


register("dkd_sums", fake=_fake_sums)
register("dkd_loss", fake=_fake_loss, backward=_backward, setup_context=_setup_context)
register("dkd_loss_backward", fake=_fake_loss_backward)
