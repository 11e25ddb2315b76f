"""Pruning: the authors' case, exactness on any network, the criteria, the command."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sodfast
from sodfast.cli import main
from sodfast.convert import _map_names, _Source
from sodfast.nn import NormAct, SimplifiedGOctConv
from sodfast.prune import CRITERIA, estimate_statistics, mask, prune
from sodfast.weights import build

DEAD = 1e-25


@torch.no_grad()
def random_network(seed: int) -> nn.Module:
    """Any CSNet: odd channel counts, absent scales, dead γ anywhere, with and without β."""
    draw, _ = random.Random(seed), torch.manual_seed(seed)

    def two() -> list[int]:
        pair = [draw.randint(1, 4), draw.randint(1, 4)]
        pair[draw.randrange(2)] *= draw.random() < 0.7
        return pair

    fused = draw.choice([(4,), (3, 4), (2, 3, 4), (1, 2, 3, 4)])
    stages: list[list[list[int]]] = [[two()]]
    for stage in range(1, 5):
        blocks = [two() for _ in range(draw.randint(1, 2))]
        if stage in fused:
            blocks[-1] = [draw.randint(1, 5)]
        stages.append(blocks)
    fuse = [draw.randint(0, 3) for _ in fused]
    fuse[0] += 1
    bank = [[draw.randint(0, 2) for _ in range(5)] for _ in fused]
    bank[0][0] += 1
    channels = {"stages": stages, "fuse": fuse, "bank": bank, "merge": draw.randint(1, 5)}
    gain = draw.choice([1.0, 100.0])
    model = sodfast.create_model("csnet", channels=channels, weight_gain=gain, fused_stages=fused)
    kill(model, share=draw.choice([0.1, 0.4, 0.8]), without_beta=draw.choice([0.0, 0.5, 1.0]))
    for module in model.modules():
        if isinstance(module, SimplifiedGOctConv) and draw.random() < 0.3:
            centre = module.weight[..., 1, 1].clone()
            module.weight.zero_()[..., 1, 1] = centre  # does not mix pixels
    return statistics(model)


def kill(model: nn.Module, share: float, without_beta: float) -> None:
    for norm in model.modules():
        if isinstance(norm, NormAct):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.slope, std=0.3)
            dead = torch.rand(len(norm.weight)) < share
            norm.weight[dead] = DEAD
            norm.bias[dead & (torch.rand(len(norm.weight)) < without_beta)] = DEAD


@torch.no_grad()
def statistics(model: nn.Module) -> nn.Module:
    """Running statistics that fit, in float64: of a constant the variance is next to nothing."""
    norms = [module for module in model.modules() if isinstance(module, NormAct)]
    for norm in norms:
        norm.momentum = 1.0
    model.double().train()(torch.randn(3, 3, 64, 64, dtype=torch.float64))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def outputs(model: nn.Module, seed: int = 0, sizes: Any = ((32, 48), (80, 16))) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return [
            model(torch.randn(2, 3, *size, generator=generator, dtype=torch.float64).to(dtype))
            for size in sizes
        ]


def close(a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    for x, y in zip(a, b):
        assert (x - y).abs().max() <= tolerance * (1 + y.abs().max())


# ---- the authors' case --------------------------------------------------------------------------


def golden_channels(config: list[Any]) -> dict[str, Any]:
    outs = [[int(c) for c in entry[1]] for entry in config[:18]]
    parts = iter(outs)
    stages = [[next(parts) for _ in range(number)] for number in (1, 3, 4, 6, 4)]
    return {
        "stages": stages,
        "fuse": [int(c) for c in config[18][1]],
        "bank": [[int(c) for c in row] for row in config[19][2]],
        "merge": int(config[20][1][0]),
    }


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    """Networks before and after, the masks, input and output."""
    tensors = load_file(shared / "golden" / "csnet_dwd_prune.safetensors")
    case = json.loads((shared / "golden" / "csnet_dwd_prune.json").read_text())["prune"]
    found = {"mask": case["mask"], "x": tensors["prune/x"], "y": tensors["prune/y"]}
    for name, key in (("old", "base_config"), ("new", "new_config")):
        prefix = f"prune/{name}_state_dict/"
        state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        channels = golden_channels(case[key])
        ours = _map_names(_Source(state), channels)
        found[name] = build("csnet", {"channels": channels}, ours, name)
    return found


def test_golden(golden: dict[str, Any]) -> None:
    pruned, report = prune(golden["old"], mode="paper", threshold=1e-20)
    expected = golden["new"]
    assert report.after == pruned.config["channels"] == expected.config["channels"]
    for ours, theirs in zip(report.keep.values(), golden["mask"]):
        assert ours.tolist() == [bool(m) for scale in theirs for m in scale]
    state = pruned.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
    # With statistics of 0 and 1 the original overflows: its output is NaN, and so is ours.
    assert golden["y"].isnan().all()
    with torch.no_grad():
        assert pruned(golden["x"]).isnan().all()
        y = pruned.train()(golden["x"])
        assert y.isfinite().all() and torch.equal(y, expected.train()(golden["x"]))
    expected.eval()


def test_golden_network_exactly(golden: dict[str, Any]) -> None:
    old = statistics(copy.deepcopy(golden["old"]))
    pruned, report = prune(old)
    assert 300 < report.removed < report.total
    close(outputs(pruned), outputs(old), 1e-10)


def test_published_networks_exactly(shared: Path) -> None:
    from sodfast.convert import convert_csnet

    folder = shared / "reference" / "sod100k"
    for name in ("csnet-L-x1", "csnet-L-x2"):
        model = convert_csnet(folder / f"{name}.pth.tar", folder / f"{name}.bin")
        pruned, report = prune(model)
        assert report.removed >= 3
        close(outputs(pruned), outputs(model), 1e-5)
        for criterion in CRITERIA[1:]:
            pruned, report = prune(model, criterion, ratio=0.3)
            assert report.removed > 0.25 * report.total
            close(outputs(pruned), outputs(mask(model, criterion, ratio=0.3)), 1e-5)


# ---- exactness ----------------------------------------------------------------------------------


def test_exact_on_any_network(full: bool) -> None:
    removed = 0
    for seed in range(400 if full else 25):
        model = random_network(seed)
        before = copy.deepcopy(model.state_dict())
        for criterion in CRITERIA:
            pruned, report = prune(model, criterion, ratio=0.5)
            masked = mask(model, criterion, ratio=0.5)
            close(outputs(pruned, seed), outputs(masked, seed), 1e-9)
            if criterion == "threshold":  # then the mask changes nothing either
                close(outputs(masked, seed), outputs(model, seed), 1e-9)
            removed += report.removed
            assert not any(torch.isnan(t).any() for t in pruned.state_dict().values())
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert removed > 500


def test_exact_in_float32(small_csnet: Callable) -> None:
    """On networks as training leaves them, and for every backend's arithmetic."""
    for seed in range(5):
        model = small_csnet(seed)
        with torch.no_grad():
            for norm in model.modules():
                if isinstance(norm, NormAct):
                    norm.weight[torch.rand(len(norm.weight)) < 0.4] = DEAD
        pruned, report = prune(model)
        assert report.removed
        assert next(pruned.parameters()).dtype == torch.float32
        close(outputs(pruned, seed), outputs(model, seed), 1e-5)
        close(outputs(sodfast.fuse(pruned), seed), outputs(model, seed), 5e-5)


