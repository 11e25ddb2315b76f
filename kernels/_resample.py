"""One scale as another sees it: what the cross-scale convolution reads, resampled on the way.

planes are pointers to the planes of channels and known says which exist, both (channels, 1); row
and col are (1, pixels); levels count octaves. Everything is (channels, pixels) in float32.

    forward    finer -> coarser   max-pool 2^level (after a 2×2 average where the stride is 2)
               coarser -> finer   bilinear ×2^level: the source of p is (p + ½)/2^level − ½, clamped
    backward   finer -> coarser   the transpose of bilinear
               coarser -> finer   max-pool's gradient, to the first maximum of each window
"""

import triton
import triton.language as tl


@triton.jit
def strided(planes, known, row, col, rows, cols, pitch, STRIDE: tl.constexpr):
    """The map after the stride, rows × cols, zeros outside; pitch is the stored row length."""
    known = known & ((row >= 0) & (row < rows) & (col >= 0) & (col < cols))
    at = planes + (STRIDE * row * pitch + STRIDE * col)
    value = tl.load(at, mask=known, other=0.0).to(tl.float32)
    if STRIDE == 2:
        value += tl.load(at + 1, mask=known, other=0.0).to(tl.float32)
        value += tl.load(at + pitch, mask=known, other=0.0).to(tl.float32)
        value += tl.load(at + pitch + 1, mask=known, other=0.0).to(tl.float32)
        value *= 0.25
    return value


@triton.jit
def pooled(planes, known, row, col, rows, cols, pitch, level, STRIDE: tl.constexpr):
    """The maximum over 2^level × 2^level of the map after the stride, whose size is rows × cols."""
    best = strided(planes, known, row << level, col << level, rows, cols, pitch, STRIDE)
    for n in range(1, 1 << (2 * level)):
        at_row = (row << level) + (n >> level)
        at_col = (col << level) + (n & ((1 << level) - 1))
        value = strided(planes, known, at_row, at_col, rows, cols, pitch, STRIDE)
        best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    return best


@triton.jit
def first_maximum(planes, known, row, col, rows, cols, pitch, level, STRIDE: tl.constexpr):
    """Whether (row, col) of the map after the stride is where its window's maximum comes first."""
    top, left = row >> level << level, col >> level << level
    best = strided(planes, known, top, left, rows, cols, pitch, STRIDE)
    where = tl.zeros(best.shape, tl.int32)
    for n in range(1, 1 << (2 * level)):
        at_row, at_col = top + (n >> level), left + (n & ((1 << level) - 1))
        value = strided(planes, known, at_row, at_col, rows, cols, pitch, STRIDE)
        where = tl.where(value > best, n, where)
        best = tl.where(value > best, value, best)
    return where == (row - top << level) + (col - left)


@triton.jit
def _between(fine, size, level):
    """The coarse neighbours of a fine position, clamped, and the weight of the second."""
    factor = 1 << level
    twice = 2 * fine + 1 - factor  # 2 · factor · (source position); never below -2 · factor
    lower = (twice + 2 * factor >> level + 1) - 1
    upper = (twice - lower * (2 * factor)).to(tl.float32) / (2 * factor)
    return tl.maximum(lower, 0), tl.minimum(lower + 1, size - 1), upper


@triton.jit
def upsampled(planes, known, row, col, down, right, rows, cols, pitch, level,
               STRIDE: tl.constexpr):  # fmt: skip
    """Bilinear ×2^level of a map that is shifted by a tap (down, right); row and col are fine."""
    known = known & ((row < rows << level) & (col < cols << level))
    r0, r1, fr = _between(row, rows, level)
    c0, c1, fc = _between(col, cols, level)
    r0, r1, c0, c1 = r0 + down, r1 + down, c0 + right, c1 + right
    above = (1 - fc) * strided(planes, known, r0, c0, rows, cols, pitch, STRIDE)
    above += fc * strided(planes, known, r0, c1, rows, cols, pitch, STRIDE)
    below = (1 - fc) * strided(planes, known, r1, c0, rows, cols, pitch, STRIDE)
    below += fc * strided(planes, known, r1, c1, rows, cols, pitch, STRIDE)
    return (1 - fr) * above + fr * below


@triton.jit
def _share(fine, coarse, size, level):
    """The weight that coarse has in the interpolation of fine, zero where fine is outside."""
    lower, upper, fraction = _between(fine, size, level)
    share = tl.where(lower == coarse, 1 - fraction, 0.0) + tl.where(upper == coarse, fraction, 0.0)
    return tl.where((fine >= 0) & (fine < size << level), share, 0.0)


@triton.jit
def gathered(planes, known, row, col, rows, cols, level):
    """The transpose of bilinear ×2^level: what (row, col) of the coarse map, rows × cols, gets."""
    known = known & ((row >= 0) & (row < rows) & (col >= 0) & (col < cols))
    total = tl.zeros(known.shape, tl.float32)
    # A coarse pixel is part of 2 · factor fine ones in each direction; of itself at level 0.
    around = tl.where(level == 0, 0, 1 << level >> 1)
    side = (1 << level) + 2 * around
    for n in range(side * side):
        r = (row << level) - around + n // side
        c = (col << level) - around + n % side
        share = _share(r, row, rows, level) * _share(c, col, cols, level)
        fine_rows, fine_cols = rows << level, cols << level
        value = strided(planes, known & (share > 0), r, c, fine_rows, fine_cols, fine_cols, 1)
        total += share * value
    return total
