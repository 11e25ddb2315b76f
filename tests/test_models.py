"""CSNet: counts as printed in the papers, the published weights, configurations, layers alone."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sodfast
from sodfast.convert import convert_csnet
from sodfast.models.csnet import csnet_channels
from sodfast.nn import DilatedBank, GOctConv, ILBlock, NormAct, SimplifiedGOctConv

# ×1-L and ×2-L, as published.
PRUNED_X1 = {
    "stages": [
        [[8, 10]],
        [[9, 10], [10, 10], [10, 10]],
        [[19, 13], [19, 17], [20, 12], [34]],
        [[24, 21], [26, 27], [22, 18], [19, 18], [23, 18], [38]],
        [[18, 29], [25, 24], [26, 20], [50]],
    ],
    "fuse": [12, 24, 24],
    "bank": [[1, 2, 2, 2, 4], [1, 4, 4, 4, 5], [2, 2, 4, 5, 4]],
    "merge": 60,
}
PRUNED_X2 = {
    "stages": [
        [[13, 10]],
        [[13, 12], [18, 11], [18, 12]],
        [[28, 21], [34, 22], [31, 29], [51]],
        [[23, 26], [27, 26], [25, 20], [17, 21], [19, 25], [38]],
        [[18, 31], [31, 27], [26, 44], [64]],
    ],
    "fuse": [17, 38, 32],
    "bank": [[2, 1, 2, 2, 1], [0, 6, 6, 7, 5], [0, 1, 3, 7, 7]],
    "merge": 79,
}


@pytest.mark.parametrize(
    ("width", "params"),
    [(1.0, 210_985), (1.2, 298_633), (1.5, 455_631), (1.8, 645_565), (2.0, 788_631)],
)
def test_parameters_by_width(width, params):
    model = sodfast.create_model("csnet", width=width)
    assert sodfast.count(model)["params"] == params
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize(
    ("split", "figure"),  # ECCV table 1, in 1e9
    [((1, 0), 0.91), ((3, 1), 0.78), ((5, 5), 0.61), ((1, 3), 0.47), ((0, 1), 0.35)],
)
def test_work_by_split(split, figure):
    counts = sodfast.count(sodfast.create_model("csnet", split=split))
    assert counts["params"] == 210_985
    # Two per cent, and the half of the last digit that the table rounds away.
    assert counts["paper_macs"] / 1e9 == pytest.approx(figure, abs=0.02 * figure + 0.005)


def conv_macs_by_hand(channels, height, width):
    """Work of the convolutions: output channels × inputs per output × positions."""

    def cross(ins, outs, kernel_size, area):
        # A path between two scales is convolved at the lower of both resolutions.
        return sum(
            i * o * kernel_size**2 * area // 4 ** max(a, b)
            for a, i in enumerate(ins)
            for b, o in enumerate(outs)
        )

    area, ins, total, fused, head_area = height * width, [3], 0, [], 0
    for s, stage in enumerate(channels["stages"]):
        for b, outs in enumerate(stage):
            down = s >= 2 and b == 0
            area //= 4 if down else 1
            total += cross(ins, outs, 3 if down or s == 0 else 1, area)
            total += 2 * 9 * sum(o * area // 4**j for j, o in enumerate(outs))
            ins = outs
        if s >= 2:
            fused.append(ins[0])
            head_area = head_area or area
    bank = [sum(row) for row in channels["bank"]]
    total += cross(fused, channels["fuse"], 1, head_area)
    inside = zip(channels["fuse"], bank)
    total += sum(9 * i * o * head_area // 4**s for s, (i, o) in enumerate(inside))
    total += cross(bank, [channels["merge"]], 1, head_area)
    return total + channels["merge"] * head_area


@pytest.mark.parametrize(
    ("channels", "params", "convolutions", "paper"),
    [(PRUNED_X1, 93_647, 0.2851e9, 0.4354e9), (PRUNED_X2, 140_894, 0.4973e9, 0.7167e9)],
)
def test_counts_of_the_published_configurations(channels, params, convolutions, paper):
    counts = sodfast.count(sodfast.create_model("csnet", channels=channels))
    assert counts["params"] == params
    assert counts["conv_macs"] == conv_macs_by_hand(channels, 224, 224)
    # The figures at hand count the last 1x1 convolution twice; with it they agree to the digit.
    head = channels["merge"] * 112 * 112
    assert counts["conv_macs"] + head == pytest.approx(convolutions, abs=0.00005e9)
    assert counts["paper_macs"] == pytest.approx(paper, rel=0.02)


def test_count_follows_size_and_configuration_and_leaves_the_model_alone(small_channels):
    model = sodfast.create_model("csnet", channels=small_channels).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert sodfast.count(model, (32, 64))["conv_macs"] == conv_macs_by_hand(small_channels, 32, 64)
    assert model.training
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])


@pytest.fixture(scope="module")
def published(shared):
    """Model and golden tensors of a published checkpoint, by name."""
    golden = load_file(shared / "golden" / "csnet.safetensors")
    blocks = json.loads((shared / "golden" / "csnet_block_mean_std.json").read_text())
    folder = shared / "reference" / "sod100k"

    def get(name):
        model = convert_csnet(folder / f"{name}.pth.tar", folder / f"{name}.bin")
        outputs = {k.split("/")[1]: v for k, v in golden.items() if k.startswith(name)}
        inputs = {k: v for k, v in golden.items() if "/" not in k}
        return model, inputs, outputs, blocks[name]

    return get


@pytest.mark.parametrize("form", ["layers", "fused"])
@pytest.mark.parametrize("name", ["csnet-L-x1", "csnet-L-x2"])
@torch.no_grad()
def test_published_weights_give_the_published_results(published, backend, device, name, form):
    model, inputs, outputs, blocks = published(name)
    model = (sodfast.fuse(model) if form == "fused" else model).to(device)
    for key in ("x2", "ximg"):
        logits = model(inputs[key].to(device)).cpu()
        torch.testing.assert_close(logits, outputs[key], rtol=0, atol=1e-4)

    model = getattr(model, "network", model)  # inside a plan nobody can look
    inner, statistics = {}, {}

    def keep_bank(_, __, ys):
        inner.update({f"x1_ms.{i}": y for i, y in enumerate(ys)})

    def keep_head(_, __, ys):
        inner["x1_cls_layer_pre_upsample"] = ys[0]

    model.fusion.bank.register_forward_hook(keep_bank)
    model.head.register_forward_hook(keep_head)
    for s, stage in enumerate(model.stages):
        for b, block in enumerate(stage):
            block.register_forward_hook(
                lambda _, __, ys, key=f"stage{s}.{b}": statistics.update({key: ys})
            )
    logits = model(inputs["x1"].to(device)).cpu()
    torch.testing.assert_close(logits, outputs["x1"], rtol=0, atol=1e-4)
    assert len(inner) == 4
    for key, y in inner.items():
        # Activations are tiny: the bound is relative to the largest of each tensor.
        bound = 1e-5 * outputs[key].abs().max().item()
        torch.testing.assert_close(y.cpu(), outputs[key], rtol=0, atol=bound)
    compared = 0
    for key, expected in blocks.items():
        for y, (mean, std, shape) in zip(statistics.get(key, ()), expected):
            assert list(y.shape) == shape
            assert y.mean().item() == pytest.approx(mean, rel=1e-4)
            assert y.std().item() == pytest.approx(std, rel=1e-4)
            compared += 1
    assert compared == 33  # 15 blocks with two scales, 3 with one


def test_configuration_builds_the_same_network_again():
    model = sodfast.create_model("csnet", width=0.5, split=(3, 1), in_channels=4, weight_gain=2.0)
    config = json.loads(json.dumps(model.config))
    again = sodfast.create_model(model.name, **config)
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), again.eval()(x))


def test_preprocessing_is_a_copy_per_model(small_csnet):
    model = small_csnet()
    model.preprocessing["mean"][0] = 1.0
    assert small_csnet().preprocessing["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize("split", [(1, 0), (3, 1), (1, 3), (0, 1)])
def test_splits_train(split, backend, device):
    torch.manual_seed(0)
    model = sodfast.create_model("csnet", width=0.2, split=split).to(device)
    logits = model(torch.randn(2, 3, 32, 48, device=device))
    assert logits.shape == (2, 1, 32, 48)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.abs().max() > 0 for p in model.stages[0].parameters() if p.numel())


def test_empty_batch_and_sizes(backend, device, small_csnet):
    model = small_csnet().to(device)
    for size in ((0, 3, 32, 32), (1, 3, 16, 16), (2, 3, 16, 80)):
        assert model(torch.zeros(size, device=device)).shape == (size[0], 1, *size[2:])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 32, 32), r"\(B, 3, H, W\), not \(3, 32, 32\)"),
        ((1, 4, 32, 32), r"not \(1, 4, 32, 32\)"),
        ((1, 3, 30, 32), "30x32.*16x32, 32x32"),
        ((1, 3, 100, 90), "100x90.* 96x80, 96x96, 112x80, 112x96"),
        ((1, 3, 1, 1), "1x1.* 16x16$"),
    ],
)
def test_image_of_the_wrong_shape_is_refused(shape, message, small_csnet):
    model = small_csnet()
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"width": 0.01}, "width.*0.01"),
        ({"split": (0, 0)}, "split"),
        ({"split": (1, -1)}, "split"),
        ({"widht": 1.0}, "no argument 'widht'; did you mean 'width'"),
    ],
)
def test_impossible_configuration_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        sodfast.create_model("csnet", **config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": [[[3, 2]]] * 4}, "5 lists"),
        ({"stages": [[[3, 2]], [[2, 2]], [[3, 0], [4]], [[3]], [[3, 1]]]}, r"\[4\]\[0\].* 1 num"),
        ({"stages": [[[3, 2]], [[0, 0]], [[4]], [[3]], [[3]]]}, r"\[1\]\[0\] has no channel"),
        ({"fuse": [1, 2]}, "fuse.*3 numbers"),
        ({"bank": [[1, 1]] * 3}, "bank.*15 numbers"),
        ({"bank": [[1, 1, 1, 1, -1]] * 3}, "bank.*from 0 on"),
        ({"merge": 0}, "merge.*no channel"),
        ({"merge": 2.5}, "merge.*integers"),
        ({"head": 1}, "stages, fuse, bank and merge, not bank, fuse, head"),
    ],
)
def test_impossible_channels_are_refused(change, message, small_channels):
    with pytest.raises(ValueError, match=message):
        sodfast.create_model("csnet", channels={**small_channels, **change})


def test_width_and_channels_exclude_each_other(small_channels):
    with pytest.raises(ValueError, match="width=2.0"):
        sodfast.create_model("csnet", width=2.0, channels=small_channels)


def test_unknown_model_is_refused():
    assert sodfast.list_models() == [
        "csf", "csnet", "extractor", "fpn-rgbd", "scfnet", "scfnet-base", "vanilla",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="unknown model 'csnte'; did you mean 'csnet'"):
        sodfast.create_model("csnte")


def test_unpruned_bank_gives_the_rest_to_the_largest_dilation():
    channels = csnet_channels()
    assert channels["fuse"] == [13, 26, 26]
    assert channels["bank"] == [[2, 2, 2, 2, 5], [5, 5, 5, 5, 6], [5, 5, 5, 5, 6]]


def test_norm_act_in_training_is_batch_norm_and_prelu(backend, device):
    torch.manual_seed(0)
    ours = NormAct((3, 2), momentum=0.2).to(device)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.slope)
    xs = [torch.randn(2, 3, 8, 8, device=device), torch.randn(2, 2, 4, 4, device=device)]
    ys = ours(xs)
    first = 0
    for x, y in zip(xs, ys):
        part = slice(first, first + x.shape[1])
        norm = nn.BatchNorm2d(x.shape[1], momentum=0.2, device=device)
        norm.weight.data.copy_(ours.weight[part])
        expected = nn.functional.prelu(norm(x), ours.slope[part])
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(ours.running_mean[part], norm.running_mean)
        torch.testing.assert_close(ours.running_var[part], norm.running_var)
        torch.testing.assert_close(ours.channel_means[:, part], expected.mean((2, 3)))
        first = part.stop
    assert not ours.channel_means.requires_grad
    ours.eval()(xs)
    assert ours.channel_means is None


def test_norm_act_refuses_to_train_on_one_value_per_channel(backend, device):
    norm = NormAct((2, 3)).to(device)
    xs = [torch.zeros(1, 2, 2, 2, device=device), torch.zeros(1, 3, 1, 1, device=device)]
    with pytest.raises(ValueError, match=r"scale 1 has shape \(1, 3, 1, 1\)"):
        norm(xs)
    norm.eval()(xs)
    absent = NormAct((2, 0)).to(device)
    absent([xs[0], xs[1][:, :0]])


def test_weight_gain_is_a_factor_on_the_weights():
    torch.manual_seed(0)
    block, plain = ILBlock(3, (2, 3), weight_gain=100.0), ILBlock(3, (2, 3))
    state = block.state_dict()
    for name in ("conv2.weight", "conv3.weight"):
        state[name] = state[name] * 100
    plain.load_state_dict(state)
    x = torch.randn(1, 3, 8, 8)
    for y, e in zip(block.eval()(x), plain.eval()(x)):
        torch.testing.assert_close(y, e)
    assert "weight_gain=100.0" in repr(block.conv2)
    bank = DilatedBank(2, [[1, 1]], dilations=(1, 3), weight_gain=10.0).eval()
    twin = DilatedBank(2, [[1, 1]], dilations=(1, 3)).eval()
    twin.load_state_dict({**bank.state_dict(), "weights.0": bank.weights[0] * 10})
    torch.testing.assert_close(bank(x[:, :2]), twin(x[:, :2]))


def test_initialisation_is_that_of_torch():
    torch.manual_seed(0)
    conv = GOctConv((6, 4), (5, 5), kernel_size=3, bias=True)
    bound = (6 + 4) ** -0.5 / 3  # 1 / sqrt(fan_in)
    for parameter in (conv.weight, conv.bias):
        assert 0.7 * bound < parameter.abs().max() <= bound
    assert 0.9 / 3 < SimplifiedGOctConv(50).weight.abs().max() <= 1 / 3
    assert (NormAct(3).slope == 0.25).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GOctConv((0, 0), 3), "in_channels has no channel"),
        (lambda: GOctConv((1, 1, 1, 1, 1), 3), "in_channels must be 1 to 4"),
        (lambda: GOctConv(3, (2.5,)), "out_channels"),
        (lambda: GOctConv(3, 3, kernel_size=5), "kernel_size.*5"),
        (lambda: GOctConv(3, 3, stride=4), "stride.*4"),
        (lambda: SimplifiedGOctConv(3, dilation=0), "dilation.*0"),
        (lambda: DilatedBank((2, 2), [[1, 1]], dilations=(1, 2)), "1 scales, in_channels 2"),
        (lambda: DilatedBank(2, [[1, 1, 1]], dilations=(1, 2)), r"out_channels\[0\]"),
    ],
)
def test_impossible_layer_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_layers_say_what_they_want() -> None:
    """The first mistakes: one tensor for two scales, a scale too few, other channels, an array."""
    block = sodfast.nn.ILBlock((20, 12), (24, 16))
    fine, coarse = torch.rand(1, 20, 8, 8), torch.rand(1, 12, 4, 4)
    for xs, found in ((fine, r"1 of \(20,\)"), ([coarse, fine], r"2 of \(12, 20\)")):
        with pytest.raises(ValueError, match=rf"2 scales of \(20, 12\) channels, got {found}"):
            block(xs)
    with pytest.raises(TypeError, match=r"xs\[1\] must be a tensor, not ndarray"):
        block([fine, coarse.numpy()])
    with pytest.raises(ValueError, match=r"in_channels must be 1 to 4 numbers .*: 3\.5"):
        sodfast.nn.GOctConv(3.5, 3)
    for layer in (
        sodfast.nn.GOctConv((20, 12), 4), sodfast.nn.SimplifiedGOctConv((20, 12)),
        sodfast.nn.NormAct((20, 12)), sodfast.nn.DilatedBank((20, 12), ((4, 4), (4, 0)), (1, 2)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"2 scales of \(20, 12\) channels, got 1 of \(20,\)"):
            layer([fine])
        layer([fine, coarse])
