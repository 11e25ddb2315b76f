"""The weight of dynamic distillation, and its loss with the gradient.

The formulas are those of csrc/cpu/dkd.cpp: with e = exp(-|x|) nothing cancels in either tail. A
program takes a part of one image's pixels, block by block; the parts' sums are added in their
order. Per pixel: three maps read, for the loss one written, some hundred operations.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    area,
    check,
    check_like,
    check_shape,
    count_parts,
    end_tile,
    first_tile,
    sum_parts,
    tiled,
)

_BLOCK = 1024


@triton.jit
def _logistic(x):
    """exp(-|x|), sigmoid(x), 1 - sigmoid(x), max(x, 0), max(-x, 0)."""
    e = tl.exp(tl.where(x > 0, -x, x))
    large = 1 / (1 + e)
    small = e * large
    p, not_p = tl.where(x > 0, large, small), tl.where(x > 0, small, large)
    return e, p, not_p, tl.where(x > 0, x, 0.0), tl.where(x > 0, 0.0, -x)


@triton.jit
def _log1p(e):
    """log(1 + e) for e in (0, 1], with all digits of a small e: what 1 + e lost is made up for."""
    u = 1 + e
    return tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def _read(pointer, at, known):
    return tl.load(pointer + at, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _sums(student, teacher, truth, partials, pixels, images, BLOCK: tl.constexpr):
    image, part = tl.program_id(0), tl.program_id(1)
    start = image.to(tl.int64) * pixels
    tiles = tl.cdiv(pixels, BLOCK)
    both_s, apart_s = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    both_t, apart_t = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for tile in range(first_tile(tiles), end_tile(tiles)):
        i = tile * BLOCK + tl.arange(0, BLOCK)
        known = i < pixels
        g = _read(truth, start + i, known)
        _, p, not_p, _, _ = _logistic(_read(student, start + i, known))
        both_s += p * g
        apart_s += tl.where(known, p * (1 - g) + not_p * g, 0.0)
        _, p, not_p, _, _ = _logistic(_read(teacher, start + i, known))
        both_t += p * g
        apart_t += tl.where(known, p * (1 - g) + not_p * g, 0.0)
    to = partials + (part * images + image) * 4
    tl.store(to, tl.sum(both_s))
    tl.store(to + 1, tl.sum(apart_s))
    tl.store(to + 2, tl.sum(both_t))
    tl.store(to + 3, tl.sum(apart_t))


@triton.jit
def _power(x, p):
    """x^p for x from 0 on, as pow has it: 0^0 is 1."""
    return tl.where(
        p == 0, 1.0, tl.where(x == 0, 0.0, tl.exp(p * tl.log(tl.where(x == 0, 1.0, x))))
    )


@triton.jit
def _weigh(partials, theta, alpha, beta, images, parts, p, threshold, epsilon):
    """θ, α and β of an image from its parts' sums, added in their order."""
    image = tl.program_id(0)
    both_s, apart_s, both_t, apart_t = 0.0, 0.0, 0.0, 0.0
    for part in range(parts):
        at = partials + (part * images + image) * 4
        both_s += tl.load(at)
        apart_s += tl.load(at + 1)
        both_t += tl.load(at + 2)
        apart_t += tl.load(at + 3)
    # Of nothing and nothing the IoU is 1.
    all_s, all_t = both_s + apart_s, both_t + apart_t
    a = tl.where(all_t == 0, 1.0, both_t / tl.where(all_t == 0, 1.0, all_t))
    b = tl.where(all_s == 0, 0.0, apart_s / tl.where(all_s == 0, 1.0, all_s))
    mean = _power(a, p) * _power(b, 1 - p)
    e = tl.exp(-2 * mean)
    tanh = tl.where(mean < 0.02, mean - mean * mean * mean / 3, (1 - e) / (1 + e))
    tl.store(theta + image, tl.where(a <= threshold, epsilon, tanh).to(theta.dtype.element_ty))
    tl.store(alpha + image, a.to(alpha.dtype.element_ty))
    tl.store(beta + image, b.to(beta.dtype.element_ty))


@triton.jit
def _loss(student, teacher, truth, theta, gradient, partials, pixels, images, temperature,
          kl_factor, BLOCK: tl.constexpr):  # fmt: skip
    image, part = tl.program_id(0), tl.program_id(1)
    start = image.to(tl.int64) * pixels
    tiles = tl.cdiv(pixels, BLOCK)
    weight = tl.load(theta + image).to(tl.float32)
    kl_weight, ce_weight = weight * kl_factor / pixels, (1 - weight) / pixels
    loss = tl.zeros((BLOCK,), tl.float32)
    for tile in range(first_tile(tiles), end_tile(tiles)):
        i = tile * BLOCK + tl.arange(0, BLOCK)
        known = i < pixels
        x, g = _read(student, start + i, known), _read(truth, start + i, known)
        e, map_p, _, above, below = _logistic(x)
        ce = (1 - g) * above + g * below + _log1p(e)
        e_q, q, _, q_above, q_below = _logistic(x / temperature)
        e_p, p, not_p, p_above, p_below = _logistic(_read(teacher, start + i, known) / temperature)
        kl = not_p * (q_above - p_above) + p * (q_below - p_below) + (_log1p(e_q) - _log1p(e_p))
        loss += tl.where(known, kl_weight * kl + ce_weight * ce, 0.0)
        if gradient is not None:
            slope = kl_weight / temperature * (q - p) + ce_weight * (map_p - g)
            tl.store(gradient + start + i, slope.to(gradient.dtype.element_ty), mask=known)
    tl.store(partials + part * images + image, tl.sum(loss))


