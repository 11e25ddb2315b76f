"""The networks that the shapes come from, and what a case times of them.

The L networks have the channels that the authors' pruning left (facts about the published
checkpoints). Their weights are random, of realistic size: batch normalisation leaves
activations around 1e-2 and meets variances around 1e-4.
"""

from __future__ import annotations

import copy

import torch
from cases import Work
from torch import nn

import sodfast
from sodfast.weights import flush_denormals

SIZE = 224  # pixels, as in the papers
TRAINING_BATCH = 8
ACTIVATION = 1e-2  # magnitude of what flows between the layers of a trained CSNet

X1_L = {
    "stages": [
        [[8, 10]],
        [[9, 10], [10, 10], [10, 10]],
        [[19, 13], [19, 17], [20, 12], [34]],
        [[24, 21], [26, 27], [22, 18], [19, 18], [23, 18], [38]],
        [[18, 29], [25, 24], [26, 20], [50]],
    ],
    "fuse": [12, 24, 24],
    "bank": [[1, 2, 2, 2, 4], [1, 4, 4, 4, 5], [2, 2, 4, 5, 4]],
    "merge": 60,
}
X2_L = {
    "stages": [
        [[13, 10]],
        [[13, 12], [18, 11], [18, 12]],
        [[28, 21], [34, 22], [31, 29], [51]],
        [[23, 26], [27, 26], [25, 20], [17, 21], [19, 25], [38]],
        [[18, 31], [31, 27], [26, 44], [64]],
    ],
    "fuse": [17, 38, 32],
    "bank": [[2, 1, 2, 2, 1], [0, 6, 6, 7, 5], [0, 1, 3, 7, 7]],
    "merge": 79,
}
NETWORKS = {
    "csnet-x1": {"width": 1.0},
    "csnet-x2": {"width": 2.0},
    "csnet-x1-L": {"channels": X1_L},
    "csnet-x2-L": {"channels": X2_L},
}


def build_network(network: str) -> nn.Module:
    """A network by its name in NETWORKS, in eval mode, with realistic random weights."""
    model = sodfast.create_model("csnet", **NETWORKS[network])
    norms = [module for module in model.modules() if isinstance(module, sodfast.nn.NormAct)]
    with torch.no_grad(), sodfast.use_backend("reference"):
        for norm in norms:
            norm.weight.uniform_(0.5 * ACTIVATION, 2 * ACTIVATION)
            norm.bias.normal_(std=ACTIVATION)
            norm.slope.normal_(0.1, 0.3)  # negative at times, as learned ones are
            norm.momentum = 1.0
        # One forward in training mode leaves every norm the statistics of its input.
        model.train()(torch.randn(1, 3, 64, 64))
        for norm in norms:
            norm.momentum = 0.1
            norm.channel_means = None
        for parameter in model.parameters():
            parameter.copy_(flush_denormals(parameter))
    return model.eval()


def network_work(network: str, training: bool) -> Work:
    """A whole network on one image, or on a batch to train with."""
    model = build_network(network).train(training)
    return Work(model, (torch.randn(TRAINING_BATCH if training else 1, 3, SIZE, SIZE),))


def layer_work(network: str, layer: str, training: bool) -> Work:
    """A layer by its path in the network, on tensors shaped as those it gets there.

    For inference it is the layer of the fused network. Where fusing would leave nothing of
    it (a NormAct) it is taken as it is.
    """
    model = build_network(network)
    module = model.get_submodule(layer)
    if not training and not isinstance(module, sodfast.nn.NormAct):
        fused = sodfast.fuse(model)
        model = getattr(fused, "network", fused)  # the layers of a plan
        module = model.get_submodule(layer)
    shapes = _input_shapes(model, layer, TRAINING_BATCH if training else 1)
    if training and isinstance(module, sodfast.nn.DilatedBank):
        module.norm = nn.Identity()  # the norm has rows of its own
    needs_gradient = training and shapes[0][1] != 3  # an image needs none
    xs = [ACTIVATION * torch.randn(shape) for shape in shapes]
    return Work(module.train(training), ([x.requires_grad_(needs_gradient) for x in xs],))


def _input_shapes(model: nn.Module, layer: str, batch: int) -> list[torch.Size]:
    """The shapes that reach a layer when the network gets images of SIZE."""
    shapes: list[torch.Size] = []

    def note(_: nn.Module, args: tuple[list[torch.Tensor]]) -> None:
        xs = args[0]
        shapes.extend(x.shape for x in (xs if isinstance(xs, list) else [xs]))

    # On the meta device shapes are all there is, and nothing is computed.
    twin = copy.deepcopy(model).to("meta")
    twin.get_submodule(layer).register_forward_pre_hook(note)
    with torch.no_grad():
        twin(torch.empty(batch, 3, SIZE, SIZE, device="meta"))
    return shapes
