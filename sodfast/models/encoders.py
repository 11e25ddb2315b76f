"""Encoders by name: an image to four features, each half as large as the one before."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .efficientnet_lite import EfficientNetLite0
from .mobilenet_v3 import MobileNetV3Large
from .res2net import Res2Net50
from .resnet import ResNet50
from .vgg import VGG

__all__ = ["ENCODERS", "AutoBackboneEncoder", "make_encoder"]

# Called with (in_channels).
ENCODERS: dict[str, Callable[[int], nn.Module]] = {
    "mobilenet_v3_large_050": lambda n: MobileNetV3Large(0.5, "paddle", n),
    "mobilenet_v3_large_100": lambda n: MobileNetV3Large(1.0, "paddle", n),
    "mobilenet_v3_large_100_torchvision": lambda n: MobileNetV3Large(1.0, "torchvision", n),
    "efficientnet_lite0": EfficientNetLite0,
    "resnet50": ResNet50,
    "res2net50": Res2Net50,
    "vgg16": lambda n: VGG(16, n),
    "vgg19": lambda n: VGG(19, n),
}
# Of transformers: our name, its model type and what differs from that type's defaults.
_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin_b": (
        "swin",
        {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
    ),
}


def make_encoder(
    name: str, in_channels: int = 3, config: Mapping[str, Any] | None = None
) -> nn.Module:
    """An encoder with fresh weights; its ``channels`` are those of the four features.

    Args:
        name: of :data:`ENCODERS`, "swin_b", or a model type that transformers' AutoBackbone
            knows, such as "swin", "convnext", "pvt_v2" or "resnet".
        in_channels: of the image.
        config: settings of a transformers configuration; other encoders take none.

    Raises:
        ImportError: transformers is needed and missing; the message names the extra.
        ValueError: an unknown name, a setting that is refused, or a backbone without four
            stages.
    """
    if name in ENCODERS:
        if config:
            raise ValueError(f"encoder {name!r} takes no encoder_config, got {dict(config)}")
        return ENCODERS[name](in_channels)
    return AutoBackboneEncoder(name, in_channels, config or {})


class AutoBackboneEncoder(nn.Module):
    """The last four stages of a transformers backbone (the extra ``teachers``).

    Made from a configuration, so nothing is downloaded; arguments and errors as of
    :func:`make_encoder`. Weights in transformers' own naming load into ``backbone``.

    Shape: image (B, in_channels, H, W) to four features; H and W multiples of 32.
    """

    channels: tuple[int, ...]

    def __init__(self, name: str, in_channels: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        try:
            transformers = importlib.import_module("transformers")
        except ImportError:
            raise ImportError(
                f"encoder {name!r} is none of {', '.join(ENCODERS)}; others come from "
                "transformers: pip install 'sodfast[teachers]'"
            ) from None
        kind, preset = _PRESETS.get(name, (name, {}))
        if kind not in transformers.CONFIG_MAPPING:
            known = ", ".join((*ENCODERS, *_PRESETS))
            raise ValueError(
                f"unknown encoder {name!r}: neither one of {known}, nor a model type of "
                "transformers"
            )
        settings = {**preset, "num_channels": in_channels, **config}
        try:
            names = transformers.AutoConfig.for_model(kind, **settings).stage_names
            chosen = transformers.AutoConfig.for_model(kind, **settings, out_features=names[-4:])
            for key, value in vars(chosen).items():
                if isinstance(value, tuple):  # some backbones add these to lists
                    setattr(chosen, key, list(value))
            self.backbone = transformers.AutoBackbone.from_config(chosen)
        except (AttributeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"encoder {name!r} with {settings}: {reason}") from error
        stored = self.backbone.state_dict()
        for place, buffer in list(self.backbone.named_buffers()):
            if place not in stored:  # a weight file must hold these too: it is all that is loaded
                module, _, leaf = place.rpartition(".")
                self.backbone.get_submodule(module).register_buffer(leaf, buffer)
        for place, parameter in self.backbone.named_parameters():
            if place.startswith((f"{kind}.layernorm.", "layernorm.")):
                parameter.requires_grad_(False)  # of a result that is no feature
        self.channels = tuple(self.backbone.channels)
        if len(self.channels) != 4:
            raise ValueError(f"encoder {name!r} has {len(self.channels)} stages, 4 are needed")

    def forward(self, image: Tensor) -> list[Tensor]:
        return list(self.backbone(image).feature_maps)
