"""A whole fused ILBlock for inference: on CUDA one launch, nothing between its layers in memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _check
from ._backend import choose, register
from .goctconv import check_arguments, fake_goctconv, goctconv_reference
from .goctconv_depthwise import goctconv_depthwise_reference


def ilblock(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    slopes: Sequence[Tensor],
    out_channels: Sequence[int],
    stride: int = 1,
) -> list[Tensor]:
    r"""Run a gOctConv and two depthwise 3x3 convolutions, each with bias and PReLU (an ILBlock).

    .. math:: u = f_1(\mathrm{gOctConv}(x)), \quad y = f_3(w_3 * f_2(w_2 * u)), \quad
              f_l(z) = \mathrm{PReLU}(z + b_l)

    (CSNet, section 3.2, with its normalisations folded in.) It has a kernel on CUDA alone, for
    inference: in one launch where repeating the halo of each tile costs less time than the
    bytes it saves, otherwise in three. Elsewhere :class:`sodfast.nn.ILBlock` runs its layers.

    Args:
        xs: 1 to 4 tensors, high resolution first; scale i is (B, C_i, H/2^i, W/2^i) exactly.
            An absent scale has C_i = 0.
        weights: of the three layers: (N, sum of C_i, k, k), k = 1 or 3, as of
            :func:`goctconv`; twice (N, 1, 3, 3), as of :func:`goctconv_depthwise`. N is the sum
            of out_channels.
        biases, slopes: of the three layers, (N,) each.
        out_channels: channels of each of the 1 to 4 output scales; 0 = absent.
        stride: of the gOctConv, 1 or 2.

    All tensors share one device and one dtype (float32, float16 or bfloat16 in the CUDA kernel,
    which adds up in float32 and rounds the result alone; any by the reference). NaN and infinity
    propagate. It has no gradient.

    Returns:
        One tensor per entry of out_channels: (B, out_channels[j], h/2^j, w/2^j), where (h, w)
        is the size of scale 0 after the stride.

    Raises:
        TypeError: an integer dtype, or dtypes that differ.
        ValueError: as :func:`goctconv`; or not three weights, biases and slopes of these shapes.
        RuntimeError: a backend that was asked for by name cannot run; autograd.
    """
    for name, tensors in (("weights", weights), ("biases", biases), ("slopes", slopes)):
        if len(tensors) != 3:
            raise ValueError(f"{name} must hold 3 tensors, one per layer, not {len(tensors)}")
    xs, out_channels = check_arguments(xs, weights[0], out_channels, stride, biases[0], slopes[0])
    rows = sum(out_channels)
    for layer in (1, 2):
        _check.parameter(weights[layer], f"weights[{layer}]", (rows, 1, 3, 3), xs[0])
        _check.parameter(biases[layer], f"biases[{layer}]", (rows,), xs[0])
        _check.parameter(slopes[layer], f"slopes[{layer}]", (rows,), xs[0])
    if choose("ilblock", xs[0]) == "reference":
        return ilblock_reference(xs, weights, biases, slopes, out_channels, stride)
    return torch.ops.sodfast.ilblock(
        xs, list(weights), list(biases), list(slopes), out_channels, stride
    )


def ilblock_reference(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    slopes: Sequence[Tensor],
    out_channels: Sequence[int],
    stride: int = 1,
) -> list[Tensor]:
    """:func:`ilblock` in plain torch: the specification, and the fallback."""
    ys = goctconv_reference(xs, weights[0], out_channels, stride, biases[0], slopes[0])
    for weight, bias, slope in zip(weights[1:], biases[1:], slopes[1:]):
        ys = goctconv_depthwise_reference(ys, weight, 1, bias, slope)
    return ys


def _fake(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    slopes: list[Tensor],
    out_channels: list[int],
    stride: int,
) -> list[Tensor]:
    return fake_goctconv(xs, weights[0], None, None, out_channels, stride)


def _refuse_gradient(*_: Any) -> None:
    raise RuntimeError("sodfast::ilblock has no gradient: a fused block is for inference")


register("ilblock", fake=_fake, backward=_refuse_gradient, cuda_autocast="half")
