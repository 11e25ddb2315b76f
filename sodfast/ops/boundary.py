"""Boundaries of soft maps, and the sums of the structure polishing loss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._backend import choose, register

LARGEST_K = 31
THIN = {"inner": 1, "outer": 2, "both": 3}  # bits: 1 needs the erosion, 2 the dilation


def boundary(z: Tensor, k: int = 1, thin: str = "inner") -> Tensor:
    r"""The boundary of soft maps, thickened to about k pixels.

    .. math:: \text{inner: } z - \mathrm{erode}_3(z), \qquad
              \text{outer: } \mathrm{dilate}_3(z) - z, \qquad
              \text{both: } \mathrm{dilate}_3(z) - \mathrm{erode}_3(z)

    with 3x3 windows, then a max-pool over k x k windows. (KD-SCFNet, structure polishing loss,
    which takes the inner one.) In morphology these are the internal, external and Beucher
    gradient, and the max-pool is a dilation. What lies outside the image never wins a minimum
    or maximum, so that its border is no boundary.

    The gradient through a minimum or maximum goes to the first pixel, in reading order, that
    attains it; so ``torch.nn.functional.max_pool2d`` chooses, too.

    Args:
        z: (B, C, H, W), any values; usually soft maps in [0, 1]. NaN makes every pixel NaN
            whose windows see it, and its window's gradient goes to some pixel of the window.
        k: side of the windows in pixels, odd, 1 to 31. The time hardly depends on it.
        thin: "inner", "outer" or "both".

    float32 or float64 on the CPU, float32, float16 or bfloat16 on a GPU in compiled kernels, other
    floating dtypes by the reference; under autocast on the CPU everything runs in float32.

    Returns:
        (B, C, H, W), never negative.

    Raises:
        TypeError: an integer dtype.
        ValueError: a wrong rank, an empty size, a wrong k, an unknown thin.
        RuntimeError: a backend that was asked for by name cannot run.
    """
    _check.maps(z, "z")
    check_window(k)
    if thin not in THIN:
        raise ValueError(f"thin must be one of {', '.join(THIN)}, not {thin!r}")
    if choose("boundary", z) == "reference":
        return boundary_reference(z, k, thin)
    return torch.ops.sodfast.boundary(z, k, THIN[thin])


def boundary_reference(z: Tensor, k: int = 1, thin: str = "inner") -> Tensor:
    """:func:`boundary` in plain torch: the specification, and the fallback."""
    low = -F.max_pool2d(-z, 3, 1, 1) if thin != "outer" else z
    high = F.max_pool2d(z, 3, 1, 1) if thin != "inner" else z
    return F.max_pool2d(high - low, k, 1, k // 2)


def structure_polishing_sums(logits: Tensor, truth: Tensor, k: int) -> Tensor:
    r"""The sums that the structure polishing loss is made of, in one pass.

    With :math:`p = \sigma(\text{logits})` and g = truth, per image

    .. math:: \sum p g, \; \sum p, \; \sum g, \qquad
              \sum b(p)\, b(g), \; \sum b(p), \; \sum b(g), \qquad b = \text{boundary}(\cdot, k)

    over the pixels: what a Dice loss of the map and one of its boundary need (KD-SCFNet's
    structure polishing loss). Nothing of the size of the image is kept for the backward but
    the two arguments.

    Args:
        logits: (B, 1, H, W).
        truth: (B, 1, H, W), in [0, 1], soft or not; it gets no gradient.
        k: thickness of both boundaries, as of :func:`boundary`.

    Both share one device and one dtype: in compiled kernels float32 or float64 on the CPU,
    float32, float16 or bfloat16 on a GPU, others by the reference. Under autocast everything runs
    in float32: half precision may not hold the sums. Ties and NaN are as in :func:`boundary`; on a
    GPU the minima are those of the logits, which sigmoid may round to one number.

    Returns:
        (B, 2, 3): per image, of the map and of its boundary, the three sums.

    Raises:
        TypeError: an integer dtype, or dtypes that differ.
        ValueError: a wrong shape or device, an empty size, a wrong k; a truth that requires a
            gradient.
        RuntimeError: a backend that was asked for by name cannot run.
    """
    _check.maps(logits, "logits")
    if logits.shape[1] != 1:
        raise ValueError(f"logits must be (B, 1, H, W), not {tuple(logits.shape)}")
    _check.maps(truth, "truth")
    _check.same_place(truth, "truth", logits, "logits")
    if truth.shape != logits.shape:
        raise ValueError(
            f"truth must have the shape of logits, {tuple(logits.shape)}, not {tuple(truth.shape)}"
        )
    check_window(k)
    if truth.requires_grad:
        raise ValueError("truth requires a gradient, which is not computed: detach it")
    if choose("structure_polishing_sums", logits) == "reference":
        return structure_polishing_sums_reference(logits, truth, k)
    return torch.ops.sodfast.structure_polishing_sums(logits, truth, k)


def structure_polishing_sums_reference(logits: Tensor, truth: Tensor, k: int) -> Tensor:
    """:func:`structure_polishing_sums` in plain torch: the specification, and the fallback."""
    p = logits.sigmoid()
    pairs = [(p, truth), (boundary_reference(p, k), boundary_reference(truth, k))]
    rows = [torch.stack([a * b, a, b], 1).flatten(2).sum(2) for a, b in pairs]
    return torch.stack(rows, 1)


def check_window(k: int) -> None:
    """Raise ValueError unless k is the side of a window that boundaries can have."""
    if not 1 <= k <= LARGEST_K or k % 2 == 0:
        raise ValueError(f"k must be odd and from 1 to {LARGEST_K}, not {k}")


def _fake(z: Tensor, k: int, thin: int) -> Tensor:
    return z.new_empty(z.shape)


def _fake_backward(grad: Tensor, z: Tensor, k: int, thin: int) -> Tensor:
    return z.new_empty(z.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    z, ctx.k, ctx.thin = inputs
    ctx.save_for_backward(z)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    (z,) = ctx.saved_tensors
    return torch.ops.sodfast.boundary_backward(grad, z, ctx.k, ctx.thin), None, None


def _fake_sums(logits: Tensor, truth: Tensor, k: int) -> Tensor:
    return logits.new_empty((logits.shape[0], 2, 3))


def _fake_sums_backward(grad: Tensor, logits: Tensor, truth: Tensor, k: int) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context_sums(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logits, truth, ctx.k = inputs
    ctx.save_for_backward(logits, truth)


def _backward_sums(ctx: Any, grad: Tensor) -> tuple:
    if ctx.needs_input_grad[1]:
        raise RuntimeError("sodfast::structure_polishing_sums has no gradient to truth: detach it")
    logits, truth = ctx.saved_tensors
    grad_logits = torch.ops.sodfast.structure_polishing_sums_backward(grad, logits, truth, ctx.k)
    return grad_logits, None, None


register("boundary", fake=_fake, backward=_backward, setup_context=_setup_context)
register("boundary_backward", fake=_fake_backward)
register(
    "structure_polishing_sums",
    fake=_fake_sums,
    backward=_backward_sums,
    setup_context=_setup_context_sums,
    cuda_autocast="float32",
)
register("structure_polishing_sums_backward", fake=_fake_sums_backward)
