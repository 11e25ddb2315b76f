"""gOctConv: a convolution between sets of scales (CSNet, section 3)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._backend import choose, register


def goctconv(
    xs: Sequence[Tensor],
    weight: Tensor,
    out_channels: Sequence[int],
    stride: int = 1,
    bias: Tensor | None = None,
    slope: Tensor | None = None,
) -> list[Tensor]:
    r"""Convolve every input scale into every output scale (the generalised OctConv).

    With :math:`W_{ji}` the slice of the weight from input scale i to output scale j,

    .. math:: y_j = \sum_{i<j} W_{ji} * \mathrm{maxpool}_{2^{j-i}}(x_i) + W_{jj} * x_j
              + \sum_{i>j} \mathrm{up}_{2^{i-j}}(W_{ji} * x_i)

    Going down the maximum is taken before the convolution, going up the bilinear upsampling
    (``align_corners=False``) comes after it. With stride 2 every input is first average-pooled
    2x2; the convolution itself always has stride 1 and zero padding k // 2.

    Args:
        xs: 1 to 4 tensors, high resolution first; scale i is (B, C_i, H/2^i, W/2^i) exactly.
            An absent scale has C_i = 0.
        weight: (sum of out_channels, sum of C_i, k, k), k = 1 or 3; rows are output channels,
            columns input channels, both high resolution first.
        out_channels: channels of each of the 1 to 4 output scales; 0 = absent.
        stride: 1 or 2.
        bias: (sum of out_channels,), added to the sum over the input scales; None = 0.
        slope: (sum of out_channels,), PReLU slopes applied last; None = no activation. It is
            meant for inference: the compiled op refuses to differentiate through it.

    All tensors share one device and one dtype (float32 or float64 in the CPU kernels, float32,
    float16 or bfloat16 in the CUDA kernels, other floating dtypes by the reference; under
    autocast everything runs in float32 on the CPU and in the autocast's dtype on CUDA).
    NaN and infinity propagate.

    Returns:
        One tensor per entry of out_channels: (B, out_channels[j], h/2^j, w/2^j), where (h, w)
        is the size of scale 0 after the stride.

    Raises:
        TypeError: an integer dtype, or dtypes that differ.
        ValueError: a wrong rank, channel count, device, stride or kernel size, or a scale
            whose size is not exactly that of scale 0 divided by 2^i (names both sizes).
        RuntimeError: a backend that was asked for by name cannot run.
    """
    xs, out_channels = check_arguments(xs, weight, out_channels, stride, bias, slope)
    if choose("goctconv", xs[0]) == "reference":
        return goctconv_reference(xs, weight, out_channels, stride, bias, slope)
    return torch.ops.sodfast.goctconv(xs, weight, bias, slope, out_channels, stride)


def goctconv_reference(
    xs: Sequence[Tensor],
    weight: Tensor,
    out_channels: Sequence[int],
    stride: int = 1,
    bias: Tensor | None = None,
    slope: Tensor | None = None,
) -> list[Tensor]:
    """:func:`goctconv` in plain torch: the specification, and the fallback."""
    in_channels = [x.shape[1] for x in xs]
    height, width = (size // stride for size in xs[0].shape[-2:])
    if stride == 2:
        xs = [F.avg_pool2d(x, 2) if x.shape[1] else x for x in xs]
    ys = []
    for j, rows in enumerate(weight.split(list(out_channels))):
        size = (height // 2**j, width // 2**j)  # no shifts: ONNX has none for sizes
        y = None
        for i, (x, kernel) in enumerate(zip(xs, rows.split(in_channels, dim=1))):
            if kernel.numel() == 0:  # an absent scale on either side
                continue
            if j > i:
                x = F.max_pool2d(x, 2 ** (j - i))
            path = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
            if j < i:
                path = F.interpolate(path, size=size, mode="bilinear", align_corners=False)
            y = path if y is None else y + path
        ys.append(xs[0].new_zeros(xs[0].shape[0], rows.shape[0], *size) if y is None else y)
    return bias_prelu(ys, bias, slope)


def bias_prelu(ys: list[Tensor], bias: Tensor | None, slope: Tensor | None) -> list[Tensor]:
    """The epilogue of the convolutions: PReLU(y + bias), per channel over all scales."""
    channels = [y.shape[1] for y in ys]
    if bias is not None:
        ys = [y + b.view(-1, 1, 1) for y, b in zip(ys, bias.split(channels))]
    if slope is not None:
        ys = [F.prelu(y, a) if a.numel() else y for y, a in zip(ys, slope.split(channels))]
    return ys


def goctconv_measured(
    xs: Sequence[Tensor], weight: Tensor, out_channels: Sequence[int], stride: int = 1
) -> tuple[list[Tensor], Tensor]:
    """:func:`goctconv`, and the moments of its result, which a norm behind it asks for.

    For training. It has a kernel on CUDA alone, which sums the moments up as it writes; see
    :func:`goctconv_norm_depthwise`, which takes them.

    Args:
        xs, weight, out_channels, stride: as of :func:`goctconv`; there is no epilogue.

    Returns:
        (ys, moments): ys as of :func:`goctconv`; of every plane of ys, mean and sum of squared
        distances from it, (sum of out_channels, B, 2), float64, not differentiable.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`goctconv`.
    """
    xs, out_channels = check_arguments(xs, weight, out_channels, stride, None, None)
    if choose("goctconv_measured", xs[0]) == "reference":
        return goctconv_measured_reference(xs, weight, out_channels, stride)
    return torch.ops.sodfast.goctconv_measured(xs, weight, out_channels, stride)


def goctconv_measured_reference(
    xs: Sequence[Tensor], weight: Tensor, out_channels: Sequence[int], stride: int = 1
) -> tuple[list[Tensor], Tensor]:
    """:func:`goctconv_measured` in plain torch: the specification, and the fallback."""
    ys = goctconv_reference(xs, weight, out_channels, stride)
    return ys, plane_moments(ys)


def plane_moments(xs: Sequence[Tensor]) -> Tensor:
    """Mean and sum of squared distances from it of every plane: (channels, B, 2), float64."""
    wide = [x.detach().double().flatten(2) for x in xs]
    means = [x.mean(2, keepdim=True) for x in wide]
    squares = [(x - m).square().sum(2) for x, m in zip(wide, means)]
    mean, square = (torch.cat(parts, 1) for parts in ([m.squeeze(2) for m in means], squares))
    return torch.stack([mean.t(), square.t()], 2)


def check_arguments(
    xs: Sequence[Tensor],
    weight: Tensor,
    out_channels: Sequence[int],
    stride: int,
    bias: Tensor | None,
    slope: Tensor | None,
) -> tuple[list[Tensor], list[int]]:
    """Check the arguments of :func:`goctconv`; return xs and out_channels as lists."""
    xs = _check.scales(xs)
    out_channels = _check.channel_list(out_channels)
    rows, columns = sum(out_channels), sum([x.shape[1] for x in xs])
    kernel_size = weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() == 4 else 1
    if kernel_size not in (1, 3):
        raise ValueError(f"weight must be 1x1 or 3x3, not {tuple(weight.shape)}")
    _check.parameter(weight, "weight", (rows, columns, kernel_size, kernel_size), xs[0])
    _check.epilogue(bias, slope, rows, xs[0])
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, not {stride!r}")
    size = tuple(xs[0].shape[-2:])
    height, width = size[0] // stride, size[1] // stride
    if height < 1 or width < 1:
        raise ValueError(f"xs[0] is {size[0]}x{size[1]}, too small for stride {stride}")
    for i, x in enumerate(xs):  # odd sizes lose a row or column to the stride
        pooled = (x.shape[2] // stride, x.shape[3] // stride)
        if pooled[0] << i != height or pooled[1] << i != width:
            raise ValueError(
                f"xs[{i}] is {pooled[0]}x{pooled[1]} after stride {stride}, which is not the "
                f"size of scale 0, {height}x{width}, divided by {1 << i}"
            )
    coarsest = 1 << (len(out_channels) - 1)
    if height % coarsest or width % coarsest:
        raise ValueError(
            f"out_channels asks for {len(out_channels)} scales, but {height}x{width}, the size "
            f"of scale 0, does not divide by {coarsest}"
        )
    return xs, out_channels


def bias_gradient(grads: Sequence[Tensor]) -> Tensor:
    """The gradient of a convolution's bias: the sum over batch and positions, all scales."""
    return torch.cat([grad.sum((0, 2, 3)) for grad in grads])


def refuse_slope(op: str, slope: Tensor | None) -> None:
    """Raise when autograd reaches an op that was called with its inference epilogue."""
    if slope is not None:
        raise RuntimeError(
            f"sodfast::{op}: slope is an inference epilogue and has no gradient; "
            "apply PReLU separately (goctconv_norm_act) to train"
        )


def fake_goctconv(
    xs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    out_channels: list[int],
    stride: int,
) -> list[Tensor]:
    batch, _, height, width = xs[0].shape
    height, width = height // stride, width // stride
    return [
        xs[0].new_empty(batch, channels, height // 2**j, width // 2**j)
        for j, channels in enumerate(out_channels)
    ]


def _fake_measured(
    xs: list[Tensor], weight: Tensor, out_channels: list[int], stride: int
) -> tuple[list[Tensor], Tensor]:
    ys = fake_goctconv(xs, weight, None, None, out_channels, stride)
    return ys, xs[0].new_empty(weight.shape[0], xs[0].shape[0], 2, dtype=torch.float64)


def _fake_grad_input(
    grads: list[Tensor], xs: list[Tensor], weight: Tensor, stride: int
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in xs]


def _fake_grad_weight(grads: list[Tensor], xs: list[Tensor], weight: Tensor, stride: int) -> Tensor:
    return weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    xs, weight, _, slope, _, ctx.stride = inputs
    ctx.save_for_backward(*xs, weight)
    ctx.slope = slope


def _backward(ctx: Any, grads: list[Tensor]) -> tuple:
    refuse_slope("goctconv", ctx.slope)
    need_xs, need_weight, need_bias, *_ = ctx.needs_input_grad
    grad_xs, grad_weight = _gradients(ctx, grads, any(need_xs), need_weight)
    grad_bias = bias_gradient(grads) if need_bias else None
    return grad_xs, grad_weight, grad_bias, None, None, None


def _setup_context_measured(ctx: Any, inputs: tuple, output: tuple[list[Tensor], Tensor]) -> None:
    xs, weight, _, ctx.stride = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*xs, weight)


def _backward_measured(ctx: Any, grads: list[Tensor], _: Tensor) -> tuple:
    need_xs, need_weight, *_ = ctx.needs_input_grad
    return *_gradients(ctx, grads, any(need_xs), need_weight), None, None


def _gradients(
    ctx: Any, grads: list[Tensor], need_xs: bool, need_weight: bool
) -> tuple[Sequence[Tensor | None], Tensor | None]:
    """Those of xs and weight, of what is needed."""
    *xs, weight = ctx.saved_tensors
    grad_xs, grad_weight = [None] * len(xs), None
    if need_xs:
        grad_xs = torch.ops.sodfast.goctconv_grad_input(grads, xs, weight, ctx.stride)
    if need_weight:
        grad_weight = torch.ops.sodfast.goctconv_grad_weight(grads, xs, weight, ctx.stride)
    return grad_xs, grad_weight


register(
    "goctconv",
    fake=fake_goctconv,
    backward=_backward,
    setup_context=_setup_context,
    cuda_autocast="half",
)
register(
    "goctconv_measured",
    fake=_fake_measured,
    backward=_backward_measured,
    setup_context=_setup_context_measured,
    cuda_autocast="half",
)
register("goctconv_grad_input", fake=_fake_grad_input)
register("goctconv_grad_weight", fake=_fake_grad_weight)
