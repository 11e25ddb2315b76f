"""What the Triton kernels share: operands of dot products, ordered sums, checks of arguments.

One launch serves all scales. Their tensors and sizes go into a kernel as tuples; the programs are
counted through the scales, and each picks what belongs to its own.

Offsets: whole planes are addressed in 64 bits, positions within a plane in 32.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

WANTED_PROGRAMS = 1024  # enough for a few waves on any GPU
MOST_PARTS = 64


@triton.jit
def multiply(a, b, total, OPERAND: tl.constexpr):
    """total + a @ b: operands rounded to OPERAND, products and sums in float32."""
    return tl.dot(a.to(OPERAND), b.to(OPERAND), total, input_precision="ieee")


@triton.jit
def bias_prelu(total, bias, slope, channel, known):
    """The inference epilogue: prelu(total + bias, slope); total is (channels, pixels)."""
    if bias is not None:
        total += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[:, None]
    if slope is not None:
        a = tl.load(slope + channel, mask=known, other=0.0).to(tl.float32)[:, None]
        total = tl.where(total > 0, total, a * total)
    return total


@triton.jit
def load_inside(planes, known, row, col, rows, cols):
    """The values at (row, col) of planes, zeros outside: (channels, pixels) in float32.

    planes and known are (channels, 1), row and col (1, pixels).
    """
    inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
    return tl.load(planes + (row * cols + col), mask=known & inside, other=0.0).to(tl.float32)


@triton.jit
def pick(values, index):
    """values[index] (numbers, or pointers to one dtype) for an index that only a program knows."""
    found = values[0]
    for n in tl.static_range(1, len(values)):
        found = tl.where(index == n, values[n], found)
    return found


@triton.jit
def find(program, starts):
    """Which of several ranges of programs holds this one; starts are their first programs."""
    found = program * 0
    for n in tl.static_range(1, len(starts)):
        found += (program >= starts[n]).to(tl.int32)
    return found


@triton.jit
def first_tile(tiles):
    """Part number program_id(1) of so many tiles begins here."""
    return (tl.cast(tiles, tl.int64) * tl.program_id(1) // tl.num_programs(1)).to(tl.int32)


@triton.jit
def end_tile(tiles):
    """And ends here."""
    end = tl.cast(tiles, tl.int64) * (tl.program_id(1) + 1)
    return (end // tl.num_programs(1)).to(tl.int32)


@triton.jit
def _sum_parts(partials, outs, starts, begins, sizes, total, PARTS, BLOCK: tl.constexpr):
    n = find(tl.program_id(0), starts)
    i = (tl.program_id(0) - pick(starts, n)) * BLOCK + tl.arange(0, BLOCK)
    known = i < pick(sizes, n)
    value = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        value += tl.load(partials + part * total + pick(begins, n) + i, mask=known, other=0.0)
    out = pick(outs, n)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=known)


def sum_parts(partials: Tensor, outs: Sequence[Tensor]) -> None:
    """outs, one after the other, become the sum of the rows of partials, in their order.

    Reads parts · n floats and writes n: a weight's size, next to nothing. partials is float32,
    (parts, n).
    """
    sizes = [out.numel() for out in outs]
    starts, blocks = cumulate(triton.cdiv(size, 256) for size in sizes)
    if blocks:
        parts, total = partials.shape
        begins, _ = cumulate(sizes)
        _sum_parts[(blocks,)](
            partials, tuple(outs), starts, begins, tuple(sizes), total, parts, BLOCK=256
        )


# What activations of a dtype are multiplied in.
OPERANDS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

if not isinstance(_sum_parts, triton.JITFunction):  # TRITON_INTERPRET was set
    from ._interpreter import repair

    repair()


def power_of_two(number: int, least: int, most: int) -> int:
    """The smallest power of two that is not below number, within [least, most]."""
    return min(max(triton.next_power_of_2(max(number, 1)), least), most)


def cumulate(counts: Iterable[int]) -> tuple[tuple[int, ...], int]:
    """Where each of several ranges starts when one follows the other, and where all end."""
    ends = list(accumulate(counts, initial=0))
    return tuple(ends[:-1]), ends[-1]


def area(x: Tensor) -> int:
    """The number of pixels of a map."""
    return x.shape[2] * x.shape[3]


def count_parts(programs: int, tiles: int) -> int:
    """How many parts a sum over tiles is split into, so that the GPU is filled.

    It depends on the shapes alone: so do the results.
    """
    return max(1, min(tiles, MOST_PARTS, WANTED_PROGRAMS // max(programs, 1)))


def check(condition: bool, op: str, message: str) -> None:
    """Raises RuntimeError "sodfast::op: message" unless the condition holds."""
    if not condition:
        raise RuntimeError(f"sodfast::{op}: {message}")


def tiled(op: str, planes: int, tiles: int) -> tuple[int, int]:
    """The grid of so many tiles of every plane."""
    most = 65535  # of a grid's second dimension, on CUDA
    check(tiles <= most, op, f"the maps are too large: {tiles} tiles each, a GPU starts {most}")
    return planes, tiles


def check_scales(op: str, name: str, xs: Sequence[Tensor]) -> list[Tensor]:
    """Checks the tensors of all scales and returns them contiguous.

    The public functions check with better words; this keeps the raw ops within bounds.
    """
    check(1 <= len(xs) <= 4, op, f"{name} must hold 1 to 4 scales, got {len(xs)}")
    for i, x in enumerate(xs):
        first = xs[0]
        check(x.dim() == 4, op, f"{name}[{i}] must be (B, C, H, W), got {tuple(x.shape)}")
        check_like(op, f"{name}[{i}]", x, first)
        check(x.dtype == first.dtype, op, f"{name}[{i}] is {x.dtype}, {name}[0] is {first.dtype}")
        batch, _, height, width = first.shape
        check(
            x.shape[0] == batch
            and x.shape[2] << i == height
            and x.shape[3] << i == width
            and 0 < height * width < 2**31,
            op,
            f"{name}[{i}] is {tuple(x.shape)}, which does not fit {name}[0], {tuple(first.shape)}",
        )
    return [x.contiguous() for x in xs]


def check_like(op: str, name: str, x: Tensor, like: Tensor) -> None:
    """Checks a tensor's device and that its dtype is one that the kernels take."""
    check(x.device == like.device, op, f"{name} is on {x.device}, the first on {like.device}")
    check(x.dtype in OPERANDS, op, f"{name} is {x.dtype}; float32, float16 and bfloat16 are taken")
    check(x.layout == torch.strided, op, f"{name} must be a dense tensor")


def check_shape(op: str, name: str, x: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """Checks a tensor's shape, device and dtype, and returns it contiguous."""
    check_like(op, name, x, like)
    given = tuple(x.shape)
    check(given == tuple(shape), op, f"{name} must have shape {tuple(shape)}, got {given}")
    return x.contiguous()


def check_shapes(
    op: str, name: str, xs: Sequence[Tensor], shapes: Sequence[Sequence[int]], like: Tensor
) -> list[Tensor]:
    """:func:`check_shape` of a list with one tensor per scale, all of one dtype."""
    check(len(xs) == len(shapes), op, f"{name} must hold {len(shapes)} tensors, got {len(xs)}")
    dtypes = {x.dtype for x in xs}
    check(len(dtypes) == 1, op, f"{name} must have one dtype, got {dtypes}")
    pairs = enumerate(zip(xs, shapes))
    return [check_shape(op, f"{name}[{i}]", x, shape, like) for i, (x, shape) in pairs]


def check_vector(op: str, name: str, x: Tensor | None, size: int, like: Tensor) -> Tensor | None:
    """The same for an optional vector of so many numbers."""
    return None if x is None else check_shape(op, name, x, (size,), like)
