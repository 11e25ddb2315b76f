"""The boundary of soft maps, the sums of the structure polishing loss, and their gradients.

    t = z - erode₃(z)   or   dilate₃(z) - z   or   dilate₃(z) - erode₃(z)       b = max-pool_k(t)

Forward, three launches: t over tiles of 32 x 64 pixels, its maxima of k along the rows, theirs down
the columns. A tile of the latter two reads 128 positions of each of 32 lines once, k - 1 of which
are its neighbour's too. In registers, the maxima of 2 come from two of 1, those of 4 from two of 2,
and in the end those of k from two that overlap: log2(k) steps, each an exchange inside the warps.

Backward, five launches: t and its maxima along the rows again; the gradient down the columns, then
along the rows; that of z. A tile of the middle two makes its maxima anew and keeps a bit per step,
which of the two had it; then it takes the steps back and hands the gradient of every window to the
one that had it, until all has come to the position of the maximum. For z a pixel asks the nine
3 x 3 windows that see it. No atomics; in which order sums are made follows from k.

Per pixel of a large map in float32, the caches serve

                                              k = 1     3    13    31
    forward    a direction: reads               1.0   1.0   1.1   1.3
                            steps                 0     2     4     5
    backward   a direction: reads               2.0   2.1   2.5   3.8
                            steps, back too       0     4     8    10
               the maxima along the rows: as forward

beside 10 reads for t and 19 for the gradient of z. Memory moves 24 bytes forward and 50 backward at
any k; 8 and 12 have to. t is never negative: -1 is below all of it. THIN is 1, 2 or 3, in the order
above. With LOGISTIC the map is sigmoid(z): its extremes are where those of z are.
"""

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

