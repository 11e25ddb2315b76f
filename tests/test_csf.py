"""CSF: the papers' totals, the model, the fusion with group normalisation layer by layer."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sodfast
from sodfast.models.csf import BilinearGOctConv, GroupNormAct, GroupNormFusion
from sodfast.nn import GOctConv

# A fusion small enough for a test; multiples of 32 for the group normalisation.
NARROW = {"fuse": [32] * 4, "bank": [[6, 6, 6, 6, 8]] * 4, "merge": 32}
FORMS = (("resnet50", "batch"), ("res2net50", "group"))


# ------------------------------------------------------------------------ counts and configuration


@pytest.mark.parametrize(
    ("encoder", "params", "printed", "work"),
    [("resnet50", 36_367_169, "36.37", 18.40), ("res2net50", 36_528_489, "36.53", 18.96)],
)
def test_counts_as_printed(encoder, params, printed, work):
    with torch.device("meta"):
        model = sodfast.create_model("csf", encoder=encoder)
    counts = sodfast.count(model, (352, 352))
    assert counts["params"] == params
    assert f"{counts['params'] / 1e6:.2f}" == printed
    # The papers name no size; at this one their work is within two per cent of ours.
    assert counts["conv_macs"] / 1e9 == pytest.approx(work, rel=0.02)


@pytest.mark.parametrize(("encoder", "printed"), [(23_508_032, "36.37"), (23_669_352, "36.53")])
def test_widths_are_the_only_powers_of_two_with_the_printed_total(encoder, printed):
    """The arithmetic behind the inference in CSF's docstring."""

    def total(mid):
        convolutions = sum(mid) * 3840 + sum(9 * m * m for m in mid) + sum(mid) ** 2
        return encoder + convolutions + 3 * 3 * sum(mid) + sum(mid) + 1

    powers = [2**k for k in range(4, 12)]
    mids = itertools.combinations_with_replacement(powers, 4)
    assert [m for m in mids if f"{total(m) / 1e6:.2f}" == printed] == [(128, 256, 512, 512)]


def test_configuration_is_resolved():
    with torch.device("meta"):
        model = sodfast.create_model("csf", encoder="res2net50")
        again = sodfast.create_model("csf", **json.loads(json.dumps(model.config)))
    assert model.config["norm"] == "group"
    assert model.config["channels"]["fuse"] == [128, 256, 512, 512]
    assert model.config["channels"]["bank"][0] == [25, 25, 25, 25, 28]
    assert model.config["channels"]["merge"] == 1408
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    with torch.device("meta"):
        assert sodfast.create_model("csf").config["norm"] == "batch"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"encoder": "resnet18"}, "encoder must be resnet50 or res2net50, not 'resnet18'"),
        ({"norm": "layer"}, "norm.*'layer'"),
        ({"channels": {"fuse": [32] * 4}}, "fuse, bank and merge, not fuse"),
        ({"channels": {**NARROW, "fuse": [32] * 3}}, "fuse.*4 numbers"),
        ({"norm": "group", "channels": {**NARROW, "merge": 40}}, "multiples of 32.*40"),
    ],
)
def test_impossible_configuration_is_refused(config, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        sodfast.create_model("csf", **config)


# --------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: form[0])
def model(request):
    torch.manual_seed(1)
    encoder, norm = request.param
    model = sodfast.create_model("csf", encoder=encoder, channels=NARROW)
    assert model.config["norm"] == norm
    with torch.no_grad():
        # As in a trained network each block adds a little to its input, and the statistics fit:
        # fresh ones let values and rounding errors grow from block to block.
        for name, module in model.encoder.named_modules():
            if name.endswith("bn3"):
                module.weight.fill_(0.25)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, sodfast.nn.NormAct)):
                module.momentum = 1.0
        model.train()(torch.randn(2, 3, 64, 64))
    return model.eval()


def test_trains(model):
    model = copy.deepcopy(model).train()
    logits = model(torch.randn(1, 3, 64, 64))  # one image at a time, as in the authors' recipe
    assert logits.shape == (1, 1, 64, 64)
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert next(model.encoder.parameters()).grad.abs().max() > 0


