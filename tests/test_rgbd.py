"""Learning from RGB-D: four channels through training and prediction; dynamic distillation."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run as run_command

import sodfast
from sodfast.data.cache import open_data
from sodfast.data.folders import find_pairs
from sodfast.data.synth import write_scenes
from sodfast.data.synth_depth import read_damage
from sodfast.distill import Teacher, distill
from sodfast.evaluate import FLAT_DEPTH, evaluate_network
from sodfast.export import export
from sodfast.fuse import fuse
from sodfast.models import input_channels
from sodfast.nn import DynamicDistillationLoss
from sodfast.optim import parameter_groups
from sodfast.plan import Plan, load_plan
from sodfast.predict import Predictor
from sodfast.recipe import Recipe, load_recipe
from sodfast.runlog import Losses, read_log, read_teaching
from sodfast.schedule import learning_rate, split_biases
from sodfast.train import train
from sodfast.validation import validate

Command = Callable[..., SimpleNamespace]
SMALL = [
    "size=32", "cache_size=36", "epochs=2", "batch_size=6", "config.width=0.3", "log_every=3",
    "held_out=0.2",
]  # fmt: skip
CE = "loss=bce"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line."""

    def call(*arguments: object) -> SimpleNamespace:
        status, out, err = run_command(capsys, *arguments)
        return SimpleNamespace(returncode=status, stdout=out, stderr=err)

    return call


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rgbd") / "set"
    write_scenes(folder, 30, seed=3, depth=True, size=40, damage=0.3)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def weights(scenes: Path, cache: Path) -> Path:
    """Of a network with four channels that has learned a little, channels eliminated."""
    run = scenes.parent / "teacher"
    extra = ["lambda_d=3.0", "prune=true", "finetune_epochs=1", "prune_criterion=ratio"]
    recipe = load_recipe("rgbd-csnet", [*SMALL, CE, *extra, "prune_mode=exact", "prune_ratio=0.2"])
    table = train(recipe, scenes, run, cache_folder=cache, progress=False)
    assert table["result"]["params"] < table["trained"]["params"]
    return run / "weights.safetensors"


# ---- four channels -----------------------------------------------------------------------------


def test_training_and_pruning_keep_the_fourth_channel(weights: Path) -> None:
    model = sodfast.load(weights)
    assert model.config["in_channels"] == 4
    assert model.preprocessing == {
        "size": [32, 32], "mean": [0.485, 0.456, 0.406, 0.0], "std": [0.229, 0.224, 0.225, 1.0],
        "resample": "bilinear",
    }  # fmt: skip
    fused, x = fuse(model), torch.rand(2, 4, 32, 48)
    assert isinstance(fused, Plan)
    with torch.no_grad():
        assert torch.allclose(fused(x), model(x), atol=1e-4)
    x[:, 3] = 1 - x[:, 3]
    with torch.no_grad():
        assert not torch.allclose(fused(x), model(torch.cat([x[:, :3], 1 - x[:, 3:]], 1)))


def test_depth_is_needed_and_its_absence_is_said(tmp_path: Path, cache: Path) -> None:
    write_scenes(tmp_path / "flat", 8, size=32)
    recipe = load_recipe("rgbd-csnet", [*SMALL, CE])
    with pytest.raises(ValueError, match="asked for, but there is no folder depth/"):
        train(recipe, tmp_path / "flat", tmp_path / "run", cache_folder=cache, progress=False)


def test_weights_that_a_run_starts_from_decide_on_depth(
    weights: Path, scenes: Path, cache: Path, tmp_path: Path
) -> None:
    plain = load_recipe("rgbd-csnet", [*SMALL, CE, "config.in_channels=3", "checkpoint_every=3"])
    train(plain, scenes, tmp_path, cache_folder=cache, progress=False, init=weights)
    first = (tmp_path / "weights.safetensors").read_bytes()
    assert sodfast.load(tmp_path / "weights.safetensors").config["in_channels"] == 4
    # A run that goes on need not be told again what it began with.
    for path in sorted(tmp_path.glob("checkpoint-*.pt"))[1:]:
        path.unlink()
    train(plain, scenes, tmp_path, cache_folder=cache, progress=False, resume=True)
    assert (tmp_path / "weights.safetensors").read_bytes() == first


