"""BatchNorm + PReLU of all scales with the channel means that dynamic weight decay needs.

    z = (x - mean) · γ/√(var + ε) + β,   y = prelu(z, slope),   channel_means[b, c] = mean_{h,w} y

Training makes two launches: statistics (reads x) and the result (reads x, writes y). Statistics:
tiles are summed and then measured about their own mean, and combined in float64 (Chan's formula),
so that a large mean costs no digits; parts of a channel are combined in a fixed order by every
program that needs them. The backward reads x and the gradient twice, recomputes z, and writes once.

Per value some 10 operations and 12 bytes forward, 20 backward (float32): bound by memory, the aim
is the copy bandwidth. What fits in the L2 cache is read from memory once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    area,
    check,
    check_scales,
    check_shape,
    check_shapes,
    count_parts,
    cumulate,
    end_tile,
    find,
    first_tile,
    pick,
    power_of_two,
)


@triton.jit
def _vector(pointer, c):
    return tl.load(pointer + c).to(tl.float32)


@triton.jit
def _statistics(xs, partials, starts, channels, areas, batch, size, BLOCK: tl.constexpr):
    """partials[:, channel, part] = count, mean and Σ (x - mean)² of a part of a channel."""
    s = find(tl.program_id(0), starts)
    c = tl.program_id(0) - pick(starts, s)
    x, pixels = pick(xs, s), pick(areas, s)
    blocks = tl.cdiv(pixels, BLOCK)
    zero = tl.zeros((1,), tl.float64)
    count, mean, squares = zero, zero, zero
    for tile in range(first_tile(batch * blocks), end_tile(batch * blocks)):
        plane = ((tile // blocks).to(tl.int64) * pick(channels, s) + c) * pixels
        p = tile % blocks * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + plane + p, mask=p < pixels, other=0.0).to(tl.float32)
        n = tl.minimum(pixels - tile % blocks * BLOCK, BLOCK)
        centre = tl.sum(value, axis=0) / n
        value = tl.where(p < pixels, value - centre, 0.0)
        rest = tl.sum(value, axis=0).to(tl.float64)  # not exactly zero: centre is rounded
        new_mean = centre.to(tl.float64) + rest / n
        new_squares = tl.sum(value * value, axis=0).to(tl.float64) - rest * rest / n
        delta = new_mean - mean
        squares += new_squares + delta * delta * (count * n / (count + n))
        mean += delta * (n / (count + n))
        count += n
    parts = tl.num_programs(1)
    at = partials + tl.program_id(0) * parts + tl.program_id(1) + tl.arange(0, 1)
    tl.store(at, count)
    tl.store(at + size * parts, mean)
    tl.store(at + 2 * size * parts, squares)


@triton.jit
def _combine(partials, channel, size, parts, PARTS: tl.constexpr):
    """Mean and biased variance of a channel, in float64; nothing to average gives NaN."""
    part = tl.arange(0, PARTS)
    at, known = partials + channel * parts + part, part < parts
    count = tl.load(at, mask=known, other=0.0)
    means = tl.load(at + size * parts, mask=known, other=0.0)
    squares = tl.load(at + 2 * size * parts, mask=known, other=0.0)
    total = tl.sum(count, axis=0)
    mean = tl.sum(count * means, axis=0) / total
    delta = tl.where(known, means - mean, 0.0)
    return mean, tl.sum(squares + count * delta * delta, axis=0) / total


@triton.jit
def _normalise(xs, ys, gamma, beta, slope, old_mean, old_var, partials, mean, var, channel_means,
               starts, channels, areas, batch, size, parts, eps, TRAINING: tl.constexpr,
               PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program per channel of a sample; those of the first sample write the statistics."""
    b, channel = tl.program_id(0), tl.program_id(1)
    s = find(channel, starts)
    if TRAINING:
        m, v = _combine(partials, channel, size, parts, PARTS)
        m, v = m.to(tl.float32), v.to(tl.float32)
    else:
        m, v = _vector(old_mean, channel), _vector(old_var, channel)
    if b == 0:
        tl.store(mean + channel, m.to(mean.dtype.element_ty))
        tl.store(var + channel, v.to(var.dtype.element_ty))
    if b < batch:
        scale = _vector(gamma, channel) / tl.sqrt_rn(v + eps)
        shift, a = _vector(beta, channel), _vector(slope, channel)
        pixels = pick(areas, s)
        plane = (b.to(tl.int64) * pick(channels, s) + channel - pick(starts, s)) * pixels
        x, y = pick(xs, s) + plane, pick(ys, s) + plane
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, pixels, BLOCK):
            p = start + tl.arange(0, BLOCK)
            value = tl.load(x + p, mask=p < pixels, other=0.0).to(tl.float32)
            value = (value - m) * scale + shift
            value = tl.where(value > 0, value, a * value)
            tl.store(y + p, value.to(y.dtype.element_ty), mask=p < pixels)
            total += tl.where(p < pixels, value, 0.0)
        at = channel_means + b * size + channel
        tl.store(at, (tl.sum(total, axis=0) / pixels).to(channel_means.dtype.element_ty))


