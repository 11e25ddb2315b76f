"""Ablations: the entries are sound; real runs make a table and a plot, and go on."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import sodfast
from sodfast.ablate import ablate, as_markdown, plan
from sodfast.ablations import ABLATIONS, Ablation
from sodfast.cli import main
from sodfast.data.synth import write_scenes
from sodfast.evaluate import evaluate_network
from sodfast.predict import Predictor
from sodfast.recipe import load_recipe
from sodfast.runlog import read_log

SMALL = [
    "config.width=0.2", "size=32", "cache_size=32", "sizes=[]", "epochs=2", "finetune_epochs=1",
    "batch_size=8", "held_out=0.25", "lambda_steps=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablate")
    write_scenes(folder / "set", 24, seed=3, size=40)
    return folder


@pytest.mark.parametrize(
    ("name", "recipe"),
    [(name, recipe) for name, entry in ABLATIONS.items() if not entry.taught
     for recipe in ((None, "csnet") if entry.recipe == "csnet-fast" else (None,))],
)  # fmt: skip
def test_every_run_of_every_entry_can_be_made(name: str, recipe: str | None) -> None:
    ablation = ABLATIONS[name]
    teachers = ["teacher.safetensors"] if ablation.dynamic else []
    runs = plan(ablation, recipe, ["lr=0.125"], seeds=2, teachers=teachers)
    for run in runs:
        assert bool(run.teacher) == (run.recipe.loss == "dkd")
    assert len(runs) == 2 * len(ablation.runs)
    assert len({run.folder for run in runs}) == len({run.label for run in runs}) * 2 == len(runs)
    varied = {json.dumps(run.recipe.as_dict(), sort_keys=True) for run in runs}
    assert len(varied) == len(runs), "two runs are the same"
    for run in runs:
        assert run.recipe.lr == 0.125
        with torch.device("meta"):
            sodfast.create_model(run.recipe.model, **run.recipe.config)
    seed = load_recipe(recipe or ablation.recipe).seed
    assert {run.seed for run in runs} == {seed, seed + 1}


def test_the_papers_ablations_are_there() -> None:
    papers = " ".join(entry.paper for entry in ABLATIONS.values())
    for place in ("fig. 6a", "fig. 13", "fig. 6b", "fig. 14", "table 4", "table 11", "table 3",
                  "table 9", "table 10", "table 1,", "table 6", "KD-SCFNet table 3",
                  "KD-SCFNet fig. 6", "Dynamic KD table 3", "Dynamic KD table 5"):  # fmt: skip
        assert place in papers


def test_what_is_varied_cannot_be_set() -> None:
    with pytest.raises(ValueError, match="weight_decay is what this ablation varies"):
        plan(ABLATIONS["lambda"], "csnet-fast", ["weight_decay=1"])
    assert main(["ablate", "lambda", "--data", "x", "-o", "y", "--set", "weight_decay=1"]) == 2
    assert main(["ablate", "lamda", "--data", "x", "-o", "y"]) == 2


def test_by_cost_is_resumed_and_refuses_other_settings(
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two decays, a criterion that removes channels; the second call finds both runs done."""
    entry = Ablation(
        "criterion", "none",
        tuple((decay, "norm", {"lambda_d": strength, "prune_criterion": "norm",
                               "prune_mode": "paper", "prune_ratio": 0.5})
              for decay, strength in (("standard", 0.0), ("dynamic", 1.5))),
    )  # fmt: skip
    monkeypatch.setitem(ABLATIONS, "criterion", entry)
    words = ["ablate", "criterion", "--data", str(scenes / "set"), "-o", str(tmp_path / "a"),
             "--cache", str(scenes / "cache"), "--device", "cpu"]  # fmt: skip
    words += [word for setting in SMALL for word in ("--set", setting)]
    assert main(words) == 0
    first = capsys.readouterr()
    assert "run 2 of 2: dynamic, norm" in first.err
    table = json.loads((tmp_path / "a" / "table.json").read_text())
    assert [row["series"] for row in table["rows"]] == ["standard", "dynamic"]
    for row in table["rows"]:
        assert row["params"] < 0.5 * row["params_before"]  # half the channels on both sides
        assert 0 < row["max_f"] < 1 and 0 < row["mae"] < 1
        assert f"{row['max_f']:.4f}" in (tmp_path / "a" / "table.md").read_text()
    with Image.open(tmp_path / "a" / "plot.png") as picture:
        assert picture.width > 1000
    starts = {run: read_log(tmp_path / "a" / run, "start")[-1]["recipe"]["lambda_d"]
              for run in ("standard-norm-seed-1", "dynamic-norm-seed-1")}  # fmt: skip
    assert list(starts.values()) == [0.0, 1.5]

    monkeypatch.setattr("sodfast.ablate.train", None)  # nothing may be trained now
    assert main(words) == 0
    again = capsys.readouterr()
    assert "run " not in again.err and again.out == first.out
    assert main([*words, "--set", "lr=0.5"]) == 1
    assert "was run with other settings (lr)" in capsys.readouterr().err