@triton.jit
def _scale(grad, gradient, out, pixels, BLOCK: tl.constexpr):
    image = tl.program_id(0)
    start = image.to(tl.int64) * pixels
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = i < pixels
    value = tl.load(grad + image).to(tl.float32) * _read(gradient, start + i, known)
    tl.store(out + start + i, value.to(out.dtype.element_ty), mask=known)


def _map(op: str, name: str, x: Tensor) -> Tensor:
    """A checked map of one channel, contiguous."""
    check_like(op, name, x, x)
    sound = x.dim() == 4 and x.shape[1] == 1 and 0 < area(x) < 2**31 - _BLOCK
    check(sound, op, f"{name} must be (B, 1, H, W), got {tuple(x.shape)}")
    return x.contiguous()


def _maps(op: str, student: Tensor, teacher: Tensor, truth: Tensor) -> list[Tensor]:
    maps = [_map(op, "student_logits", student)]
    for name, x in (("teacher_logits", teacher), ("truth", truth)):
        maps.append(check_shape(op, name, x, student.shape, student))
        check(x.dtype == student.dtype, op, f"{name} is {x.dtype}, the student {student.dtype}")
    return maps


def _grid(x: Tensor) -> tuple[int, int]:
    """Images, and the parts of each."""
    return x.shape[0], count_parts(x.shape[0], triton.cdiv(area(x), _BLOCK))


def dkd_theta(
    student_logits: Tensor,
    teacher_logits: Tensor,
    truth: Tensor,
    p: float,
    threshold: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sodfast.ops.dkd_theta`; a threshold below 0 is none."""
    op = "dkd_theta"
    maps = _maps(op, student_logits, teacher_logits, truth)
    check(0 <= p <= 1, op, f"p must be in 0–1, got {p}")
    check(threshold <= 1, op, f"threshold must be at most 1, got {threshold}")
    check(0 <= epsilon <= 1, op, f"epsilon must be in 0–1, got {epsilon}")
    images, parts = _grid(maps[0])
    theta, alpha, beta = (maps[0].new_empty(images) for _ in range(3))
    if images:
        partials = maps[0].new_empty((parts, images * 4), dtype=torch.float32)
        _sums[(images, parts)](*maps, partials, area(maps[0]), images, BLOCK=_BLOCK)
        _weigh[(images,)](
            partials, theta, alpha, beta, images, parts, float(p), float(threshold), float(epsilon)
        )
    return theta, alpha, beta


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    truth: Tensor,
    theta: Tensor,
    temperature: float,
    kl_factor: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`sodfast.ops.dkd_loss`; also the gradient to the student, or an empty tensor."""
    op = "dkd_loss"
    maps = _maps(op, student_logits, teacher_logits, truth)
    images, parts = _grid(maps[0])
    theta = check_shape(op, "theta", theta, (images,), maps[0])
    check(theta.dtype == maps[0].dtype, op, f"theta is {theta.dtype}, the student {maps[0].dtype}")
    check(0 < temperature < math.inf, op, f"temperature must be above 0, got {temperature}")
    check(0 <= kl_factor < math.inf, op, f"kl_factor must be from 0 on, got {kl_factor}")
    loss = maps[0].new_empty(images)
    gradient = maps[0].new_empty(maps[0].shape if with_gradient else 0)
    if images:
        partials = maps[0].new_empty((parts, images), dtype=torch.float32)
        _loss[(images, parts)](
            *maps, theta, gradient if with_gradient else None, partials, area(maps[0]), images,
            float(temperature), float(kl_factor), BLOCK=_BLOCK,
        )  # fmt: skip
        sum_parts(partials, [loss])
    return loss, gradient


def dkd_loss_backward(grad: Tensor, gradient: Tensor) -> Tensor:
    """The gradient to the student's logits."""
    op = "dkd_loss_backward"
    gradient = _map(op, "gradient", gradient)
    images = gradient.shape[0]
    grad = check_shape(op, "grad", grad, (images,), gradient)
    check(grad.dtype == gradient.dtype, op, f"grad is {grad.dtype}, gradient {gradient.dtype}")
    out = torch.empty_like(gradient)
    if images:
        grid = tiled(op, images, triton.cdiv(area(gradient), _BLOCK))
        _scale[grid](grad, gradient, out, area(gradient), BLOCK=_BLOCK)
    return out
