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
from sodfast.models.res2net import Res2Net50
from sodfast.models.resnet import ResNet50

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
    assert load_encoder_weights(encoder, path) == dropped
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
