"""CSF: the cross-stage fusion on large encoders (ECCV table 2, TPAMI table 7)."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sodfast.nn import CrossStageFusion, DilatedBank, GOctConv
from sodfast.nn.layers import Channels, Scales, channel_tuple, scale_list

from .csnet import bank_channels, check_fusion
from .encoder_weights import load_encoder_weights
from .image import PREPROCESSING, check_image, preprocessing_for
from .res2net import Res2Net50
from .resnet import ENCODER_CHANNELS, ResNet50

ENCODERS: dict[str, type[nn.Module]] = {"resnet50": ResNet50, "res2net50": Res2Net50}
FUSE_CHANNELS = (128, 256, 512, 512)
GROUPS = 32
SIZE = 352  # of an image's sides; the papers name none, and at this one the work is nearest
SIZE_MULTIPLE = 32  # the last feature's resolution is a 32nd of the input's


class CSF(nn.Module):
    """A ResNet-50 or Res2Net-50 encoder and CSNet's cross-stage fusion of its four features.

    What is known: the parameters, 36.37 M with ResNet-50 and 36.53 M with Res2Net-50, and that
    the authors' Res2Net version has GroupNorm with 32 groups and bilinear resampling both ways.
    What we infer: the fusion's widths, which are printed nowhere. All four features go in (256,
    512, 1024, 2048 channels); 128, 256, 512 and 512 channels in the mix and the bank (a fifth
    per dilation, the rest to 16, as in CSNet) and their sum, 1408, in the merged feature give
    36,367,169 and 36,528,489. They are the only powers of two, none smaller than the one
    before, that give either total, and they stand in the proportion 1:2:4:4 of CSNet's stages.
    The printed work, 18.40 G and 18.96 G, has no image size beside it. At 352 x 352 the
    convolutions here are 18.20 G and 19.20 G.

    Args:
        encoder: "resnet50" or "res2net50".
        encoder_weights: a local file with pretrained weights of the encoder, see
            :func:`sodfast.models.load_encoder_weights`. Not part of ``config``: a file written
            by :func:`sodfast.save` holds the weights themselves.
        in_channels: of the image.
        norm: "batch": normalisation and resampling (max-pool down, bilinear up) of CSNet, with
            our ops. "group": as in the authors' Res2Net version, see :class:`GroupNormFusion`.
            None: "batch" with ResNet-50, "group" with Res2Net-50.
        channels: other widths of the fusion: ``{"fuse": [128, …], "bank": [[25, …], …],
            "merge": 1408}``, as of :class:`sodfast.models.CSNet`.
        weight_gain: of the dilated bank.
        freeze_encoder_norm: the encoder's batch normalisation keeps its statistics, scales and
            shifts in training. The authors' recipe (batches of one image); it only makes sense
            with pretrained weights.

    Shape: image (B, in_channels, H, W), H and W multiples of 32, to logits (B, 1, H, W),
    upsampled from a 4th of the resolution; the sigmoid is the caller's.

    Raises:
        ValueError: an impossible configuration, or an image of the wrong rank or size.
    """

    name = "csf"
    size_multiple = SIZE_MULTIPLE

    def __init__(
        self,
        encoder: str = "resnet50",
        encoder_weights: str | Path | None = None,
        in_channels: int = 3,
        norm: str | None = None,
        channels: dict[str, Any] | None = None,
        weight_gain: float = 1.0,
        freeze_encoder_norm: bool = False,
    ) -> None:
        super().__init__()
        if encoder not in ENCODERS:
            raise ValueError(f"encoder must be {' or '.join(ENCODERS)}, not {encoder!r}")
        if norm is None:
            norm = "group" if encoder == "res2net50" else "batch"
        if norm not in ("batch", "group"):
            raise ValueError(f"norm must be 'batch' or 'group', not {norm!r}")
        channels = csf_channels() if channels is None else _checked(channels)
        self.preprocessing: dict[str, Any] = preprocessing_for(PREPROCESSING, in_channels)
        self.preprocessing["size"] = [SIZE, SIZE]
        self.config: dict[str, Any] = {
            "encoder": encoder,
            "in_channels": in_channels,
            "norm": norm,
            "channels": channels,
            "weight_gain": weight_gain,
            "freeze_encoder_norm": freeze_encoder_norm,
        }
        self.encoder = ENCODERS[encoder](in_channels)
        fusion = CrossStageFusion if norm == "batch" else GroupNormFusion
        self.fusion = fusion(
            ENCODER_CHANNELS,
            channels["fuse"],
            channels["bank"],
            channels["merge"],
            weight_gain=weight_gain,
        )
        self.head = GOctConv(channels["merge"], 1, bias=True)
        if freeze_encoder_norm:
            for module in self._encoder_norms():
                module.requires_grad_(False)
        if encoder_weights is not None:
            load_encoder_weights(self.encoder, encoder_weights)

    def forward(self, image: Tensor) -> Tensor:
        check_image(image, self.config["in_channels"], SIZE_MULTIPLE)
        logits = self.head(self.fusion(self.encoder(image)))[0]
        return F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False)

    def train(self, mode: bool = True) -> "CSF":
        """As of every module, but a frozen normalisation stays in eval mode."""
        super().train(mode)
        if self.config["freeze_encoder_norm"]:
            for module in self._encoder_norms():
                module.eval()
        return self

    def _encoder_norms(self) -> list[nn.Module]:
        return [m for m in self.encoder.modules() if isinstance(m, nn.BatchNorm2d)]


def csf_channels() -> dict[str, Any]:
    """The fusion's widths that give the papers' totals."""
    fuse = list(FUSE_CHANNELS)
    return {"fuse": fuse, "bank": bank_channels(fuse), "merge": sum(fuse)}


def _checked(channels: dict[str, Any]) -> dict[str, Any]:
    if set(channels) != {"fuse", "bank", "merge"}:
        raise ValueError(
            f"channels must have fuse, bank and merge, not {', '.join(sorted(channels))}"
        )
    return check_fusion(channels, len(ENCODER_CHANNELS))


class BilinearGOctConv(GOctConv):
    """1x1 :class:`sodfast.nn.GOctConv` without bias that resamples bilinearly both ways.

    Where GOctConv max-pools on the way down, this one samples bilinearly (align_corners=False,
    no antialiasing). Made of torch operations: our op knows max-pooling alone. A 1x1
    convolution and bilinear sampling commute, so each path is convolved at the lower of its two
    resolutions. Shapes as of GOctConv.
    """

    def __init__(self, in_channels: Channels, out_channels: Channels) -> None:
        super().__init__(in_channels, out_channels)

    def forward(self, xs: Scales) -> list[Tensor]:
        xs = scale_list(xs)
        height, width = xs[0].shape[-2:]
        ys = []
        for j, rows in enumerate(self.weight.split(self.out_channels)):
            size = (height >> j, width >> j)
            paths = []
            for i, weight in enumerate(rows.split(self.in_channels, dim=1)):
                if i < j:
                    paths.append(F.conv2d(_resize(xs[i], size), weight))
                else:
                    paths.append(_resize(F.conv2d(xs[i], weight), size))
            ys.append(sum(paths[1:], paths[0]))
        return ys


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class GroupNormAct(nn.Module):
    """Group normalisation (32 groups per scale) and PReLU, made of torch operations.

    The parameters of all scales are concatenated, as in :class:`sodfast.nn.NormAct`.

    Shape: scale i (B, channels[i], H/2^i, W/2^i), in and out.

    Raises:
        ValueError: a scale's channels are no multiple of 32.
    """

    def __init__(self, channels: Channels, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels = channel_tuple(channels, "channels")
        if any(c % GROUPS or not c for c in self.channels):
            raise ValueError(f"channels must be multiples of {GROUPS} groups: {self.channels}")
        self.eps = eps
        count = sum(self.channels)
        self.weight = nn.Parameter(torch.ones(count))
        self.bias = nn.Parameter(torch.zeros(count))
        self.slope = nn.Parameter(torch.full((count,), 0.25))

    def forward(self, xs: Scales) -> list[Tensor]:
        parameters = zip(*(p.split(self.channels) for p in (self.weight, self.bias, self.slope)))
        return [
            F.prelu(F.group_norm(x, GROUPS, weight, bias, self.eps), slope)
            for x, (weight, bias, slope) in zip(scale_list(xs), parameters)
        ]

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={GROUPS}, eps={self.eps}"


class GroupNormBank(DilatedBank):
    """:class:`sodfast.nn.DilatedBank` with :class:`GroupNormAct`."""

    # Group normalisation depends on the input: nothing can be folded.
    fusable_pairs = ()  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = GroupNormAct([sum(row) for row in self.out_channels])


class GroupNormFusion(nn.Module):
    """:class:`sodfast.nn.CrossStageFusion` with :class:`GroupNormAct` and bilinear resampling.

    Arguments and shapes as of CrossStageFusion; every width must be a multiple of 32.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        mid_channels: Sequence[int],
        bank_channels: Sequence[Sequence[int]],
        out_channels: int,
        weight_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.mix = _conv_norm(in_channels, mid_channels)
        self.bank = GroupNormBank(mid_channels, bank_channels, weight_gain=weight_gain)
        self.merge = _conv_norm([sum(row) for row in bank_channels], out_channels)

    def forward(self, xs: Scales) -> list[Tensor]:
        return self.merge(self.bank(self.mix(xs)))


def _conv_norm(in_channels: Channels, out_channels: Channels) -> nn.Sequential:
    conv, norm = BilinearGOctConv(in_channels, out_channels), GroupNormAct(out_channels)
    return nn.Sequential(OrderedDict(conv=conv, norm=norm))