def test_by_epoch_and_over_seeds(scenes: Path, tmp_path: Path) -> None:
    runs = plan(ABLATIONS["epochs"], "csnet-fast", SMALL, seeds=2)
    rows = ablate(
        ABLATIONS["epochs"], runs, scenes / "set", tmp_path, cache_folder=scenes / "cache",
        device="cpu", progress=False,
    )  # fmt: skip
    assert [(row["series"], row["seeds"]) for row in rows] == [("standard", 2), ("dynamic", 2)]
    for row in rows:
        low, high = row["mae_range"]
        assert low <= row["mae"] <= high and low < high  # other seeds, other numbers
        assert row["params"] == row["params_before"]  # nothing is eliminated here
    assert " ± " in as_markdown(ABLATIONS["epochs"], rows)
    assert (tmp_path / "plot.png").is_file()


def test_teachers_are_compared(scenes: Path, tmp_path: Path) -> None:
    """Two untrained teachers of different size, one small student, pictures without masks."""
    files = []
    torch.manual_seed(0)
    for width in (0.2, 0.3):
        place = tmp_path / f"width-{width}"
        place.mkdir()
        files.append(place / "weights.safetensors")
        sodfast.save(sodfast.create_model("csnet", width=width), files[-1])
    words = ["ablate", "teacher", "-o", str(tmp_path / "a"), "--recipe", "kd-csnet", "--images",
             str(scenes / "set" / "images"), "--val", str(scenes / "set"), "--device", "cpu",
             "--cache", str(scenes / "cache")]  # fmt: skip
    settings = ["config.width=0.2", "size=32", "cache_size=32", "epochs=1", "batch_size=8"]
    settings += ["distill_threshold=0.0"]  # cut at 1/2 the maps of untrained ones are the same
    words += [word for setting in settings for word in ("--set", setting)]
    assert main(words) == 2  # no teacher
    words += [word for file in files for word in ("--teacher", str(file))]
    assert main(words) == 0
    rows = json.loads((tmp_path / "a" / "table.json").read_text())["rows"]
    assert [row["series"] for row in rows] == ["width-0.2", "width-0.3"]
    assert rows[0]["params"] == rows[1]["params"]
    assert rows[0]["mae"] != rows[1]["mae"]  # they were told different things
    assert main([*words, "--teacher", str(files[0])]) == 2  # twice the same
    assert main(["ablate", "epochs", "--data", "x", "-o", "y", "--teacher", str(files[0])]) == 2


# ---- dynamic distillation ----------------------------------------------------------------------


