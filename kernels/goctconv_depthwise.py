"""Depthwise 3×3 convolution of all scales, in one launch, and its gradients.

    y_c[p] = prelu(bias_c + Σ_t w_c[t] · x_c[p + dilation · t], slope_c)

The gradient to the input is the same with the kernel turned around; the gradient to the weight,
g_w[t] = Σ_p g_y[p] · x[p + dilation · t], is summed in parts that a second launch adds up in order.

Per value: 9 multiply-adds, one read, one write (8 bytes in float32): bound by memory on every GPU.
The aim is the copy bandwidth; the eight neighbours come from the L1 cache. The gradient to the
weight reads two values and writes nothing.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    area,
    bias_prelu,
    check,
    check_scales,
    check_shape,
    check_shapes,
    check_vector,
    count_parts,
    cumulate,
    end_tile,
    find,
    first_tile,
    load_inside,
    pick,
    power_of_two,
    sum_parts,
)


@triton.jit
def _convolve(xs, w, bias, slope, ys, starts, first_channels, channels, height, width, dilation,
              FLIP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    s = find(tl.program_id(0), starts)
    local = tl.program_id(0) - pick(starts, s)
    rows, cols = height >> s, width >> s
    blocks = tl.cdiv(rows * cols, BLOCK)
    plane = local // blocks
    c = pick(first_channels, s) + plane % pick(channels, s)
    p = local % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    row, col = p // cols, p % cols
    x = pick(xs, s) + plane.to(tl.int64) * (rows * cols)
    total = tl.zeros((1, BLOCK), tl.float32)
    for t in tl.static_range(9):
        weight = tl.load(w + c * 9 + (8 - t if FLIP else t)).to(tl.float32)
        at_row, at_col = row + (t // 3 - 1) * dilation, col + (t % 3 - 1) * dilation
        total += weight * load_inside(x, True, at_row, at_col, rows, cols)
    total = bias_prelu(total, bias, slope, c + tl.arange(0, 1), True)
    y = pick(ys, s) + plane.to(tl.int64) * (rows * cols)
    tl.store(y + p, total.to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def _correlate(gys, xs, partials, starts, channels, batch, height, width, dilation, size,
               BLOCK: tl.constexpr):  # fmt: skip
    s = find(tl.program_id(0), starts)
    c = tl.program_id(0) - pick(starts, s)
    rows, cols = height >> s, width >> s
    gy, x = pick(gys, s), pick(xs, s)
    blocks = tl.cdiv(rows * cols, BLOCK)
    t = tl.arange(0, 16)[:, None]  # the nine taps, and nothing
    down, right = (t // 3 - 1) * dilation, (t % 3 - 1) * dilation
    sums = tl.zeros((16, BLOCK), tl.float32)
    for tile in range(first_tile(batch * blocks), end_tile(batch * blocks)):
        p = tile % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
        row, col = p // cols, p % cols
        start = ((tile // blocks).to(tl.int64) * pick(channels, s) + c) * (rows * cols)
        g = load_inside(gy + start, True, row, col, rows, cols)
        sums += g * load_inside(x + start, t < 9, row + down, col + right, rows, cols)
    at = partials + tl.program_id(1) * size + tl.program_id(0) * 9 + tl.arange(0, 16)
    tl.store(at, tl.sum(sums, axis=1), mask=tl.arange(0, 16) < 9)


def _run(
    op: str,
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    dilation: int,
    flip: bool,
) -> list[Tensor]:
    maps = check_scales(op, "grads" if flip else "xs", xs)
    channels = [x.shape[1] for x in maps]
    batch, _, height, width = maps[0].shape
    weight = check_shape(op, "weight", weight, (sum(channels), 1, 3, 3), maps[0])
    bias = check_vector(op, "bias", bias, sum(channels), maps[0])
    slope = check_vector(op, "slope", slope, sum(channels), maps[0])
    check(dilation >= 1, op, f"dilation must be at least 1, got {dilation}")
    ys = [x.new_empty(x.shape) for x in maps]
    block = power_of_two(height * width, 64, 1024)
    first_channels, _ = cumulate(channels)
    starts, programs = cumulate(batch * x.shape[1] * triton.cdiv(area(x), block) for x in maps)
    if programs:
        reach = min(dilation, max(height, width))  # a tap past the map reads zeros from there on
        _convolve[(programs,)](
            tuple(maps), weight, bias, slope, tuple(ys), starts, first_channels, tuple(channels),
            height, width, reach, FLIP=flip, BLOCK=block,
        )  # fmt: skip
    return ys


def goctconv_depthwise(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    dilation: int,
) -> list[Tensor]:
    """See :func:`sodfast.ops.goctconv_depthwise`."""
    return _run("goctconv_depthwise", xs, weight, bias, slope, dilation, False)


def goctconv_depthwise_grad_input(
    grads: Sequence[Tensor], weight: Tensor, dilation: int
) -> list[Tensor]:
    """The gradient to xs."""
    return _run("goctconv_depthwise_grad_input", grads, weight, None, None, dilation, True)


def goctconv_depthwise_grad_weight(
    grads: Sequence[Tensor], xs: Sequence[Tensor], weight: Tensor, dilation: int
) -> Tensor:
    """The gradient to the weight."""
    op = "goctconv_depthwise_grad_weight"
    maps = check_scales(op, "xs", xs)
    gradients = check_shapes(op, "grads", grads, [x.shape for x in maps], maps[0])
    channels = [x.shape[1] for x in maps]
    check_shape(op, "weight", weight, (sum(channels), 1, 3, 3), maps[0])
    check(dilation >= 1, op, f"dilation must be at least 1, got {dilation}")
    found = weight.new_empty(weight.shape)
    if found.numel() == 0:
        return found
    batch, _, height, width = maps[0].shape
    block = power_of_two(height * width, 64, 256)
    starts, programs = cumulate(channels)
    parts = count_parts(programs, batch * triton.cdiv(height * width, block))
    partials = weight.new_empty((parts, weight.numel()), dtype=torch.float32)
    _correlate[(programs, parts)](
        tuple(gradients), tuple(maps), partials, starts, tuple(channels), batch, height, width,
        min(dilation, max(height, width)), weight.numel(), BLOCK=block,
    )  # fmt: skip
    sum_parts(partials, [found])
    return found