def one_network(**gammas: dict[str, list[int]]) -> nn.Module:
    """Two channels per scale and block; γ = 0 in the named norms for the given channels."""
    torch.manual_seed(0)
    channels = {
        "stages": [[[2, 2]], [[2, 2], [2, 2]], [[2, 2], [3]], [[2, 2], [3]], [[2, 2], [3]]],
        "fuse": [3, 2, 2],
        "bank": [[1, 0, 1, 0, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0]],
        "merge": 3,
    }
    model = sodfast.create_model("csnet", channels=channels)
    with torch.no_grad():
        kill(model, 0.0, 0.0)
        for name, norm in model.named_modules():
            if isinstance(norm, NormAct):
                norm.slope.abs_()
                for short, dead in gammas.items():
                    if name == short.replace("_", "."):
                        norm.weight[dead] = 0
    return statistics(model)


def removed(report: Any) -> dict[str, list[int]]:
    found = {name: (~kept).nonzero()[:, 0].tolist() for name, kept in report.keep.items()}
    return {name: channels for name, channels in found.items() if channels}


def test_what_can_be_folded_and_what_cannot() -> None:
    # In the third norm: always a constant; in front of 1x1 it can go.
    model = one_network(stages_1_0_norm3=[0, 3])
    pruned, report = prune(model)
    assert removed(report) == {"stages.1.0": [0, 3]} and not report.stayed
    close(outputs(pruned), outputs(model), 1e-12)
    # In the first alone, β runs into the zero padding.
    model = one_network(stages_1_0_norm1=[0, 3])
    pruned, report = prune(model)
    assert removed(report) == {} and report.stayed == {"stages.1.0": [0, 3]}
    # Unless β is 0 (or slope and β < 0 are), in the first and the second.
    for nothing in ("bias", "slope"):
        model = one_network(stages_1_0_norm1=[0, 3], stages_1_0_norm2=[0, 3])
        with torch.no_grad():
            for norm in (model.stages[1][0].norm1, model.stages[1][0].norm2):
                norm.bias[[0, 3]] = -0.5
                getattr(norm, nothing)[[0, 3]] = 0
        pruned, report = prune(model)
        assert removed(report) == {"stages.1.0": [0, 3]}
        close(outputs(pruned), outputs(model), 1e-12)