_ROWS, _COLS, _BLOCK = 32, 64, 1024
_LINES, _SPAN = 32, 128


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _place(cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Row (ROWS, 1) and column (1, COLS) of a program's pixels."""
    across = tl.cdiv(cols, COLS)
    tile = tl.program_id(1)
    row = tile // across * ROWS + tl.arange(0, ROWS)[:, None]
    return row, tile % across * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def _thin(z, t, extremes, rows, cols, THIN: tl.constexpr, LOGISTIC: tl.constexpr,
          ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """t; and where asked for the place of the minimum in its window, 16 · that of the maximum."""
    row, col = _place(cols, ROWS, COLS)
    known = (row < rows) & (col < cols)
    start = tl.program_id(0).to(tl.int64) * rows * cols
    here = tl.load(z + start + row * cols + col, mask=known, other=0.0).to(tl.float32)
    low, high = here, here
    lowest, highest = tl.zeros((ROWS, COLS), tl.int32), tl.zeros((ROWS, COLS), tl.int32)
    for i in tl.static_range(9):
        v = tl.minimum(tl.maximum(row + (i // 3 - 1), 0), rows - 1)
        h = tl.minimum(tl.maximum(col + (i % 3 - 1), 0), cols - 1)
        value = tl.load(z + start + v * cols + h, mask=known, other=0.0).to(tl.float32)
        place = 3 * (v - row + 1) + h - col + 1
        lower = (value < low) | (value != value)
        higher = (value > high) | (value != value)
        if i == 0:
            lower, higher = known, known
        low, lowest = tl.where(lower, value, low), tl.where(lower, place, lowest)
        high, highest = tl.where(higher, value, high), tl.where(higher, place, highest)
    low = low if THIN != 2 else here
    high = high if THIN != 1 else here
    if LOGISTIC:
        low, high = _sigmoid(low), _sigmoid(high)
    tl.store(t + start + row * cols + col, high - low, mask=known)
    if extremes is not None:
        code = (lowest + 16 * highest).to(tl.uint8)
        tl.store(extremes + start + row * cols + col, code, mask=known)


@triton.jit
def _place_on_lines(lines, own, before, LINES: tl.constexpr, SPAN: tl.constexpr):
    """Lines (LINES, 1) of a program and positions on them (1, SPAN): some before its own."""
    blocks = tl.cdiv(lines, LINES)
    tile = tl.program_id(1)
    line = tile % blocks * LINES + tl.arange(0, LINES)[:, None]
    return line, tile // blocks * own - before + tl.arange(0, SPAN)[None, :]


@triton.jit
def _ahead(x, by):
    """x from so many positions further on. Lines are rings: what comes round is never used."""
    position = (tl.arange(0, x.shape[1]) + by) & (x.shape[1] - 1)  # a power of two, less one
    return tl.gather(x, tl.broadcast_to(position[None, :], x.shape), 1)


@triton.jit
def _distance(step, K):
    """How far apart the two windows start that a step joins: of 1, 2, 4, ... up to K in all."""
    return tl.minimum(1 << step, K - (1 << step))


@triton.jit
def _maxima(best, K, STEPS):
    """Of the K positions from each on; bit n: in step n the window further on had it.

    The earlier of equal maxima wins and the last NaN, as in torch.nn.functional.max_pool2d.
    """
    choices = tl.zeros(best.shape, tl.int32)
    for step in range(STEPS):
        value = _ahead(best, _distance(step, K))
        better = (value > best) | (value != value)
        best = tl.where(better, value, best)
        choices |= better.to(tl.int32) << step
    return best, choices


@triton.jit
def _pool(t, out, lines, length, line_stride, stride, K, STEPS, LINES: tl.constexpr,
          SPAN: tl.constexpr):  # fmt: skip
    """The maxima of K along lines, which are rows or columns as their strides say."""
    own = SPAN - K + 1
    line, position = _place_on_lines(lines, own, K // 2, LINES, SPAN)
    known = (line < lines) & (position >= 0) & (position < length)
    start = tl.program_id(0).to(tl.int64) * lines * length + line * line_stride
    value = tl.load(t + start + position * stride, mask=known, other=-1.0)
    best, _ = _maxima(value, K, STEPS)
    centre = position + K // 2
    whole = (line < lines) & (centre < length) & (tl.arange(0, SPAN)[None, :] < own)
    tl.store(out + start + centre * stride, best.to(out.dtype.element_ty), mask=whole)


@triton.jit
def _route(grad, weights, t, out, lines, length, line_stride, stride, K, STEPS,
           LINES: tl.constexpr, SPAN: tl.constexpr):  # fmt: skip
    """The gradient of t from that of its maxima; with weights grad is made of b."""
    line, position = _place_on_lines(lines, SPAN - 2 * (K - 1), K - 1, LINES, SPAN)
    known = (line < lines) & (position >= 0) & (position < length)
    plane = tl.program_id(0).to(tl.int64)
    start = plane * lines * length + line * line_stride
    value = tl.load(t + start + position * stride, mask=known, other=-1.0)
    _, choices = _maxima(value, K, STEPS)
    centre = position + K // 2  # of the window that starts at a position
    exists = (line < lines) & (centre >= 0) & (centre < length)
    total = tl.load(grad + start + centre * stride, mask=exists, other=0.0).to(tl.float32)
    if weights is not None:
        of_product = tl.load(weights + plane * 6 + 3).to(tl.float32)
        total = of_product * total + tl.load(weights + plane * 6 + 4).to(tl.float32)
        total = tl.where(exists, total, 0.0)
    for back in range(STEPS):
        step = STEPS - 1 - back
        moves = ((choices >> step) & 1) != 0
        moved = _ahead(tl.where(moves, total, 0.0), -_distance(step, K))
        total = tl.where(moves, 0.0, total) + moved
    i = tl.arange(0, SPAN)[None, :]
    own = known & (i >= K - 1) & (i <= SPAN - K)  # seen by no window that the tile cuts
    tl.store(out + start + position * stride, total, mask=own)


@triton.jit
def _route_thin(thin, extremes, logits, truth, weights, out, rows, cols, THIN: tl.constexpr,
                ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """The gradient of z from that of t; with logits, the gradient of the loss to them."""
    row, col = _place(cols, ROWS, COLS)
    known = (row < rows) & (col < cols)
    plane = tl.program_id(0).to(tl.int64)
    start = plane * rows * cols
    at = start + row * cols + col
    total = tl.zeros((ROWS, COLS), tl.float32)
    if THIN == 1:
        total = tl.load(thin + at, mask=known, other=0.0)
    if THIN == 2:
        total = -tl.load(thin + at, mask=known, other=0.0)
    for i in tl.static_range(9):  # the window centred there: this pixel is its place 8 - i
        v, h = row + (i // 3 - 1), col + (i % 3 - 1)
        inside = known & (v >= 0) & (v < rows) & (h >= 0) & (h < cols)
        there = start + v * cols + h
        code = tl.load(extremes + there, mask=inside, other=255).to(tl.int32)
        of_window = tl.load(thin + there, mask=inside, other=0.0)
        if THIN != 2:
            total -= tl.where(code % 16 == 8 - i, of_window, 0.0)
        if THIN != 1:
            total += tl.where(code // 16 == 8 - i, of_window, 0.0)
    if logits is not None:
        p = _sigmoid(tl.load(logits + at, mask=known, other=0.0).to(tl.float32))
        g = tl.load(truth + at, mask=known, other=0.0).to(tl.float32)
        of_product = tl.load(weights + plane * 6).to(tl.float32)
        of_map = tl.load(weights + plane * 6 + 1).to(tl.float32)
        total = (total + (of_product * g + of_map)) * (p * (1 - p))
    tl.store(out + at, total.to(out.dtype.element_ty), mask=known)


@triton.jit
def _sum_maps(logits, truth, edge, true_edge, partials, pixels, images, BLOCK: tl.constexpr):
    image, part = tl.program_id(0), tl.program_id(1)
    start = image.to(tl.int64) * pixels
    tiles = tl.cdiv(pixels, BLOCK)
    both, edges = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    of_map, of_edge = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    of_truth, of_true = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for tile in range(first_tile(tiles), end_tile(tiles)):
        i = tile * BLOCK + tl.arange(0, BLOCK)
        known = i < pixels
        p = _sigmoid(tl.load(logits + start + i, mask=known, other=0.0).to(tl.float32))
        p = tl.where(known, p, 0.0)
        g = tl.load(truth + start + i, mask=known, other=0.0).to(tl.float32)
        both, of_map, of_truth = both + p * g, of_map + p, of_truth + g
        a = tl.load(edge + start + i, mask=known, other=0.0)
        b = tl.load(true_edge + start + i, mask=known, other=0.0)
        edges, of_edge, of_true = edges + a * b, of_edge + a, of_true + b
    to = partials + (part * images + image) * 6
    tl.store(to, tl.sum(both))
    tl.store(to + 1, tl.sum(of_map))
    tl.store(to + 2, tl.sum(of_truth))
    tl.store(to + 3, tl.sum(edges))
    tl.store(to + 4, tl.sum(of_edge))
    tl.store(to + 5, tl.sum(of_true))


def _maps(op: str, name: str, z: Tensor, k: int, thin: int = 1) -> Tensor:
    """A checked map, contiguous."""
    check_like(op, name, z, z)
    sound = z.dim() == 4 and 0 < area(z) < 2**31 - _ROWS * _COLS
    check(sound, op, f"{name} must be (B, C, H, W), got {tuple(z.shape)}")
    check(1 <= k <= 31 and k % 2 == 1, op, f"k must be odd and from 1 to 31, got {k}")
    check(1 <= thin <= 3, op, f"thin must be 1, 2 or 3, got {thin}")
    return z.contiguous()


def _pair(op: str, logits: Tensor, truth: Tensor, k: int) -> tuple[Tensor, Tensor]:
    logits = _maps(op, "logits", logits, k)
    check(logits.shape[1] == 1, op, f"logits must be (B, 1, H, W), got {tuple(logits.shape)}")
    check(truth.dtype == logits.dtype, op, f"truth is {truth.dtype}, logits {logits.dtype}")
    return logits, check_shape(op, "truth", truth, logits.shape, logits)


def _grid(z: Tensor) -> tuple[int, int]:
    tiles = triton.cdiv(z.shape[2], _ROWS) * triton.cdiv(z.shape[3], _COLS)
    return tiled("boundary", z.shape[0] * z.shape[1], tiles)


def _lines(z: Tensor, k: int, down: bool, shared: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Grid and sizes of a kernel along lines, whose tiles share so many positions with the next."""
    rows, cols = z.shape[2:]
    lines, length, *strides = (cols, rows, 1, cols) if down else (rows, cols, cols, 1)
    tiles = triton.cdiv(lines, _LINES) * triton.cdiv(length, _SPAN - shared)
    grid = tiled("boundary", z.shape[0] * z.shape[1], tiles)
    return grid, (lines, length, *strides, k, (k - 1).bit_length())


_TILE = {"ROWS": _ROWS, "COLS": _COLS, "num_warps": 16}  # 4 pixels a thread
_LINE_TILE = {"LINES": _LINES, "SPAN": _SPAN, "num_warps": 16}  # 8; a line is in one warp


def _thinned(
    z: Tensor, thin: int, logistic: bool, record: bool = False
) -> tuple[Tensor, Tensor | None]:
    """t; and with record where in the 3 x 3 windows the extremes are."""
    t = torch.empty_like(z, dtype=torch.float32)
    extremes = torch.empty_like(z, dtype=torch.uint8) if record else None
    _thin[_grid(z)](z, t, extremes, *z.shape[2:], THIN=thin, LOGISTIC=logistic, **_TILE)
    return t, extremes


def _pooled(t: Tensor, k: int, down: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """The maxima of k along the rows of t, or down its columns."""
    out = torch.empty_like(t, dtype=dtype)
    grid, sizes = _lines(t, k, down, k - 1)
    _pool[grid](t, out, *sizes, **_LINE_TILE)
    return out


def _routed(grad: Tensor, weights: Tensor | None, t: Tensor, k: int) -> Tensor:
    """The gradient of t from that of the boundary."""
    along = _pooled(t, k, down=False)
    grid, sizes = _lines(t, k, True, 2 * (k - 1))
    of_along = torch.empty_like(t)
    _route[grid](grad, weights, along, of_along, *sizes, **_LINE_TILE)
    grid, sizes = _lines(t, k, False, 2 * (k - 1))
    of_thin = along  # which is not needed any more
    _route[grid](of_along, None, t, of_thin, *sizes, **_LINE_TILE)
    return of_thin


def _thick(z: Tensor, k: int, thin: int, logistic: bool, dtype: torch.dtype) -> Tensor:
    """The boundary."""
    t, _ = _thinned(z, thin, logistic)
    return _pooled(_pooled(t, k, down=False), k, down=True, dtype=dtype)


def boundary(z: Tensor, k: int, thin: int) -> Tensor:
    """See :func:`sodfast.ops.boundary`; thin is 1 (inner), 2 (outer) or 3 (both)."""
    z = _maps("boundary", "z", z, k, thin)
    if z.numel() == 0:
        return torch.empty_like(z)
    return _thick(z, k, thin, logistic=False, dtype=z.dtype)


def boundary_backward(grad: Tensor, z: Tensor, k: int, thin: int) -> Tensor:
    """The gradient to z."""
    op = "boundary_backward"
    z = _maps(op, "z", z, k, thin)
    grad = check_shape(op, "grad", grad, z.shape, z)
    check(grad.dtype == z.dtype, op, f"grad is {grad.dtype}, z is {z.dtype}")
    out = torch.empty_like(z)
    if z.numel():
        t, extremes = _thinned(z, thin, logistic=False, record=True)
        of_thin = _routed(grad, None, t, k)
        _route_thin[_grid(z)](
            of_thin, extremes, None, None, None, out, *z.shape[2:], THIN=thin, **_TILE
        )
    return out


def structure_polishing_sums(logits: Tensor, truth: Tensor, k: int) -> Tensor:
    """See :func:`sodfast.ops.structure_polishing_sums`."""
    logits, truth = _pair("structure_polishing_sums", logits, truth, k)
    images = logits.shape[0]
    sums = logits.new_empty((images, 2, 3))
    if images:
        edges = [
            _thick(z, k, 1, logistic=logistic, dtype=torch.float32)
            for z, logistic in ((logits, True), (truth, False))
        ]
        parts = count_parts(images, triton.cdiv(area(logits), _BLOCK))
        partials = logits.new_empty((parts, images * 6), dtype=torch.float32)
        _sum_maps[(images, parts)](
            logits, truth, *edges, partials, area(logits), images, BLOCK=_BLOCK
        )
        sum_parts(partials, [sums])
    return sums


def structure_polishing_sums_backward(
    grad: Tensor, logits: Tensor, truth: Tensor, k: int
) -> Tensor:
    """The gradient to the logits."""
    op = "structure_polishing_sums_backward"
    logits, truth = _pair(op, logits, truth, k)
    grad = check_shape(op, "grad", grad, (logits.shape[0], 2, 3), logits)
    check(grad.dtype == logits.dtype, op, f"grad is {grad.dtype}, logits {logits.dtype}")
    out = torch.empty_like(logits)
    if logits.numel():
        t, extremes = _thinned(logits, 1, logistic=True, record=True)
        edge = _thick(truth, k, 1, logistic=False, dtype=torch.float32)
        of_thin = _routed(edge, grad, t, k)
        _route_thin[_grid(logits)](
            of_thin, extremes, logits, truth, grad, out, *logits.shape[2:], THIN=1, **_TILE
        )
    return out
