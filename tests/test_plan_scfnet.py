"""SCFNet as a plan: its steps, the whole network, the file."""

import struct

import numpy as np
import pytest
import torch
from test_plan import SOURCE, build, patched, run
from torch import nn
from torch.nn import functional as F

import sodfast
from sodfast.models.efficientnet_lite import EfficientNetLite0
from sodfast.models.encoders import ENCODERS
from sodfast.models.image import PREPROCESSING
from sodfast.models.mobilenet_v3 import MobileNetV3Large, Unit
from sodfast.nn import SCFM
from sodfast.nn.scfm import ConvBNReLU
from sodfast.ops import _backend
from sodfast.plan import Plan


def settled(model, image):
    """Statistics to fit the image's, weights of the norms of any size, in eval mode."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 0, 0.2)
        norm.momentum = 1.0
    with torch.no_grad(), sodfast.use_backend("reference"):
        model.train()(image)
    return model.eval()


FORMS = {
    "paddle": lambda n: MobileNetV3Large(0.1, "paddle", n),
    "torchvision": lambda n: MobileNetV3Large(0.1, "torchvision", n),  # a unit without expansion
    "lite": EfficientNetLite0,
}


GATED = ("paddle", "torchvision")  # the small ones, which have steps of every kind


@pytest.fixture(params=FORMS)
def model(request, compiled, monkeypatch):
    """A small SCFNet; "lite" has the encoder of the default weights, which is not small."""
    torch.manual_seed(0)
    monkeypatch.setitem(ENCODERS, "small", FORMS[request.param])
    net = sodfast.create_model("scfnet", encoder="small", channels=9, in_channels=4)
    return settled(net, torch.randn(3, 4, 96, 96))


def on_every_instruction_set(call):
    module = _backend._C
    before = module.cpu_isa()
    try:
        for isa in module.cpu_isas():
            module.set_cpu_isa(isa)
            yield isa, call()
    finally:
        module.set_cpu_isa(before)


@torch.no_grad()
def agrees(fused, model, x, limit):
    """Whether a plan gives on every instruction set what the network gives in float64."""
    assert isinstance(fused, Plan)
    with sodfast.use_backend("reference"):
        expected = model.double()(x.double())
    for isa, result in on_every_instruction_set(lambda: fused(x)):
        error = (result - expected).abs().max() / expected.abs().max()
        assert error < limit, f"{isa}: {error}"


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (192, 160), (32, 352)])
def test_result_on_every_instruction_set(model, size, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fused, x = sodfast.fuse(model), torch.randn(3, 4, *size)
        together, single = fused(x), torch.cat([fused(image) for image in x.split(1)])
        agrees(fused, model, x, 5e-5)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, single)
    assert fused(x[:0]).shape == (0, 1, *size)


# ------------------------------------------------------------------------------------- single steps
class Steps(nn.Module):
    """A 3x3 stem of stride 2, some layers after it, a head and the upsampling."""

    name, preprocessing = "steps", {**PREPROCESSING, "size": [32, 32]}

    def __init__(self, channels, outs, *layers):
        super().__init__()
        self.config = {"in_channels": 3}
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.Hardswish()
        )
        self.layers, self.head = nn.ModuleList(layers), nn.Conv2d(outs, 1, 3, padding=1)

    def through(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, image):
        y = self.head(self.through(self.stem(image)))
        return F.interpolate(y, image.shape[-2:], mode="bilinear", align_corners=False)

    def layers_to(self, plan, x):
        for layer in self.layers:
            x = layer.add_to(plan, x)
        return x

    def add_to(self, plan, image):
        x = plan.conv(image, self.stem[0], self.stem[-1])
        return plan.upsample(plan.conv(self.layers_to(plan, x), self.head))


class Fusion(Steps):
    """The layers are reduced twice, and an SCFM fuses all three."""

    def through(self, x):
        high = self.layers[0](x)
        return self.layers[2](x, high, self.layers[1](high))

    def layers_to(self, plan, x):
        high = self.layers[0].add_to(plan, x)
        deep = self.layers[1].add_to(plan, high)
        return self.layers[2].add_to(plan, x, high, deep)


SIZES = [(32, 32), (48, 112), (96, 80), (16, 720)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize(
    "ins, expanded, outs, excite, activation, form",
    [
        (5, 13, 5, False, nn.ReLU, "paddle"),
        (8, 33, 11, True, nn.Hardswish, "paddle"),
        (7, 7, 7, True, nn.ReLU, "torchvision"),
        (4, 24, 4, False, nn.ReLU6, "torchvision"),
        (1, 1, 1, False, nn.Hardswish, "paddle"),
    ],
)
def test_inverted_residual(
    compiled, ins, expanded, outs, excite, activation, form, kernel, stride, size
):
    torch.manual_seed(0)
    unit = Unit(ins, expanded, outs, kernel, stride, excite, activation, form)
    model = settled(Steps(ins, outs, unit), torch.randn(4, 3, 64, 64))
    if activation is nn.ReLU6:  # so that some of what it sees exceeds 6
        for layer in (unit.expand, unit.depthwise):
            layer[1].bias.data += 5
    agrees(sodfast.fuse(model), model, torch.randn(1, 3, *size), 2e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ins, outs, dilation", [(3, 16, 1), (17, 6, 5), (1, 1, 64)])
def test_dilated_convolution(compiled, ins, outs, dilation, size):
    torch.manual_seed(0)
    layer = ConvBNReLU(ins, outs, dilation)
    model = settled(Steps(ins, outs, layer), torch.randn(4, 3, 64, 64))
    agrees(sodfast.fuse(model), model, torch.randn(1, 3, *size), 2e-5)


class Strided(nn.Sequential):
    def __init__(self, channels):
        conv = nn.Conv2d(channels, channels, 3, 2, 1)
        super().__init__(conv, nn.BatchNorm2d(channels), nn.ReLU())

    def add_to(self, plan, x):
        return plan.conv(x, self[0], self[-1])


@pytest.mark.parametrize("size", [(32, 64), (48, 112), (96, 80)])
@pytest.mark.parametrize("channels", [1, 5, 16])
def test_fusion(compiled, channels, size):
    torch.manual_seed(0)
    layers = Strided(channels), Strided(channels), SCFM(channels)
    model = settled(Fusion(channels, channels, *layers), torch.randn(4, 3, 64, 64))
    agrees(sodfast.fuse(model), model, torch.randn(1, 3, *size), 2e-5)


def test_a_nan_reaches_the_map_and_no_other_image(model):
    fused = sodfast.fuse(model)
    x = torch.randn(2, 4, 64, 64)
    x[0, 1, 30, 30] = torch.nan
    with torch.no_grad():
        y = fused(x)
        assert y[0].isnan().any() and torch.equal(y[1:], fused(x[1:]))


# ------------------------------------------------------------------------------- the network, file
def test_work_of_the_steps_is_that_of_the_network(model):
    fused = sodfast.fuse(model)
    gates = [m for n, m in model.encoder.named_modules() if n.endswith(("reduce", "expand"))]
    beyond = sum(m.weight.numel() for m in gates if isinstance(m, nn.Conv2d))
    total = sum(step.macs_per_pixel for step in fused.steps) * 64 * 96 + beyond
    assert total == sodfast.count(model, (64, 96))["conv_macs"]


@pytest.mark.parametrize("config", [{"encoder": "vgg16"}, {"form": "paper"}])
def test_what_has_no_steps_runs_layer_by_layer(compiled, config):
    model = settled(sodfast.create_model("scfnet", channels=4, **config), torch.randn(2, 3, 64, 96))
    fused = sodfast.fuse(model)
    assert not isinstance(fused, Plan)
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        expected = model(x)
        assert (fused(x) - expected).abs().max() <= 1e-3 * expected.abs().max()


@torch.no_grad()
def test_file_and_the_example_in_c(compiled, tmp_path):
    """SCFNet as in the paper."""
    torch.manual_seed(0)
    plan = sodfast.fuse(settled(sodfast.create_model("scfnet"), torch.randn(2, 3, 96, 96)))
    path = tmp_path / "x.sodfast"
    plan.save(path)
    x = torch.randn(2, 3, 64, 96)
    assert torch.equal(sodfast.load_plan(path)(x), plan(x))
    example = build(SOURCE / "csrc" / "plan" / "example.c", tmp_path / "example", "-std=c11")
    photo = np.random.default_rng(0).integers(0, 256, (352, 352, 3), dtype=np.uint8)
    (tmp_path / "photo.ppm").write_bytes(b"P6\n352 352\n255\n" + photo.tobytes())
    mean, std = (
        torch.tensor(plan.network.preprocessing[key]).view(3, 1, 1) for key in ("mean", "std")
    )
    x = (torch.from_numpy(photo).permute(2, 0, 1) / 255 - mean) / std
    expected = (255 * plan(x[None]).sigmoid()[0, 0]).round().numpy()
    code, text = run(example, path, tmp_path / "photo.ppm", tmp_path / "map.pgm", 2)
    assert code == 0, text
    got = np.frombuffer((tmp_path / "map.pgm").read_bytes().split(b"255\n", 1)[1], np.uint8)
    assert np.abs(got.reshape(352, 352) - expected).max() <= 1
    assert np.ptp(expected) > 1  # a map, not a constant


def steps_of(plan):
    """The position of each step's words behind (kind, count), by kind."""
    blob = plan.blob.numpy().tobytes()
    tensors, steps = struct.unpack_from("<II", blob, 28)
    position, found = 120 + 8 * tensors, {}
    for _ in range(steps):
        kind, count = struct.unpack_from("<II", blob, position)
        found.setdefault(kind, []).append(position + 8)
        position += 8 + 4 * count
    return found


