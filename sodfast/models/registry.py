"""Models by name: what create_model, the weight files and the command line go by."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from .csf import CSF
from .csnet import FUSED_CHOICES, FUSED_STAGES, CSNet
from .extractor import Extractor, Vanilla
from .fpn import FPN
from .scfnet import SCFNet, SCFNetBase

_MODELS: dict[str, type[nn.Module]] = {
    model.name: model for model in (CSNet, Extractor, Vanilla, CSF, SCFNet, SCFNetBase, FPN)
}

_SPLITS = ((1, 0), (3, 1), (1, 1), (1, 3), (0, 1))

# The networks of the papers' tables before pruning, as (name, configuration).
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("csnet", {"width": width}) for width in (1.0, 1.2, 1.5, 1.8, 2.0)),
    *(("csnet", {"split": split}) for split in _SPLITS if split != (1, 1)),
    *(("csnet", {"fused_stages": stages}) for stages in FUSED_CHOICES if stages != FUSED_STAGES),
    *(("extractor", {"split": split}) for split in _SPLITS),
    ("vanilla", {"split": (1, 1)}),
    ("csf", {"encoder": "resnet50"}),
    ("csf", {"encoder": "res2net50"}),
    ("scfnet", {"encoder": "mobilenet_v3_large_050"}),
    ("scfnet", {"encoder": "efficientnet_lite0", "channels": 32}),
    ("scfnet", {"encoder": "resnet50"}),
    ("scfnet", {"encoder": "vgg16"}),
    ("scfnet-base", {"encoder": "mobilenet_v3_large_050"}),
    ("fpn-rgbd", {"encoder": "vgg16"}),
    ("fpn-rgbd", {"encoder": "vgg19"}),
    ("fpn-rgbd", {"encoder": "vgg19", "teacher": True}),
)


def list_models() -> list[str]:
    """The names that :func:`create_model` knows."""
    return sorted(_MODELS)


def input_channels(name: str, config: Mapping[str, Any]) -> int:
    """How many channels the images of ``create_model(name, **config)`` have: 4 with depth.

    Raises ValueError for an unknown name.
    """
    default = inspect.signature(_known(name)).parameters["in_channels"].default
    return int(config.get("in_channels", default))


def create_model(name: str, **config: Any) -> nn.Module:
    """Build a model with fresh weights.

    Every model has ``name``, ``config`` (JSON-able; ``create_model(m.name, **m.config)``
    builds the same network again) and ``preprocessing`` (what its images need).

    Args:
        name: one of :func:`list_models`.
        config: the model's own arguments, see its class.

    Raises:
        ValueError: an unknown name or argument (with the nearest known one), or an argument's
            value that the model refuses.
    """
    model = _known(name)
    known = list(inspect.signature(model).parameters)
    for key in config:
        if key not in known:
            raise ValueError(f"{name} has no argument {key!r}{_nearest(key, known)}")
    try:
        return model(**config)
    except TypeError as error:
        raise ValueError(f"{name} cannot be made with {config}: {error}") from error


def _known(name: str) -> type[nn.Module]:
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}{_nearest(name, list_models())}")
    return _MODELS[name]


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(known)}"
