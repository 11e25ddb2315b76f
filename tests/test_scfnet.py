"""SCFNet and its baseline: counts, encoders, layers, and the way through fuse, files, predict."""

import copy
import importlib.util
import json

import numpy as np
import pytest
import torch
from command_line import run as command
from torch import nn
from torch.nn import functional as F

import sodfast
from sodfast.data.synth import write_scenes
from sodfast.models.efficientnet_lite import EfficientNetLite0
from sodfast.models.encoders import make_encoder
from sodfast.models.mobilenet_v3 import MobileNetV3Large
from sodfast.models.vgg import VGG
from sodfast.nn import SCFM
from sodfast.nn.scfm import ConvBNReLU

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
TINY_SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 4}
# Small forms of every kind, as (name, configuration).
MODELS = {
    "mobilenet": ("scfnet", {}),
    "mobilenet, paper's form": ("scfnet", {"form": "paper", "channels": 8}),
    "resnet": ("scfnet", {"encoder": "resnet50", "channels": 8}),
    "vgg": ("scfnet", {"encoder": "vgg16", "channels": 8}),
    "base": ("scfnet-base", {}),
    "swin": ("scfnet", {"encoder": "swin", "encoder_config": TINY_SWIN, "channels": 8}),
}


def statistics(model: nn.Module) -> int:
    return sum(b.numel() for name, b in model.named_buffers() if "running" in name)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """With statistics that fit, in eval mode."""
    name, config = MODELS[request.param]
    if request.param == "swin":
        pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = sodfast.create_model(name, **config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 64, 64))
    return model.eval()


# ------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize(
    ("encoder", "trainable", "total"),
    [("mobilenet_v3_large_050", 788_298, 800_154), ("resnet50", 26_093_508, 26_148_420)],
)
def test_parameters_as_published(encoder, trainable, total):
    with torch.device("meta"):
        model = sodfast.create_model("scfnet", encoder=encoder)
    assert sodfast.count(model)["params"] == trainable
    assert trainable + statistics(model) == total


def test_work_as_published():
    """0.2391 G at 352 x 352 with all four heads; in eval mode the main one alone is computed."""
    with torch.device("meta"):
        model = sodfast.create_model("scfnet")
    other_heads = sum(16 * 9 * (352 // scale) ** 2 for scale in (8, 16, 32))
    work = sodfast.count(model, (352, 352))["conv_macs"] + other_heads
    assert f"{work / 1e9:.4f}" == "0.2391"


@pytest.mark.parametrize(
    ("build", "published", "beyond"),
    [
        # torchvision's counts, less the last convolution and the classifier
        (lambda: MobileNetV3Large(1.0, "torchvision"), 5_483_032,
         960 * 160 + 2 * 960 + 961 * 1280 + 1281 * 1000),
        (EfficientNetLite0, 4_652_008, 320 * 1280 + 2 * 1280 + 1281 * 1000),
        (lambda: VGG(16), 138_357_544, 25089 * 4096 + 4097 * 4096 + 4097 * 1000),
        (lambda: VGG(19), 143_667_240, 25089 * 4096 + 4097 * 4096 + 4097 * 1000),
    ],
)  # fmt: skip
def test_encoders_have_the_published_counts(build, published, beyond):
    with torch.device("meta"):
        encoder = build()
    assert sum(p.numel() for p in encoder.parameters()) == published - beyond


@needs_transformers
def test_swin_b_has_the_published_count():
    with torch.device("meta"):
        encoder = make_encoder("swin_b")
    # torchvision's swin_b without its head; a norm per feature besides the last one's
    published = 87_768_224 - 1025 * 1000
    assert encoder.channels == (128, 256, 512, 1024)
    norms = 2 * sum(encoder.channels)
    assert sum(p.numel() for p in encoder.parameters()) == published + norms


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "strides"),
    [("mobilenet_v3_large_050", (4, 8, 16, 32)), ("mobilenet_v3_large_100_torchvision",
     (4, 8, 16, 32)), ("efficientnet_lite0", (4, 8, 16, 32)), ("vgg16", (2, 4, 8, 16)),
     ("resnet50", (4, 8, 16, 32))],
)  # fmt: skip
def test_encoders_give_four_features(name, strides):
    encoder = make_encoder(name, in_channels=4).eval()
    features = encoder(torch.randn(1, 4, 64, 96))
    shapes = [(1, c, 64 // s, 96 // s) for c, s in zip(encoder.channels, strides)]
    assert [f.shape for f in features] == shapes


def test_encoders_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="takes no encoder_config"):
        sodfast.create_model("scfnet", encoder="vgg16", encoder_config={"a": 1})
    with pytest.raises(ValueError, match="depth must be 16 or 19, not 11"):
        VGG(11)
    with pytest.raises(ValueError, match="form must be 'paddle' or 'torchvision', not 'timm'"):
        MobileNetV3Large(form="timm")


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"sodfast\[teachers\]"):
        sodfast.create_model("scfnet", encoder="swin_b")


