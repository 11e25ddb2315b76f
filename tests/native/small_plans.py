"""small_plans.py FOLDER: plans of small networks of each kind, for the fuzzer."""

import sys
from pathlib import Path

import torch

import sodfast
from sodfast.models import efficientnet_lite
from sodfast.models.encoders import ENCODERS
from sodfast.models.mobilenet_v3 import MobileNetV3Large

# SCFNet's own encoders make files of 3 and 13 MB, most of which is weights.
ENCODERS["small"] = lambda n: MobileNetV3Large(0.1, "torchvision", n)
efficientnet_lite.STAGES = tuple(
    (kernel_size, min(expansion, 2), 8, stride, 1)
    for kernel_size, expansion, _, stride, _ in efficientnet_lite.STAGES
)
NETWORKS = {
    "csnet": ("csnet", {"width": 0.3}),
    "wide": ("csnet", {"width": 0.3, "fused_stages": (1, 2, 3, 4)}),
    "extractor": ("extractor", {"width": 0.2, "in_channels": 4}),
    "vanilla": ("vanilla", {"width": 0.15}),
    "scfnet": ("scfnet", {"encoder": "small", "channels": 4}),
    "scfnet-lite": ("scfnet", {"encoder": "efficientnet_lite0", "channels": 4}),
}

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
for name, (model, config) in NETWORKS.items():
    sodfast.fuse(sodfast.create_model(model, **config)).save(folder / f"{name}.sodfast")
