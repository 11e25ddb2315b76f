"""Cross-scale convolution (gOctConv) in one launch for all output scales, and its gradients.

    y_j = prelu(bias_j + Σ_{i<=j} W_ji * pool(x_i) + Σ_{i>j} up(W_ji * x_i), slope_j)

pool is the maximum over 2^(j-i) (after a 2×2 average with stride 2), up is bilinear. Both happen
on load: a program computes a tile (output channels × pixels) of one scale as a sum of matrix
products W_ji[tap] · gathered(x_i); nothing but y is written. The linear up and the convolution
change places: each tap reads the four coarse values around its pixel.

The gradient to the input is the same sum with the transpose of up in place of pool, and with the
products that belong to a coarser output going only to the first maximum of each window. The
gradient to the weight multiplies gathered gradients and gathered inputs at the coarser scale of
each pair; it is summed in parts that a second launch adds up in order.

Per pixel and output channel in·k² multiply-adds. Bytes: every x once and every y once; neighbours,
windows and further blocks of output channels come from the caches. With the channels of CSNet (9
to 40) a 1×1 makes 10 to 40 FLOP a byte in half precision, far under what tensor cores need to be
busy: the aim is the copy bandwidth. In float32 the products are not rounded to TF32: there, more
than about 16 channels are bound by the FMA units.
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
    check_shape,
    check_shapes,
    check_vector,
    count_parts,
    cumulate,
    end_tile,
    find,
    first_tile,
    multiply,
    pick,
    power_of_two,
    sum_parts,
)
from ._resample import first_maximum, gathered, pooled, strided, upsampled

# ---- the kernels --------------------------------------------------------------------------------


@triton.jit
def _weights(weight, o, c, known, inputs, tap, KERNEL: tl.constexpr):
    """weight[o, c, tap] for o and c that broadcast to a tile."""
    at = (o * inputs + c) * (KERNEL * KERNEL) + tap
    return tl.load(weight + at, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _forward(xs, weight, bias, slope, ys, starts, in_channels, out_channels, first_in, first_out,
             all_in, areas, pitches, batch, height, width, STRIDE: tl.constexpr,
             KERNEL: tl.constexpr, OPERAND: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
             PIXELS: tl.constexpr):  # fmt: skip
    j = find(tl.program_id(0), starts)
    local = tl.program_id(0) - pick(starts, j)
    outs, begin = pick(out_channels, j), pick(first_out, j)
    rows, cols = height >> j, width >> j
    out_blocks, blocks = tl.cdiv(outs, OUTS), tl.cdiv(rows * cols, PIXELS)
    o = local % out_blocks * OUTS + tl.arange(0, OUTS)
    p = local // out_blocks % blocks * PIXELS + tl.arange(0, PIXELS)[None, :]
    b = (local // (out_blocks * blocks)).to(tl.int64)
    row, col = p // cols, p % cols
    total = tl.zeros((OUTS, PIXELS), tl.float32)
    for i in range(len(xs)):
        ins, pitch = pick(in_channels, i), pick(pitches, i)
        for start in range(0, ins, INS):
            c = start + tl.arange(0, INS)
            planes = pick(xs, i) + ((b * ins + c) * pick(areas, i))[:, None]
            known = (c < ins)[:, None]
            known_w = (o < outs)[:, None] & (c < ins)[None, :]
            for tap in range(KERNEL * KERNEL):
                down, right = tap // KERNEL - KERNEL // 2, tap % KERNEL - KERNEL // 2
                if i <= j:
                    x = pooled(planes, known, row + down, col + right, height >> i, width >> i,
                                pitch, j - i, STRIDE)  # fmt: skip
                else:
                    x = upsampled(planes, known, row, col, down, right, height >> i, width >> i,
                                   pitch, i - j, STRIDE)  # fmt: skip
                w = _weights(weight, begin + o[:, None], pick(first_in, i) + c[None, :], known_w,
                             all_in, tap, KERNEL)  # fmt: skip
                total = multiply(w, x, total, OPERAND)
    total = bias_prelu(total, bias, slope, begin + o, o < outs)
    y = pick(ys, j)
    at = ((b * outs + o) * (rows * cols))[:, None] + p
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(o < outs)[:, None] & (row < rows))


@triton.jit
def _grad_input(gys, xs, weight, gxs, starts, in_channels, out_channels, first_in, first_out,
                all_in, areas, pitches, batch, height, width, STRIDE: tl.constexpr,
                KERNEL: tl.constexpr, OPERAND: tl.constexpr, OUTS: tl.constexpr,
                INS: tl.constexpr, PIXELS: tl.constexpr):  # fmt: skip
    i = find(tl.program_id(0), starts)
    local = tl.program_id(0) - pick(starts, i)
    ins, begin = pick(in_channels, i), pick(first_in, i)
    rows, cols, pitch = height >> i, width >> i, pick(pitches, i)
    stored = pick(areas, i) // pitch
    # With stride 2 a pixel is a 2×2 window; one that an odd size cuts gets zeros.
    tile_rows, tile_cols = tl.cdiv(stored, STRIDE), tl.cdiv(pitch, STRIDE)
    in_blocks, blocks = tl.cdiv(ins, INS), tl.cdiv(tile_rows * tile_cols, PIXELS)
    c = local % in_blocks * INS + tl.arange(0, INS)
    p = local // in_blocks % blocks * PIXELS + tl.arange(0, PIXELS)[None, :]
    b = (local // (in_blocks * blocks)).to(tl.int64)
    row, col = p // tile_cols, p % tile_cols
    known = (c < ins)[:, None]
    plane = ((b * ins + c) * pick(areas, i))[:, None]
    total = tl.zeros((INS, PIXELS), tl.float32)
    for j in range(len(gys)):
        outs = pick(out_channels, j)
        out_rows, out_cols = height >> j, width >> j
        part = tl.zeros((INS, PIXELS), tl.float32)
        for start in range(0, outs, OUTS):
            o = start + tl.arange(0, OUTS)
            planes = pick(gys, j) + ((b * outs + o) * (out_rows * out_cols))[:, None]
            known_o = (o < outs)[:, None]
            for tap in range(KERNEL * KERNEL):
                down, right = tap // KERNEL - KERNEL // 2, tap % KERNEL - KERNEL // 2
                if j <= i:
                    g = gathered(planes, known_o, row - down, col - right, rows, cols, i - j)
                else:
                    g = strided(planes, known_o, (row >> j - i) - down, (col >> j - i) - right,
                                 out_rows, out_cols, out_cols, 1)  # fmt: skip
                w = _weights(weight, pick(first_out, j) + o[None, :], begin + c[:, None],
                             known & (o < outs)[None, :], all_in, tap, KERNEL)  # fmt: skip
                part = multiply(w, g, part, OPERAND)
        if j > i:
            maximum = first_maximum(pick(xs, i) + plane, known, row, col, rows, cols, pitch,
                                     j - i, STRIDE)  # fmt: skip
            part = tl.where(maximum, part, 0.0)
        total += part
    if STRIDE == 2:
        total = tl.where((row < rows) & (col < cols), 0.25 * total, 0.0)
    gx = pick(gxs, i)
    for n in tl.static_range(STRIDE * STRIDE):
        at_row, at_col = STRIDE * row + n // STRIDE, STRIDE * col + n % STRIDE
        mask = known & ((at_row < stored) & (at_col < pitch))
        at = gx + plane + (at_row * pitch + at_col)
        tl.store(at, total.to(gx.dtype.element_ty), mask=mask)


@triton.jit
def _grad_weight(gys, xs, partials, starts, in_channels, out_channels, first_in, first_out, all_in,
                 areas, pitches, batch, height, width, size, STRIDE: tl.constexpr,
                 KERNEL: tl.constexpr, OPERAND: tl.constexpr, OUTS: tl.constexpr,
                 INS: tl.constexpr, PIXELS: tl.constexpr):  # fmt: skip
    pair = find(tl.program_id(0), starts)
    local = tl.program_id(0) - pick(starts, pair)
    j, i = pair // len(xs), pair % len(xs)
    outs, ins, pitch = pick(out_channels, j), pick(in_channels, i), pick(pitches, i)
    tap = local % (KERNEL * KERNEL)
    down, right = tap // KERNEL - KERNEL // 2, tap % KERNEL - KERNEL // 2
    block = local // (KERNEL * KERNEL)
    o = block % tl.cdiv(outs, OUTS) * OUTS + tl.arange(0, OUTS)
    c = block // tl.cdiv(outs, OUTS) * INS + tl.arange(0, INS)
    coarser = tl.maximum(i, j)
    rows, cols = height >> coarser, width >> coarser
    blocks = tl.cdiv(rows * cols, PIXELS)
    total = tl.zeros((OUTS, INS), tl.float32)
    for tile in range(first_tile(batch * blocks), end_tile(batch * blocks)):
        b = (tile // blocks).to(tl.int64)
        p = tile % blocks * PIXELS + tl.arange(0, PIXELS)[None, :]
        row, col = p // cols, p % cols
        gradients = pick(gys, j) + ((b * outs + o) * ((height >> j) * (width >> j)))[:, None]
        g = gathered(gradients, (o < outs)[:, None], row, col, rows, cols, coarser - j)
        values = pick(xs, i) + ((b * ins + c) * pick(areas, i))[:, None]
        x = pooled(values, (c < ins)[:, None], row + down, col + right, height >> i, width >> i,
                    pitch, coarser - i, STRIDE)  # fmt: skip
        total = multiply(g, tl.trans(x), total, OPERAND)
    at = (pick(first_out, j) + o)[:, None] * all_in + (pick(first_in, i) + c)[None, :]
    at = tl.program_id(1) * size + at * (KERNEL * KERNEL) + tap
    tl.store(partials + at, total, mask=(o < outs)[:, None] & (c < ins)[None, :])


# ---- the ops ------------------------------------------------------------------------------------


class _Geometry:
    """The checked shapes of one call, as the kernels want them."""

    def __init__(
        self,
        op: str,
        xs: Sequence[Tensor],
        weight: Tensor,
        out_channels: Sequence[int],
        stride: int,
    ) -> None:
        self.maps = check_scales(op, "xs", xs)
        check(stride in (1, 2), op, f"stride must be 1 or 2, got {stride}")
        check(1 <= len(out_channels) <= 4, op, f"1 to 4 output scales, not {len(out_channels)}")
        check(min(out_channels) >= 0, op, f"out_channels must not be negative: {out_channels}")
        batch, _, height, width = self.maps[0].shape
        self.height, self.width = height // stride, width // stride
        self.in_channels = tuple(x.shape[1] for x in self.maps)
        self.out_channels = tuple(out_channels)
        kernel = weight.shape[-1] if weight.dim() == 4 else 1
        check(kernel in (1, 3), op, f"weight must be 1x1 or 3x3, got {tuple(weight.shape)}")
        shape = (sum(out_channels), sum(self.in_channels), kernel, kernel)
        self.weight = check_shape(op, "weight", weight, shape, self.maps[0])
        for i, x in enumerate(self.maps):
            size = x.shape[2] // stride << i, x.shape[3] // stride << i
            check(
                size == (self.height, self.width), op, f"xs[{i}] does not divide by {stride << i}"
            )
        coarsest = 1 << (len(out_channels) - 1)
        check(
            self.height > 0
            and self.width > 0
            and self.height % coarsest == 0
            and self.width % coarsest == 0,
            op,
            f"{self.height}x{self.width} does not divide by {coarsest}",
        )
        self.out_shapes = [
            (batch, channels, self.height >> j, self.width >> j)
            for j, channels in enumerate(out_channels)
        ]
        self.batch, self.kernel, self.stride = batch, kernel, stride

    def arguments(self) -> tuple:
        areas = tuple(map(area, self.maps))
        pitches = tuple(x.shape[3] for x in self.maps)
        channels = self.in_channels, self.out_channels
        (first_in, all_in), (first_out, _) = map(cumulate, channels)
        return (
            *channels,
            first_in,
            first_out,
            all_in,
            areas,
            pitches,
            self.batch,
            self.height,
            self.width,
        )

    def constants(self) -> dict:
        outs = power_of_two(max(self.out_channels), 16, 64)
        ins = power_of_two(max(self.in_channels), 16, 64)
        wide = max(
            outs, ins
        )  # 8 values of the gathered tile a thread: more would not fit registers
        return {
            "OPERAND": OPERANDS[self.maps[0].dtype],
            "STRIDE": self.stride,
            "KERNEL": self.kernel,
            "OUTS": outs,
            "INS": ins,
            "PIXELS": 32 if wide > 32 else 64,
            "num_warps": 4 if wide == 16 else 8,
            "num_stages": 1,
        }


def goctconv(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    out_channels: Sequence[int],
    stride: int,
) -> list[Tensor]:
    """See :func:`sodfast.ops.goctconv`."""
    op = "goctconv"
    shape = _Geometry(op, xs, weight, out_channels, stride)
    bias = check_vector(op, "bias", bias, sum(out_channels), shape.maps[0])
    slope = check_vector(op, "slope", slope, sum(out_channels), shape.maps[0])
    ys = [shape.maps[0].new_empty(size) for size in shape.out_shapes]
    constants = shape.constants()
    starts, programs = cumulate(
        shape.batch
        * triton.cdiv(area(y), constants["PIXELS"])
        * triton.cdiv(y.shape[1], constants["OUTS"])
        for y in ys
    )
    if programs:
        _forward[(programs,)](
            tuple(shape.maps), shape.weight, bias, slope, tuple(ys), starts,
            *shape.arguments(), **constants,
        )  # fmt: skip
    return ys


def goctconv_grad_input(
    grads: Sequence[Tensor], xs: Sequence[Tensor], weight: Tensor, stride: int
) -> list[Tensor]:
    """The gradient to xs."""
    op = "goctconv_grad_input"
    shape = _Geometry(op, xs, weight, _channels(op, grads), stride)
    gys = check_shapes(op, "grads", grads, shape.out_shapes, shape.maps[0])
    gxs = [x.new_empty(x.shape) for x in shape.maps]
    constants = shape.constants()
    counts = []
    for x in gxs:
        pixels = triton.cdiv(x.shape[2], stride) * triton.cdiv(x.shape[3], stride)
        tiles = triton.cdiv(pixels, constants["PIXELS"])
        counts.append(shape.batch * tiles * triton.cdiv(x.shape[1], constants["INS"]))
    starts, programs = cumulate(counts)
    if programs:
        _grad_input[(programs,)](
            tuple(gys), tuple(shape.maps), shape.weight, tuple(gxs), starts,
            *shape.arguments(), **constants,
        )  # fmt: skip
    return gxs


def goctconv_grad_weight(
    grads: Sequence[Tensor], xs: Sequence[Tensor], weight: Tensor, stride: int
) -> Tensor:
    """The gradient to the weight."""
    op = "goctconv_grad_weight"
    shape = _Geometry(op, xs, weight, _channels(op, grads), stride)
    gys = check_shapes(op, "grads", grads, shape.out_shapes, shape.maps[0])
    found = weight.new_empty(weight.shape)
    if found.numel() == 0:
        return found
    constants = shape.constants()
    starts, programs = cumulate(
        triton.cdiv(outs, constants["OUTS"]) * triton.cdiv(ins, constants["INS"]) * shape.kernel**2
        for outs in shape.out_channels
        for ins in shape.in_channels
    )
    tiles = shape.batch * triton.cdiv(shape.height * shape.width, constants["PIXELS"])
    parts = count_parts(programs, tiles)
    partials = weight.new_empty((parts, weight.numel()), dtype=torch.float32)
    _grad_weight[(programs, parts)](
        tuple(gys),
        tuple(shape.maps),
        partials,
        starts,
        *shape.arguments(),
        weight.numel(),
        **constants,
    )
    sum_parts(partials, [found])
    return found


def _channels(op: str, grads: Sequence[Tensor]) -> list[int]:
    check(all(g.dim() == 4 for g in grads), op, "grads must be (B, C, H, W) each")
    return [g.shape[1] for g in grads]
