"""Scoring folders and networks: every file accounted for, and what is written about it."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import metric_cases
from PIL import Image
from torch import nn

import sodfast
from sodfast.cli import main
from sodfast.evaluate import cores, evaluate_maps, evaluate_network, worst_maps
from sodfast.metrics import CONVENTIONS, FIGURES, Scores, score
from sodfast.plot import TradeoffRow, draw_tradeoff, read_rows
from sodfast.predict import Predictor

SOFT = [(p, t) for name, p, t in metric_cases.cases() if name.startswith("soft")][:6]


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture
def maps(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of six maps and one of their truths."""
    for number, (prediction, truth) in enumerate(SOFT):
        write(tmp_path / "maps" / f"{number}.png", prediction)
        write(tmp_path / "truths" / f"{number}.png", truth)
    return tmp_path / "maps", tmp_path / "truths"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = sodfast.create_model("csnet", width=0.5)
    model.preprocessing = {**model.preprocessing, "size": [64, 64]}
    sodfast.save(model, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number, (_, truth) in enumerate(SOFT[:3]):
        photo = rng.integers(0, 256, (*truth.shape, 3), dtype=np.uint8)
        write(tmp_path / "Toy" / "images" / f"{number}.png", photo)
        write(tmp_path / "Toy" / "masks" / f"{number}.png", truth)
    return tmp_path / "Toy"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return status, captured.out, captured.err


# ------------------------------------------------------------------------ the evaluation


@pytest.mark.parametrize("threads", [1, 3])
def test_a_folder_of_maps(maps: tuple[Path, Path], threads: int) -> None:
    wanted = Scores()
    for prediction, truth in SOFT:
        wanted.add(score(prediction, truth))
    seen: list[int] = []
    result = evaluate_maps(*maps, threads=threads, progress=seen.append)
    assert result.figures() == wanted.figures()
    assert [m.name for m in result.maps] == [str(n) for n in range(6)]
    assert (result.truths, result.complete, result.notes) == (6, True, {})
    assert seen == [6] * 6
    assert result.maps[2].prediction == maps[0] / "2.png"


def test_nothing_is_left_out_in_silence(maps: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, truths = maps
    (predictions / "0.png").unlink()
    (predictions / "1.png").write_bytes((predictions / "1.png").read_bytes()[:200])
    write(predictions / "2.png", np.zeros((9, 9), np.uint8))
    write(predictions / "extra.png", np.zeros((9, 9), np.uint8))
    (truths / "3.png").write_bytes(b"no picture")
    colours = np.zeros((*SOFT[4][0].shape, 3), np.uint8)
    colours[..., 0] = 200
    write(predictions / "4.png", colours)

    result = evaluate_maps(predictions, truths)
    assert [m.name for m in result.maps] == ["5"]
    assert result.truths == 6 and not result.complete
    assert result.missing == ["0"] and result.surplus == ["extra"]
    reasons = {failure.source.name: failure.reason for failure in result.failures}
    assert reasons.keys() == {"1.png", "2.png", "3.png", "4.png"}
    height, width = SOFT[2][1].shape
    assert f"the map is 9 x 9, but its truth {width} x {height}" in reasons["2.png"]
    assert "not a picture" in reasons["3.png"] and "in colours" in reasons["4.png"]
    assert len(result.maps) + len(result.failures) + len(result.missing) == result.truths

    resized = evaluate_maps(predictions, truths, resize=True)
    assert [m.name for m in resized.maps] == ["2", "5"]
    assert resized.notes == {"map resized": ["2"], "constant map": ["2"]}


def test_unusual_truths_are_scored_and_noted(tmp_path: Path) -> None:
    shape = (20, 24)
    truths = {
        "empty": np.zeros(shape, np.uint8),
        "full": np.full(shape, 255, np.uint8),
        "grey": np.linspace(0, 255, 480).astype(np.uint8).reshape(shape),
        "ones": np.eye(*shape, dtype=np.uint8),
        "usual": np.eye(*shape, dtype=np.uint8) * 255,
    }
    rng = np.random.default_rng(0)
    prediction = rng.integers(0, 256, shape, dtype=np.uint8)
    for name, truth in truths.items():
        write(tmp_path / "m" / f"{name}.png", prediction)
        write(tmp_path / "t" / f"{name}.png", truth)
    result = evaluate_maps(tmp_path / "m", tmp_path / "t")
    assert result.complete
    assert result.notes == {
        "empty truth": ["empty"],
        "full truth": ["full"],
        "truth with grey values": ["grey"],
        "truth of zeros and ones": ["ones"],
    }
    by_name = {m.name: m.scores for m in result.maps}
    assert by_name["grey"].positives == (truths["grey"] > 128).sum()
    assert by_name["ones"].pysodmetrics.s == by_name["usual"].pysodmetrics.s


def test_folders_that_make_no_sense(maps: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, truths = maps
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no such folder: .*gone"):
        evaluate_maps(tmp_path / "gone", truths)
    with pytest.raises(ValueError, match="no maps found"):
        evaluate_maps(tmp_path / "empty", truths)
    write(tmp_path / "other" / "x.png", SOFT[0][0])
    with pytest.raises(ValueError, match="no map has the name of a truth: .*'x'.*'0'"):
        evaluate_maps(tmp_path / "other", truths)
    Image.fromarray(SOFT[0][0]).save(predictions / "0.bmp")
    with pytest.raises(ValueError, match="two maps are named '0'"):
        evaluate_maps(predictions, truths)


def test_a_part_by_names(maps: tuple[Path, Path], tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("4.png\n1\n")
    result = evaluate_maps(*maps, names=names)
    assert [m.name for m in result.maps] == ["1", "4"] and result.truths == 2 and result.complete
    assert result.surplus == []  # the other maps have truths, they were not asked for
    names.write_text("9\n")
    with pytest.raises(ValueError, match="line 1: there is no truth named '9'"):
        evaluate_maps(*maps, names=names)


def test_a_network_equals_its_written_maps(weights: Path, data: Path, tmp_path: Path) -> None:
    predictor = Predictor(weights)
    result = evaluate_network(predictor, data, threads=2)
    for photo in (data / "images").iterdir():
        write(tmp_path / "out" / photo.name, predictor(photo))
    written = evaluate_maps(tmp_path / "out", data)
    assert result.figures() == written.figures()
    assert result.complete and result.name == written.name == "Toy"
    assert written.maps[0].photo == result.maps[0].photo == data / "images" / "0.png"


def test_a_network_on_a_set_with_faults(weights: Path, data: Path) -> None:
    write(data / "images" / "9.png", np.zeros((8, 8, 3), np.uint8))
    write(data / "masks" / "1.png", np.zeros((5, 6), np.uint8))
    result = evaluate_network(Predictor(weights), data)
    assert result.truths == 4 and [m.name for m in result.maps] == ["0", "2"]
    reasons = [failure.reason for failure in result.failures]
    assert reasons[0] == "images/9.png has no mask"
    assert re.fullmatch(r"the photo is \d+ x \d+, but its truth 6 x 5", reasons[1])


def test_the_worst_maps(maps: tuple[Path, Path]) -> None:
    result = evaluate_maps(*maps)
    errors = [m.scores.pysodmetrics.mae for m in worst_maps(result.maps, 3)]
    assert errors == sorted((m.scores.pysodmetrics.mae for m in result.maps), reverse=True)[:3]
    values = [m.scores.pysodmetrics.weighted_f for m in worst_maps(result.maps, 3, "weighted_f")]
    assert values == sorted(m.scores.pysodmetrics.weighted_f for m in result.maps)[:3]
    with pytest.raises(ValueError, match="by must be one of .*, got 'precision'"):
        worst_maps(result.maps, 3, "precision")


# ---------------------------------------------------------------------- the command line


def test_eval_prints_every_convention(
    maps: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "eval", *maps)
    assert status == 0 and "error" not in err
    figures = evaluate_maps(*maps).figures()
    assert "6 of 6 maps scored" in out
    lines = out.splitlines()
    assert re.split(r"\s{2,}", lines[1].strip()) == list(FIGURES.values())
    for line, (key, convention) in zip(lines[2:], CONVENTIONS.items()):
        cells = re.split(r"\s{2,}", line)
        assert cells[0] == convention
        wanted = [f"{figures[key][f]:.4f}" if f in figures[key] else "–" for f in FIGURES]
        assert cells[1:] == wanted


def test_eval_markdown(maps: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "eval", *maps, "--markdown")
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert status == 0 and len(rows) == 2 + len(CONVENTIONS)
    assert len({row.count("|") for row in rows}) == 1
    assert "- " in out and "6 of 6" in out


def test_eval_of_weights_as_json(
    weights: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(
        capsys, "eval", "--weights", weights, "--data", data, data / "masks/..", "--json"
    )
    assert status == 0
    result = json.loads(out)
    model = result["model"]
    counts = sodfast.count(sodfast.load(weights), (64, 64))
    assert model["parameters"] == counts["params"]
    assert (model["conv_macs"], model["paper_macs"]) == (counts["conv_macs"], counts["paper_macs"])
    assert model["parameters_mib"] == pytest.approx(counts["params"] / 2**18)
    assert model["file_mib"] == pytest.approx(weights.stat().st_size / 2**20)
    assert model["input_size"] == [64, 64] and model["weights"] == "small.safetensors"
    speed = model["images_per_second"]
    assert speed["network"] > 0 and speed["file_to_map"] > 0 and speed["threads"] == cores()
    first, second = result["datasets"]
    assert first["name"] == "Toy" and first["scored"] == first["truths"] == 3
    assert first["figures"] == second["figures"]
    wanted = evaluate_network(Predictor(weights), data).figures()
    for convention, values in wanted.items():
        for figure, value in values.items():
            assert first["figures"][convention][figure] == pytest.approx(value, abs=1e-12)
    f_measure = first["curves"]["salmetric"]["f_measure"]
    threshold = first["figures"]["salmetric"]["threshold"]
    assert len(f_measure) == 256
    assert f_measure[threshold] == pytest.approx(wanted["salmetric"]["max_f"], abs=1e-6)


def test_eval_of_another_size_without_speed(
    weights: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("eval", "--weights", weights, "--data", data, "--no-speed", "--size")
    status, out, _ = run(capsys, *arguments, 96)
    assert status == 0 and "96 x 96" in out and "speed" not in out
    status, _, err = run(capsys, *arguments, 100)
    assert status == 2 and "multiple of 16" in err


def test_eval_reports_and_fails(
    maps: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (maps[0] / "3.png").unlink()
    write(maps[0] / "4.png", np.zeros((2, 2), np.uint8))
    status, out, err = run(capsys, "eval", *maps, "--json")
    assert status == 1
    entry = json.loads(out)["datasets"][0]  # the figures of the others are there
    assert (entry["truths"], entry["scored"], entry["missing"]) == (6, 4, ["3"])
    assert entry["failures"][0]["source"].endswith("4.png")
    assert "sodfast: error: 2 of 6 could not be scored:" in err
    assert "3: no map" in err and "the map is 2 x 2" in err
    status, out, err = run(capsys, "eval", *maps, "--resize")
    assert status == 1 and "map resized: 1 (4)" in out and "without a map: 1 (3)" in out


def test_eval_writes_a_line_per_image(
    maps: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "per.csv"
    assert run(capsys, "eval", *maps, "--per-image", target)[0] == 0
    rows = list(csv.DictReader(io.StringIO(target.read_text())))
    result = evaluate_maps(*maps)
    assert [row["name"] for row in rows] == [m.name for m in result.maps]
    for row, scored in zip(rows, result.maps):
        for figure in FIGURES:
            value = getattr(scored.scores.pysodmetrics, figure)
            assert float(row[figure]) == pytest.approx(value, abs=1e-6)
    figures = result.figures()
    mean = np.mean([float(row["weighted_f"]) for row in rows])
    assert mean == pytest.approx(figures["pysodmetrics"]["weighted_f"], abs=1e-6)
    mean = np.mean([float(row["salmetric_mae"]) for row in rows])
    assert mean == pytest.approx(figures["salmetric"]["mae"], abs=1e-6)


def test_eval_draws_the_worst(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    arguments = ("eval", "--weights", weights, "--data", data, "--no-speed", "--sheet", sheet)
    assert run(capsys, *arguments, "--worst", 2, "--worst-by", "s")[0] == 0
    with Image.open(sheet) as image:
        two = image.size
        colours = np.asarray(image.convert("RGB")).astype(int)
    assert np.ptp(colours, axis=2).max() > 50  # the photos are in colours
    assert run(capsys, *arguments)[0] == 0
    with Image.open(sheet) as image:
        assert image.width == two[0] and image.height > two[1]

    write(tmp_path / "out" / "0.png", SOFT[0][0])
    arguments = ("eval", tmp_path / "out", data / "masks", "--sheet", sheet)
    status, _, err = run(capsys, *arguments)
    assert status == 1 and "--images DIR" in err  # two maps are missing; the sheet is there
    with Image.open(sheet) as image:
        assert image.width < two[0]
    status, _, err = run(capsys, *arguments, "--images", data / "images")
    assert "--images" not in err
    with Image.open(sheet) as image:
        assert image.width == two[0]


def test_eval_refuses_what_makes_no_sense(
    maps: tuple[Path, Path], weights: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ([], "two folders are needed"),
        (maps[:1], "two folders are needed"),
        ((*maps, "--weights", weights, "--data", data), "give either"),
        (("--weights", weights), "--data DIR is missing"),
        (("--data", data), "--weights FILE is missing"),
        ((*maps, "--json", "--markdown"), "not allowed with"),
        ((*maps, "--worst", 3), "--worst needs --sheet"),
        ((*maps, "--size", 64), "--size belongs to --weights"),
        (("--weights", weights, "--data", data, "--resize"), "--resize belongs to"),
        ((*maps, "--per-image", maps[0] / "0.png" / "x.csv"), "there is no folder"),
        ((*maps, "--curves", "curves.jpg"), "--curves: must end in .png, got 'curves.jpg'"),
    ):
        status, out, err = run(capsys, "eval", *arguments)
        assert status == 2 and out == "" and "sodfast: error:" in err and words in err, words
    for arguments, words in (
        ((maps[0], maps[1] / "gone"), "no such folder"),
        (("--weights", weights.with_name("gone.safetensors"), "--data", data), "gone.safetensors"),
        (("--weights", weights, "--data", data / "images"), "found neither folders"),
    ):
        status, _, err = run(capsys, "eval", *arguments)
        assert status == 1 and "sodfast: error:" in err and words in err.lower(), words


# --------------------------------------------------------------------------------- plots


def test_drawing_without_matplotlib_says_what_to_do(
    maps: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = run(capsys, "eval", *maps, "--curves", tmp_path / "c.png")
    assert status == 1 and out == ""  # said before the work, not after it
    assert "drawing needs matplotlib, which is not installed: pip install" in err
    rows = tmp_path / "rows.csv"
    rows.write_text("name,f,parameters\na,0.9,1K\n")
    status, _, err = run(capsys, "plot", "tradeoff", "-o", tmp_path / "t.png", "--rows", rows)
    assert status == 1 and "drawing needs matplotlib" in err
    assert run(capsys, "eval", *maps)[0] == 0  # and nothing else needs it


def test_curves(
    maps: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "curves.png"
    assert run(capsys, "eval", *maps, "--curves", target)[0] == 0
    with Image.open(target) as image:
        assert image.width > 1000 and np.unique(np.asarray(image)).size > 50


def test_rows_of_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        "name, f, parameters, macs, images_per_second, family, source\n"
        "CSNet,0.9,211K, 0.61 G,36,CSNet,a paper\n"
        '"U2Net, small",.95,1.1m,,,,\n'
    )
    assert read_rows(path) == [
        TradeoffRow("CSNet", 0.9, 211e3, 0.61e9, 36, family="CSNet"),
        TradeoffRow("U2Net, small", 0.95, 1.1e6),
    ]
    for text, words in (
        ("name,parameters\na,1\n", "lacks 'f'"),
        ("name,f,params\na,1,1\n", "unknown 'params'"),
        ("name,f\na,\n", "line 2: name and f must not be empty"),
        ("name,f,macs\nb,.9,1\na,.9,many\n", "line 3, column macs: a positive number .*'many'"),
        ("name,f,macs\na,.9,-3\n", "got '-3'"),
        ("name,f,macs\na,.9\n", "line 2: 3 columns expected"),
        ("name,f\na,.9,1\n", "line 2: 2 columns expected"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_rows(path)
    with pytest.raises(FileNotFoundError, match="no such file of rows"):
        read_rows(tmp_path / "gone.csv")


def test_tradeoff_of_rows_results_and_weights(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    rows, results, target = (tmp_path / name for name in ("r.csv", "r.json", "t.png"))
    rows.write_text("name,f,parameters,macs,family\na,0.9,1M,2G,x\nb,0.91,2M,,x\nc,.7,,,\n")
    _, out, _ = run(capsys, "eval", "--weights", weights, "--data", data, "--json", "--no-speed")
    results.write_text(out)
    sources = ("--rows", rows, "--results", results, "--weights", weights, "--data", data)
    status, out, err = run(capsys, "plot", "tradeoff", "-o", target, *sources)
    assert status == 0 and "5 networks" in out
    assert "no parameters known of c" in err and "no macs known of b, c" in err
    with Image.open(target) as image:
        three = image.size
    status, _, err = run(capsys, "plot", "tradeoff", "-o", target, "--rows", rows)
    assert status == 0 and "no images per second known of a, b, c" in err
    with Image.open(target) as image:
        assert image.width * 3 == three[0] * 2  # a panel less

    for arguments, expected, words in (
        ((), 2, "nothing to draw"),
        (("--results", results, "--distance"), 2, "--distance is for --weights"),
        (("--weights", weights, "--data", data, "--distance"), 2, "takes RGB alone"),
        (("--weights", weights), 2, "go together"),
        (("--rows", tmp_path / "gone.csv"), 1, "gone.csv"),
        (("--results", rows), 1, "no JSON"),
        (("--results", results, "--data-set", "other"), 1, "holds no data set 'other', only Toy"),
        (("--results", results, "--figure", "s"), 1, "SalMetric has no S"),
    ):
        status, _, err = run(capsys, "plot", "tradeoff", "-o", target, *arguments)
        assert status == expected and words in err, words
    with pytest.raises(ValueError, match="at least one network with a cost"):
        draw_tradeoff([TradeoffRow("a", 0.9)], target)


def test_tradeoff_needs_parameters(
    maps: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    results = tmp_path / "maps.json"
    results.write_text(run(capsys, "eval", *maps, "--json")[1])
    target = tmp_path / "t.png"
    status, _, err = run(capsys, "plot", "tradeoff", "-o", target, "--results", results)
    assert status == 1 and "it knows no parameters" in err and not target.exists()


# ---------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def published(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from sodfast.convert import convert_csnet

    folder = tmp_path_factory.mktemp("published")
    source = shared / "reference" / "sod100k"
    paths = {}
    for name in ("x1", "x2"):
        model: nn.Module = convert_csnet(
            source / f"csnet-L-{name}.pth.tar", source / f"csnet-L-{name}.bin"
        )
        paths[name] = folder / f"{name}.safetensors"
        sodfast.save(model, paths[name])
    return paths


# SalMetric's max F and MAE of these checkpoints, and how near they must be. x1: FACTS.md, from the
# original JPEG files; those here were compressed anew, which costs x1 0.0012. x2: the README
# beside the data, from these files.
ECSSD = {"x1": (0.8991, 0.0758, 0.002, 0.0012), "x2": (0.9155, 0.0664, 0.0005, 0.0003)}


@pytest.mark.parametrize("name", ECSSD)
def test_ecssd_end_to_end(
    full: bool,
    shared: Path,
    published: dict[str, Path],
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not full:
        pytest.skip("a minute per network; run with --full")
    status, out, _ = run(
        capsys, "eval", "--weights", published[name], "--data", shared / "data" / "ECSSD", "--json"
    )
    assert status == 0
    figures: dict[str, Any] = json.loads(out)["datasets"][0]["figures"]
    max_f, mae, near_f, near_mae = ECSSD[name]
    assert figures["salmetric"]["max_f"] == pytest.approx(max_f, abs=near_f)
    assert figures["salmetric"]["mae"] == pytest.approx(mae, abs=near_mae)


def test_a_thousand_maps_are_scored_in_half_a_minute(shared: Path, tmp_path: Path) -> None:
    """Measured in processor time on a tenth of ECSSD, which other work does not disturb."""
    from PIL import ImageFilter

    masks = sorted((shared / "data" / "ECSSD" / "masks").iterdir())[::10]
    for mask in masks:
        with Image.open(mask) as image:
            soft = image.convert("L").filter(ImageFilter.GaussianBlur(9))
        soft.save(tmp_path / mask.name)
    evaluate_maps(tmp_path, shared / "data" / "ECSSD" / "masks", threads=2)  # warm
    start = time.process_time()
    result = evaluate_maps(tmp_path, shared / "data" / "ECSSD" / "masks", threads=2)
    assert len(result.maps) == 100
    # 30 s on two cores would be 60 s of one: 6 s for a tenth. It takes about 1.5.
    assert time.process_time() - start < 6


# ------------------------------------------------------------------------------ the page


def test_the_page_runs(
    maps: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[1] / "docs" / "score_your_maps.md"
    code = re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    maps[1].rename(tmp_path / "masks")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in code:
        exec(compile(block, str(page), "exec"), names)
    assert len(names["result"].maps) == 6 and names["scores"].images == 1


def test_the_page_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "score_your_maps.md").read_text("utf-8")
    _, usage, _ = run(capsys, "eval", "--help")
    known = set(re.findall(r"--[a-z][a-z-]+", usage)) - {"--help"}
    told = set(re.findall(r"--[a-z][a-z-]+", text)) - {
        "--rows",
        "--results",
        "--convention",
        "--figure",
    }
    assert told <= known and known - told <= {"--size", "--no-speed", "--threads"}
