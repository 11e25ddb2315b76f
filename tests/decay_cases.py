"""What the tests of dynamic weight decay share: a loss, the γ, and the slow form as the truth."""

import torch
from torch import Tensor, nn

from sodfast.optim import decaying_norms


class PlainAdam(torch.optim.Adam):
    """Adam, but not of the class that is recognised: the decay and the step are two ops."""


def images(seed: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 32, 48, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def gammas(model: nn.Module) -> list[nn.Parameter]:
    return [norm.weight for _, norm in decaying_norms(model)]


def gradients(model: nn.Module) -> list[Tensor]:
    found = []
    for weight in gammas(model):
        assert weight.grad is not None
        found.append(weight.grad.clone())
    return found


def regulariser(model: nn.Module, absolute: bool = True) -> Tensor:
    """R as the paper's loss term: the slow form that DynamicWeightDecay replaces."""
    total = torch.zeros((), dtype=torch.float64)
    for _, norm in decaying_norms(model):
        means = norm.channel_means.abs() if absolute else norm.channel_means
        total = total + (0.5 * means * norm.weight.square()).sum(1).mean()
    return total


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Stranger(nn.Module):
    """A network with nothing of ours in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.conv(x))))
