"""The networks of the papers, by name."""

from .count import count
from .csf import CSF
from .csnet import CSNet
from .encoder_weights import load_encoder_weights
from .extractor import Extractor, Vanilla
from .fpn import FPN
from .registry import create_model, input_channels, list_models
from .scfnet import SCFNet, SCFNetBase

__all__ = [
    "CSF",
    "FPN",
    "CSNet",
    "Extractor",
    "SCFNet",
    "SCFNetBase",
    "Vanilla",
    "count",
    "create_model",
    "input_channels",
    "list_models",
    "load_encoder_weights",
]
