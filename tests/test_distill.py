"""Distillation: what the teacher says becomes the truth, on-line and as weak labels; recipes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run as command
from PIL import Image

import sodfast
from sodfast import checkpoint, nn
from sodfast.data.cache import open_images
from sodfast.data.folders import find_images
from sodfast.data.synth import write_scenes
from sodfast.distill import Teacher, distill, weak_labels
from sodfast.launch import Launch
from sodfast.objective import Objective
from sodfast.recipe import Recipe, load_recipe
from sodfast.runlog import read_log
from sodfast.train import train

SMALL: dict[str, Any] = {
    "config": {"width": 0.2}, "size": 32, "cache_size": 36, "epochs": 2, "finetune_epochs": 0,
    "batch_size": 8, "held_out": 0.2, "lr": 1e-2, "schedule": "cosine", "lambda_d": 0.0,
    "prune": False, "log_every": 1, "checkpoint_every": 3, "loss": "sp", "distill_loss": "sp",
    "blur": 0.3, "brightness": 0.5, "random_sizes": [32, 48],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """labelled/ and unlabelled/ scenes, and teacher.safetensors: SCFNet with settled statistics."""
    place = tmp_path_factory.mktemp("distill")
    write_scenes(place / "labelled", 20, seed=1, size=40)
    write_scenes(place / "unlabelled", 24, seed=2, size=40)
    shutil.rmtree(place / "unlabelled" / "masks")
    torch.manual_seed(0)
    teacher = sodfast.create_model("scfnet", channels=4).train()
    with torch.no_grad():
        for _ in range(20):
            teacher(torch.randn(4, 3, 64, 64))
    teacher.preprocessing["size"] = [64, 64]
    sodfast.save(teacher, place / "teacher.safetensors")
    return place


def run(folder: Path, to: Path, data: bool = True, resume: bool = False, **changes: Any) -> Any:
    return distill(
        Recipe(**{**SMALL, **changes}), folder / "teacher.safetensors", folder / "unlabelled", to,
        folder / "labelled" if data else None, resume=resume, device="cpu",
        cache_folder=folder / "cache", progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("teach", ["online", "offline"])
def test_mixed_run(folder: Path, tmp_path: Path, teach: str) -> None:
    table = run(folder, tmp_path / "run", teach=teach)
    assert 0 <= table["result"]["mae"] <= 1
    start = read_log(tmp_path / "run", "start")[0]
    assert (start["training"], start["taught"], start["validation"]) == (16, 24, 4)
    steps = read_log(tmp_path / "run", "step")
    assert len(steps) == 12  # 24 unlabelled pictures, 4 per batch, two passes
    assert {e["size"] for e in steps} == {32, 48}
    assert steps[0]["boundary"] == 13 and steps[-1]["boundary"] == 1
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_teacher_alone_needs_no_labels(folder: Path, tmp_path: Path) -> None:
    table = run(folder, tmp_path / "run", data=False)
    assert "mae" not in table["result"]  # nothing to validate on
    start = read_log(tmp_path / "run", "start")[0]
    assert (start["training"], start["taught"], start["validation"]) == (0, 24, 0)
    assert len(read_log(tmp_path / "run", "step")) == 6


def test_killed_and_resumed_ends_bit_equal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, tmp_path / "whole", ema=0.5)

    class Killed(Exception):
        pass

    step = Launch.step

    def stop_at_the_eighth(self: Launch, optimizer: Any) -> None:
        stop_at_the_eighth.count += 1  # type: ignore[attr-defined]
        if stop_at_the_eighth.count == 8:  # type: ignore[attr-defined]
            raise Killed
        step(self, optimizer)

    stop_at_the_eighth.count = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(Launch, "step", stop_at_the_eighth)
    with pytest.raises(Killed):
        run(folder, tmp_path / "run", ema=0.5)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path / "run")[1]["state"]["step"] == 6
    run(folder, tmp_path / "run", ema=0.5, resume=True)
    whole, resumed = (
        (tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "run")
    )
    assert whole == resumed


def test_resume_refuses_another_teacher(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "run", data=False, epochs=1)
    other = sodfast.create_model("scfnet", channels=4)
    sodfast.save(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="trained on other pictures"):
        distill(
            Recipe(**{**SMALL, "epochs": 1}), tmp_path / "other.safetensors",
            folder / "unlabelled", tmp_path / "run", resume=True, device="cpu",
            cache_folder=folder / "cache", progress=False,
        )  # fmt: skip


# ---- the teacher ---------------------------------------------------------------------------------


def test_teacher_sees_what_it_was_trained_for(folder: Path) -> None:
    """A batch that is normalised for the student, at a size that the teacher does not take."""
    teacher = Teacher(folder / "teacher.safetensors")
    torch.manual_seed(0)
    picture = torch.rand(2, 3, 48, 48)
    student = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

    def normalised(pre: dict[str, Any]) -> torch.Tensor:
        mean, std = (torch.tensor(pre[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        return (picture - mean) / std

    found = teacher.of_student(normalised(student), student)
    assert found.shape == (2, 1, 48, 48) and not found.requires_grad
    x = torch.nn.functional.interpolate(
        normalised(teacher.preprocessing), size=(64, 64), mode="bilinear"
    )
    with torch.no_grad():
        expected = torch.nn.functional.interpolate(
            teacher.model(x).sigmoid(), size=(48, 48), mode="bilinear"
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_weak_labels_are_the_teachers_maps_and_are_not_made_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sodfast.distill as module

    monkeypatch.setattr(module, "SHARD", 10)
    teacher, launch = Teacher(folder / "teacher.safetensors"), Launch(device="cpu")
    cache = open_images(folder / "unlabelled", 36, tmp_path, progress=False)
    assert not cache.masks.any()

    calls: list[range] = []
    label = module._label

    def interrupted(*arguments: Any) -> np.ndarray:
        calls.append(arguments[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return label(*arguments)

    monkeypatch.setattr(module, "_label", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weak_labels(teacher, cache, launch, progress=False)
    labelled = weak_labels(teacher, cache, launch, progress=False)
    # The shard that was being made is made again, the two that were done are not.
    assert calls == [range(10), range(10, 20), range(20, 24), range(20, 24)]
    again = weak_labels(teacher, cache, launch, progress=False)
    assert len(calls) == 4 and np.array_equal(again.masks, labelled.masks)
    assert not list(tmp_path.glob("*.npy"))

    row = 7
    map_ = sodfast.Predictor(folder / "teacher.safetensors")(np.asarray(cache.images[row]))
    assert map_.std() > 0
    assert np.abs(labelled.masks[row].astype(int) - map_).max() <= 2
    assert np.array_equal(labelled.images, cache.images)

    other = sodfast.create_model("csnet", width=0.2)
    sodfast.save(other, tmp_path / "other.safetensors")
    monkeypatch.setattr(module, "_label", label)
    theirs = weak_labels(Teacher(tmp_path / "other.safetensors"), cache, launch, progress=False)
    assert not np.array_equal(theirs.masks, labelled.masks)
    assert len(list(tmp_path.glob("*labels-*.masks"))) == 2


def test_ranks_share_the_weak_labels(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sodfast.distill as module

    monkeypatch.setattr(module, "SHARD", 5)
    cache = open_images(folder / "unlabelled", 36, tmp_path, progress=False)
    teacher = Teacher(folder / "teacher.safetensors")
    second = Launch(device="cpu")
    second.rank, second.world, second.is_main = 1, 2, False
    with pytest.raises(FileNotFoundError):  # nobody puts the shards together
        weak_labels(teacher, cache, second, progress=False)
    done = sorted(path.name[-11:-4] for path in tmp_path.glob("*.npy"))
    assert done == ["0000005", "0000015"]


def test_thresholded_labels(folder: Path, tmp_path: Path) -> None:
    from sodfast.sources import open_sources

    recipe = Recipe(**{**SMALL, "distill_threshold": 0.5, "unlabelled_part": 0.75})
    launch = Launch(device="cpu")
    sources = open_sources(
        recipe, launch, folder / "labelled", None, folder / "unlabelled",
        folder / "teacher.safetensors", folder / "cache", False, False,
    )  # fmt: skip
    rows, _ = sources.split(recipe.held_out)
    pre = sodfast.create_model("csnet", width=0.2).preprocessing
    batches = sources.batches(rows, recipe, pre, torch.device("cpu"), launch)
    x, truth = batches.get(3, 48)
    names = batches.names(3)
    batches.close()
    assert x.shape == (8, 3, 48, 48) and batches.labelled == 2 and len(names) == 8
    assert set(truth[2:].unique().tolist()) <= {0.0, 1.0}
    assert len(truth[:2].unique()) > 2  # soft along edges, as given


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(**SMALL)
    with pytest.raises(ValueError, match="go together"):
        train(recipe, folder / "labelled", tmp_path / "a", images=folder / "unlabelled")
    with pytest.raises(ValueError, match="nothing to learn from"):
        train(recipe, None, tmp_path / "b")
    with pytest.raises(ValueError, match="leaves no picture of one kind"):
        run(folder, tmp_path / "c", unlabelled_part=0.01)


# ---- the loss of a recipe ------------------------------------------------------------------------


def test_objective_of_both_parts() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(5, 1, 12, 12) for _ in range(3)]
    truth = torch.rand(5, 1, 12, 12)
    recipe = Recipe(loss="sp", boundary="5", boundary_weight=2.0, distill_loss="dice",
                    distill_weight=0.3)  # fmt: skip
    found = Objective(recipe)(maps, truth, 2, 0.5)
    own = nn.MultiLevelLoss(nn.StructurePolishingLoss(2.0, 5))
    taught = nn.MultiLevelLoss(nn.DiceLoss())
    expected = own([m[:2] for m in maps], truth[:2])
    expected += 0.3 * taught([m[2:] for m in maps], truth[2:])
    torch.testing.assert_close(found, expected)
    plain = Objective(Recipe())(maps[0], truth, 5, 0.0)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(maps[0], truth)
    torch.testing.assert_close(plain, bce)
    assert Objective(Recipe()).boundary(0.0) is None
    both = Objective(Recipe(loss="sp+bce", boundary="5", boundary_weight=2.0))
    assert both.boundary(0.0) == 5
    sp = nn.StructurePolishingLoss(2.0, 5)(maps[0], truth)
    torch.testing.assert_close(both(maps[0], truth, 5, 0.0), sp + bce)
    progressive = Objective(Recipe(loss="sp", boundary="code"))
    assert [progressive.boundary(epoch / 69) for epoch in (0, 8, 9, 58, 59, 68)] == [
        13, 13, 11, 3, 1, 1
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("boundary=4", "odd number of pixels from 1 to 31"),
        ("loss=iou", "loss must be bce or dice or sp"),
        ("unlabelled_part=1.0", "unlabelled_part must be from 0 to under 1"),
        ("random_sizes=[0]", "random_sizes must be whole numbers above 0"),
        ("sizes=[[0, 64]]", "sizes and random_sizes cannot both"),
    ],
)
def test_settings_out_of_range(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("fs-scfnet", [setting.replace("boundary=4", "boundary='4'")])


def test_recipe_is_the_papers() -> None:
    """KD-SCFNet, section 4.2, and what is known of the authors' program."""
    from sodfast.schedule import image_size, learning_rate

    recipe = load_recipe("fs-scfnet")
    per_epoch = 10553 // recipe.batch_size
    rates = [
        learning_rate(recipe, step / (69 * per_epoch), -1.0, per_epoch)
        for step in range(69 * per_epoch)
    ]
    assert rates[0] == pytest.approx(6.4e-4)
    assert max(rates) == pytest.approx(6.4e-2) == rates[5 * per_epoch]
    assert np.diff(rates[: 5 * per_epoch]) == pytest.approx(rates[1] - rates[0])
    assert rates[37 * per_epoch] == pytest.approx(6.4e-4 + (6.4e-2 - 6.4e-4) / 2)
    assert rates[-1] == pytest.approx(6.4e-4, rel=0.01)
    sides = [image_size(recipe, 0.5, step) for step in range(2000)]
    assert sorted(set(sides)) == [224, 256, 288, 320, 352]
    assert min(map(sides.count, set(sides))) > 300
    assert sides == [image_size(recipe, 0.1, step) for step in range(2000)]
    model = sodfast.create_model(recipe.model, **recipe.config)
    groups = sodfast.optim.parameter_groups(
        model, recipe.weight_decay, recipe.encoder_lr, recipe.encoder_norm_decay
    )
    number = [sum(p.numel() for p in group["params"]) for group in groups]
    encoder = sum(p.numel() for p in model.encoder.parameters())
    assert number[2] + number[3] == encoder and sum(number) == 788_298
    assert [g.get("lr_scale", 1.0) for g in groups] == [1.0, 1.0, 0.1, 0.1]
    assert [g["weight_decay"] for g in groups] == [5e-4, 0.0, 0.0, 5e-4]
    assert all(p.dim() == 1 for p in groups[2]["params"])


