"""What others call the weights of our encoders: torchvision, timm, transformers, PaddleClas,
efficientnet_pytorch.

:func:`their_names` finds out which naming a state dict has by a name that only it contains.
"""

from collections.abc import Callable, Collection, Mapping

from torch import nn

from .efficientnet_lite import STAGES, EfficientNetLite0
from .encoders import AutoBackboneEncoder
from .mobilenet_v3 import MobileNetV3Large
from .resnet import ResNet50
from .vgg import VGG

__all__ = ["paddle_name", "surplus", "their_names"]

# Beginnings of names that a classifier has and an encoder has not.
_RESNET = ("fc.", "classifier.1.")
_MOBILENET = {
    "paddle": ("last_second_conv.", "last_conv.", "fc."),
    "torchvision": ("classifier.", "features.16.", "blocks.6.", "conv_head."),
}
_EFFICIENTNET = {
    "_conv_stem.weight": ("_conv_head.", "_bn1.", "_fc."),
    "conv_stem.weight": ("conv_head.", "bn2.", "classifier."),
}
_VGG = ("classifier.", "pre_logits.", "head.")
_TRANSFORMERS = ("classifier.", "head.")


def surplus(encoder: nn.Module, names: Collection[str]) -> list[str]:
    """Those names in a file that belong to the classifier and what leads to it."""
    beginnings: tuple[str, ...] = _RESNET
    if isinstance(encoder, MobileNetV3Large):
        beginnings = _MOBILENET[encoder.form]
    elif isinstance(encoder, EfficientNetLite0):
        beginnings = next((words for stem, words in _EFFICIENTNET.items() if stem in names), ())
    elif isinstance(encoder, VGG):
        beginnings = _VGG
    elif isinstance(encoder, AutoBackboneEncoder):
        beginnings = _TRANSFORMERS
    return [name for name in names if name.startswith(beginnings)]


def their_names(encoder: nn.Module, state: Mapping[str, object]) -> dict[str, str]:
    """For every name of the encoder's state dict the file's."""
    own = encoder.state_dict()
    for marker, rename in _namings(encoder):
        for prefix in ("", "resnet.", "bkbone.", "backbone."):
            if prefix + marker in state:
                return {name: prefix + rename(name) for name in own}
    if isinstance(encoder, AutoBackboneEncoder):
        return _transformers_names(encoder, state)
    return {name: name for name in own}


def _namings(encoder: nn.Module) -> list[tuple[str, Callable[[str], str]]]:
    if isinstance(encoder, ResNet50):
        return [("embedder.embedder.convolution.weight", _resnet_in_transformers)]
    if isinstance(encoder, MobileNetV3Large):
        return [
            ("blocks.0.expand_conv.conv.weight", paddle_name),
            ("features.1.block.0.0.weight", _mobilenet_in_torchvision),
            ("conv_stem.weight", _mobilenet_in_timm),
        ]
    if isinstance(encoder, EfficientNetLite0):
        return [
            ("_conv_stem.weight", _efficientnet_in_lukemelas),
            ("conv_stem.weight", _efficientnet_in_timm),
        ]
    return []


def _transformers_names(
    encoder: AutoBackboneEncoder, state: Mapping[str, object]
) -> dict[str, str]:
    """A backbone's own names, with or without "backbone." or the model's ("swin.") before them."""
    own = list(encoder.state_dict())
    bare = [name.removeprefix("backbone.") for name in own]
    for prefix in ("backbone.", f"{encoder.backbone.config.model_type}.", ""):
        if any(prefix + name in state for name in bare):
            return {name: prefix + name.removeprefix("backbone.") for name in own}
    return {name: name for name in own}


