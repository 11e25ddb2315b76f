"""The papers' other networks: extractor, vanilla, and CSNet with other fused stages."""

import json

import numpy as np
import pytest
import torch

import sodfast
from sodfast.models.csnet import csnet_channels
from sodfast.models.extractor import OctConvBlock
from sodfast.models.registry import VARIANTS
from sodfast.nn import ILBlock

SPLITS = ((1, 0), (3, 1), (5, 5), (1, 3), (0, 1))

STAGES = [[[3, 2]], [[2, 3], [2]], [[3, 0], [4]], [[3, 2], [3]], [[0, 3], [3]]]


def small_fusion(scales):
    bank = [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 2, 0, 0], [1, 1, 0, 0, 1]]
    return {
        "stages": STAGES,
        "fuse": [2, 0, 1, 3][-scales:],
        "bank": bank[-scales:],
        "merge": 4,
    }


# Small forms of all of them, as (name, configuration).
SMALL = {
    "extractor": ("extractor", {"channels": {"stages": STAGES}}),
    "depth": (
        "extractor",
        {"channels": {"stages": STAGES}, "in_channels": 4, "weight_gain": 10.0},
    ),
    "vanilla": ("vanilla", {"channels": {"stages": STAGES}}),
    "stage 4": ("csnet", {"channels": small_fusion(1), "fused_stages": (4,)}),
    "stages 3-4": ("csnet", {"channels": small_fusion(2), "fused_stages": (3, 4)}),
    "stages 1-4": ("csnet", {"channels": small_fusion(4), "fused_stages": (1, 2, 3, 4)}),
}


@pytest.fixture(params=SMALL)
def variant(request, settle):
    """A small model with plausible statistics, in eval mode, and an input."""
    name, config = SMALL[request.param]
    torch.manual_seed(0)
    model = sodfast.create_model(name, **config)
    shape = (4, config.get("in_channels", 3), 64, 64)
    return settle(model, torch.randn(shape)), torch.randn(2, *shape[1:3], 48)


def agrees(work, figure):
    # Two per cent, and the half of the last digit that the table rounds away.
    return work / 1e9 == pytest.approx(figure, abs=0.02 * figure + 0.005)


@pytest.mark.parametrize(("split", "figure"), list(zip(SPLITS, (0.80, 0.64, 0.45, 0.30, 0.20))))
def test_extractor_counts_as_printed(split, figure):
    counts = sodfast.count(sodfast.create_model("extractor", split=split))
    assert counts["params"] == 179_501  # the tables' 180K
    assert agrees(counts["paper_macs"], figure)


def test_vanilla_counts_as_printed():
    counts = sodfast.count(sodfast.create_model("vanilla"))
    assert counts["params"] == 1_456_781  # the table's 1457K
    assert agrees(counts["paper_macs"], 3.31)


def fusion_params(features, mid):
    """Cross-stage fusion and head: convolutions, three per channel for norm and slope."""
    mix = sum(features) * sum(mid)
    bank = sum(9 * m * m for m in mid)
    merge = sum(mid) * sum(mid)
    return mix + bank + merge + 3 * 3 * sum(mid) + sum(mid) + 1


@pytest.mark.parametrize(
    ("stages", "features", "mid"),
    [
        ((4,), [80], [26]),
        ((3, 4), [80, 80], [26, 26]),
        ((2, 3, 4), [40, 80, 80], [13, 26, 26]),
        ((1, 2, 3, 4), [20, 40, 80, 80], [5, 13, 26, 26]),  # TPAMI table 1
    ],
)
def test_fused_stages_have_the_widths_of_the_paper(stages, features, mid):
    model = sodfast.create_model("csnet", fused_stages=stages)
    channels = model.config["channels"]
    assert channels["fuse"] == mid
    assert channels["merge"] == sum(mid)
    assert [channels["stages"][stage][-1] for stage in stages] == [[c] for c in features]
    # Where a stage ends in one scale or two, its parameters are the same.
    extractor = 179_501 - (80 + 1)
    assert sodfast.count(model)["params"] == extractor + fusion_params(features, mid)


def test_bank_of_four_fused_stages_is_that_of_the_table():
    channels = csnet_channels(fused_stages=(1, 2, 3, 4))
    assert channels["bank"] == [
        [1, 1, 1, 1, 1], [2, 2, 2, 2, 5], [5, 5, 5, 5, 6], [5, 5, 5, 5, 6],
    ]  # fmt: skip
    assert channels["merge"] == 70


