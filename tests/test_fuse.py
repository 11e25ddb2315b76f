"""sodfast.fuse: the same result without normalisation layers, from any thread."""

import threading

import pytest
import torch
from torch import nn

import sodfast
from sodfast.nn import CrossStageFusion, GOctConv, ILBlock, NormAct, SimplifiedGOctConv


@torch.no_grad()
def same(model, inputs):
    """Largest difference between a model and its fused form, relative to the result's scale."""
    fused = sodfast.fuse(model)
    assert not any(isinstance(module, NormAct) for module in fused.modules())
    expected, got = model(inputs), fused(inputs)
    if isinstance(expected, torch.Tensor):
        expected, got = [expected], [got]
    largest = torch.cat([e.flatten() for e in expected]).abs().max()
    return torch.cat([(g - e).flatten() for g, e in zip(got, expected)]).abs().max() / largest


def test_csnet(backend, device, small_csnet):
    model = small_csnet(weight_gain=100.0)
    x = torch.randn(2, 3, 64, 48)
    # The same network in float64 shows that the form is exact and only rounding is left.
    assert same(model.double().to(device), x.double().to(device)) < 1e-10
    assert same(model.float(), x.to(device)) < 5e-5


def test_blocks_with_absent_scales(backend, device, settle):
    torch.manual_seed(0)
    xs = [torch.randn(2, c, 16 >> i, 16 >> i) for i, c in enumerate((3, 0, 4))]
    on_device = [x.to(device) for x in xs]
    block = settle(ILBlock((3, 0, 4), (0, 3, 2), kernel_size=3), xs)
    assert same(block.to(device), on_device) < 5e-5
    bank = [[1, 2], [0, 0], [0, 2]]
    fusion = settle(CrossStageFusion((3, 0, 4), (2, 0, 3), bank, 5, (1, 3), 100.0), xs)
    assert same(fusion.to(device), on_device) < 5e-5


class Stranger(nn.Module):
    """A module of somebody else's, with a learned bias in front of the normalisation."""

    fusable_pairs = (("first", "norm"),)

    def __init__(self, conv, norm):
        super().__init__()
        self.first, self.norm = conv, norm

    def forward(self, xs):
        return self.norm(self.first(xs))


def test_stranger_with_a_learned_bias(backend, device, settle):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    model = settle(Stranger(GOctConv(3, (2, 4), stride=2, bias=True), NormAct((2, 4))), x)
    assert same(model.to(device), x.to(device)) < 5e-5


def test_pair_that_cannot_be_fused_is_named():
    with pytest.raises(TypeError, match=r"Stranger.*Conv2d and a NormAct"):
        sodfast.fuse(Stranger(nn.Conv2d(3, 3, 1), NormAct(3)))
    with pytest.raises(TypeError, match=r"GOctConv and a BatchNorm2d"):
        sodfast.fuse(Stranger(GOctConv(3, 3), nn.BatchNorm2d(3)))


def test_model_stays_as_it_was_and_fusing_twice_changes_nothing(small_csnet):
    model = small_csnet().train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    fused = sodfast.fuse(model)
    assert model.training and not fused.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in fused.parameters())
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])
    again = sodfast.fuse(fused)
    assert again.state_dict().keys() == fused.state_dict().keys()
    for name, x in again.state_dict().items():
        assert torch.equal(x, fused.state_dict()[name])


def test_denormals_are_flushed():
    model = Stranger(SimplifiedGOctConv(2), NormAct(2)).eval()
    with torch.no_grad():
        model.norm.weight[0] = 1e-42
        model.norm.slope[1] = 1e-40
    fused = sodfast.fuse(model)
    assert (fused.first.weight[0] == 0).all() and (fused.first.weight[1] != 0).all()
    assert fused.first.slope.tolist() == [0.25, 0.0]


def test_fold_is_done_in_float64(settle):
    """γ / sqrt(σ² + ε) rounded once, where float32 arithmetic rounds three times."""
    torch.manual_seed(0)
    model = settle(Stranger(GOctConv(40, 40), NormAct(40)), torch.randn(1, 40, 8, 8))
    norm = model.norm
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    exact = (model.first.weight.double() * scale.view(-1, 1, 1, 1)).float()
    assert torch.equal(sodfast.fuse(model).first.weight, exact)


def test_threads_share_a_fused_model(backend, device, small_csnet):
    fused = sodfast.fuse(small_csnet()).to(device)
    images = [torch.randn(1, 3, 48, 48 + 16 * i, device=device) for i in range(4)]
    with torch.no_grad():
        expected = [fused(image) for image in images]
    wrong = []

    @torch.no_grad()
    def work(first):
        for step in range(25):
            i = (first + step) % len(images)
            if not torch.equal(fused(images[i]), expected[i]):
                wrong.append((first, step))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradient_through_the_fused_form_is_refused(compiled):
    fused = sodfast.fuse(Stranger(GOctConv(3, 3), NormAct(3)))
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    with sodfast.use_backend("cpu"):
        (y,) = fused(x)
    with pytest.raises(RuntimeError, match="goctconv: slope is an inference epilogue"):
        y.sum().backward()


@torch.no_grad()
def test_compile_and_export(backend, device, small_csnet):
    fused = sodfast.fuse(small_csnet()).to(device)
    x = torch.randn(2, 3, 32, 48, device=device)
    compiled_model = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled_model(x), fused(x))
    program = torch.export.export(fused, (x,))
    torch.testing.assert_close(program.module()(x), fused(x))