def paddle_name(name: str) -> str:
    """units.3.expand.0.weight, stem.1.running_var … in PaddleClas's words."""
    *place, module, leaf = name.split(".")
    leaf = {"running_mean": "_mean", "running_var": "_variance"}.get(leaf, leaf)
    if place[0] == "stem":
        return f"conv.{'conv' if module == '0' else 'bn'}.{leaf}"
    unit, part = place[1], place[2]
    if part == "squeeze":
        return f"blocks.{unit}.mid_se.{'conv1' if module == 'reduce' else 'conv2'}.{leaf}"
    word = {"expand": "expand_conv", "depthwise": "bottleneck_conv", "project": "linear_conv"}[part]
    return f"blocks.{unit}.{word}.{'conv' if module == '0' else 'bn'}.{leaf}"


def _mobilenet_in_torchvision(name: str) -> str:
    first, *rest = name.split(".")
    if first == "stem":
        return f"features.0.{'.'.join(rest)}"
    unit, part, module, leaf = rest
    expands, excites = int(unit) > 0, int(unit) in _EXCITED
    place = {
        "expand": 0,
        "depthwise": int(expands),
        "squeeze": int(expands) + 1,
        "project": int(expands) + 1 + int(excites),
    }[part]
    if part == "squeeze":
        module = "fc1" if module == "reduce" else "fc2"
    return f"features.{int(unit) + 1}.block.{place}.{module}.{leaf}"


def _mobilenet_in_timm(name: str) -> str:
    first, *rest = name.split(".")
    if first == "stem":
        return f"{'conv_stem' if rest[0] == '0' else 'bn1'}.{rest[1]}"
    unit, part, module, leaf = rest
    number = int(unit)
    stage = max(s for s, begin in enumerate(_TIMM_STAGES) if begin <= number)
    place = f"blocks.{stage}.{number - _TIMM_STAGES[stage]}"
    if part == "squeeze":
        return f"{place}.se.conv_{module}.{leaf}"
    return _unit_in_timm(place, number > 0, part, module, leaf)


def _unit_in_timm(place: str, expands: bool, part: str, module: str, leaf: str) -> str:
    if not expands:  # depthwise and pointwise
        conv, norm = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}[part]
    else:
        conv, norm = {
            "expand": ("conv_pw", "bn1"),
            "depthwise": ("conv_dw", "bn2"),
            "project": ("conv_pwl", "bn3"),
        }[part]
    return f"{place}.{conv if module == '0' else norm}.{leaf}"


def _efficientnet_in_timm(name: str) -> str:
    first, *rest = name.split(".")
    if first == "stem":
        return f"{'conv_stem' if rest[0] == '0' else 'bn1'}.{rest[1]}"
    stage, unit, part, module, leaf = rest
    return _unit_in_timm(f"blocks.{stage}.{unit}", int(stage) > 0, part, module, leaf)


def _efficientnet_in_lukemelas(name: str) -> str:
    """The names of the package efficientnet_pytorch, which number all units in one row."""
    first, *rest = name.split(".")
    if first == "stem":
        return f"{'_conv_stem' if rest[0] == '0' else '_bn0'}.{rest[1]}"
    stage, unit, part, module, leaf = rest
    number = sum(count for *_, count in STAGES[: int(stage)]) + int(unit)
    conv, norm = {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }[part]
    return f"_blocks.{number}.{conv if module == '0' else norm}.{leaf}"


_EXCITED = (3, 4, 5, 10, 11, 12, 13, 14)  # units with squeeze and excitation
_TIMM_STAGES = (0, 1, 3, 6, 10, 12)  # the first unit of each


def _resnet_in_transformers(name: str) -> str:
    """conv1.weight, layer2.0.bn3.bias, layer2.0.downsample.1.bias … in transformers' words."""
    *place, module, leaf = name.split(".")
    if not place:
        kind = "convolution" if module == "conv1" else "normalization"
        return f"embedder.embedder.{kind}.{leaf}"
    layer, block = int(place[0].removeprefix("layer")) - 1, place[1]
    if place[2:] == ["downsample"]:
        kind = "convolution" if module == "0" else "normalization"
        part = f"shortcut.{kind}"
    else:
        kind = "convolution" if module.startswith("conv") else "normalization"
        part = f"layer.{int(module[-1]) - 1}.{kind}"
    return f"encoder.stages.{layer}.layers.{block}.{part}.{leaf}"