@pytest.mark.parametrize(
    ("stages", "resolution"), [((4,), 8), ((3, 4), 4), ((2, 3, 4), 2), ((1, 2, 3, 4), 1)]
)
@torch.no_grad()
def test_fusion_has_the_resolution_of_its_first_stage(stages, resolution):
    model = sodfast.create_model("csnet", width=0.4, fused_stages=stages).eval()
    seen = []
    model.head.register_forward_hook(lambda _, __, ys: seen.extend(y.shape for y in ys))
    assert model(torch.zeros(1, 3, 32, 48)).shape == (1, 1, 32, 48)
    assert seen == [(1, 1, 32 // resolution, 48 // resolution)]


@torch.no_grad()
def test_extractor_is_csnet_without_fusion(settle):
    """Same stages, same weights: the features that CSNet's fusion gets of stage 4."""
    torch.manual_seed(0)
    channels = csnet_channels(0.3, fused_stages=(4,))
    csnet = settle(
        sodfast.create_model("csnet", channels=channels, fused_stages=(4,)),
        torch.randn(4, 3, 64, 64),
    )
    extractor = sodfast.create_model("extractor", width=0.3).eval()
    assert extractor.config["channels"] == {"stages": channels["stages"]}
    extractor.stages.load_state_dict(csnet.stages.state_dict())
    fed, image = [], torch.randn(1, 3, 32, 32)
    for model, module in ((csnet, csnet.fusion), (extractor, extractor.head)):
        module.register_forward_pre_hook(lambda _, args: fed.append(args[0]))
        model(image)
    assert len(fed[0]) == len(fed[1]) == 1
    assert fed[0][0].abs().max() > 0
    assert torch.equal(fed[0][0], fed[1][0])


@pytest.mark.parametrize(("block_class", "crosses"), [(OctConvBlock, True), (ILBlock, False)])
@torch.no_grad()
def test_only_the_vanilla_block_crosses_scales_after_its_first_layer(block_class, crosses):
    torch.manual_seed(0)
    block = block_class((3, 2), (4, 5)).eval()
    xs = [torch.randn(1, 4, 8, 8), torch.randn(1, 5, 4, 4)]
    other = [xs[0], torch.randn(1, 5, 4, 4)]
    for conv in (block.conv2, block.conv3):
        assert conv.weight.shape[2:] == (3, 3)
        assert torch.equal(conv(xs)[0], conv(other)[0]) is not crosses


def test_trains(variant, backend, device):
    model, image = variant
    model, image = model.to(device).train(), image.to(device)
    logits = model(image)
    assert logits.shape == (2, 1, 64, 48)
    logits.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.numel()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert model.stages[0][0].conv1.weight.grad.abs().max() > 0


@torch.no_grad()
def test_file_and_configuration_give_the_same_network(variant, tmp_path):
    model, image = variant
    again = sodfast.create_model(model.name, **json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    sodfast.save(model, tmp_path / "weights.safetensors")
    loaded = sodfast.load(tmp_path / "weights.safetensors")
    assert type(loaded) is type(again) is type(model)
    assert loaded.config == again.config == model.config
    expected = model(image)
    assert expected.std() > 0
    assert torch.equal(again.eval()(image), expected)
    assert torch.equal(loaded(image), expected)


@torch.no_grad()
def test_fused_form_is_equal(variant, backend, device):
    model, image = variant
    # In float64 too: there the form itself is seen, without rounding.
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 5e-5)):
        model, image = model.to(device, dtype), image.to(device, dtype)
        fused = sodfast.fuse(model)
        assert not any(isinstance(module, sodfast.nn.NormAct) for module in fused.modules())
        expected = model(image)
        assert expected.std() > 0
        assert (fused(image) - expected).abs().max() <= bound * expected.abs().max()


def test_predicts_pictures(variant):
    model, _ = variant
    picture = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    depth = None
    if model.config["in_channels"] == 4:
        with pytest.raises(ValueError, match="takes a depth map with the picture"):
            sodfast.predict.Predictor(model, size=32)(picture)
        depth = picture[:, :, 0]
    saliency = sodfast.predict.Predictor(model, size=32)(picture, depth)
    assert saliency.shape == (37, 50)
    assert saliency.dtype == np.uint8


@pytest.mark.parametrize("variant", ["vanilla", "stages 1-4"], indirect=True)
@torch.no_grad()
def test_compiles_without_a_graph_break(variant):
    model, image = variant
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), model(image))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("csnet", {"fused_stages": (2, 4)}, r"fused_stages.*\(3, 4\).*not \(2, 4\)"),
        ("csnet", {"fused_stages": ()}, r"fused_stages.*not \(\)"),
        ("csnet", {"fused_stages": (4,), "channels": csnet_channels()}, "fuse.*1 numbers"),
        (
            "csnet",
            {"fused_stages": (1, 2, 3, 4), "channels": csnet_channels()},
            r"stages'\]\[1\]\[2\] must hold 1 num",
        ),
        ("extractor", {"channels": csnet_channels()}, "stages alone, not bank, fuse, merge, st"),
        ("extractor", {"channels": {"stages": [[[1]]]}}, "5 lists"),
        ("extractor", {"width": 2.0, "channels": {"stages": []}}, "width=2.0"),
        ("vanilla", {"split": (0, 0)}, "split"),
        ("vanilla", {"fused_stages": (4,)}, "vanilla has no argument 'fused_stages'"),
    ],
)
def test_impossible_configuration_is_refused(name, config, message):
    with pytest.raises(ValueError, match=message):
        sodfast.create_model(name, **config)


def test_image_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match="40x32.*16.*32x32, 48x32"):
        sodfast.create_model("extractor", width=0.2)(torch.zeros(1, 3, 40, 32))


def test_list_of_variants_builds_and_names_each_once():
    described = [(name, json.dumps(config)) for name, config in VARIANTS]
    assert len(set(described)) == len(described)
    assert {name for name, _ in VARIANTS} == set(sodfast.list_models())
    for name, config in VARIANTS:
        with torch.device("meta"):
            model = sodfast.create_model(name, **config)
        assert model.name == name
        default = sodfast.create_model("csnet", width=0.2).config.keys()
        assert name != "csnet" or model.config.keys() == default
