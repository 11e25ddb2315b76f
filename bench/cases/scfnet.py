"""SCFNet on MobileNetV3-Large ×0.5: one image of its 352x352 through the network."""

import torch
from torch import nn

import sodfast
from cases import Case, Work

SIZE = 352


def scfnet_work() -> Work:
    """Random weights, and the statistics that one forward in training mode leaves."""
    model = sodfast.create_model("scfnet")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(2, 3, SIZE, SIZE))
    return Work(model.eval(), (torch.randn(1, 3, SIZE, SIZE),))


CASES = [Case("model", "scfnet", "scfnet", False, scfnet_work)]
