"""ResNet-50 and Res2Net-50: results of others with the same weights, weight files of others."""

import copy
import json
from pathlib import Path

import pytest
import torch
from golden.make_encoders import fill
from safetensors.torch import save_file
from torch import nn

import sodfast
from sodfast.models import load_encoder_weights
from sodfast.models.efficientnet_lite import EfficientNetLite0
from sodfast.models.encoder_names import their_names
from sodfast.models.encoders import make_encoder
from sodfast.models.mobilenet_v3 import MobileNetV3Large
from sodfast.models.res2net import Res2Net50
from sodfast.models.resnet import ResNet50
from sodfast.models.vgg import VGG

GOLDEN = json.loads((Path(__file__).parent / "golden" / "encoders.json").read_text())


@pytest.mark.parametrize(
    ("encoder_class", "golden"),
    [
        (ResNet50, "timm resnet50"),
        (ResNet50, "transformers ResNetModel"),
        (Res2Net50, "timm res2net50d"),
    ],
)
@torch.no_grad()
def test_encoder_gives_what_others_give(encoder_class, golden):
    with torch.device("meta"):
        encoder = encoder_class().double().eval()
    state = {
        name: fill(name, tuple(x.shape)) if x.dim() else torch.zeros_like(x, device="cpu")
        for name, x in encoder.state_dict().items()
    }
    encoder.load_state_dict(state, assign=True)
    features = encoder(fill("image", (1, 3, 64, 96)) * 4)
    assert len(features) == len(GOLDEN[golden]) == 4
    for y, expected in zip(features, GOLDEN[golden]):
        assert list(y.shape) == expected["shape"]
        found = {"mean": y.mean(), "std": y.std(), "max": y.max(), "first": y[0, 0, 0, 0]}
        for key, value in found.items():
            # The values grow from block to block, and roundings with them.
            bound = 1e-9 * expected["max"]
            assert value.item() == pytest.approx(expected[key], rel=1e-9, abs=bound)


def state_in_transformers_naming(ours):
    """(theirs, ours) of ResNet-50 written out in the order of transformers' modules."""
    leaves = {
        "convolution": ["weight"],
        "normalization": ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"],
    }
    pairs = []
    for kind, our_name in (("convolution", "conv1"), ("normalization", "bn1")):
        pairs += [
            (f"resnet.embedder.embedder.{kind}.{leaf}", f"{our_name}.{leaf}")
            for leaf in leaves[kind]
        ]
    for stage, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            theirs = f"resnet.encoder.stages.{stage}.layers.{block}"
            mine = f"layer{stage + 1}.{block}"
            parts = [
                (f"layer.{k}.{kind}", f"{short}{k + 1}", kind)
                for k in range(3)
                for kind, short in (("convolution", "conv"), ("normalization", "bn"))
            ]
            if block == 0:
                parts += [
                    ("shortcut.convolution", "downsample.0", "convolution"),
                    ("shortcut.normalization", "downsample.1", "normalization"),
                ]
            for part, our_part, kind in parts:
                pairs += [
                    (f"{theirs}.{part}.{leaf}", f"{mine}.{our_part}.{leaf}")
                    for leaf in leaves[kind]
                ]
    assert {name for _, name in pairs} == set(ours)
    return {their_name: ours[name] for their_name, name in pairs}


@pytest.fixture(scope="module")
def state_of():
    """A state dict of an encoder in half precision (small files); every tensor differs."""

    def build(encoder_class):
        torch.manual_seed(1)
        with torch.device("meta"):
            outline = encoder_class().state_dict()
        state = {}
        for number, (name, x) in enumerate(outline.items()):
            if x.is_floating_point():
                state[name] = torch.full(x.shape, number / 32, dtype=torch.float16)
                state[name].view(-1)[0] = -1.0
            else:
                state[name] = torch.tensor(number)
        return state

    return build


CLASSIFIER = {"fc.weight": torch.zeros(10, 2048), "fc.bias": torch.zeros(10)}
THEIR_CLASSIFIER = {f"classifier.1.{k[3:]}": v for k, v in CLASSIFIER.items()}


def in_torchvision_form(state):
    # Files of old have no batch counters.
    return {k: v for k, v in state.items() if not k.endswith("batches_tracked")} | CLASSIFIER


