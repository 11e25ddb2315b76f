"""The dilated bank in one launch for all scales and branches, and its gradients.

    y_s = prelu(bias + [ Σ_t W_{s,d}[t] · x_s[p + d · t] ]_d, slope)

A program computes all branches of a tile of pixels of one scale, one after the other, as sums of
matrix products per tap: the tile of x and its surroundings come from memory once, and for the
other branches from the L1 cache. The gradient to the input sums over the branches the same way;
the gradient to the weight is summed in parts that a second launch adds up in order.

Per pixel 9·in·out multiply-adds (CSNet: 2,400), 4·(in + out) bytes in float32: the bank is bound
by arithmetic. A branch of few channels fills a sixteenth of a matrix product only: the aim is the
time of the products padded to 16 channels on tensor cores in half precision.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    OPERANDS,
    area,
    bias_prelu,
    check,
    check_scales,
    check_shapes,
    check_vector,
    count_parts,
    cumulate,
    end_tile,
    find,
    first_tile,
    load_inside,
    multiply,
    pick,
    power_of_two,
    sum_parts,
)


@triton.jit
def _weights(weight, o, c, known, ins, tap):
    """weight[o, c, tap] for o and c that broadcast to a tile."""
    return tl.load(weight + (o * ins + c) * 9 + tap, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _forward(xs, weights, bias, slope, ys, starts, in_channels, out_channels, first_out, branches,
             first_rows, dilations, height, width, OPERAND: tl.constexpr, OUTS: tl.constexpr,
             INS: tl.constexpr, PIXELS: tl.constexpr):  # fmt: skip
    s = find(tl.program_id(0), starts)
    local = tl.program_id(0) - pick(starts, s)
    rows, cols = height >> s, width >> s
    ins, outs, blocks = pick(in_channels, s), pick(out_channels, s), tl.cdiv(rows * cols, PIXELS)
    p = local % blocks * PIXELS + tl.arange(0, PIXELS)[None, :]
    b = (local // blocks).to(tl.int64)
    row, col = p // cols, p % cols
    x, y = pick(xs, s), pick(ys, s)
    for d in range(len(dilations)):
        branch = s * len(dilations) + d
        end = pick(first_rows, branch) + pick(branches, branch)
        for begin in range(pick(first_rows, branch), end, OUTS):
            o = begin + tl.arange(0, OUTS)
            total = tl.zeros((OUTS, PIXELS), tl.float32)
            for start in range(0, ins, INS):
                c = start + tl.arange(0, INS)
                planes = x + ((b * ins + c) * (rows * cols))[:, None]
                known = (o < end)[:, None] & (c < ins)[None, :]
                for tap in range(9):
                    at_row = row + (tap // 3 - 1) * pick(dilations, d)
                    at_col = col + (tap % 3 - 1) * pick(dilations, d)
                    value = load_inside(planes, (c < ins)[:, None], at_row, at_col, rows, cols)
                    w = _weights(pick(weights, s), o[:, None], c[None, :], known, ins, tap)
                    total = multiply(w, value, total, OPERAND)
            total = bias_prelu(total, bias, slope, pick(first_out, s) + o, o < end)
            at = ((b * outs + o) * (rows * cols))[:, None] + p
            mask = (o < end)[:, None] & (row < rows)
            tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _grad_input(gys, weights, gxs, starts, in_channels, out_channels, branches, first_rows,
                dilations, height, width, OPERAND: tl.constexpr, OUTS: tl.constexpr,
                INS: tl.constexpr, PIXELS: tl.constexpr):  # fmt: skip
    s = find(tl.program_id(0), starts)
    local = tl.program_id(0) - pick(starts, s)
    rows, cols = height >> s, width >> s
    ins, outs, blocks = pick(in_channels, s), pick(out_channels, s), tl.cdiv(rows * cols, PIXELS)
    in_blocks = tl.cdiv(ins, INS)
    c = local % in_blocks * INS + tl.arange(0, INS)
    p = local // in_blocks % blocks * PIXELS + tl.arange(0, PIXELS)[None, :]
    b = (local // (in_blocks * blocks)).to(tl.int64)
    row, col = p // cols, p % cols
    gy, gx = pick(gys, s), pick(gxs, s)
    total = tl.zeros((INS, PIXELS), tl.float32)
    for d in range(len(dilations)):
        branch = s * len(dilations) + d
        end = pick(first_rows, branch) + pick(branches, branch)
        for begin in range(pick(first_rows, branch), end, OUTS):
            o = begin + tl.arange(0, OUTS)
            planes = gy + ((b * outs + o) * (rows * cols))[:, None]
            known = (c < ins)[:, None] & (o < end)[None, :]
            for tap in range(9):
                at_row = row - (tap // 3 - 1) * pick(dilations, d)
                at_col = col - (tap % 3 - 1) * pick(dilations, d)
                g = load_inside(planes, (o < end)[:, None], at_row, at_col, rows, cols)
                w = _weights(pick(weights, s), o[None, :], c[:, None], known, ins, tap)
                total = multiply(w, g, total, OPERAND)
    at = ((b * ins + c) * (rows * cols))[:, None] + p
    tl.store(gx + at, total.to(gx.dtype.element_ty), mask=(c < ins)[:, None] & (row < rows))


@triton.jit
def _grad_weight(gys, xs, partials, starts, begins, in_channels, out_channels, branches,
                 first_rows, dilations, batch, height, width, size, OPERAND: tl.constexpr,
                 OUTS: tl.constexpr, INS: tl.constexpr, PIXELS: tl.constexpr):  # fmt: skip
    branch = find(tl.program_id(0), starts)
    local = tl.program_id(0) - pick(starts, branch)
    s, d = branch // len(dilations), branch % len(dilations)
    rows, cols = height >> s, width >> s
    ins, outs, blocks = pick(in_channels, s), pick(out_channels, s), tl.cdiv(rows * cols, PIXELS)
    tap, block, in_blocks = local % 9, local // 9, tl.cdiv(ins, INS)
    down, right = (tap // 3 - 1) * pick(dilations, d), (tap % 3 - 1) * pick(dilations, d)
    c = block % in_blocks * INS + tl.arange(0, INS)
    o = pick(first_rows, branch) + block // in_blocks * OUTS + tl.arange(0, OUTS)
    known_o = o < pick(first_rows, branch) + pick(branches, branch)
    gy, x = pick(gys, s), pick(xs, s)
    total = tl.zeros((OUTS, INS), tl.float32)
    for tile in range(first_tile(batch * blocks), end_tile(batch * blocks)):
        b = (tile // blocks).to(tl.int64)
        p = tile % blocks * PIXELS + tl.arange(0, PIXELS)[None, :]
        row, col = p // cols, p % cols
        gradients = gy + ((b * outs + o) * (rows * cols))[:, None]
        g = load_inside(gradients, known_o[:, None], row, col, rows, cols)
        planes = x + ((b * ins + c) * (rows * cols))[:, None]
        value = load_inside(planes, (c < ins)[:, None], row + down, col + right, rows, cols)
        total = multiply(g, tl.trans(value), total, OPERAND)
    at = (o[:, None] * ins + c[None, :]) * 9 + tap
    at += tl.program_id(1) * size + pick(begins, s)
    tl.store(partials + at, total, mask=known_o[:, None] & (c < ins)[None, :])


class _Geometry:
    """The checked shapes of one call, as the kernels want them."""

    def __init__(
        self,
        op: str,
        maps: list[Tensor],
        weights: Sequence[Tensor],
        dilations: Sequence[int],
        out_channels: Sequence[int],
    ) -> None:
        n = len(dilations)
        check(1 <= n <= 8, op, f"dilations must name 1 to 8 branches, got {n}")
        check(min(dilations) >= 1, op, f"dilations must be at least 1, got {list(dilations)}")
        wanted = n * len(maps)
        sound = len(out_channels) == wanted and min(out_channels) >= 0
        check(sound, op, f"out_channels must be {wanted} numbers from 0 on, got {out_channels}")
        self.batch, _, self.height, self.width = maps[0].shape
        rows = [list(out_channels[s * n : (s + 1) * n]) for s in range(len(maps))]
        outs = [sum(row) for row in rows]
        check(
            len(weights) == len(maps) and all(w.dim() == 4 for w in weights),
            op,
            f"weights must hold {len(maps)} tensors (out, in, 3, 3)",
        )
        ins = [w.shape[1] for w in weights]
        shapes = [(o, c, 3, 3) for o, c in zip(outs, ins)]
        self.weights = check_shapes(op, "weights", weights, shapes, maps[0])
        self.in_shapes = [(x.shape[0], c, *x.shape[2:]) for x, c in zip(maps, ins)]
        self.out_shapes = [(x.shape[0], o, *x.shape[2:]) for x, o in zip(maps, outs)]
        self.ins, self.outs, self.branches = tuple(ins), tuple(outs), tuple(out_channels)
        self.first_rows = tuple(first for row in rows for first in cumulate(row)[0])
        # A dilation past the map's size reads only zeros, however large it is.
        self.dilations = tuple(min(d, max(self.height, self.width)) for d in dilations)
        wide = max(power_of_two(max(ins), 16, 32), power_of_two(max(self.branches), 16, 32))
        self.constants = {
            "OPERAND": OPERANDS[maps[0].dtype],
            "OUTS": power_of_two(max(self.branches), 16, 32),
            "INS": power_of_two(max(ins), 16, 32),
            "PIXELS": 64,
            "num_warps": 4 if wide == 16 else 8,
            "num_stages": 1,
        }

    def tiles(self, x: Tensor) -> int:
        return self.batch * triton.cdiv(area(x), self.constants["PIXELS"])


def goctconv_dilated(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    slope: Tensor | None,
    dilations: Sequence[int],
    out_channels: Sequence[int],
) -> list[Tensor]:
    """See :func:`sodfast.ops.goctconv_dilated`."""
    op = "goctconv_dilated"
    maps = check_scales(op, "xs", xs)
    shape = _Geometry(op, maps, weights, dilations, out_channels)
    check_shapes(op, "xs", maps, shape.in_shapes, maps[0])
    first_out, total = cumulate(shape.outs)
    bias = check_vector(op, "bias", bias, total, maps[0])
    slope = check_vector(op, "slope", slope, total, maps[0])
    ys = [maps[0].new_empty(size) for size in shape.out_shapes]
    starts, programs = cumulate(shape.tiles(y) if y.shape[1] else 0 for y in ys)
    if programs:
        _forward[(programs,)](
            tuple(maps), tuple(shape.weights), bias, slope, tuple(ys), starts, shape.ins,
            shape.outs, first_out, shape.branches, shape.first_rows, shape.dilations,
            shape.height, shape.width, **shape.constants,
        )  # fmt: skip
    return ys


def goctconv_dilated_grad_input(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    out_channels: Sequence[int],
) -> list[Tensor]:
    """The gradient to xs."""
    op = "goctconv_dilated_grad_input"
    gys = check_scales(op, "grads", grads)
    shape = _Geometry(op, gys, weights, dilations, out_channels)
    check_shapes(op, "grads", gys, shape.out_shapes, gys[0])
    gxs = [gys[0].new_empty(size) for size in shape.in_shapes]
    blocks = [triton.cdiv(c, shape.constants["INS"]) for c in shape.ins]
    starts, programs = cumulate(shape.tiles(x) * n for x, n in zip(gxs, blocks))
    if programs:
        _grad_input[(programs,)](
            tuple(gys), tuple(shape.weights), tuple(gxs), starts, shape.ins, shape.outs,
            shape.branches, shape.first_rows, shape.dilations, shape.height, shape.width,
            **shape.constants,
        )  # fmt: skip
    return gxs


def goctconv_dilated_grad_weight(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    out_channels: Sequence[int],
) -> list[Tensor]:
    """The gradients to the weights."""
    op = "goctconv_dilated_grad_weight"
    maps = check_scales(op, "xs", xs)
    shape = _Geometry(op, maps, weights, dilations, out_channels)
    check_shapes(op, "xs", maps, shape.in_shapes, maps[0])
    gys = check_shapes(op, "grads", grads, shape.out_shapes, maps[0])
    found = [weight.new_empty(weight.shape) for weight in weights]
    begins, size = cumulate(weight.numel() for weight in found)
    if size == 0:
        return found
    in_blocks = [triton.cdiv(c, shape.constants["INS"]) for c in shape.ins]
    starts, programs = cumulate(
        9 * triton.cdiv(count, shape.constants["OUTS"]) * in_blocks[n // len(dilations)]
        for n, count in enumerate(shape.branches)
    )
    parts = count_parts(programs, shape.tiles(maps[0]))
    partials = maps[0].new_empty((parts, size), dtype=torch.float32)
    _grad_weight[(programs, parts)](
        tuple(gys), tuple(maps), partials, starts, begins, shape.ins, shape.outs, shape.branches,
        shape.first_rows, shape.dilations, shape.batch, shape.height, shape.width, size,
        **shape.constants,
    )  # fmt: skip
    sum_parts(partials, found)
    return found
