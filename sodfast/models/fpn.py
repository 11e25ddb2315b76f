"""The feature pyramid for RGB-D pictures and its teacher (Ren et al., dynamic distillation)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoder_weights import load_encoder_weights
from .encoders import make_encoder
from .image import PREPROCESSING, check_image, preprocessing_for

SIZE = 256  # of the paper's pictures
KERNELS = (3, 5)  # of a receptive-field block's long branches; also the dilation after them


class FPN(nn.Module):
    """A feature pyramid on an encoder that takes depth as a fourth channel (early fusion).

    Every feature is projected to the same few channels; from deep to shallow they are upsampled,
    added and smoothed by a 3x3 convolution, and another one makes a map of the finest. With
    VGG-16 and VGG-19 these are the paper's 57.9 and 78.2 MiB of float32. Its teacher has a
    :class:`ReceptiveFieldBlock` after each projection.

    Args:
        encoder: "vgg16", "vgg19", or another name that
            :func:`sodfast.models.encoders.make_encoder` knows.
        in_channels: 4: RGB and depth; 3: the paper's RGB variant.
        teacher: with receptive-field blocks.
        channels: of the pyramid.
        encoder_weights: a local file with pretrained weights of the encoder, also of one that
            takes RGB, see :func:`sodfast.models.load_encoder_weights`. Not part of ``config``.
        depth_kernel: what the first convolution does with depth then: "mean" (of its RGB
            kernels), "zero" or "random". Not part of ``config``.
        encoder_config: settings of an encoder of transformers.

    Shape: image (B, in_channels, H, W), H and W multiples of 16 with VGG and of 32 otherwise, to
    logits (B, 1, H, W), upsampled from the finest feature's resolution; the sigmoid is the
    caller's.

    Raises:
        ValueError: an impossible configuration, or an image of the wrong rank or size.
        ImportError: the encoder needs the extra ``teachers``.
    """

    name = "fpn-rgbd"

    def __init__(
        self,
        encoder: str = "vgg16",
        in_channels: int = 4,
        teacher: bool = False,
        channels: int = 96,
        encoder_weights: str | Path | None = None,
        depth_kernel: str = "mean",
        encoder_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be at least 1, not {channels}")
        if in_channels not in (3, 4):
            raise ValueError(f"in_channels must be 3 or 4 (RGB and depth), not {in_channels}")
        self.size_multiple = 16 if encoder.startswith("vgg") else 32
        self.encoder = make_encoder(encoder, in_channels, encoder_config)
        if encoder_weights is not None:
            load_encoder_weights(self.encoder, encoder_weights, depth_kernel)
        self.preprocessing: dict[str, Any] = preprocessing_for(PREPROCESSING, in_channels)
        self.preprocessing["size"] = [SIZE, SIZE]
        self.config: dict[str, Any] = {
            "encoder": encoder,
            "in_channels": in_channels,
            "teacher": teacher,
            "channels": channels,
            "encoder_config": dict(encoder_config or {}),
        }
        widths: tuple[int, ...] = self.encoder.channels  # type: ignore[assignment]
        self.laterals = nn.ModuleList(_conv(width, channels, 1) for width in widths)
        self.fields = nn.ModuleList(
            ReceptiveFieldBlock(channels) for _ in (widths if teacher else ())
        )
        self.smooth = nn.ModuleList(_conv(channels, channels, 3) for _ in widths)
        self.head = _conv(channels, 1, 3)

    def forward(self, image: Tensor) -> Tensor:
        check_image(image, self.config["in_channels"], self.size_multiple)
        levels = [lateral(x) for lateral, x in zip(self.laterals, self.encoder(image))]
        if self.config["teacher"]:
            levels = [field(x) for field, x in zip(self.fields, levels)]
        *finer, top = zip(self.smooth, levels)
        smooth, x = top
        x = smooth(x)
        for smooth, level in reversed(finer):
            x = smooth(level + F.interpolate(x, level.shape[-2:], mode="nearest"))
        logits = self.head(x)
        return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)


class ReceptiveFieldBlock(nn.Module):
    """Branches of growing kernels and dilations beside a shortcut (Liu et al., ECCV 2018).

    1x1 | 1x3, 3x1, 3x3 dilated by 3 | 1x5, 5x1, 3x3 dilated by 5, one after the other within a
    branch and side by side between them; together they pass a 3x3 convolution, and a 1x1 shortcut
    is added before the ReLU.

    Shape: (B, channels, H, W) to the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        branches: list[nn.Module] = [_conv(channels, channels, 1)]
        for k in KERNELS:
            branches.append(
                nn.Sequential(
                    _conv(channels, channels, (1, k)),
                    _conv(channels, channels, (k, 1)),
                    _conv(channels, channels, 3, dilation=k),
                )
            )
        self.branches = nn.ModuleList(branches)
        self.merge = _conv(channels * len(branches), channels, 3)
        self.shortcut = _conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        together = self.merge(torch.cat([branch(x) for branch in self.branches], 1))
        return F.relu(together + self.shortcut(x))


def _conv(
    in_channels: int, out_channels: int, kernel: int | tuple[int, int], dilation: int = 1
) -> nn.Conv2d:
    """A convolution that keeps the size; Kaiming normal weights for what is added up linearly."""
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (dilation * (sides[0] // 2), dilation * (sides[1] // 2))
    conv = nn.Conv2d(in_channels, out_channels, sides, padding=padding, dilation=dilation)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
