"""The losses of KD-SCFNet: their formulas, their schedules, a stranger's network."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sodfast.nn import (
    BoundaryDiceLoss,
    DiceLoss,
    MultiLevelLoss,
    ProgressiveBoundary,
    StructurePolishingLoss,
)


def case(channels=1, size=(14, 11), dtype=torch.float64):
    torch.manual_seed(0)
    logits = torch.randn(3, channels, *size, dtype=dtype)
    truth = (torch.rand(3, channels, *size, dtype=dtype) > 0.6).to(dtype)
    truth[0, 0] = 0  # nothing salient
    return logits, truth


def dice(p, g):
    """One image and channel, in words of the paper."""
    return 1 - (1 + 2 * (p * g).sum()) / (1 + p.sum() + g.sum())


def edge(z, k):
    """z less its erosion, thickened; one image and channel."""
    z = z[None, None]
    thin = z + F.max_pool2d(-z, 3, 1, 1)
    return F.max_pool2d(thin, k, 1, k // 2)[0, 0]


def mean_over_maps(function, logits, truth):
    pairs = zip(logits.sigmoid().flatten(0, 1), truth.flatten(0, 1))
    return torch.stack([function(p, g) for p, g in pairs]).mean()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("k", [1, 3, 13, 31])
def test_losses_are_their_formulas(channels, k):
    logits, truth = case(channels)
    of_map = mean_over_maps(dice, logits, truth)
    of_edge = mean_over_maps(lambda p, g: dice(edge(p, k), edge(g, k)), logits, truth)
    torch.testing.assert_close(DiceLoss()(logits, truth), of_map)
    torch.testing.assert_close(BoundaryDiceLoss(k)(logits, truth), of_edge)
    together = StructurePolishingLoss(0.3, k)(logits, truth)
    torch.testing.assert_close(together, of_map + 0.3 * of_edge)


@pytest.mark.parametrize("loss", [DiceLoss(), BoundaryDiceLoss(3), StructurePolishingLoss(k=5)])
def test_gradients(loss):
    logits, truth = case(size=(6, 5))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, truth), logits)
    logits.grad = None
    loss(logits, truth).backward()
    assert logits.grad.abs().max() > 1e-4


def test_half_precision_holds_the_sums():
    logits = torch.full((1, 1, 400, 400), 10.0, dtype=torch.float16)
    truth = torch.ones(1, 1, 400, 400)
    assert DiceLoss()(logits, truth).item() == pytest.approx(0, abs=1e-4)


def test_levels_are_halved():
    logits, truth = case()
    maps = [logits, 2 * logits, -logits, logits + 1]
    loss = DiceLoss()
    expected = sum(loss(m, truth) / 2**i for i, m in enumerate(maps))
    torch.testing.assert_close(MultiLevelLoss(loss)(maps, truth), expected)
    torch.testing.assert_close(MultiLevelLoss(loss)(logits, truth), loss(logits, truth))
    weighted = MultiLevelLoss(loss, (3.0, 0.5))(maps[:2], truth)
    torch.testing.assert_close(weighted, 3 * loss(maps[0], truth) + loss(maps[1], truth) / 2)


def test_what_does_not_fit_is_refused():
    logits, truth = case()
    with pytest.raises(ValueError, match=r"\(3, 1, 14, 11\) and \(3, 14, 11\)"):
        DiceLoss()(logits, truth[:, 0])
    with pytest.raises(ValueError, match="logits and truth"):
        StructurePolishingLoss()(logits, truth[..., :-1])
    with pytest.raises(ValueError, match="1 to 4 maps, got 5"):
        MultiLevelLoss(DiceLoss())([logits] * 5, truth)
    with pytest.raises(ValueError, match="1 to 4 maps, got 0"):
        MultiLevelLoss(DiceLoss())([], truth)
    with pytest.raises(ValueError, match="'paper' or 'code', not 'pbsm'"):
        ProgressiveBoundary("pbsm")
    with pytest.raises(ValueError, match="epochs must be above 0, not 0"):
        ProgressiveBoundary(epochs=0)


def test_progressive_boundary_by_name():
    def lengths(schedule, epochs):
        ks = [ProgressiveBoundary(schedule, epochs)(e) for e in range(epochs)]
        assert ks == sorted(ks, reverse=True)
        return [ks.count(k) for k in (13, 11, 9, 7, 5, 3, 1)]

    assert lengths("paper", 69) == [10, 10, 10, 10, 10, 10, 9]
    assert lengths("code", 69) == [9, 10, 10, 10, 10, 10, 10]
    assert lengths("paper", 7) == [2, 1, 1, 1, 1, 1, 0]
    assert lengths("paper", 690) == [100] * 6 + [90]
    assert ProgressiveBoundary()(30.0 - 1e-9) == 7  # an epoch's beginning, as floats have it
    assert ProgressiveBoundary()(1000) == 1


def test_in_a_network_of_a_stranger():
    """As the module's docstring shows it: a few steps teach a two-map network a disc."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    truth = ((x**2 + y**2) < 0.3).float().expand(2, 1, 32, 32)
    image = torch.cat([truth, x.expand(2, 1, 32, 32)], 1) + 0.3 * torch.randn(2, 2, 32, 32)

    class Stranger(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU())
            self.heads = nn.ModuleList(nn.Conv2d(8, 1, 3, padding=1) for _ in range(2))

        def forward(self, x):
            return [head(self.body(x)) for head in self.heads]

    network, epochs = Stranger(), 40
    structure_polishing = StructurePolishingLoss()
    criterion = MultiLevelLoss(structure_polishing)
    thickness = ProgressiveBoundary("paper", epochs)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    before = DiceLoss()(network(image)[0], truth).item()
    for epoch in range(epochs):
        structure_polishing.k = thickness(epoch)
        optimizer.zero_grad()
        criterion(network(image), truth).backward()
        optimizer.step()
    assert before > 0.5
    assert DiceLoss()(network(image)[0], truth).item() < 0.1


def test_half_precision_holds_no_sums_so_they_are_float32() -> None:
    """Sums over 352² pixels are beyond float16."""
    logits = torch.randn(1, 1, 352, 352, generator=torch.Generator().manual_seed(0)).half()
    truth = torch.ones_like(logits)
    found = StructurePolishingLoss()(logits.requires_grad_(), truth)
    assert found.item() == StructurePolishingLoss()(logits.float(), truth.float()).item()
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient.dtype == torch.float16 and gradient.isfinite().all()
