"""What is timed on a GPU: layers of CSNet, the fused networks, and a step of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases.goctconv import INFERENCE, TRAINING
from networks import ACTIVATION, SIZE, _input_shapes, build_network
from torch import Tensor, nn

import sodfast
from sodfast.optim import DynamicWeightDecay, parameter_groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OP_BATCH = {False: 64, True: 24}
BLOCKS = {
    "ilblock": (
        ("csnet-x2-L", "stages.1.1"),
        ("csnet-x2-L", "stages.3.1"),
        ("csnet-x2", "stages.4.1"),  # the most channels that are one launch
    )
}
BLOCKS_TRAINING = {"ilblock": (("csnet-x1", "stages.1.1"), ("csnet-x1", "stages.3.1"))}


@dataclass(frozen=True)
class Work:
    """One case in one dtype; build() makes the module and its inputs on the GPU, in float32.

    Attributes:
        kind: "op", "inference" or "training"; an op with training has its backward timed.
        dtype: "fp32" or "bf16".
    """

    kind: str
    name: str
    network: str
    layer: str
    batch: int
    dtype: str
    training: bool

    @property
    def label(self) -> str:
        passes = "training" if self.training else "inference"
        return " ".join(filter(None, (self.network, self.layer, passes, f"batch {self.batch}")))

    @property
    def differentiated(self) -> int:
        """How many of the inputs get a gradient, from the first on: an image needs none."""
        shapes = self.shapes()
        return 0 if shapes[0][1] == 3 else len(shapes)

    def module(self) -> nn.Module:
        """The network or layer, fused where it does not train."""
        torch.manual_seed(0)
        model = build_network(self.network)
        layer = model.get_submodule(self.layer) if self.layer else model
        if not self.training and not isinstance(layer, sodfast.nn.NormAct):
            model = _fused(model)
            layer = model.get_submodule(self.layer) if self.layer else model
        if self.training and isinstance(layer, sodfast.nn.DilatedBank):
            layer.norm = nn.Identity()  # the norm has rows of its own
        return layer.train(self.training)

    def shapes(self) -> list[tuple[int, ...]]:
        if not self.layer:
            return [(self.batch, 3, SIZE, SIZE)]
        model = build_network(self.network)
        fused = model if self.training or "norm" in self.layer else _fused(model)
        return [tuple(shape) for shape in _input_shapes(fused, self.layer, self.batch)]

    def build(self) -> tuple[nn.Module, list[Tensor]]:
        module = self.module().cuda()
        scale = ACTIVATION if self.layer else 1.0
        return module, [scale * torch.randn(shape, device="cuda") for shape in self.shapes()]

    def parts(
        self, module: nn.Module, x: Tensor
    ) -> tuple[Callable[[Tensor], Tensor], torch.optim.Optimizer]:
        """What a step of training needs besides: from the result to the loss; the optimizer."""
        target = (torch.rand_like(x[:, :1]) > 0.5).float()
        adam = torch.optim.Adam(parameter_groups(module), lr=1e-4, capturable=True)
        return (
            lambda logits: F.binary_cross_entropy_with_logits(logits.float(), target),
            DynamicWeightDecay(adam, module),
        )


def _fused(model: nn.Module) -> nn.Module:
    """The fused network as its layers, which is how it runs on a GPU."""
    fused = sodfast.fuse(model)
    return getattr(fused, "network", fused)


def works(kind: str) -> Iterator[Work]:
    """The cases of a kind, in both dtypes; of each dtype the most telling first."""
    for dtype in DTYPES:
        if kind == "op":
            for training, layers in (
                (False, BLOCKS | INFERENCE), (True, BLOCKS_TRAINING | TRAINING)
            ):  # fmt: skip
                for op, places in layers.items():
                    for network, layer in places:
                        batch = OP_BATCH[training]
                        yield Work(kind, op, network, layer, batch, dtype, training)
        elif kind == "inference":
            for network in ("csnet-x2-L", "csnet-x1-L"):
                for batch in (64, 1):
                    yield Work(kind, "csnet", network, "", batch, dtype, False)
        else:
            for batch in (24, 128):
                yield Work(kind, "csnet", "csnet-x2", "", batch, dtype, True)
