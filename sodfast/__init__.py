"""sodfast: salient object detection with tiny networks, and the fast layers under them."""

__version__ = "0.1.0"

from . import nn, ops
from .fuse import fuse
from .models import count, create_model, list_models
from .ops._backend import info, use_backend
from .plan import load_plan
from .predict import Predictor
from .pretrained import from_pretrained
from .weights import load, save

__all__ = [
    "Predictor",
    "__version__",
    "count",
    "create_model",
    "from_pretrained",
    "fuse",
    "info",
    "list_models",
    "load",
    "load_plan",
    "nn",
    "ops",
    "save",
    "use_backend",
]
