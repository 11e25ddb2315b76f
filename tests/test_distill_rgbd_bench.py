"""The account that bench/distill_rgbd.py gives of what the threshold caught."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from sodfast.recipe import load_recipe

SCRIPT = Path(__file__).parents[1] / "bench" / "distill_rgbd.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("distill_rgbd", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_precision_and_recall_are_of_the_last_epoch(script: Any, tmp_path: Path) -> None:
    """Two epochs of two batches; in the first everything was below the threshold."""
    names = [["a", "b"], ["c", "d"]]
    alphas = [[0.1, 0.1], [0.1, 0.1], [0.2, 0.9], [0.5, 0.4]]
    rest = {"theta": [0.3, 0.3], "beta": [0.5, 0.5]}
    lines = [
        {"batch": i, "names": names[i % 2], "alpha": alpha, **rest}
        for i, alpha in enumerate(alphas)
    ]
    (tmp_path / "teaching.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {"epochs": 2, "dkd": {"threshold": 0.5}}
    start = {"event": "start", "step": 0, "steps": 4, "recipe": recipe}
    (tmp_path / "log.jsonl").write_text(json.dumps(start) + "\n")
    damage = {
        "a": "dominated",
        "b": "contrast",
        "c": "",
        "d": "distorted",
        "never seen": "contrast",
    }
    found = script.caught(tmp_path, damage, recipe)
    assert (found["pictures"], found["damaged"], found["caught"]) == (4, 3, 3)  # a, c and d
    assert found["precision"] == pytest.approx(2 / 3) == found["recall"]
    assert found["recall_by_kind"] == {"dominated": 1, "contrast": 0, "distorted": 1}
    assert found["mean_alpha_intact"] == 0.5 and found["mean_alpha_damaged"] == pytest.approx(0.5)


def test_scenes_are_made_once_and_nothing_else_is_touched(script: Any, tmp_path: Path) -> None:
    (tmp_path / "scenes.part").mkdir()
    (tmp_path / "scenes.part" / "half.png").touch()
    made = script.scenes(tmp_path / "scenes", 4, 1, 0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenes"]
    assert script.scenes(made, 4, 1, 0.5) == made
    for n, damage in ((4, 0.0), (5, 0.5)):
        with pytest.raises(SystemExit, match="holds other scenes"):
            script.scenes(made, n, 1, damage)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").touch()
    with pytest.raises(SystemExit, match="holds other scenes"):
        script.scenes(tmp_path / "photos", 4, 1, 0.5)
    assert (tmp_path / "photos" / "mine.jpg").is_file()


def test_the_arms_differ_in_the_loss_alone(script: Any) -> None:
    arms = {
        name: load_recipe(script.RECIPE, settings).as_dict()
        for name, settings in script.arms([0.3, 0.5]).items()
    }
    assert list(arms) == [
        "cross-entropy", "fixed 0.3", "fixed 0.5", "dynamic", "dynamic, noise elimination"
    ]  # fmt: skip
    rest = [{k: v for k, v in arm.items() if k not in ("loss", "dkd")} for arm in arms.values()]
    assert all(other == rest[0] for other in rest)
    assert [arm["loss"] for arm in arms.values()] == ["bce"] + 4 * ["dkd"]
    assert arms["dynamic"]["dkd"] == {
        **arms["dynamic, noise elimination"]["dkd"], "threshold": 0.0
    }  # fmt: skip