def test_scfnet_trains_and_teaches(folder: Path, tmp_path: Path) -> None:
    """The recipe's own network, tiny sizes: train, then teach a CSNet."""
    settings = ["size=32", "random_sizes=[32]", "cache_size=36", "epochs=1", "batch_size=8",
                "held_out=0.2"]  # fmt: skip
    recipe = load_recipe("fs-scfnet", settings)
    options: dict[str, Any] = {"device": "cpu", "cache_folder": folder / "cache", "progress": False}
    table = train(recipe, folder / "labelled", tmp_path / "teacher", **options)
    assert table["result"]["params"] == 788_298
    student = load_recipe("kd-csnet", ["size=32", "cache_size=36", "epochs=1", "batch_size=8"])
    weights = tmp_path / "teacher" / "weights.safetensors"
    distill(student, weights, folder / "unlabelled", tmp_path / "run", **options)
    result = sodfast.load(tmp_path / "run" / "weights.safetensors")
    assert result.name == "csnet" and result.preprocessing["size"] == [32, 32]


# ---- pictures without masks, the command ---------------------------------------------------------


def test_find_images(folder: Path, tmp_path: Path) -> None:
    everything = find_images(folder / "unlabelled")
    assert len(everything) == 24 and everything[3].name.endswith("000003")
    # Of a data set the images alone.
    assert len(find_images(folder / "labelled")) == 20
    (tmp_path / "some.txt").write_text(
        "\n".join(str(found.image) for found in everything[:5]) + "\n# no picture\n"
    )
    assert [f.image for f in find_images(tmp_path / "some.txt")] == [
        f.image for f in everything[:5]
    ]
    (tmp_path / "bad.txt").write_text("nowhere.png\n")
    with pytest.raises(ValueError, match=r"bad.txt, line 1: .*nowhere.png does not exist"):
        find_images(tmp_path / "bad.txt")
    with pytest.raises(FileNotFoundError, match="no such folder of images"):
        find_images(tmp_path / "nothing")
    side = tmp_path / "side"
    side.mkdir()
    with pytest.raises(ValueError, match="no pictures found"):
        find_images(side)
    for ending in ("jpg", "png"):
        Image.new("RGB", (8, 8)).save(side / f"a.{ending}")
    assert [f.image.name for f in find_images(side)] == ["a.jpg"]
    for name in ("a.jpg", "a.webp"):
        (tmp_path / "two" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "two" / name)
    with pytest.raises(ValueError, match="two pictures are named 'a'"):
        find_images(tmp_path / "two")


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--images", folder / "unlabelled", "--data", folder / "labelled",
                 "-o", tmp_path / "run", "--cache", folder / "cache"]  # fmt: skip
    for setting in ("size=32", "cache_size=36", "epochs=1", "batch_size=8", "teach=offline"):
        arguments += ["--set", setting]
    teacher = folder / "teacher.safetensors"
    status, out, err = command(capsys, "distill", "kd-csnet", "--teacher", teacher, *arguments)
    assert status == 0, err
    assert "max-F" in out and (tmp_path / "run" / "weights.safetensors").is_file()
    missing = tmp_path / "none.safetensors"
    status, _, err = command(capsys, "distill", "kd-csnet", "--teacher", missing, *arguments,
                             "--resume")  # fmt: skip
    assert status == 1 and "none.safetensors" in err