def test_depth_is_found_where_the_recipe_does_not_say_it(
    scenes: Path, cache: Path, tmp_path: Path
) -> None:
    """fpn-rgbd takes it by default."""
    small = load_recipe("rgbd-teacher", [*SMALL[:2], "epochs=1", "batch_size=15", "held_out=0.0"])
    recipe = replace(small, config={"encoder": "vgg16", "channels": 2})
    train(recipe, scenes, tmp_path, cache_folder=cache, progress=False)
    assert sodfast.load(tmp_path / "weights.safetensors").config["in_channels"] == 4
    for name in sodfast.list_models():
        assert input_channels(name, {"in_channels": 5}) == 5
        assert input_channels(name, {}) == (4 if name == "fpn-rgbd" else 3)


def test_what_was_not_read_yet_is_read_at_the_end(
    weights: Path, scenes: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU losses are read 16 at a time; epochs need not end with a validation."""
    monkeypatch.setattr(sodfast.train, "Losses", lambda _: Losses(16))
    recipe = load_recipe("rgbd-csnet", [*SMALL, "validate_every=9", "log_every=99"])
    distill(recipe, weights, None, tmp_path, scenes, cache_folder=cache, progress=False)
    assert len(read_teaching(tmp_path)) == read_log(tmp_path, "start")[0]["steps"] == 8


def test_validation_sees_depth(weights: Path, scenes: Path, cache: Path) -> None:
    model, rows = sodfast.load(weights), np.arange(10)
    both = [
        open_data(scenes, 36, cache, progress=False, depth=True, disparity=meaning)
        for meaning in (True, False)
    ]
    found = [validate(model, opened, rows, 32) for opened in both]
    assert found[0]["mae"] != found[1]["mae"]
    with pytest.raises(ValueError, match="takes depth maps"):
        validate(model, open_data(scenes, 36, cache, progress=False), rows, 32)


def test_export(weights: Path, tmp_path: Path) -> None:
    worst = export(sodfast.load(weights), tmp_path / "n.sodfast")
    assert worst < 1e-4
    x = torch.rand(1, 4, 32, 32)
    with torch.no_grad():
        assert torch.allclose(
            load_plan(tmp_path / "n.sodfast")(x), sodfast.load(weights)(x), atol=1e-4
        )


# ---- prediction ----------------------------------------------------------------------------------


def test_predictor(weights: Path, scenes: Path) -> None:
    predictor, pairs = Predictor(weights), find_pairs(scenes, depth=True)[:3]
    single = [predictor(pair.image, pair.depth) for pair in pairs]
    together = predictor([p.image for p in pairs], [p.depth for p in pairs])
    assert all(np.array_equal(a, b) for a, b in zip(single, together))
    turned = Predictor(weights, disparity=False)(pairs[0].image, pairs[0].depth)
    assert not np.array_equal(turned, single[0])
    with pytest.raises(ValueError, match="takes a depth map with the picture"):
        predictor(pairs[0].image)
    with pytest.raises(ValueError, match="depth must be 3 maps, one per picture: 1"):
        predictor([p.image for p in pairs], [pairs[0].depth])
    with pytest.raises(ValueError, match="takes no depth map"):
        Predictor()(pairs[0].image, pairs[0].depth)


def test_predict_command(command: Command, weights: Path, scenes: Path, tmp_path: Path) -> None:
    base = ["predict", str(scenes / "images"), "-o", str(tmp_path / "maps"), "--weights"]
    done = command(*base, str(weights), "--depth", str(scenes / "depth"), "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "maps").glob("*.png"))) == 30
    from PIL import Image

    pair = find_pairs(scenes, depth=True)[7]
    written = np.asarray(Image.open(tmp_path / "maps" / f"{pair.name}.png"))
    assert np.array_equal(written, Predictor(weights)(pair.image, pair.depth))

    (tmp_path / "depth").mkdir()
    for path in sorted((scenes / "depth").iterdir())[2:]:
        (tmp_path / "depth" / f"{path.stem}_depth.png").write_bytes(path.read_bytes())
    some = command(*base, str(weights), "--depth", str(tmp_path / "depth"), "--threads", "1")
    assert some.returncode == 1 and "2 of 30 could not be done" in some.stderr
    assert "000001.png: no depth map named 000001 in" in some.stderr

    for extra, wanted in (
        ([], "takes depth maps: --depth DIR is missing"),
        (["--depth", str(tmp_path / "none")], "no such folder"),
        (["--depth", str(tmp_path)], ""),
    ):
        refused = command(*base, str(weights), *extra, "--threads", "1")
        assert refused.returncode in (1, 2) and wanted in refused.stderr
    plain = command(*base, "csnet-fast", "--depth", str(scenes / "depth"))
    assert plain.returncode == 2 and "csnet-fast takes RGB alone" in plain.stderr
    single = command("predict", "-", "--weights", str(weights))
    assert single.returncode == 2 and "pictures from files only" in single.stderr


def test_predict_says_which_depth_maps_are_constant(
    command: Command, weights: Path, tmp_path: Path
) -> None:
    from PIL import Image

    write_scenes(tmp_path / "set", 4, seed=9, depth=True, size=40)
    depth = tmp_path / "set" / "depth"
    for name, mode, value in (("000001", "L", 9), ("000003", "I;16", 700)):
        Image.new(mode, Image.open(depth / f"{name}.png").size, value).save(depth / f"{name}.png")
    done = command(
        "predict", tmp_path / "set" / "images", "--depth", depth, "--weights", weights,
        "-o", tmp_path / "maps", "--threads", "1",
    )  # fmt: skip
    assert done.returncode == 0 and len(list((tmp_path / "maps").iterdir())) == 4
    warned = [line for line in done.stderr.splitlines() if "warning" in line]
    assert len(warned) == 2
    for line, name, value in zip(warned, ("000001", "000003"), (9, 255)):
        assert (
            f"images/{name}.png: the depth map {depth / name}.png is constant ({value} of" in line
        )


def test_options_without_a_meaning_are_refused_before_the_work(
    command: Command, scenes: Path, tmp_path: Path
) -> None:
    for channels in (3, 4):
        network = sodfast.create_model("csnet", width=0.2, in_channels=channels)
        sodfast.save(network.eval(), tmp_path / f"{channels}.safetensors")
    turned = command(
        "eval", "--weights", str(tmp_path / "3.safetensors"), "--data", str(scenes), "--distance"
    )
    assert turned.returncode == 2 and "--distance has no meaning: " in turned.stderr
    pruned = command(
        "prune", str(tmp_path / "4.safetensors"), "-o", str(tmp_path / "p.safetensors"),
        "--images", str(scenes / "images"),
    )  # fmt: skip
    assert pruned.returncode == 2 and "--images: " in pruned.stderr
    assert not (tmp_path / "p.safetensors").exists()


def test_evaluation_reads_depth_and_notes_what_is_constant(
    command: Command, weights: Path, tmp_path: Path
) -> None:
    from PIL import Image

    write_scenes(tmp_path, 3, seed=9, depth=True, size=40)
    path = tmp_path / "depth" / "000001.png"
    Image.new("L", Image.open(path).size, 9).save(path)
    found = evaluate_network(Predictor(weights), tmp_path)
    assert found.complete and found.notes == {FLAT_DEPTH: ["000001"]}
    assert all(scored.depth is not None for scored in found.maps)
    sheet = str(tmp_path / "sheet.png")
    done = command(
        "eval", "--weights", str(weights), "--data", str(tmp_path), "--sheet", sheet, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) and Path(sheet).is_file()


def test_tradeoff_takes_maps_of_distances(
    command: Command, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same scenes with depth turned round and --distance score the same."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    write_scenes(tmp_path / "near", 4, seed=9, depth=True, size=40)
    write_scenes(tmp_path / "far", 4, seed=9, depth=True, size=40)
    for path in (tmp_path / "far" / "depth").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    drawn: list[float] = []
    monkeypatch.setattr(
        "sodfast.plot.draw_tradeoff", lambda rows, *_: drawn.append(rows[0].f) or []
    )
    for folder, option in (("near", []), ("far", ["--distance"]), ("far", [])):
        done = command(
            "plot", "tradeoff", "-o", tmp_path / "t.png", "--weights", weights,
            "--data", tmp_path / folder, "--threads", "1", *option,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert drawn[0] == drawn[1] != drawn[2]


# ---- dynamic distillation --------------------------------------------------------------------


@pytest.mark.parametrize("student", [4, 3])
@pytest.mark.parametrize("taught_by", [4, 3])
def test_any_teacher_teaches_any_student(
    student: int, taught_by: int, weights: Path, scenes: Path, cache: Path, tmp_path: Path
) -> None:
    teacher = weights
    if taught_by == 3:
        teacher = tmp_path / "rgb.safetensors"
        torch.manual_seed(4)
        sodfast.save(sodfast.create_model("extractor", width=0.3).eval(), teacher)
    recipe = load_recipe("rgbd-csnet", [*SMALL, f"config.in_channels={student}"])
    run = tmp_path / "run"
    table = distill(
        recipe, teacher, None, run, scenes, cache_folder=cache, progress=False
    )  # fmt: skip
    assert 0 <= table["result"]["mae"] <= 1
    assert sodfast.load(run / "weights.safetensors").config["in_channels"] == student
    lines = read_teaching(run)
    assert [line["batch"] for line in lines] == list(range(8))  # 24 pictures, 6 at once, twice
    assert sorted(n for line in lines[:4] for n in line["names"]) == sorted(
        n for line in lines[4:] for n in line["names"]
    )
    for line in lines:
        assert len(line["names"]) == len(line["alpha"]) == len(line["theta"]) == 6
        for theta, alpha, beta in zip(line["theta"], line["alpha"], line["beta"]):
            wanted = np.tanh(alpha**0.7 * beta**0.3) if alpha > 0.5 else 0.01
            assert abs(theta - wanted) < 1e-4
    logged = read_log(run, "step")[-1]
    assert logged["alpha"] == pytest.approx(np.mean(lines[logged["step"] - 1]["alpha"]))


def test_what_is_recorded_is_what_the_teacher_says(
    weights: Path, scenes: Path, cache: Path, tmp_path: Path
) -> None:
    """Without augmentation α can be worked out from the files alone."""
    changes = ["crop=0.0", "horizontal_flip=0.0", "rotation=0.0", "cache_size=32"]
    recipe = load_recipe("rgbd-csnet", [*SMALL, *changes, "epochs=1", "config.in_channels=3"])
    distill(recipe, weights, None, tmp_path, scenes, cache_folder=cache, progress=False)
    opened = open_data(scenes, 32, cache, progress=False, depth=True)
    teacher = sodfast.load(weights)
    pre = teacher.preprocessing
    for line in read_teaching(tmp_path):
        for name, alpha in zip(line["names"], line["alpha"]):
            row = opened.names.index(name)
            rgbd = np.concatenate([opened.images[row], opened.depths[row][..., None]], 2) / 255
            x = torch.from_numpy((rgbd - pre["mean"]) / pre["std"]).float().permute(2, 0, 1)
            with torch.no_grad():
                p = teacher(x[None]).sigmoid()[0, 0].double()
            g = torch.from_numpy(opened.masks[row] / 255)
            assert alpha == pytest.approx(float((p * g).sum() / (p + g - p * g).sum()), abs=1e-3)


def test_teachers_logits_are_those_behind_its_maps(weights: Path) -> None:
    teacher, x = Teacher(weights), torch.rand(2, 4, 32, 48)
    pre = {"mean": [0.1, 0.2, 0.3, 0.0], "std": [1.0, 2.0, 3.0, 1.0]}
    logits = teacher.logits_of_student(x, pre)
    assert torch.allclose(logits.sigmoid(), teacher.of_student(x, pre))
    odd = teacher.logits_of_student(x[..., :31, :17], pre)
    assert odd.shape == (2, 1, 31, 17) and not odd.requires_grad


def test_fixed_weight_and_no_elimination(
    weights: Path, scenes: Path, cache: Path, tmp_path: Path
) -> None:
    for name, setting, check in (
        ("fixed", "dkd.fixed_weight=0.3", lambda t, a: t == 0.3),
        ("dynamic", "dkd.threshold=0.0", lambda t, a: t > 0.01 or a < 0.01),
    ):
        recipe = load_recipe("rgbd-csnet", [*SMALL, "epochs=1", setting])
        run = tmp_path / name
        distill(recipe, weights, None, run, scenes, cache_folder=cache, progress=False)
        pairs = [p for line in read_teaching(run) for p in zip(line["theta"], line["alpha"])]
        assert all(check(theta, alpha) for theta, alpha in pairs)


def test_a_resumed_run_is_the_same_to_the_bit(
    weights: Path, scenes: Path, cache: Path, tmp_path: Path
) -> None:
    recipe = load_recipe("rgbd-csnet", [*SMALL, "checkpoint_every=3"])
    options: dict[str, Any] = {"cache_folder": cache, "progress": False}
    distill(recipe, weights, None, tmp_path / "a", scenes, **options)
    distill(recipe, weights, None, tmp_path / "b", scenes, **options)
    for path in sorted((tmp_path / "b").glob("checkpoint-*.pt"))[1:]:
        path.unlink()
    distill(recipe, weights, None, tmp_path / "b", scenes, resume=True, **options)
    first, second = (sodfast.load(tmp_path / r / "weights.safetensors") for r in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert read_teaching(tmp_path / "a") == read_teaching(tmp_path / "b")
    with pytest.raises(ValueError, match="other pictures"):
        other = tmp_path / "other.safetensors"
        torch.manual_seed(8)
        sodfast.save(sodfast.create_model("csnet", width=0.2, in_channels=4).eval(), other)
        distill(recipe, other, None, tmp_path / "b", scenes, resume=True, **options)


def test_refusals(command: Command, weights: Path, scenes: Path, tmp_path: Path) -> None:
    recipe = load_recipe("rgbd-csnet", SMALL)
    with pytest.raises(ValueError, match="labelled data: no teacher"):
        train(recipe, scenes, tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="labelled data: no data"):
        distill(recipe, weights, None, tmp_path / "b", progress=False)
    with pytest.raises(ValueError, match="unexpected keyword argument 'weight'"):
        odd = load_recipe("rgbd-csnet", [*SMALL, "dkd.weight=1"])
        distill(odd, weights, None, tmp_path / "c", scenes, progress=False)
    plain = load_recipe("kd-csnet", ["size=32", "cache_size=36"])
    with pytest.raises(ValueError, match="the teacher takes depth maps, and images without"):
        distill(plain, weights, scenes / "images", tmp_path / "d", progress=False)
    refused = command("distill", "kd-csnet", "--teacher", str(weights), "-o", str(tmp_path / "e"))
    assert refused.returncode == 2 and "--images is missing" in refused.stderr


def test_distill_command(
    command: Command, weights: Path, scenes: Path, cache: Path, tmp_path: Path
) -> None:
    settings = [word for setting in (*SMALL, "epochs=1") for word in ("--set", setting)]
    done = command(
        "distill", "rgbd-csnet", *settings, "--teacher", str(weights), "--data", str(scenes),
        "-o", str(tmp_path / "run"), "--cache", str(cache),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "teaching.jsonl").is_file() and "max-F" in done.stdout


def test_synth_command(command: Command, tmp_path: Path) -> None:
    done = command(
        "data",
        "synth",
        str(tmp_path / "s"),
        "--n",
        "5",
        "--depth",
        "--damage",
        "0.4",
        "--size",
        "32",
    )
    assert done.returncode == 0, done.stderr
    assert sum(map(bool, read_damage(tmp_path / "s" / "damage.csv").values())) == 2
    wrong = command("data", "synth", str(tmp_path / "t"), "--n", "5", "--damage", "0.4")
    assert wrong.returncode == 2 and "there are none" in wrong.stderr


# ---- recipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rgbd-teacher", "rgbd-fixed", "rgbd-dkd", "rgbd-dkd-ne"])
def test_recipes_are_the_papers(name: str) -> None:
    recipe = load_recipe(name)
    wanted = {
        "model": "fpn-rgbd", "size": 256, "epochs": 40, "batch_size": 4, "optimizer": "sgd",
        "lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "rotation": 10.0, "prune": False,
    }  # fmt: skip
    assert {key: getattr(recipe, key) for key in wanted} == wanted
    assert recipe.loss == ("bce" if name == "rgbd-teacher" else "dkd")
    assert recipe.config.get("teacher", False) == (name == "rgbd-teacher")
    settings = {**recipe.dkd, "threshold": recipe.dkd.get("threshold") or None}
    loss = DynamicDistillationLoss(**settings)
    assert (loss.p, loss.temperature) == (0.7, 5.0)
    assert loss.fixed_weight == (0.5 if name == "rgbd-fixed" else None)
    assert loss.threshold == (0.5 if name == "rgbd-dkd-ne" else None)


def test_poly_schedule() -> None:
    recipe = Recipe(schedule="poly", lr=2.0, prune=False, epochs=10, finetune_epochs=0)
    rates = [learning_rate(recipe, done, -1.0, 5) for done in (0.0, 0.5, 1.0)]
    assert rates == pytest.approx([2.0, 2.0 * 0.5**0.9, 0.0])


def test_biases_get_their_own_rate_and_no_decay() -> None:
    model = sodfast.create_model("fpn-rgbd", channels=2)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    assert split_biases(Recipe(), model, groups) is groups
    first, second = split_biases(Recipe(bias_lr=2.0, bias_decay=False), model, groups)
    assert all(p.dim() == 1 for p in second["params"]) and all(
        p.dim() == 4 for p in first["params"]
    )
    assert len(first["params"]) == len(second["params"]) == len(groups[0]["params"]) // 2
    assert (first["weight_decay"], second["weight_decay"], second["lr_scale"]) == (0.1, 0.0, 2.0)
    csnet = sodfast.create_model("csnet", width=0.2)
    parts = split_biases(Recipe(bias_lr=2.0), csnet, parameter_groups(csnet, 0.1))
    assert sum(len(p["params"]) for p in parts) == len(list(csnet.parameters()))
    assert [p.get("lr_scale", 1.0) for p in parts] == [1.0, 2.0, 1.0]