@torch.no_grad()
def test_fused_form_is_equal(model, backend, device):
    model, image = copy.deepcopy(model).to(device), torch.randn(2, 3, 64, 32, device=device)
    fused = sodfast.fuse(model)
    assert not any(isinstance(module, sodfast.nn.NormAct) for module in fused.modules())
    expected = model(image)
    assert expected.std() > 0
    assert (fused(image) - expected).abs().max() <= 5e-5 * expected.abs().max()
    exact = model.double()(image.double())
    torch.testing.assert_close(sodfast.fuse(model)(image.double()), exact, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_file_gives_the_same_network(model, tmp_path):
    sodfast.save(model, tmp_path / "weights.safetensors")
    loaded = sodfast.load(tmp_path / "weights.safetensors")
    assert loaded.config == model.config
    image = torch.randn(1, 3, 32, 64)
    assert torch.equal(loaded(image), model(image))


def test_predicts_pictures(model):
    picture = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    saliency = sodfast.predict.Predictor(model, size=64)(picture)
    assert saliency.shape == (37, 50) and saliency.dtype == np.uint8
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        sodfast.predict.Predictor(model, size=48)
    with pytest.raises(ValueError, match="48x64.*32.*32x64, 64x64"):
        model(torch.zeros(1, 3, 48, 64))


def test_frozen_norm_of_the_encoder_stays():
    model = sodfast.create_model("csf", channels=NARROW, freeze_encoder_norm=True).train()
    norms = {n: m for n, m in model.encoder.named_modules() if isinstance(m, nn.BatchNorm2d)}
    before = {n: copy.deepcopy(m.state_dict()) for n, m in norms.items()}
    image = torch.randn(1, 3, 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(image).mean().backward()
    optimizer.step()
    assert len(norms) == 53
    for name, norm in norms.items():
        for key, value in norm.state_dict().items():
            assert torch.equal(value, before[name][key]), (name, key)
    assert model.encoder.conv1.weight.grad.abs().max() > 0
    assert model.fusion.mix.norm.training and model.fusion.mix.norm.running_mean.abs().max() > 0
    model.eval().train()
    assert model.encoder.layer1.training and not model.encoder.layer1[0].bn1.training


# -------------------------------------------------------- the fusion with groups, layer by layer


def test_bilinear_goctconv_between_any_two_scales():
    """One path at a time against the composition of torch's own layers, in float64."""
    torch.manual_seed(0)
    conv = BilinearGOctConv((2, 3, 1), (3, 2, 4)).double()
    xs = [torch.randn(2, c, 16 >> i, 24 >> i, dtype=torch.float64) for i, c in enumerate((2, 3, 1))]
    expected = [torch.zeros(2, c, 16 >> j, 24 >> j).double() for j, c in enumerate((3, 2, 4))]
    rows, columns = (0, 3, 5, 9), (0, 2, 5, 6)
    for i, x in enumerate(xs):
        for j in range(3):
            weight = conv.weight[rows[j] : rows[j + 1], columns[i] : columns[i + 1]]
            # The convolution first, always; ours goes first where that is cheaper.
            moved = F.interpolate(F.conv2d(x, weight), scale_factor=2.0 ** (i - j), mode="bilinear")
            expected[j] += moved
    for y, e in zip(conv(xs), expected):
        torch.testing.assert_close(y, e)


def test_bilinear_goctconv_halves_like_an_average_where_goctconv_takes_the_maximum():
    torch.manual_seed(0)
    ours, plain = BilinearGOctConv(2, (2, 2)), GOctConv(2, (2, 2))
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(1, 2, 8, 8)
    low = F.conv2d(F.avg_pool2d(x, 2), ours.weight[2:])
    torch.testing.assert_close(ours([x])[1], low)
    torch.testing.assert_close(ours([x])[0], plain([x])[0])
    assert not torch.allclose(ours([x])[1], plain([x])[1])


def test_group_norm_act_is_group_norm_and_prelu():
    torch.manual_seed(0)
    ours = GroupNormAct((64, 32))
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    xs = [torch.randn(2, 64, 4, 6), torch.randn(2, 32, 2, 3)]
    first = 0
    for x, y in zip(xs, ours(xs)):
        part = slice(first, first + x.shape[1])
        norm, activation = nn.GroupNorm(32, x.shape[1]), nn.PReLU(x.shape[1])
        norm.weight.data, norm.bias.data = ours.weight.data[part], ours.bias.data[part]
        activation.weight.data = ours.slope.data[part]
        torch.testing.assert_close(y, activation(norm(x)))
        first = part.stop
    assert first == 96
    with pytest.raises(ValueError, match=r"multiples of 32 groups: \(64, 16\)"):
        GroupNormAct((64, 16))


def test_group_norm_fusion_has_no_batch_in_its_result():
    """Each image by itself, in training too: what batches of one image need."""
    torch.manual_seed(0)
    fusion = GroupNormFusion((8, 8), (32, 32), [[6, 6, 6, 6, 8]] * 2, 32).train()
    xs = [torch.randn(3, 8, 16, 16), torch.randn(3, 8, 8, 8)]
    (together,) = fusion(xs)
    (alone,) = fusion([x[1:2] for x in xs])
    torch.testing.assert_close(together[1:2], alone)
    assert together.shape == (3, 32, 16, 16)