@needs_transformers
@pytest.mark.parametrize(
    ("encoder", "config", "message"),
    [
        ("nonsense", {}, "unknown encoder 'nonsense': neither one of mobilenet_v3.*swin_b"),
        ("bert", {}, "encoder 'bert'"),
        ("swin", {"depths": [1, 1], "num_heads": [1, 1]}, "3 stages, 4 are needed"),
    ],
)
def test_backbones_that_do_not_fit_are_refused(encoder, config, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        sodfast.create_model("scfnet", encoder=encoder, encoder_config=config)


@needs_transformers
@pytest.mark.parametrize("kind", ["convnext", "pvt_v2", "resnet"])
def test_any_backbone_of_transformers(kind):
    with torch.device("meta"):
        model = sodfast.create_model("scfnet", encoder=kind)
        assert model.eval()(torch.empty(1, 3, 64, 64)).shape == (1, 1, 64, 64)


# ------------------------------------------------------------------------------------------ layers


@torch.no_grad()
@pytest.mark.parametrize("form", ["code", "paper"])
def test_scfm_is_its_formula(form):
    torch.manual_seed(0)
    module = SCFM(3, form).double().eval()
    for p in module.parameters():
        nn.init.normal_(p)
    low, high, deep = (torch.randn(2, 3, *s).double() for s in ((12, 10), (6, 5), (3, 2)))

    def up(x, like):
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)

    if form == "code":
        a = module.conv_high(high + high * up(deep, high))
        b = module.conv_low(low + low * up(high, low))
    else:
        a = module.conv_high(high * up(deep, high)) + high
        b = module.conv_low(low * up(deep, low)) + low
    torch.testing.assert_close(module(low, high, deep), module.conv_out(b + up(a, b)))


def test_scfm_refuses_an_unknown_form():
    with pytest.raises(ValueError, match="form must be 'code' or 'paper', not 'text'"):
        SCFM(4, "text")


def test_decoder_starts_as_the_authors_do():
    torch.manual_seed(0)
    conv = ConvBNReLU(64, 64)[0]
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert not conv.bias.any()


# --------------------------------------------------------------------------------------- the model


def test_maps_in_training_and_one_map_after(model):
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        one = model(image)
    assert one.shape == (2, 1, 64, 96)
    model = copy.deepcopy(model).train()
    out = model(image)
    maps = [out] if isinstance(out, torch.Tensor) else out
    assert len(maps) == (1 if model.name == "scfnet-base" else 4)
    assert all(m.shape == one.shape for m in maps)
    sum(m.square().mean() for m in maps).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # a norm of Swin's classifier
            assert name.startswith("encoder.backbone.swin.layernorm.")
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@torch.no_grad()
def test_fused_form_is_equal(model, backend, device):
    model, image = copy.deepcopy(model).to(device), torch.randn(2, 3, 64, 32, device=device)
    fused = sodfast.fuse(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    expected = model(image)
    assert expected.std() > 0
    # Deep encoders with fresh weights enlarge every rounding; the algebra shows in float64.
    assert (fused(image) - expected).abs().max() <= 1e-3 * expected.abs().max()
    exact = model.double()(image.double())
    torch.testing.assert_close(sodfast.fuse(model)(image.double()), exact, rtol=1e-9, atol=1e-9)
    again = sodfast.fuse(fused)
    assert torch.equal(again(image), fused(image))


@torch.no_grad()
def test_file_gives_the_same_network(model, tmp_path):
    sodfast.save(model, tmp_path / "weights.safetensors")
    loaded = sodfast.load(tmp_path / "weights.safetensors")
    assert loaded.config == json.loads(json.dumps(model.config))
    assert loaded.preprocessing == model.preprocessing
    image = torch.randn(1, 3, 32, 64)
    assert torch.equal(loaded(image), model(image))


def test_predicts_pictures(model):
    picture = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    saliency = sodfast.Predictor(model, size=64)(picture)
    assert saliency.shape == (37, 50) and saliency.dtype == np.uint8
    with pytest.raises(ValueError, match="48x64.*32.*32x64, 64x64"):
        model(torch.zeros(1, 3, 48, 64))
    assert model.preprocessing["size"] == [352, 352]
    assert model.preprocessing["mean"][0] * 255 == pytest.approx(124.55)


def test_commands_take_it(model, tmp_path, capsys):
    """predict and eval on a weight file of every kind."""
    write_scenes(tmp_path / "set", 2, seed=3, size=40)
    sodfast.save(model, tmp_path / "weights.safetensors")
    weights = ("--weights", tmp_path / "weights.safetensors", "--size", 64)
    status, _, err = command(
        capsys, "predict", tmp_path / "set" / "images", "-o", tmp_path / "maps", *weights
    )
    assert status == 0, err
    assert len(list((tmp_path / "maps").glob("*.png"))) == 2
    status, out, err = command(
        capsys, "eval", *weights, "--data", tmp_path / "set", "--no-speed", "--json"
    )
    assert status == 0, err
    assert "mae" in out.lower()


def test_convolutions_get_channels_last_and_the_gradients_stay(compiled):
    """As oneDNN is faster then; the ops take both layouts."""
    torch.manual_seed(0)
    model = sodfast.create_model("scfnet", encoder="efficientnet_lite0", channels=8).double()
    layouts = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, args: layouts.append(
                    args[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    image, gradients = torch.randn(2, 3, 64, 96).double(), {}
    for backend in ("cpu", "reference"):
        model.zero_grad()
        with sodfast.use_backend(backend):
            sum(one.square().mean() for one in model(image)).backward()
        gradients[backend] = [p.grad for p in model.parameters()]
        if backend == "cpu":
            assert len(layouts) > 60 and all(layouts)
    for ours, plain in zip(gradients["cpu"], gradients["reference"]):
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_compiles_without_a_break():
    model = sodfast.create_model("scfnet", channels=8).eval()
    image = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image), model(image))