@pytest.mark.parametrize("model", GATED, indirect=True)
def test_bad_files_are_refused(model, tmp_path):
    plan, path = sodfast.fuse(model), tmp_path / "x.sodfast"
    conv, depthwise, gate, upsample = (steps_of(plan)[kind] for kind in (4, 5, 6, 3))
    scales = next(p for p in conv if plan_word(plan, p + 32) != 0xFFFFFFFF)  # with a gate
    fuses = next(p for p in conv if plan_word(plan, p + 28) != 0xFFFFFFFF)
    cases = {
        "has a kernel of size 2": (conv[0] + 8, 2),
        "has stride 3": (conv[0] + 12, 3),
        "has dilation 2": (conv[0] + 16, 2),  # with stride 2
        "unknown activation 4": (conv[0] + 20, 4),
        "unknown fusion 1": (conv[0] + 24, 1),  # of nothing
        "reads tensor 0, which is no dense map": (depthwise[0], 0),
        "has a kernel of size 7": (depthwise[0] + 8, 7),
        "reads tensor 1 before it is written": (conv[0] + 28, 1),
        "gate of another shape": (scales + 32, 1),
        "fuses another shape": (fuses + 28, 1),
        "squeezes to 0": (gate[0] + 8, 0),
        "weights beyond the end": (gate[0] + 12, 0x7FFFFFFF),
        "level": (upsample[0], plan_word(plan, gate[0] + 4)),
    }
    for message, (position, value) in cases.items():
        path.write_bytes(patched(plan, position, value))
        with pytest.raises(ValueError) as caught:
            sodfast.load_plan(path)
            pytest.fail(f"not refused: {message}")
        assert message in str(caught.value), message


def plan_word(plan, position):
    return struct.unpack_from("<I", plan.blob.numpy().tobytes(), position)[0]


@pytest.mark.parametrize("model", GATED, indirect=True)
def test_damaged_files_never_crash(model, tmp_path, full):
    program = build(SOURCE / "tests" / "native" / "fuzz_plan.cpp", tmp_path / "fuzz", "-std=c++17")
    sodfast.fuse(model).save(tmp_path / "x.sodfast")
    code, text = run(program, 5000 if full else 500, 1, tmp_path / "x.sodfast")
    assert code == 0, text
    assert " 0 results" not in text and " 0 refused" not in text


def test_nothing_is_allocated_after_the_first_calls(model, tmp_path):
    program = build(SOURCE / "tests" / "native" / "allocations.c", tmp_path / "allocations")
    model = settled(sodfast.create_model("scfnet"), torch.randn(2, 3, 64, 64))
    sodfast.fuse(model).save(tmp_path / "x.sodfast")
    code, text = run(program, tmp_path / "x.sodfast", 64)
    first, *later = map(int, text.split())
    assert code == 0 and first > 0 and later == [0] * 4