def test_one_channel_per_scale_speaks_for_all_in_front_of_3x3() -> None:
    model = one_network(
        stages_1_1_norm3=[0, 1, 2, 3], stages_2_1_norm3=[0, 1, 2], fusion_mix_norm=[0, 2, 3, 4]
    )
    pruned, report = prune(model)
    close(outputs(pruned), outputs(model), 1e-12)
    counts = [len(channels) for channels in removed(report).values()]
    assert list(removed(report)) == ["stages.1.1", "stages.2.1", "fusion.mix"]
    assert counts == [2, 2, 2]  # of 2 + 2, of 3, of 2 + 2
    # Constants of 0 go without.
    with torch.no_grad():
        model.stages[2][1].norm3.bias.zero_()
        model.fusion.mix.norm.bias.zero_()
        model.stages[2][1].norm3.weight[0] = 1.0
    pruned, report = prune(model)
    close(outputs(pruned), outputs(model), 1e-12)
    assert removed(report)["stages.2.1"] == [1, 2]
    assert removed(report)["fusion.mix"] == [0, 2, 3, 4]


def test_a_scale_and_its_branches_vanish() -> None:
    model = one_network(fusion_mix_norm=[3, 4], fusion_merge_norm=[1])
    with torch.no_grad():
        model.fusion.mix.norm.bias[[3, 4]] = 0
    pruned, report = prune(model)
    assert report.after["fuse"] == [3, 0, 2] and report.after["merge"] == 2
    assert report.after["bank"] == [[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]]
    close(outputs(pruned), outputs(model), 1e-12)
    paper, _ = prune(model, mode="paper")
    assert paper.config["channels"]["bank"][1] == [0, 0, 0, 0, 0]
    assert all(y.isfinite().all() for y in outputs(paper))


def test_something_of_every_layer_stays() -> None:
    everything = [0, 1, 2, 3]
    model = one_network(stages_1_0_norm3=everything, stages_3_1_norm3=[0, 1, 2])
    for name in ("merge", "mix"):
        nn.init.zeros_(getattr(model.fusion, name).norm.weight)
    nn.init.zeros_(model.fusion.bank.norm.weight)
    for mode in ("exact", "paper"):
        pruned, report = prune(model, mode=mode)
        assert all(kept.any() for kept in report.keep.values())
        if mode == "exact":
            close(outputs(pruned), outputs(model), 1e-12)
            assert report.after["merge"] == 1 and sum(report.after["stages"][1][0]) == 1


def test_training_goes_on_the_same() -> None:
    """With batch statistics too: a folded constant is what the batch mean takes away."""
    model = one_network(
        stages_1_0_norm3=[0, 3], stages_1_1_norm3=[0, 1], fusion_bank_norm=[0, 4],
        fusion_mix_norm=[0, 1], fusion_merge_norm=[1],
    )  # fmt: skip
    pruned, report = prune(model.train())
    assert report.removed == 7 and pruned.training
    close(outputs(pruned), outputs(model), 1e-10)
    close(outputs(pruned.eval()), outputs(model.eval()), 1e-10)  # and the running ones followed


