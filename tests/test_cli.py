"""The command line: sentences and exit statuses, never a traceback, nothing half-written."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sodfast
from sodfast.cli import main
from sodfast.ops import _backend
from sodfast.predict import Predictor

ROOT = Path(__file__).parents[1]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = sodfast.create_model("csnet", width=0.5)
    model.preprocessing = {**model.preprocessing, "size": [64, 64]}
    return model


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    sodfast.save(small_model(), path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "sub/b.jpg"):
        Image.fromarray(rng.integers(0, 256, (30, 50, 3), np.uint8)).save(folder / name)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse, for --help and --version
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return status, captured.out, captured.err


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# ------------------------------------------------------------------------------- predict


def test_predict_folder(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "maps"
    status, _, err = run(capsys, "predict", photos, "-o", out, "--weights", weights)
    assert status == 0
    assert "csnet" in err and "64 x 64" in err and "2 pictures" in err
    assert "error" not in err
    assert files_below(out) == ["a.png", "sub/b.png"]
    predictor = Predictor(weights)
    for name, source in (("a.png", "a.png"), ("sub/b.png", "sub/b.jpg")):
        with Image.open(out / name) as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), predictor(photos / source))


def test_predict_size(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "maps"
    arguments = ("predict", photos / "a.png", "-o", out, "--weights", weights, "--size")
    status, _, err = run(capsys, *arguments, 96)
    assert status == 0 and "96 x 96" in err
    with Image.open(out / "a.png") as image:
        assert np.array_equal(np.asarray(image), Predictor(weights, size=96)(photos / "a.png"))
    for size, words in ((100, "96 and 112"), (7, "nearest is 16"), (0, "positive"), ("x", "'x'")):
        status, _, err = run(capsys, *arguments, size)
        assert status == 2
        assert "sodfast: error:" in err and words in err


def test_predict_threads(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    arguments = ("predict", photos, "-o", tmp_path / "o", "--weights", weights, "--threads")
    try:
        assert run(capsys, *arguments, 1)[0] == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    status, _, err = run(capsys, *arguments, -2)
    assert status == 2 and "'-2'" in err


def test_bad_files_are_reported_at_the_end_and_the_others_done(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (photos / "sub" / "b.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "text.jpg").write_bytes(b"no picture at all")
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(photos / "one.png")
    out = tmp_path / "maps"
    gone = tmp_path / "gone.png"
    status, _, err = run(capsys, "predict", photos, gone, "-o", out, "--weights", weights)
    assert status == 1
    assert files_below(out) == ["a.png", "one.png", "sub/b.png"]
    assert "sodfast: error: 3 of 6 could not be done:" in err
    assert re.search(r"cut\.jpg: .*truncated", err)
    assert re.search(r"text\.jpg: not a picture", err)
    assert re.search(r"gone\.png: no such file", err)
    with Image.open(out / "one.png") as image:
        assert image.size == (1, 1)


def test_unusable_weights(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "maps"
    bad = tmp_path / "bad.safetensors"
    for content, words in (
        (None, "not found"),
        (b"text", "not a safetensors file"),
        (pickle.dumps({"a": 1}), "not a safetensors file"),
    ):
        if content is not None:
            bad.write_bytes(content)
        status, _, err = run(capsys, "predict", photos, "-o", out, "--weights", bad)
        assert status == 1
        assert err.startswith("sodfast: error:") and "bad.safetensors" in err and words in err
        assert not out.exists()
    status, _, err = run(capsys, "predict", photos, "-o", out)
    assert status == 2 and "sodfast: error:" in err and "--weights" in err


def test_unwritable_output(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_bytes(b"precious")
    for out in (occupied, occupied / "below"):
        status, _, err = run(capsys, "predict", photos, "-o", out, "--weights", weights)
        assert status == 1
        assert "sodfast: error: cannot write to the output folder" in err
        assert str(out) in err and "is a file" in err
    assert occupied.read_bytes() == b"precious"


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_output_folder_without_permission(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "locked"
    out.mkdir(mode=0o555)
    status, _, err = run(capsys, "predict", photos, "-o", out, "--weights", weights)
    assert status == 1 and "permission denied" in err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write")
def test_output_folder_that_refuses_files(
    weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "predict", photos, "-o", "/proc/self/maps2", "--weights", weights)
    assert status == 1
    assert "sodfast: error: cannot write to the output folder /proc/self/maps2" in err


def test_a_write_error_stops_with_a_sentence(
    weights: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    out = tmp_path / "maps"
    status, _, err = run(capsys, "predict", photos, "-o", out, "--weights", weights)
    assert status == 1
    assert f"sodfast: error: {out / 'a.png'}: no space left on device" in err
    assert files_below(out) == []


def test_a_backend_that_cannot_run_is_said_once(
    weights: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, words in (("nonsense", "unknown backend 'nonsense'"), ("cuda", "asked for, but")):
        monkeypatch.setattr(_backend, "_requested", name)
        out = tmp_path / "maps"
        status, _, err = run(capsys, "predict", photos, "-o", out, "--weights", weights)
        assert status == 1
        assert err.startswith("sodfast: error: the network cannot run: ") and words in err
        assert err.count("\n") == 1
        assert not out.exists()


def test_pictures_are_never_overwritten(
    weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (photos / "a.png").read_bytes()
    status, _, err = run(capsys, "predict", photos / "a.png", "-o", photos, "--weights", weights)
    assert status == 2 and "overwrite" in err
    assert (photos / "a.png").read_bytes() == before


def test_nothing_to_do(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = ("-o", tmp_path / "o", "--weights", weights)
    status, _, err = run(capsys, "predict", empty, *arguments)
    assert status == 1 and f"no pictures found in {empty}" in err
    status, _, err = run(capsys, "predict", *arguments)
    assert status == 2 and "INPUT" in err


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sodfast", *map(str, arguments)]


def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }


def test_ctrl_c(weights: Path, tmp_path: Path) -> None:
    """Interrupted in the middle: status 130, no traceback, only whole maps."""
    photos, out = tmp_path / "many", tmp_path / "maps"
    photos.mkdir()
    Image.fromarray(np.zeros((900, 900, 3), np.uint8)).save(photos / "0000.png")
    for number in range(1, 3000):
        os.link(photos / "0000.png", photos / f"{number:04}.png")
    # A hard link is a picture of its own: 3,000 jobs, several minutes of work.
    process = subprocess.Popen(
        command("predict", photos, "-o", out, "--weights", weights, "--size", "224"),
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("*.png")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and "sodfast: interrupted" in err
    written = list(out.iterdir())
    assert 0 < len(written) < 3000
    for path in written:
        assert path.suffix == ".png"
        with Image.open(path) as image:
            image.load()
            assert image.size == (900, 900)


# ------------------------------------------------------------------------------- convert


def test_convert_and_predict(
    shared: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared / "reference" / "sod100k"
    out = tmp_path / "x1.safetensors"
    arguments = ("convert", folder / "csnet-L-x1.pth.tar", "--config", folder / "csnet-L-x1.bin")
    status, stdout, _ = run(capsys, *arguments, "-o", out)
    assert status == 0
    assert "93,647 parameters" in stdout
    assert sodfast.load(out).config["weight_gain"] == 1
    status, _, _ = run(capsys, "predict", photos, "-o", tmp_path / "maps", "--weights", out)
    assert status == 0


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.canary),)


def test_convert_refuses_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary, out = tmp_path / "canary", tmp_path / "out.safetensors"
    hostile, configuration = tmp_path / "evil.pth.tar", tmp_path / "evil.bin"
    good_configuration = tmp_path / "plain.bin"
    torch.save({"state_dict": Evil(canary)}, hostile, _use_new_zipfile_serialization=False)
    configuration.write_bytes(pickle.dumps([[Evil(canary)]]))
    good_configuration.write_bytes(pickle.dumps([1, 2]))
    for checkpoint, config, words in (
        (hostile, configuration, "evil.bin"),
        (hostile, good_configuration, "plain.bin"),
        (hostile, tmp_path / "gone.bin", "gone.bin"),
    ):
        status, stdout, err = run(capsys, "convert", checkpoint, "--config", config, "-o", out)
        assert status == 1 and stdout == ""
        assert err.startswith("sodfast: error:") and words in err
        assert not out.exists() and not canary.exists()
    status, _, err = run(capsys, "convert", hostile, "-o", out)
    assert status == 2 and "--config" in err


def test_convert_to_an_unwritable_place(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared / "reference" / "sod100k"
    out = tmp_path / "no" / "such" / "folder" / "x.safetensors"
    arguments = ("convert", folder / "csnet-L-x1.pth.tar", "--config", folder / "csnet-L-x1.bin")
    status, _, err = run(capsys, *arguments, "-o", out)
    assert status == 1
    assert err == f"sodfast: error: {out}: no such file or directory\n"
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------- models, info


def test_models_prints_the_papers_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "models")
    assert status == 0
    for width, parameters in (
        ("1.0", "210,985"),
        ("1.2", "298,633"),
        ("1.5", "455,631"),
        ("1.8", "645,565"),
        ("2.0", "788,631"),
    ):
        assert re.search(rf"csnet +width {width} +{parameters} +[\d.]+ G +[\d.]+ G", out)


def test_info_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info")
    assert status == 0 and out.strip() == sodfast.info()
    status, out, _ = run(capsys, "--version")
    assert status == 0 and out.strip() == f"sodfast {sodfast.__version__}"


def test_wrong_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([], "COMMAND"),
        (["predikt"], "predikt"),
        (["models", "--colour"], "--colour"),
    ):
        status, out, err = run(capsys, *arguments)
        assert status == 2 and out == ""
        assert "sodfast: error:" in err and words in err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "predict", "--help")
    assert status == 0
    for option in ("INPUT", "--output DIR", "--weights FILE", "--size N", "--threads N"):
        assert option in out


def test_as_a_module_and_into_a_closed_pipe() -> None:
    process = subprocess.run(
        command("info"), capture_output=True, text=True, env=environment(), timeout=120
    )
    assert process.returncode == 0 and "sodfast" in process.stdout
    read, write = os.pipe()
    os.close(read)  # the reader has gone before anything is printed
    try:
        process = subprocess.run(
            command("models"),
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            timeout=120,
        )
    finally:
        os.close(write)
    assert process.stderr == ""