@pytest.mark.parametrize(
    ("encoder_class", "form", "suffix", "dropped"),
    [
        (ResNet50, in_torchvision_form, ".pth", list(CLASSIFIER)),
        (ResNet50, lambda state: state | CLASSIFIER, ".safetensors", list(CLASSIFIER)),  # timm
        (
            ResNet50,
            lambda state: state_in_transformers_naming(state) | THEIR_CLASSIFIER,
            ".safetensors",
            list(THEIR_CLASSIFIER),
        ),
        (
            ResNet50,  # transformers' backbone and base model: no head, no prefix
            lambda state: {
                k.removeprefix("resnet."): v for k, v in state_in_transformers_naming(state).items()
            },
            ".bin",
            [],
        ),
        (Res2Net50, lambda state: state | CLASSIFIER, ".safetensors", list(CLASSIFIER)),
        (
            Res2Net50,
            lambda state: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
            ".pt",
            [],
        ),
    ],
    ids="torchvision timm transformers transformers-backbone timm-res2net parallel".split(),
)
def test_pretrained_weights_load(encoder_class, form, suffix, dropped, state_of, tmp_path):
    state = state_of(encoder_class)
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(form(state), path)
    with torch.device("meta"):
        encoder = encoder_class()
    encoder.to_empty(device="cpu")
    assert sorted(load_encoder_weights(encoder, path)) == sorted(dropped)
    for name, x in encoder.state_dict().items():
        if x.is_floating_point():
            assert x.dtype == torch.float32
            assert torch.equal(x, state[name].float()), name


def test_model_takes_pretrained_weights(state_of, tmp_path):
    state = state_of(ResNet50)
    torch.save(state, tmp_path / "weights.pth")
    model = sodfast.create_model(
        "csf",
        channels={"fuse": [4] * 4, "bank": [[1] * 5] * 4, "merge": 4},
        encoder_weights=str(tmp_path / "weights.pth"),
    )
    assert torch.equal(model.encoder.layer3[5].conv2.weight, state["layer3.5.conv2.weight"].float())
    assert "encoder_weights" not in model.config


# ------------------------------------------------------------------ encoder weights that do not fit