@triton.jit
def _through_prelu(gy, x, mean, inverse, gamma, beta, slope):
    """The normalised input, the gradient to z, and what it adds to the slope's."""
    normal = (x - mean) * inverse
    z = normal * gamma + beta
    return normal, tl.where(z > 0, gy, gy * slope), tl.where(z > 0, 0.0, gy * z)


@triton.jit
def _sums(gys, xs, gamma, beta, slope, mean, var, partials, starts, channels, areas, batch, size,
          eps, BLOCK: tl.constexpr):  # fmt: skip
    """partials[:, channel, part]: the sums of g_z, g_z·x̂ and the slope's gradient over a part."""
    channel = tl.program_id(0)
    s = find(channel, starts)
    x, gy, pixels = pick(xs, s), pick(gys, s), pick(areas, s)
    m, inverse = _vector(mean, channel), 1 / tl.sqrt_rn(_vector(var, channel) + eps)
    scale, shift, a = _vector(gamma, channel), _vector(beta, channel), _vector(slope, channel)
    blocks = tl.cdiv(pixels, BLOCK)
    sum_gz = tl.zeros((BLOCK,), tl.float32)
    sum_gz_normal, sum_slope = sum_gz, sum_gz
    for tile in range(first_tile(batch * blocks), end_tile(batch * blocks)):
        plane = (tile // blocks).to(tl.int64) * pick(channels, s) + channel - pick(starts, s)
        p = tile % blocks * BLOCK + tl.arange(0, BLOCK)
        at = plane * pixels + p
        g = tl.load(gy + at, mask=p < pixels, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=p < pixels, other=0.0).to(tl.float32)
        normal, gz, g_slope = _through_prelu(g, value, m, inverse, scale, shift, a)
        sum_gz += gz
        sum_gz_normal += gz * normal
        sum_slope += g_slope
    parts = tl.num_programs(1)
    at = partials + channel * parts + tl.program_id(1)
    tl.store(at, tl.sum(sum_gz, axis=0))
    tl.store(at + size * parts, tl.sum(sum_gz_normal, axis=0))
    tl.store(at + 2 * size * parts, tl.sum(sum_slope, axis=0))


@triton.jit
def _backward(gys, xs, gxs, gamma, beta, slope, mean, var, partials, g_gamma, g_beta, g_slope,
              starts, channels, areas, batch, size, parts, eps, TRAINING: tl.constexpr,
              PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """g_x = γ/√(var + ε) · (g_z - mean(g_z) - x̂ · mean(g_z·x̂)); fixed statistics have no means."""
    b, channel = tl.program_id(0), tl.program_id(1)
    s = find(channel, starts)
    part = tl.arange(0, PARTS)
    at, known = partials + channel * parts + part, part < parts
    sum_gz = tl.sum(tl.load(at, mask=known, other=0.0), axis=0)
    sum_gz_normal = tl.sum(tl.load(at + size * parts, mask=known, other=0.0), axis=0)
    if b == 0:
        sum_slope = tl.sum(tl.load(at + 2 * size * parts, mask=known, other=0.0), axis=0)
        tl.store(g_beta + channel, sum_gz.to(g_beta.dtype.element_ty))
        tl.store(g_gamma + channel, sum_gz_normal.to(g_gamma.dtype.element_ty))
        tl.store(g_slope + channel, sum_slope.to(g_slope.dtype.element_ty))
    if b < batch:
        m, inverse = _vector(mean, channel), 1 / tl.sqrt_rn(_vector(var, channel) + eps)
        scale, shift, a = _vector(gamma, channel), _vector(beta, channel), _vector(slope, channel)
        pixels = pick(areas, s)
        mean_gz, mean_gz_normal = 0.0, 0.0
        if TRAINING:
            n = 1.0 * batch * pixels
            mean_gz, mean_gz_normal = sum_gz / n, sum_gz_normal / n
        plane = (b.to(tl.int64) * pick(channels, s) + channel - pick(starts, s)) * pixels
        x, gy, gx = pick(xs, s) + plane, pick(gys, s) + plane, pick(gxs, s) + plane
        for start in range(0, pixels, BLOCK):
            p = start + tl.arange(0, BLOCK)
            g = tl.load(gy + p, mask=p < pixels, other=0.0).to(tl.float32)
            value = tl.load(x + p, mask=p < pixels, other=0.0).to(tl.float32)
            normal, gz, _ = _through_prelu(g, value, m, inverse, scale, shift, a)
            value = scale * inverse * (gz - mean_gz - normal * mean_gz_normal)
            tl.store(gx + p, value.to(gx.dtype.element_ty), mask=p < pixels)


@triton.jit
def _move(old, new, c, known, factor, momentum):
    value = tl.load(old + c, mask=known, other=0.0).to(tl.float32)
    target = factor * tl.load(new + c, mask=known, other=0.0).to(tl.float32)
    value = (1 - momentum) * value + momentum * target
    tl.store(old + c, value.to(old.dtype.element_ty), mask=known)


@triton.jit
def _update(running_mean, running_var, mean, var, starts, ends, counts, unbiased, momentum,
            BLOCK: tl.constexpr):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known, scale = c < 0, tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(len(starts)):
        here = (c >= starts[s]) & (c < ends[s])
        known = known | (here & (counts[s] > 0))  # a scale without values stays as it is
        scale = tl.where(here, unbiased[s], scale)
    _move(running_mean, mean, c, known, 1.0, momentum)
    _move(running_var, var, c, known, scale, momentum)


class _Geometry:
    """The checked shapes of one call, as the kernels want them."""

    def __init__(self, op: str, xs: Sequence[Tensor], eps: float) -> None:
        self.maps = check_scales(op, "xs", xs)
        check(eps >= 0, op, f"eps must not be negative, got {eps}")
        self.batch = self.maps[0].shape[0]
        self.channels = tuple(x.shape[1] for x in self.maps)
        self.starts, self.size = cumulate(self.channels)
        self.areas = tuple(map(area, self.maps))
        self.block = power_of_two(self.areas[0], 64, 1024)
        tiles = self.batch * triton.cdiv(self.areas[0], self.block)
        self.parts = count_parts(self.size, tiles)
        self.most_parts = triton.next_power_of_2(self.parts)

    def vectors(self, op: str, **vectors: Tensor) -> list[Tensor]:
        like = self.maps[0]
        return [check_shape(op, name, v, (self.size,), like) for name, v in vectors.items()]

    def partials(self, dtype: torch.dtype) -> Tensor:
        return self.maps[0].new_empty((3, self.size, self.parts), dtype=dtype)


def goctconv_norm_act(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    eps: float,
    moments: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """See :func:`sodfast.ops.goctconv_norm_act`. No kernel of Triton returns moments: with them
    given it measures xs all the same."""
    op = "goctconv_norm_act"
    shape = _Geometry(op, xs, eps)
    vectors = shape.vectors(
        op, weight=weight, bias=bias, slope=slope, running_mean=running_mean,
        running_var=running_var,
    )  # fmt: skip
    if moments is not None:
        check(training, op, "moments have no use without training")
        like, found = shape.maps[0].device, (moments.device, moments.dtype, tuple(moments.shape))
        sound = like, torch.float64, (shape.size, shape.batch, 2)
        check(found == sound, op, f"moments must be {sound}, got {found}")
    ys = [x.new_empty(x.shape) for x in shape.maps]
    mean, var = (weight.new_empty(weight.shape) for _ in range(2))
    channel_means = shape.maps[0].new_empty((shape.batch, shape.size))
    sizes = shape.starts, shape.channels, shape.areas, shape.batch, shape.size
    if shape.size:
        partials = None
        if training:
            partials = shape.partials(torch.float64)
            _statistics[(shape.size, shape.parts)](
                tuple(shape.maps), partials, *sizes, BLOCK=shape.block
            )
        _normalise[(max(shape.batch, 1), shape.size)](
            tuple(shape.maps), tuple(ys), *vectors, partials, mean, var, channel_means, *sizes,
            shape.parts, eps, TRAINING=training, PARTS=shape.most_parts, BLOCK=shape.block,
        )  # fmt: skip
    return ys, mean, var, channel_means


def goctconv_norm_act_backward(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The gradients to xs, weight, bias and slope."""
    op = "goctconv_norm_act_backward"
    shape = _Geometry(op, xs, eps)
    gys = check_shapes(op, "grads", grads, [x.shape for x in shape.maps], shape.maps[0])
    vectors = shape.vectors(op, weight=weight, bias=bias, slope=slope, mean=mean, var=var)
    gxs = [x.new_empty(x.shape) for x in shape.maps]
    g_weight, g_bias, g_slope = (v.new_empty(v.shape) for v in (weight, bias, slope))
    sizes = shape.starts, shape.channels, shape.areas, shape.batch, shape.size
    if shape.size:
        partials = shape.partials(torch.float32)
        _sums[(shape.size, shape.parts)](
            tuple(gys), tuple(shape.maps), *vectors, partials, *sizes, eps, BLOCK=shape.block
        )
        _backward[(max(shape.batch, 1), shape.size)](
            tuple(gys), tuple(shape.maps), tuple(gxs), *vectors, partials, g_weight, g_bias,
            g_slope, *sizes, shape.parts, eps, TRAINING=training, PARTS=shape.most_parts,
            BLOCK=shape.block,
        )  # fmt: skip
    return gxs, g_weight, g_bias, g_slope


def goctconv_update_stats_(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    channels: Sequence[int],
    counts: Sequence[int],
    momentum: float,
) -> None:
    """See :func:`sodfast.ops.goctconv_update_stats_`."""
    op = "goctconv_update_stats_"
    check(len(channels) == len(counts), op, "channels and counts must be as many")
    sound = min([*channels, *counts], default=0) >= 0
    check(sound, op, f"channels {channels} and counts {counts} must not be negative")
    starts, size = cumulate(channels)
    named = {"running_mean": running_mean, "running_var": running_var, "mean": mean, "var": var}
    vectors = [check_shape(op, name, v, (size,), running_mean) for name, v in named.items()]
    contiguous = running_mean.is_contiguous() and running_var.is_contiguous()
    check(contiguous, op, "running statistics must be contiguous")
    if size:
        ends = tuple(a + n for a, n in zip(starts, channels))
        unbiased = tuple(float(n / max(n - 1, 1)) for n in counts)
        _update[(triton.cdiv(size, 256),)](
            *vectors, starts, ends, tuple(counts), unbiased, momentum, BLOCK=256
        )
