"""The fusion inside SCFNet's SCFM, and its gradients, without the upsampled map in memory.

Position d of x lies at ((2d + 1) n - N) / 2N of y, with n positions of y and N of x: whole numbers
until the weight itself. Forward: x, y and the result once, some 20 operations per number of x. The
gradient to x is the fusion of grad with y, grad in the place of x. That to y gathers: a number of y
adds up the rectangle of x that lies within one position of it, row by row; 4 reads of grad and x
per number of them, from the caches but for the first. All are bound by memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sodfast.ops._check import memory_format

from ._common import area, check, check_like, check_shape, tiled

_BLOCK = 512


@triton.jit
def _between(d, large, small, WIDE: tl.constexpr):
    """The neighbours in y of a position of x, clamped, and the weight of the second."""
    if WIDE:
        d = d.to(tl.int64)
    twice = (2 * d + 1) * small + large
    below = twice // (2 * large)
    part = (twice - below * (2 * large)).to(tl.float32) / (2 * large)
    first = tl.maximum(below - 1, 0).to(tl.int32)
    return first, tl.minimum(first + 1, small - 1), tl.where(below > 0, part, 0.0)


@triton.jit
def _fuse(x, y, out, rows, cols, small_rows, small_cols, MULTIPLY: tl.constexpr,
          WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = i < rows * cols
    row = i // cols
    r0, r1, down = _between(row, rows, small_rows, WIDE)
    c0, c1, right = _between(i - row * cols, cols, small_cols, WIDE)
    small = y + plane * small_rows * small_cols
    above = (1 - right) * tl.load(small + r0 * small_cols + c0, mask=known).to(tl.float32)
    above += right * tl.load(small + r0 * small_cols + c1, mask=known).to(tl.float32)
    below = (1 - right) * tl.load(small + r1 * small_cols + c0, mask=known).to(tl.float32)
    below += right * tl.load(small + r1 * small_cols + c1, mask=known).to(tl.float32)
    up = (1 - down) * above + down * below
    at = plane * rows * cols + i
    value = tl.load(x + at, mask=known).to(tl.float32)
    value = value + value * up if MULTIPLY else value + up
    tl.store(out + at, value.to(out.dtype.element_ty), mask=known)


@triton.jit
def _first(i, large, small, WIDE: tl.constexpr):
    """The first position of x that lies beyond position i - 1 of y."""
    if WIDE:
        i = i.to(tl.int64)
    first = ((2 * i - 1) * large + small - 1) // (2 * small)
    return tl.where(i > 0, first, 0).to(tl.int32)


@triton.jit
def _share(d, i, large, small, WIDE: tl.constexpr):
    """What position d of x weighs in position i of y; zero where d is outside."""
    if WIDE:
        d = d.to(tl.int64)
    twice = tl.minimum(tl.maximum((2 * d + 1) * small - large, 0), 2 * large * (small - 1))
    share = 1 - tl.abs(twice - i * (2 * large)).to(tl.float32) / (2 * large)
    return tl.where(d < large, tl.maximum(share, 0.0), 0.0)


@triton.jit
def _gather(grad, x, gy, rows, cols, small_rows, small_cols, most_rows, most_cols,
            MULTIPLY: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = i < small_rows * small_cols
    row = i // small_cols
    col = i - row * small_cols
    top = _first(row, rows, small_rows, WIDE)
    left = _first(col, cols, small_cols, WIDE)
    start = plane * rows * cols
    total = tl.zeros((BLOCK,), tl.float32)
    for a in range(0, most_rows):
        down = _share(top + a, row, rows, small_rows, WIDE)
        line = tl.zeros((BLOCK,), tl.float32)
        for b in range(0, most_cols):
            right = _share(left + b, col, cols, small_cols, WIDE)
            at = start + (top + a) * cols + left + b
            wanted = known & (down > 0) & (right > 0)
            value = tl.load(grad + at, mask=wanted, other=0.0).to(tl.float32)
            if MULTIPLY:
                value *= tl.load(x + at, mask=wanted, other=0.0).to(tl.float32)
            line += right * value
        total += down * line
    at = plane * small_rows * small_cols + i
    tl.store(gy + at, total.to(gy.dtype.element_ty), mask=known)


def _maps(op: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    for name, t in (("x", x), ("y", y)):
        check_like(op, name, t, x)
        sound = t.dim() == 4 and 0 < area(t) < 2**31 - _BLOCK and max(t.shape[2:]) < 2**30
        check(sound, op, f"{name} must be (B, C, H, W), got {tuple(t.shape)}")
        check(t.dtype == x.dtype, op, f"{name} is {t.dtype}, x is {x.dtype}")
    check(x.shape[:2] == y.shape[:2], op, f"y has {tuple(y.shape)}, x {tuple(x.shape)}")
    return x.contiguous(), y.contiguous()


def _sizes(x: Tensor, y: Tensor) -> tuple[tuple[int, int, int, int], bool]:
    """Rows and columns of x and y; whether twice the products of sides leave 32 bits."""
    sizes = (*x.shape[2:], *y.shape[2:])
    return sizes, any(2 * (n + 4) * (m + 4) >= 2**31 for n, m in zip(x.shape[2:], y.shape[2:]))


def _run_fuse(x: Tensor, y: Tensor, multiply: bool) -> Tensor:
    out = torch.empty_like(x)
    planes, (sizes, wide) = x.shape[0] * x.shape[1], _sizes(x, y)
    if planes:
        grid = tiled("scfm", planes, triton.cdiv(area(x), _BLOCK))
        _fuse[grid](x, y, out, *sizes, MULTIPLY=multiply, WIDE=wide, BLOCK=_BLOCK)
    return out


def scfm(x: Tensor, y: Tensor, multiply: bool) -> Tensor:
    """See :func:`sodfast.ops.scfm`."""
    return _run_fuse(*_maps("scfm", x, y), multiply).contiguous(memory_format=memory_format(x))


def scfm_backward(grad: Tensor, x: Tensor, y: Tensor, multiply: bool) -> tuple[Tensor, Tensor]:
    """The gradients to x (empty without multiply: it is grad) and to y."""
    op = "scfm_backward"
    layout = memory_format(x)
    x, y = _maps(op, x, y)
    grad = check_shape(op, "grad", grad, x.shape, x)
    check(grad.dtype == x.dtype, op, f"grad is {grad.dtype}, x is {x.dtype}")
    gx = _run_fuse(grad, y, True) if multiply else x.new_empty(0)
    gy = torch.empty_like(y)
    planes, (sizes, wide) = x.shape[0] * x.shape[1], _sizes(x, y)
    if planes:
        most = [2 * n // m + 2 for n, m in zip(x.shape[2:], y.shape[2:])]
        block = 128 if area(y) < 2**14 else 256
        grid = tiled(op, planes, triton.cdiv(area(y), block))
        _gather[grid](grad, x, gy, *sizes, *most, MULTIPLY=multiply, WIDE=wide, BLOCK=block)
    gx = gx.contiguous(memory_format=layout) if multiply else gx
    return gx, gy.contiguous(memory_format=layout)