class Tiny(nn.Module):
    """Stands for an encoder: errors need no 23 million parameters."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)


@pytest.fixture
def tiny():
    """The encoder, and a good state that differs from its own."""
    encoder = Tiny()
    return encoder, {name: x + 1 for name, x in encoder.state_dict().items()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bn1.bias"), "missing: bn1.bias$"),
        (lambda s: [s.pop(k) for k in ("bn1.bias", "conv1.weight")],
         "missing: conv1.weight, bn1.bias$"),
        (lambda s: s.update({"layer9.weight": torch.zeros(1), "a": torch.zeros(1)}),
         "unexpected: a, layer9.weight$"),
        (lambda s: s.update({"conv1.weight": torch.zeros(4, 4, 3, 3)}),
         r"different: conv1.weight is \(4, 4, 3, 3\) float32, the encoder's \(4, 3, 3, 3\)"),
        (lambda s: s.update({"bn1.bias": torch.zeros(4, dtype=torch.int64)}),
         r"different: bn1.bias is \(4,\) int64, the encoder's \(4,\) float32"),
        (lambda s: s.update({"bn1.bios": s.pop("bn1.bias")}),
         "Tiny; missing: bn1.bias; unexpected: bn1.bios$"),
        (lambda s: s.update({f"x{i:02}": torch.zeros(1) for i in range(30)}),
         "unexpected: x00, .*x19 and 10 more$"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_listed_and_change_nothing(
    tiny, change, message, suffix, tmp_path
):
    encoder, state = tiny
    before = copy.deepcopy(encoder.state_dict())
    change(state)
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder_weights(encoder, path)
    assert str(path) in str(caught.value)
    for name, x in encoder.state_dict().items():
        assert torch.equal(x, before[name])


def test_good_weights_load_and_tiny_ones_are_flushed(tiny, tmp_path):
    encoder, state = tiny
    state["bn1.bias"][2] = 1e-40
    torch.save(state, tmp_path / "weights.pth")
    assert load_encoder_weights(encoder, tmp_path / "weights.pth") == []
    state["bn1.bias"][2] = 0
    for name, x in encoder.state_dict().items():
        assert torch.equal(x, state[name])


def test_names_of_the_other_res2net_are_listed(state_of, tmp_path):
    state = {k: v for k, v in state_of(Res2Net50).items() if not k.startswith("conv1.")}
    state["conv1.weight"] = torch.zeros(64, 3, 7, 7)
    torch.save(state, tmp_path / "first-form.pth")
    with pytest.raises(ValueError, match="missing: conv1.0.weight, .*unexpected: conv1.weight"):
        with torch.device("meta"):  # refused before anything is written
            encoder = Res2Net50()
        load_encoder_weights(encoder, tmp_path / "first-form.pth")


class Stranger:
    """What a pickle must not be allowed to make."""


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("w.pth", lambda path: torch.save({"a": Stranger()}, path), "cannot be read as plain wei"),
        ("w.pth", lambda path: path.write_bytes(b"PK\x03\x04 cut"), "cannot be read as plain weig"),
        ("w.pth", lambda path: path.write_bytes(b""), "cannot be read as plain weights"),
        ("w.pth", lambda path: torch.save([1, 2], path), "holds a list, not a state dict"),
        ("w.pth", lambda path: torch.save({"epoch": 3}, path), "no tensors: epoch"),
        ("w.pth", lambda path: torch.save({1: torch.zeros(1)}, path), "no tensors: 1"),
        ("w.safetensors", lambda path: path.write_bytes(b"abc"), "no safetensors file, or cut"),
        ("w.onnx", lambda path: path.write_bytes(b"abc"), r"\.safetensors, \.pth, \.pt or \.bin"),
    ],
)
def test_files_that_cannot_be_read(tiny, name, write, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder_weights(tiny[0], tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_missing_file(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_encoder_weights(tiny[0], tmp_path / "nowhere.pth")


# ------------------------------------------------------ VGG, MobileNetV3, backbones of transformers


def test_vgg_in_torchvision_naming(tmp_path):
    with torch.device("meta"):
        names = VGG(16).state_dict()
    # Where torchvision's vgg16 has its convolutions.
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert list(names) == [f"features.{n}.{leaf}" for n in places for leaf in ("weight", "bias")]
    state = {name: torch.full(x.shape, n / 8) for n, (name, x) in enumerate(names.items())}
    head = {"classifier.0.weight": torch.zeros(4, 4), "classifier.6.bias": torch.zeros(4)}
    torch.save(state | head, tmp_path / "vgg.pth")
    encoder = VGG(16)
    assert sorted(load_encoder_weights(encoder, tmp_path / "vgg.pth")) == sorted(head)
    assert all(torch.equal(x, state[name]) for name, x in encoder.state_dict().items())


# Their name, our name and the shape, as they stand in the files that are published.
MOBILE_NAMES = {
    "torchvision": [
        ("features.0.0.weight", "stem.0.weight", (16, 3, 3, 3)),
        ("features.1.block.0.0.weight", "units.0.depthwise.0.weight", (16, 1, 3, 3)),
        ("features.1.block.1.1.running_var", "units.0.project.1.running_var", (16,)),
        ("features.2.block.0.0.weight", "units.1.expand.0.weight", (64, 16, 1, 1)),
        ("features.4.block.1.0.weight", "units.3.depthwise.0.weight", (72, 1, 5, 5)),
        ("features.4.block.2.fc1.weight", "units.3.squeeze.reduce.weight", (24, 72, 1, 1)),
        ("features.4.block.2.fc2.bias", "units.3.squeeze.expand.bias", (72,)),
        ("features.7.block.2.0.weight", "units.6.project.0.weight", (80, 240, 1, 1)),
        ("features.15.block.3.0.weight", "units.14.project.0.weight", (160, 960, 1, 1)),
    ],
    "timm": [
        ("conv_stem.weight", "stem.0.weight", (16, 3, 3, 3)),
        ("bn1.running_mean", "stem.1.running_mean", (16,)),
        ("blocks.0.0.conv_dw.weight", "units.0.depthwise.0.weight", (16, 1, 3, 3)),
        ("blocks.0.0.conv_pw.weight", "units.0.project.0.weight", (16, 16, 1, 1)),
        ("blocks.0.0.bn2.weight", "units.0.project.1.weight", (16,)),
        ("blocks.1.0.conv_pw.weight", "units.1.expand.0.weight", (64, 16, 1, 1)),
        ("blocks.2.0.se.conv_reduce.weight", "units.3.squeeze.reduce.weight", (24, 72, 1, 1)),
        ("blocks.3.3.conv_dw.weight", "units.9.depthwise.0.weight", (184, 1, 3, 3)),
        ("blocks.4.1.conv_pwl.weight", "units.11.project.0.weight", (112, 672, 1, 1)),
        ("blocks.5.2.bn3.bias", "units.14.project.1.bias", (160,)),
    ],
    "paddle": [
        ("conv.conv.weight", "stem.0.weight", (16, 3, 3, 3)),
        ("conv.bn._mean", "stem.1.running_mean", (16,)),
        ("blocks.0.expand_conv.conv.weight", "units.0.expand.0.weight", (16, 16, 1, 1)),
        ("blocks.3.mid_se.conv1.weight", "units.3.squeeze.reduce.weight", (18, 72, 1, 1)),
        ("blocks.14.linear_conv.bn._variance", "units.14.project.1.running_var", (160,)),
    ],
    "timm, EfficientNet": [
        ("conv_stem.weight", "stem.0.weight", (32, 3, 3, 3)),
        ("bn1.running_var", "stem.1.running_var", (32,)),
        ("blocks.0.0.conv_dw.weight", "stages.0.0.depthwise.0.weight", (32, 1, 3, 3)),
        ("blocks.0.0.conv_pw.weight", "stages.0.0.project.0.weight", (16, 32, 1, 1)),
        ("blocks.1.0.conv_pw.weight", "stages.1.0.expand.0.weight", (96, 16, 1, 1)),
        ("blocks.5.3.conv_dw.weight", "stages.5.3.depthwise.0.weight", (1152, 1, 5, 5)),
        ("blocks.6.0.bn3.bias", "stages.6.0.project.1.bias", (320,)),
    ],
    "efficientnet_pytorch": [
        ("_conv_stem.weight", "stem.0.weight", (32, 3, 3, 3)),
        ("_bn0.running_var", "stem.1.running_var", (32,)),
        ("_blocks.0._depthwise_conv.weight", "stages.0.0.depthwise.0.weight", (32, 1, 3, 3)),
        ("_blocks.0._bn2.weight", "stages.0.0.project.1.weight", (16,)),
        ("_blocks.1._expand_conv.weight", "stages.1.0.expand.0.weight", (96, 16, 1, 1)),
        ("_blocks.10._project_conv.weight", "stages.4.2.project.0.weight", (112, 672, 1, 1)),
        ("_blocks.15._bn0.running_mean", "stages.6.0.expand.1.running_mean", (1152,)),
    ],
}
MOBILE_HEADS = {
    "torchvision": ["features.16.0.weight", "classifier.0.weight", "classifier.3.bias"],
    "timm": ["blocks.6.0.conv.weight", "conv_head.weight", "classifier.bias"],
    "paddle": ["last_second_conv.conv.weight", "last_conv.weight", "fc.bias"],
    "timm, EfficientNet": ["conv_head.weight", "bn2.running_mean", "classifier.bias"],
    "efficientnet_pytorch": ["_conv_head.weight", "_bn1.running_mean", "_fc.bias"],
}
MOBILE = {
    "paddle": lambda: MobileNetV3Large(1.0, "paddle"),
    "timm, EfficientNet": EfficientNetLite0,
    "efficientnet_pytorch": EfficientNetLite0,
}


@pytest.mark.parametrize("naming", MOBILE_NAMES)
def test_mobile_encoders_in_every_naming(naming, tmp_path):
    encoder = MOBILE.get(naming, lambda: MobileNetV3Large(1.0, "torchvision"))()
    own = encoder.state_dict()
    marker = {
        MOBILE_NAMES[naming][0][0]: 0,
        MOBILE_NAMES[naming][1][0]: 0,
        MOBILE_NAMES[naming][2][0]: 0,
    }
    names = their_names(encoder, marker)
    for their_name, name, shape in MOBILE_NAMES[naming]:
        assert names[name] == their_name
        assert tuple(own[name].shape) == shape
    assert len(set(names.values())) == len(own)  # no two go to the same
    state = {
        names[name]: torch.full_like(x, n / 8) for n, (name, x) in enumerate(own.items())
        if x.is_floating_point()
    }  # fmt: skip
    head = dict.fromkeys(MOBILE_HEADS[naming], torch.zeros(1))
    torch.save(state | head, tmp_path / "weights.pth")
    assert load_encoder_weights(encoder, tmp_path / "weights.pth") == list(head)
    for name, x in encoder.state_dict().items():
        if x.is_floating_point():
            assert torch.equal(x, state[names[name]]), name


def test_the_two_forms_of_mobilenet_do_not_mix(tmp_path):
    """The other form's file is refused with what differs, instead of loading half of it."""
    other = MobileNetV3Large(1.0, "torchvision")
    names = their_names(other, {"features.1.block.0.0.weight": 0})
    torch.save({names[n]: x for n, x in other.state_dict().items()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="not the weights of MobileNetV3Large; .*different: "):
        load_encoder_weights(MobileNetV3Large(1.0, "paddle"), tmp_path / "w.pth")


@pytest.mark.parametrize("of", ["classifier", "backbone"])
def test_transformers_weights(of, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4, num_labels=3,
        image_size=256, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    kind = "SwinForImageClassification" if of == "classifier" else "SwinBackbone"
    theirs = getattr(transformers, kind)(config).eval()
    torch.save(theirs.state_dict(), tmp_path / "swin.bin")
    settings = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 4}
    encoder = make_encoder("swin", config=settings).eval()
    dropped = load_encoder_weights(encoder, tmp_path / "swin.bin")
    image = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        ours = encoder(image)
        if of == "backbone":
            assert not any(name.startswith("classifier") for name in dropped)
            expected = theirs(image).feature_maps
            assert all(torch.equal(a, b) for a, b in zip(ours, expected))
        else:
            assert "classifier.weight" in dropped
            # The features before the norms that a classifier does not have.
            states = theirs(image, output_hidden_states=True).reshaped_hidden_states
            norm = torch.nn.functional.layer_norm(
                states[-1].permute(0, 2, 3, 1), (64,)
            ).permute(0, 3, 1, 2)  # fmt: skip
            torch.testing.assert_close(ours[-1], norm)
