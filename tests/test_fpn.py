"""The feature pyramid for RGB-D: the paper's sizes, its teacher, encoders pretrained on RGB."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sodfast
from sodfast.models import load_encoder_weights
from sodfast.models.encoders import make_encoder
from sodfast.models.fpn import ReceptiveFieldBlock


@pytest.mark.parametrize(("encoder", "mib"), [("vgg16", "57.9"), ("vgg19", "78.2")])
def test_the_papers_sizes(encoder: str, mib: str) -> None:
    with torch.device("meta"):
        model = sodfast.create_model("fpn-rgbd", encoder=encoder)
        teacher = sodfast.create_model("fpn-rgbd", encoder=encoder, teacher=True)
    sizes = [sum(p.numel() for p in m.parameters()) * 4 / 2**20 for m in (model, teacher)]
    assert f"{sizes[0]:.1f}" == mib
    # Four blocks: 1x1, (1x3, 3x1, 3x3), (1x5, 5x1, 3x3), 3x3 of three branches, 1x1.
    c = 96
    weights = (1 + 3 + 3 + 9 + 5 + 5 + 9 + 3 * 9 + 1) * c * c + 9 * c
    assert round((sizes[1] - sizes[0]) * 2**18) == 4 * weights


def test_shapes_and_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = sodfast.create_model("fpn-rgbd", encoder="vgg16", teacher=True, channels=8)
    y = model(torch.rand(2, 4, 48, 80))
    assert y.shape == (2, 1, 48, 80)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model(torch.rand(0, 4, 16, 16)).shape == (0, 1, 16, 16)
    rgb = sodfast.create_model("fpn-rgbd", in_channels=3, channels=4)
    assert rgb(torch.rand(1, 3, 16, 16)).shape == (1, 1, 16, 16)


def test_a_receptive_field_block_sees_as_far_as_its_branches() -> None:
    block = ReceptiveFieldBlock(2).double()
    x = torch.randn(1, 2, 31, 31, dtype=torch.float64, requires_grad=True)
    # Before the ReLU, so that no side is cut off by chance.
    y = block.merge(torch.cat([branch(x) for branch in block.branches], 1)) + block.shortcut(x)
    y[0, 0, 15, 15].backward()
    seen = (x.grad[0].abs().sum(0) > 0).nonzero()
    reach = 2 + 5 + 1  # of 5x5, of 3x3 dilated by 5, of the last 3x3
    assert seen.min() == 15 - reach and seen.max() == 15 + reach
    assert torch.equal(block(x), y.relu())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="channels must be at least 1, not 0"):
        sodfast.create_model("fpn-rgbd", channels=0)
    with pytest.raises(ValueError, match="in_channels must be 3 or 4"):
        sodfast.create_model("fpn-rgbd", in_channels=2)
    with torch.device("meta"):
        model = sodfast.create_model("fpn-rgbd")
    with pytest.raises(ValueError, match=r"image must be \(B, 4, H, W\)"):
        model(torch.empty(1, 3, 16, 16, device="meta"))
    with pytest.raises(ValueError, match="multiples of 16"):
        model(torch.empty(1, 4, 16, 17, device="meta"))


def test_a_file_is_enough_to_build_it_again(tmp_path: Path) -> None:
    model = sodfast.create_model("fpn-rgbd", teacher=True, channels=4).eval()
    sodfast.save(model, tmp_path / "w.safetensors")
    again = sodfast.load(tmp_path / "w.safetensors")
    x = torch.rand(1, 4, 32, 16)
    assert torch.equal(again(x), model(x)) and again.config == model.config
    assert again.preprocessing["mean"][3] == 0.0 and again.preprocessing["size"] == [256, 256]


# ---- weights of RGB in an encoder of RGB and depth ----------------------------------------------


@pytest.fixture(scope="module")
def rgb_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    encoder = make_encoder("vgg16", 3)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(encoder.state_dict(), path)
    return encoder.eval(), path


@pytest.mark.parametrize("kernel", ["mean", "zero", "random"])
def test_depth_kernel(rgb_file: tuple[torch.nn.Module, Path], kernel: str) -> None:
    rgb, path = rgb_file
    torch.manual_seed(1)
    encoder = make_encoder("vgg16", 4).eval()
    before = encoder.features[0].weight.detach().clone()
    load_encoder_weights(encoder, path, kernel)
    weight, theirs = encoder.features[0].weight.detach(), rgb.features[0].weight.detach()
    assert torch.equal(weight[:, :3], theirs)
    wanted = {
        "mean": theirs.mean(1),
        "zero": torch.zeros_like(theirs[:, 0]),
        "random": before[:, 3],
    }
    assert torch.equal(weight[:, 3], wanted[kernel])
    assert torch.equal(encoder.features[28].weight, rgb.features[28].weight)
    if kernel == "zero":  # depth has no say yet
        x = torch.rand(1, 4, 32, 32)
        for a, b in zip(encoder(x), rgb(x[:, :3])):
            assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()))


def test_depth_kernel_in_create_model(rgb_file: tuple[torch.nn.Module, Path]) -> None:
    rgb, path = rgb_file
    model = sodfast.create_model("fpn-rgbd", encoder_weights=path, channels=2)
    assert torch.equal(model.encoder.features[0].weight[:, 3], rgb.features[0].weight.mean(1))
    assert "encoder_weights" not in model.config and "depth_kernel" not in model.config
    with pytest.raises(ValueError, match="depth_kernel must be mean, zero, random, not 'media'"):
        sodfast.create_model("fpn-rgbd", encoder_weights=path, depth_kernel="media")
    # Two channels more are not depth.
    with pytest.raises(ValueError, match="different"):
        load_encoder_weights(make_encoder("vgg16", 5), path)
