"""The networks of the papers, by name."""

from .count import count
from .csnet import CSNet
from .registry import create_model, list_models

__all__ = ["CSNet", "count", "create_model", "list_models"]
