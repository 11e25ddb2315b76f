"""The boundary of soft maps, the sums of the structure polishing loss, and their gradients.

    t = z - erode₃(z)   or   dilate₃(z) - z   or   dilate₃(z) - erode₃(z)       b = max-pool_k(t)

Forward: t, its maxima of k along the rows, theirs down the columns: three launches over tiles of
32 x 64 pixels, which read k numbers each from the caches. Bytes per pixel in float32: 24 against
the 8 that have to move; at k = 31 some 130 reads and maxima, which then are the limit.

Backward: the same, with the places of the maxima kept in a byte each; then a pixel gathers the
gradient of those windows of its column that chose it, of those of its row, and of the nine 3 x 3
windows that see it. No atomics; sums in the order of positions. t is never negative: -1 is below
all of it. THIN is 1, 2 or 3, in the order above. With LOGISTIC the map is sigmoid(z): its extremes
are where those of z are.
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
)

_ROWS, _COLS, _BLOCK = 32, 64, 1024


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
def _pool(t, out, places, rows, cols, K, ALONG: tl.constexpr, ROWS: tl.constexpr,
          COLS: tl.constexpr):  # fmt: skip
    """The maxima of K along the rows or down the columns; where asked for how far in they are."""
    row, col = _place(cols, ROWS, COLS)
    known = (row < rows) & (col < cols)
    start = tl.program_id(0).to(tl.int64) * rows * cols
    best = tl.full((ROWS, COLS), -1.0, tl.float32)
    place = tl.zeros((ROWS, COLS), tl.int32)
    for i in range(0, K):
        v, h = row, col
        if ALONG:
            h = col + (i - K // 2)
        else:
            v = row + (i - K // 2)
        inside = known & (v >= 0) & (v < rows) & (h >= 0) & (h < cols)
        value = tl.load(t + start + v * cols + h, mask=inside, other=-1.0)
        better = (value > best) | (value != value)
        best, place = tl.where(better, value, best), tl.where(better, i, place)
    at = start + row * cols + col
    tl.store(out + at, best.to(out.dtype.element_ty), mask=known)
    if places is not None:
        tl.store(places + at, place.to(tl.uint8), mask=known)


@triton.jit
def _route(grad, weights, places, out, rows, cols, K, ALONG: tl.constexpr, ROWS: tl.constexpr,
           COLS: tl.constexpr):  # fmt: skip
    """What each position gets from the K windows that see it; with weights grad is made of b."""
    row, col = _place(cols, ROWS, COLS)
    known = (row < rows) & (col < cols)
    plane = tl.program_id(0).to(tl.int64)
    start = plane * rows * cols
    total = tl.zeros((ROWS, COLS), tl.float32)
    for i in range(0, K):  # the window that has this position K - 1 - i in
        v, h = row, col
        if ALONG:
            h = col + (i - K // 2)
        else:
            v = row + (i - K // 2)
        inside = known & (v >= 0) & (v < rows) & (h >= 0) & (h < cols)
        at = start + v * cols + h
        mine = inside & (tl.load(places + at, mask=inside, other=255).to(tl.int32) == K - 1 - i)
        value = tl.load(grad + at, mask=mine, other=0.0).to(tl.float32)
        if weights is not None:
            of_product = tl.load(weights + plane * 6 + 3).to(tl.float32)
            value = of_product * value + tl.load(weights + plane * 6 + 4).to(tl.float32)
        total += tl.where(mine, value, 0.0)
    tl.store(out + start + row * cols + col, total, mask=known)


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
    return z.shape[0] * z.shape[1], tiles


_TILE = {"ROWS": _ROWS, "COLS": _COLS, "num_warps": 16}  # 4 pixels a thread


class _Trace:
    """The steps to the thick boundary of a map: the boundary, and what the way back needs."""

    def __init__(
        self, z: Tensor, k: int, thin: int, logistic: bool, record: bool, dtype: torch.dtype
    ) -> None:
        def codes() -> Tensor | None:
            return torch.empty_like(z, dtype=torch.uint8) if record else None

        grid, size = _grid(z), z.shape[2:]
        t = torch.empty_like(z, dtype=torch.float32)
        along, self.extremes = torch.empty_like(t), codes()
        self.along, self.down = codes(), codes()
        self.edge = torch.empty_like(z, dtype=dtype)
        _thin[grid](z, t, self.extremes, *size, THIN=thin, LOGISTIC=logistic, **_TILE)
        _pool[grid](t, along, self.along, *size, k, ALONG=True, **_TILE)
        _pool[grid](along, self.edge, self.down, *size, k, ALONG=False, **_TILE)

    def back(self, grad: Tensor, weights: Tensor | None, k: int) -> Tensor:
        """The gradient of t from that of the boundary."""
        grid, size = _grid(grad), grad.shape[2:]
        columns = torch.empty_like(grad, dtype=torch.float32)
        thin = torch.empty_like(columns)
        _route[grid](grad, weights, self.down, columns, *size, k, ALONG=False, **_TILE)
        _route[grid](columns, None, self.along, thin, *size, k, ALONG=True, **_TILE)
        return thin


def boundary(z: Tensor, k: int, thin: int) -> Tensor:
    """See :func:`sodfast.ops.boundary`; thin is 1 (inner), 2 (outer) or 3 (both)."""
    z = _maps("boundary", "z", z, k, thin)
    if z.numel() == 0:
        return torch.empty_like(z)
    return _Trace(z, k, thin, logistic=False, record=False, dtype=z.dtype).edge


def boundary_backward(grad: Tensor, z: Tensor, k: int, thin: int) -> Tensor:
    """The gradient to z."""
    op = "boundary_backward"
    z = _maps(op, "z", z, k, thin)
    grad = check_shape(op, "grad", grad, z.shape, z)
    check(grad.dtype == z.dtype, op, f"grad is {grad.dtype}, z is {z.dtype}")
    out = torch.empty_like(z)
    if z.numel():
        trace = _Trace(z, k, thin, logistic=False, record=True, dtype=torch.float32)
        of_thin = trace.back(grad, None, k)
        _route_thin[_grid(z)](
            of_thin, trace.extremes, None, None, None, out, *z.shape[2:], THIN=thin, **_TILE
        )
    return out


def structure_polishing_sums(logits: Tensor, truth: Tensor, k: int) -> Tensor:
    """See :func:`sodfast.ops.structure_polishing_sums`."""
    logits, truth = _pair("structure_polishing_sums", logits, truth, k)
    images = logits.shape[0]
    sums = logits.new_empty((images, 2, 3))
    if images:
        edges = [
            _Trace(z, k, 1, logistic=logistic, record=False, dtype=torch.float32).edge
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
        trace = _Trace(logits, k, 1, logistic=True, record=True, dtype=torch.float32)
        edge = _Trace(truth, k, 1, logistic=False, record=False, dtype=torch.float32).edge
        of_thin = trace.back(edge, grad, k)
        _route_thin[_grid(logits)](
            of_thin, trace.extremes, logits, truth, grad, out, *logits.shape[2:], THIN=1, **_TILE
        )
    return out