def test_what_comes_out_is_a_network_like_any(small_csnet: Callable, tmp_path: Path) -> None:
    model = small_csnet(weight_gain=100.0)
    model.preprocessing["size"] = [96, 96]
    pruned, report = prune(model, "ratio", ratio=0.4)
    assert pruned.name == "csnet" and pruned.preprocessing == model.preprocessing
    assert pruned.config == {**model.config, "channels": report.after}
    assert report.before == model.config["channels"]
    assert all(parameter.requires_grad for parameter in pruned.parameters())
    sodfast.save(pruned, tmp_path / "small.safetensors")
    loaded = sodfast.load(tmp_path / "small.safetensors")
    close(outputs(loaded), outputs(pruned), 1e-6)
    optimizer = torch.optim.Adam(pruned.train().parameters())
    pruned(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()


# ---- the criteria -------------------------------------------------------------------------------


def deciding(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, NormAct) and not name.endswith(("norm2", "norm3")):
            found[name.removesuffix(".norm1").removesuffix(".norm")] = module.weight.detach().abs()
    return found


def test_threshold_and_ratio(small_csnet: Callable) -> None:
    model = small_csnet()
    scores = deciding(model)
    every = torch.cat(list(scores.values())).sort().values
    cut = float(every[len(every) // 4 : len(every) // 4 + 2].mean())
    _, report = prune(model, "threshold", "paper", cut)
    for layer, kept in report.keep.items():
        good = scores[layer] >= cut
        assert torch.equal(kept, good) if good.any() else kept.sum() == 1
    _, other = prune(model, "ratio", "paper", ratio=(len(every) // 4 + 1) / len(every))
    assert report.keep.keys() == other.keep.keys()
    assert all(torch.equal(report.keep[name], other.keep[name]) for name in report.keep)
    _, report = prune(model, "ratio", "paper", ratio=0.0)
    assert report.removed == 0 and report.after == report.before


@pytest.mark.parametrize("criterion", ["norm", "median"])
def test_filters(small_csnet: Callable, criterion: str) -> None:
    model = small_csnet()
    _, report = prune(model, criterion, "paper", ratio=0.4)
    filters = model.stages[0][0].conv1.weight.detach().flatten(1)
    scores = []
    for one in filters:
        if criterion == "norm":
            scores.append(float(one.abs().sum()))
        else:
            scores.append(sum(float((one - other).norm()) for other in filters))
    worst = sorted(range(len(scores)), key=scores.__getitem__)[: int(0.4 * len(scores))]
    assert len(worst) == 2
    assert (~report.keep["stages.0.0"]).nonzero()[:, 0].tolist() == sorted(worst)


def test_bad_arguments_are_refused(small_csnet: Callable) -> None:
    model = small_csnet()
    for message, arguments in (
        ("criterion.*'gamma'", {"criterion": "gamma"}),
        ("mode.*'fast'", {"mode": "fast"}),
        ("threshold must be above 0, not 0", {"threshold": 0}),
        ("threshold.*nan", {"threshold": float("nan")}),
        ("ratio.*1.0", {"criterion": "ratio", "ratio": 1.0}),
        ("ratio.*-0.1", {"criterion": "norm", "ratio": -0.1}),
    ):
        with pytest.raises(ValueError, match=message):
            prune(model, **arguments)
    with pytest.raises(TypeError, match="must be a CSNet, not Linear"):
        prune(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="fused for inference"):
        prune(sodfast.fuse(model))


# ---- the command and its pictures ---------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    model = one_network(stages_1_0_norm3=[0, 3], fusion_merge_norm=[1], stages_1_1_norm1=[0])
    model.preprocessing["size"] = [64, 64]
    sodfast.save(model.float(), tmp_path / "trained.safetensors")
    return tmp_path / "trained.safetensors"


def test_command(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = weights.with_name("small.safetensors")
    assert main(["prune", str(weights), "-o", str(out), "--size", "64"]) == 0
    printed = capsys.readouterr().out
    before, after = sodfast.load(weights), sodfast.load(out)
    assert "stage 1 block 0        2, 2          1, 1" in printed
    for key, label in (("params", "parameters"), ("conv_macs", "conv MACs")):
        old, new = (sodfast.count(m, (64, 64))[key] for m in (before, after))
        line = next(line for line in printed.splitlines() if line.startswith(label))
        assert f"{old:,} →" in line and f"{new:,}" in line and new < old
    assert "1 channels were chosen but stay" in printed
    close(outputs(after), outputs(before), 1e-5)
    for name in ("channels", "gamma", "spread"):
        picture = out.with_name(f"small-{name}.png")
        assert picture.read_bytes()[:4] == b"\x89PNG" and str(picture) in printed


def test_command_keeps_its_source(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = weights.read_bytes()
    link = weights.with_name("link.safetensors")
    link.symlink_to(weights)
    assert main(["prune", str(weights), "-o", str(link), "--no-figures"]) == 2
    assert "would overwrite the weights that are pruned" in capsys.readouterr().err
    out = weights.with_name("small.safetensors")
    assert main(["prune", str(weights), "-o", str(out), "--images", "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err and not out.exists()
    assert weights.read_bytes() == before
    assert main(["prune", "csnet-fast", "-o", str(out), "--no-figures"]) == 0


def test_command_without_matplotlib(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ImportError("drawing needs matplotlib, which is not installed")

    monkeypatch.setattr("sodfast.plot.require_matplotlib", missing)
    out = weights.with_name("small.safetensors")
    arguments = ["prune", str(weights), "-o", str(out), "--mode", "paper"]
    assert main([*arguments, "--criterion", "norm", "--ratio", "0.4"]) == 0
    captured = capsys.readouterr()
    assert "needs matplotlib" in captured.err and "train it on" in captured.out
    assert out.exists() and not list(out.parent.glob("*.png"))
    for wrong in (
        ["--ratio", "0.3"],
        ["--size", "50"],
        ["--criterion", "norm", "--threshold", "1"],
    ):
        assert main([*arguments, *wrong]) == 2
    assert main(["prune", str(weights), "-o", str(out), "--threshold", "-1"]) == 1
    assert main(["prune", str(out.parent / "none"), "-o", str(out)]) == 1


def test_gap_and_spread() -> None:
    from sodfast.prune_plot import gamma_gap, output_spread

    model = one_network()
    with torch.no_grad():
        for i, norm in enumerate(m for n, m in model.named_modules() if n.endswith("norm1")):
            norm.weight.fill_(0.5)
            norm.weight[0] = 10.0 ** (-9 - i)
    low, high = gamma_gap(model)
    assert low == pytest.approx(1e-9) and high == pytest.approx(0.5)

    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = output_spread(model, x)
    assert len(found) == sum(isinstance(m, NormAct) for m in model.modules())
    ours = model.stages[0][0].norm1
    expected = 0.0
    with torch.no_grad():
        for scale, y in enumerate(model.stages[0][0].conv1([x])):
            of_scale = slice(2 * scale, 2 * scale + 2)
            gamma, beta, mean, var = (
                tensor[of_scale]
                for tensor in (ours.weight, ours.bias, ours.running_mean, ours.running_var)
            )
            z = torch.nn.functional.batch_norm(y, mean, var, gamma, beta)
            expected += float(z.std(1).mean()) / 2
    assert found["stages.0.0.norm1"][0] == pytest.approx(expected)


def test_statistics_estimated_anew(small_csnet: Callable) -> None:
    """One batch: evaluation then is training's forward. Several: their mean."""
    pruned, _ = prune(small_csnet(), "norm", "paper", ratio=0.3)
    first, second = torch.randn(2, 8, 3, 96, 96, generator=torch.Generator().manual_seed(5))
    twin = copy.deepcopy(pruned)
    estimate_statistics(pruned, [first])
    assert not pruned.training
    with torch.no_grad():
        wanted, found = twin.train()(first), pruned(first)
        drift = (twin.eval()(first) - wanted).norm()
    # Not to rounding: the running variance is the unbiased one.
    assert 0 < (found - wanted).norm() < 0.05 * drift
    norm = pruned.stages[0][0].norm1
    alone = norm.running_mean.clone()
    estimate_statistics(pruned, [second])
    other = norm.running_mean.clone()
    estimate_statistics(pruned, iter([first, second]))
    torch.testing.assert_close(norm.running_mean, (alone + other) / 2)
    assert norm.momentum == 0.1
    with pytest.raises(ValueError, match="at least one batch"):
        estimate_statistics(pruned, [])
