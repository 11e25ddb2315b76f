"""SCFNet: encoder and decoder of KD-SCFNet, and the plain decoder of its ablation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sodfast.nn.scfm import SCFM, ConvBNReLU, init_decoder
from sodfast.ops._backend import choose

from .encoder_weights import load_encoder_weights
from .encoders import make_encoder
from .image import check_image, preprocessing_for

SIZE_MULTIPLE = 32  # the last feature's resolution is a 32nd of the input's
DILATION = 5  # of the deepest feature's second convolution
_STD_AND_MEAN = {
    "mean": [value / 255 for value in (124.55, 118.90, 102.94)],
    "std": [value / 255 for value in (56.77, 55.97, 57.50)],
}
PREPROCESSING: dict[str, Any] = {"size": [352, 352], **_STD_AND_MEAN, "resample": "bilinear"}


class _EncoderDecoder(nn.Module):
    """What SCFNet and its baseline share: encoder, configuration, the batch norms' option."""

    size_multiple = SIZE_MULTIPLE

    def __init__(
        self,
        encoder: str,
        encoder_weights: str | Path | None,
        encoder_config: Mapping[str, Any] | None,
        in_channels: int,
    ) -> None:
        super().__init__()
        self.encoder = make_encoder(encoder, in_channels, encoder_config)
        self.encoder_channels: tuple[int, ...] = self.encoder.channels  # type: ignore[assignment]
        if encoder_weights is not None:
            load_encoder_weights(self.encoder, encoder_weights)
        self.preprocessing: dict[str, Any] = preprocessing_for(PREPROCESSING, in_channels)
        self.config: dict[str, Any] = {
            "encoder": encoder,
            "encoder_config": dict(encoder_config or {}),
            "in_channels": in_channels,
        }

    def _encode(self, image: Tensor) -> list[Tensor]:
        check_image(image, self.config["in_channels"], SIZE_MULTIPLE)
        if choose("scfm", image) in ("cpu", "cuda"):  # as oneDNN and cuDNN want it
            image = image.contiguous(memory_format=torch.channels_last)
        features: list[Tensor] = self.encoder(image)
        return features


