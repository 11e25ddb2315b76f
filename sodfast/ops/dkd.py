"""What the loss of dynamic distillation is made of: its weight per image, and the loss."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._backend import choose, register


def dkd_theta(
    student_logits: Tensor,
    teacher_logits: Tensor,
    truth: Tensor,
    p: float = 0.7,
    threshold: float | None = 0.5,
    epsilon: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""How much each image's distillation counts, and why, in one pass over the maps.

    With m = sigmoid(logits) of a network and g = truth, per image and over its pixels, the soft
    IoU of m and g is Σ mg / Σ (m + g - mg), and 1 where both are nothing but zeros. α is the
    teacher's IoU (Eq. 1), β one minus the student's (Eq. 2), and

    .. math:: \theta = \begin{cases} \tanh(\alpha^p \beta^{1-p}) & \alpha > \text{threshold} \\
                       \epsilon & \text{else} \end{cases} \quad (3, 6)

    The student's error Σ (m (1 - g) + (1 - m) g) is summed, not subtracted from 1: the small
    error of a good network keeps its digits.
    (Dynamic Knowledge Distillation With Noise Elimination for RGB-D SOD.)

    Args:
        student_logits: (B, 1, H, W).
        teacher_logits: (B, 1, H, W).
        truth: (B, 1, H, W), in [0, 1], soft or not.
        p: the teacher's share in the geometric mean, 0 to 1.
        threshold: noise elimination, 0 to 1; None: without, Eq. 3.
        epsilon: θ of what is eliminated, 0 to 1.

    All are constants here: the results have no gradient. The maps share one device and one
    dtype (float32 or float64 in compiled kernels, other floating dtypes by the reference; under
    autocast on the CPU everything runs in float32). NaN propagates within its image (to θ,
    unless p is 0 or 1 and the NaN is on the side that then counts nothing).

    Returns:
        θ, α and β, each (B,).

    Raises:
        TypeError: an integer dtype, dtypes that differ, or no number where one belongs.
        ValueError: a wrong shape or device, an empty size, a number out of its range.
        RuntimeError: a backend that was asked for by name cannot run.
    """
    _check_maps(student_logits, teacher_logits, truth)
    bound = 0.0 if threshold is None else threshold
    for name, value in (("p", p), ("threshold", bound), ("epsilon", epsilon)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, not {value!r}")
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in 0–1, not {value}")
    maps = student_logits.detach(), teacher_logits.detach(), truth.detach()
    if choose("dkd_theta", student_logits) == "reference":
        return dkd_theta_reference(*maps, p, threshold, epsilon)
    return torch.ops.sodfast.dkd_theta(*maps, p, -1.0 if threshold is None else threshold, epsilon)


@torch.no_grad()
def dkd_theta_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    truth: Tensor,
    p: float = 0.7,
    threshold: float | None = 0.5,
    epsilon: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`dkd_theta` in plain torch: the specification, and the fallback."""

    def overlap(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        yes, no = logits.sigmoid(), (-logits).sigmoid()
        together = (yes * truth).sum((1, 2, 3))
        apart = (yes * (1 - truth) + no * truth).sum((1, 2, 3))
        return together, apart, together + apart

    together, _, union = overlap(teacher_logits)
    alpha = (together / union).masked_fill(union == 0, 1.0)
    _, apart, union = overlap(student_logits)
    beta = (apart / union).masked_fill(union == 0, 0.0)
    theta = (alpha**p * beta ** (1 - p)).tanh()
    if threshold is not None:  # "not above" leaves a NaN what it is
        theta = theta.masked_fill(alpha <= threshold, epsilon)
    return theta, alpha, beta


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


def _fake_theta(
    student_logits: Tensor,
    teacher_logits: Tensor,
    truth: Tensor,
    p: float,
    threshold: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    theta, alpha, beta = (student_logits.new_empty(student_logits.shape[:1]) for _ in range(3))
    return theta, alpha, beta


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


register("dkd_theta", fake=_fake_theta)
register("dkd_loss", fake=_fake_loss, backward=_backward, setup_context=_setup_context)
register("dkd_loss_backward", fake=_fake_loss_backward)