def test_the_rows_of_the_papers_table() -> None:
    runs = plan(ABLATIONS["rgbd"], teachers=["t.safetensors"])
    assert [run.label for run in runs] == [
        "RGB", "RGB-D", "fixed, s 0.3", "fixed, s 0.5", "fixed, s 0.7", "dynamic",
        "dynamic, and threshold",
    ]  # fmt: skip
    assert [run.recipe.config["in_channels"] for run in runs] == [3] + 6 * [4]
    assert [run.recipe.dkd.get("threshold") for run in runs[-2:]] == [0.0, 0.5]
    rgb = plan(ABLATIONS["rgb-dkd"], teachers=["t.safetensors"])
    assert {(run.recipe.config["in_channels"], run.recipe.dkd["temperature"]) for run in rgb} == {
        (3, 10.0)
    }
    with pytest.raises(ValueError, match="needs one teacher, got 0"):
        plan(ABLATIONS["rgbd"])
    with pytest.raises(ValueError, match="needs one teacher, got 2"):
        plan(ABLATIONS["rgbd"], teachers=["a.safetensors", "b.safetensors"])
    with pytest.raises(ValueError, match="has dkd.fixed_weight = 0.5, so that nothing is dynamic"):
        plan(ABLATIONS["rgbd"], "rgbd-fixed", teachers=["t.safetensors"])
    with pytest.raises(ValueError, match="has dkd.threshold = 0, no noise elimination"):
        plan(ABLATIONS["rgbd"], "rgbd-dkd", teachers=["t.safetensors"])


def table(folder: Path) -> list[list[str]]:
    """The cells of scores.md."""
    lines = (folder / "scores.md").read_text().splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:] if "|" in line]


def test_dynamic_distillation_makes_its_table_and_pictures(tmp_path: Path) -> None:
    write_scenes(tmp_path / "set", 18, seed=3, size=40, depth=True, damage=0.3)
    write_scenes(tmp_path / "val", 7, seed=4, size=40, depth=True)
    torch.manual_seed(1)
    teacher = tmp_path / "teacher.safetensors"
    sodfast.save(sodfast.create_model("csnet", width=0.2, in_channels=4).eval(), teacher)
    small = [
        "config.width=0.2", "size=32", "cache_size=32", "epochs=1", "batch_size=6", "held_out=0.0",
        "disparity=false",
    ]  # fmt: skip
    ablation = ABLATIONS["rgbd"]
    runs = plan(ablation, "rgbd-csnet", small, teachers=[teacher])
    chosen = [run for run in runs if run.label in ("RGB", "fixed, s 0.5", "dynamic")]
    options = {"cache_folder": tmp_path / "cache", "progress": False}
    rows = ablate(ablation, chosen, tmp_path / "set", tmp_path / "out", tmp_path / "val", **options)
    assert [row["series"] for row in rows] == ["RGB", "fixed", "dynamic"]
    pictures = ("scatter.png", "curves.png", "heat.png", "plot.png")
    for name in pictures:
        with Image.open(tmp_path / "out" / name) as image:
            assert min(image.size) > 200 and image.convert("L").getextrema()[0] < 128
    # The networks are scored as `sodfast eval` does it, with depth as they have learned it.
    for label, line in zip(("RGB", "fixed, s 0.5", "dynamic"), table(tmp_path / "out")):
        place = next(tmp_path / "out" / run.folder for run in chosen if run.label == label)
        predictor = Predictor(place / "weights.safetensors", disparity=False)
        figures = evaluate_network(predictor, tmp_path / "val").scores.figures()["pysodmetrics"]
        assert line == [label, *(f"{figures[f]:.4f}" for f in ("mean_f", "weighted_f", "mae"))]
    # Two of the three were taught: two panels; photo, depth, truth and three maps in six rows.
    wide = {name: Image.open(tmp_path / "out" / name).size for name in pictures}
    assert wide["scatter.png"][0] > 1.5 * wide["scatter.png"][1]
    assert 0.8 < wide["heat.png"][0] / wide["heat.png"][1] < 1.4