class SCFNet(_EncoderDecoder):
    """SCFNet (KD-SCFNet, section 3): an encoder and three SCFMs; 0.80 M parameters by default.

    Every feature is reduced to the same few channels, the deepest is convolved once more with
    dilation 5, and three :class:`sodfast.nn.SCFM` fuse them from deep to shallow. A 3x3
    convolution makes a map of the deepest feature and of each result.

    In training the forward returns all four maps, the main one first, for
    :class:`sodfast.nn.MultiLevelLoss`; in eval mode the main one alone.

    Args:
        encoder: "mobilenet_v3_large_050", "efficientnet_lite0", "resnet50", "vgg16", "swin_b" or
            another name that :func:`sodfast.models.encoders.make_encoder` knows.
        encoder_weights: a local file with pretrained weights of the encoder, see
            :func:`sodfast.models.load_encoder_weights`. Not part of ``config``.
        encoder_config: settings of an encoder of transformers.
        in_channels: of the image.
        channels: of the decoder. None: 16 with MobileNetV3, 64 with every other encoder.
        form: of the SCFMs, "code" or "paper".
        biased_variance: the batch norms keep the biased running variance, as Paddle's do.

    Shape: image (B, in_channels, H, W), H and W multiples of 32, to logits (B, 1, H, W),
    upsampled from the finest feature's resolution; the sigmoid is the caller's.

    Raises:
        ValueError: an impossible configuration, or an image of the wrong rank or size.
        ImportError: the encoder needs the extra ``teachers``.
    """

    name = "scfnet"

    def __init__(
        self,
        encoder: str = "mobilenet_v3_large_050",
        encoder_weights: str | Path | None = None,
        encoder_config: Mapping[str, Any] | None = None,
        in_channels: int = 3,
        channels: int | None = None,
        form: str = "code",
        biased_variance: bool = False,
    ) -> None:
        super().__init__(encoder, encoder_weights, encoder_config, in_channels)
        if channels is None:
            channels = 16 if encoder.startswith("mobilenet") else 64
        if channels < 1:
            raise ValueError(f"channels must be at least 1, not {channels}")
        self.config |= {"channels": channels, "form": form, "biased_variance": biased_variance}
        self.reduce = nn.ModuleList(ConvBNReLU(c, channels) for c in self.encoder_channels)
        self.deepen = ConvBNReLU(channels, channels, DILATION)
        self.fusions = nn.ModuleList(SCFM(channels, form) for _ in range(3))  # deep to shallow
        heads = [nn.Conv2d(channels, 1, 3, padding=1) for _ in range(4)]
        for head in heads:
            init_decoder(head)
        self.heads = nn.ModuleList(heads)
        if biased_variance:
            for module in self.modules():
                if type(module) is nn.BatchNorm2d:
                    module.__class__ = BiasedBatchNorm2d

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        results = self._decode(image)
        if self.training:
            return self._maps(results, image)
        return self._maps(results[:1], image)[0]

    def add_to(self, plan: Any, image: Any) -> Any:
        """Add the fused network to a :class:`sodfast.plan.PlanBuilder`: the main map."""
        encoder: Any = self.encoder
        if not hasattr(encoder, "add_to"):
            raise NotImplementedError(f"a plan has no {type(encoder).__name__}")
        encoded = encoder.add_to(plan, image)
        features = [cast(Any, conv).add_to(plan, x) for conv, x in zip(self.reduce, encoded)]
        deep = high = self.deepen.add_to(plan, features.pop())
        for fusion in self.fusions:
            high = cast(Any, fusion).add_to(plan, features.pop(), high, deep)
        return plan.upsample(plan.conv(high, self.heads[0]))

    def maps(self, image: Tensor) -> list[Tensor]:
        """All four logit maps (B, 1, H, W), the main one first, in either mode."""
        return self._maps(self._decode(image), image)

    def _decode(self, image: Tensor) -> list[Tensor]:
        """The fused features, finest first, and the deepest."""
        features = [conv(x) for conv, x in zip(self.reduce, self._encode(image))]
        deep = high = self.deepen(features.pop())
        results = [deep]
        for fusion in self.fusions:
            high = fusion(features.pop(), high, deep)
            results.insert(0, high)
        return results

    def _maps(self, results: list[Tensor], image: Tensor) -> list[Tensor]:
        return [_upsample(head(x), image) for head, x in zip(self.heads, results)]


class SCFNetBase(_EncoderDecoder):
    """The ablation's baseline: all features side by side, and one 3x3 convolution to a map.

    Features of lower resolution are upsampled bilinearly to the finest one's first (the paper
    says no more than that they are concatenated).

    Args:
        encoder, encoder_weights, encoder_config, in_channels: as of :class:`SCFNet`.

    Shapes and errors as of SCFNet; there is one map in training too.
    """

    name = "scfnet-base"

    def __init__(
        self,
        encoder: str = "mobilenet_v3_large_050",
        encoder_weights: str | Path | None = None,
        encoder_config: Mapping[str, Any] | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__(encoder, encoder_weights, encoder_config, in_channels)
        self.head = nn.Conv2d(sum(self.encoder_channels), 1, 3, padding=1)
        init_decoder(self.head)

    def forward(self, image: Tensor) -> Tensor:
        first, *others = self._encode(image)
        together = torch.cat([first, *(_upsample(x, first) for x in others)], dim=1)
        return _upsample(self.head(together), image)


class BiasedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose running variance averages the biased variances, as Paddle's does.

    torch corrects each batch's variance by n / (n - 1) before it enters the average.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.running_var is None or self.momentum is None:
            return super().forward(x)
        # A copy, as autograd keeps what was given to it.
        updated = self.running_var.clone()
        y = F.batch_norm(
            x, self.running_mean, updated, self.weight, self.bias, True, self.momentum, self.eps
        )
        n = x.numel() // max(x.shape[1], 1)
        with torch.no_grad():
            kept = self.running_var * (1 - self.momentum)
            self.running_var.copy_(torch.lerp(updated, kept, 1 / n))
        return y


def _upsample(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
