"""``sodfast predict``: sentences and exit statuses, never a traceback, nothing half-written."""

from __future__ import annotations

import io
import os
import pickle
import re
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import command, environment, files_below, run, write_photos, write_weights
from PIL import Image

from sodfast.commands import predict as predict_command
from sodfast.ops import _backend
from sodfast.predict import Predictor
from sodfast.pretrained import DEFAULT
from sodfast.refine import refine
from sodfast.render import FORMATS, TYPES, render


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path)


def test_predict_folder(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "maps"
    status, _, err = run(capsys, "predict", photos, "-o", out, "--weights", weights)
    assert status == 0
    said = err.splitlines()[0]
    for words in ("2 pictures", str(weights), "csnet", "64 x 64", "device cpu", "backend "):
        assert words in said
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


def test_predict_device(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("predict", photos, "-o", tmp_path / "o", "--weights", weights, "--device")
    assert run(capsys, *arguments, "cpu", "--no-cuda-graph")[0] == 0
    for missing in ("nowhere" if torch.cuda.is_available() else "cuda", "meta", "hpu"):
        status, _, err = run(capsys, *arguments, missing)
        assert status == 2 and f"--device {missing} cannot be used: " in err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
def test_predict_on_a_gpu(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("predict", photos, "--weights", weights, "--device", "cuda", "-o")
    for folder, options, graph in (("a", (), True), ("b", ("--no-cuda-graph",), False)):
        status, _, err = run(capsys, *arguments, tmp_path / folder, *options)
        assert status == 0 and "device cuda" in err and ("in a CUDA graph" in err) == graph
    for name in files_below(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


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
    status, _, err = run(capsys, "predict", photos, "-o", out, "--weights", "nonsense")
    assert status == 1
    assert "sodfast: error:" in err and "a .safetensors file" in err


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


def test_a_write_error_stops_with_a_sentence(weights: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "maps"
    process = subprocess.run(
        command("predict", photos, "-o", out, "--weights", weights),
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        timeout=120,
        # No file may have more than 50 bytes: a full disk looks the same from here.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50)),
    )
    assert process.returncode == 1
    assert f"sodfast: error: {out / 'a.png'}: file too large" in process.stderr
    assert "Traceback" not in process.stderr
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


@pytest.mark.parametrize("kind", ["cutout", "overlay"])
def test_predict_type_and_format(
    kind: str, weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = Predictor(weights)
    arguments = ("predict", photos, "--weights", weights, "--type", kind, "-o")
    assert run(capsys, *arguments, tmp_path / "png")[0] == 0
    assert run(capsys, *arguments, tmp_path / "webp", "--format", "webp", "--batch", 2)[0] == 0
    assert files_below(tmp_path / "png") == ["a.png", "sub/b.png"]
    assert files_below(tmp_path / "webp") == ["a.webp", "sub/b.webp"]
    with Image.open(photos / "a.png") as image:
        photo = np.asarray(image)
    expected = render(photo, predictor(photo), kind)
    with Image.open(tmp_path / "png" / "a.png") as image:
        assert np.array_equal(np.asarray(image), expected)
    with Image.open(tmp_path / "webp" / "a.webp") as image:
        assert image.format == "WEBP" and np.asarray(image).shape == expected.shape


def test_choices_are_those_of_render(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict_command._TYPES == TYPES
    assert predict_command._FORMATS == FORMATS
    for option, word in (("--type", "sticker"), ("--format", "jpg")):
        status, _, err = run(capsys, "predict", "x.png", "-o", "y", option, word)
        assert status == 2 and word in err


def test_skip_existing(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "maps"
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "b.png").write_bytes(b"precious")
    arguments = ("predict", photos, "-o", out, "--weights", weights)
    status, _, err = run(capsys, *arguments, "--skip-existing")
    assert status == 0 and "2 pictures, 1 already done" in err
    assert files_below(out) == ["a.png", "sub/b.png"]
    assert (out / "sub" / "b.png").read_bytes() == b"precious"
    first = (out / "a.png").stat().st_mtime_ns
    status, _, err = run(capsys, *arguments, "--skip-existing")
    assert status == 0 and "2 already done" in err
    assert (out / "a.png").stat().st_mtime_ns == first
    assert run(capsys, *arguments)[0] == 0
    assert (out / "sub" / "b.png").read_bytes() != b"precious"


def test_patterns(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "maps"
    arguments = ("-o", out, "--weights", weights)
    status, _, err = run(capsys, "predict", f"{photos}/**/*.jpg", f"{photos}/*.tif", *arguments)
    assert status == 1
    assert "1 of 2 could not be done" in err and "no picture fits this pattern" in err
    assert files_below(out) == ["sub/b.png"]


def test_max_pixels(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Image.MAX_IMAGE_PIXELS
    Image.fromarray(np.zeros((200, 200, 3), np.uint8)).save(photos / "large.png")
    out = tmp_path / "maps"
    arguments = ("predict", photos, "-o", out, "--weights", weights, "--max-pixels")
    for limit, words in (
        (30_000, "large.png: has 200 x 200 = 40,000 pixels, more than the 30,000 allowed"),
        (10_000, "large.png: has over twice the 10,000 pixels that PIL.Image"),
    ):
        status, _, err = run(capsys, *arguments, limit)
        assert status == 1 and "1 of 3" in err and words in err
        assert "warning" not in err.lower()
        assert files_below(out) == ["a.png", "sub/b.png"]
    assert run(capsys, *arguments, 40_000)[0] == 0
    assert before == Image.MAX_IMAGE_PIXELS


def piped(data: bytes, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command("predict", "-", *arguments),
        input=data,
        capture_output=True,
        env=environment(),
        timeout=120,
    )


def test_standard_input_to_standard_output(weights: Path, photos: Path) -> None:
    data = (photos / "sub" / "b.jpg").read_bytes()
    expected = Predictor(weights)(photos / "sub" / "b.jpg")
    process = piped(data, "--weights", weights)
    assert process.returncode == 0
    assert b"csnet" in process.stderr
    with Image.open(io.BytesIO(process.stdout)) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), expected)
    cutout = ("--weights", weights, "--type", "cutout", "--format", "webp", "--no-refine")
    process = piped(data, *cutout)
    with Image.open(io.BytesIO(process.stdout)) as image:
        assert image.format == "WEBP"
        assert np.array_equal(np.asarray(image)[:, :, 3], expected)
    process = piped(data[:300], "--weights", weights)
    assert process.returncode == 1 and process.stdout == b""
    assert b"sodfast: error: standard input: " in process.stderr
    assert b"Traceback" not in process.stderr


def test_standard_streams_that_are_full_or_closed(weights: Path, photos: Path) -> None:
    photo = photos / "sub" / "b.jpg"
    for redirection, words in (
        (f"< {photo} > /dev/full", "standard output: no space left on device"),
        ("<&-", "one of them is closed"),
        (f"< {photo} >&-", "one of them is closed"),
    ):
        program = " ".join(command("predict", "-", "--weights", weights))
        done = subprocess.run(
            f"{program} {redirection}", shell=True, capture_output=True, text=True,
            env=environment(), timeout=120,
        )  # fmt: skip
        assert done.returncode in (1, 2) and words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("kind", TYPES)
def test_refined_or_not(
    kind: str, weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By themselves cutouts and overlays are refined, masks are what the network says."""
    with Image.open(photos / "a.png") as image:
        photo = np.asarray(image)
    saliency = Predictor(weights)(photo)
    refined = refine(photo, saliency)
    assert (refined != saliency).any()
    for options in ((), ("--refine",), ("--no-refine",)):
        out = tmp_path / f"out{len(options)}{'no' in str(options)}"
        arguments = ("--weights", weights, "--type", kind, "-o", out, *options)
        assert run(capsys, "predict", photos / "a.png", *arguments)[0] == 0
        with Image.open(out / "a.png") as image:
            got = np.asarray(image)
        wanted = options == ("--refine",) or (not options and kind != "mask")
        expected = render(photo, refined if wanted else saliency, kind, False)
        assert np.array_equal(got, expected)
        piece = piped((photos / "a.png").read_bytes(), *arguments[:4], *options)
        with Image.open(io.BytesIO(piece.stdout)) as image:
            assert np.array_equal(np.asarray(image), expected)


def test_nothing_need_be_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """The weights that ship, and a folder of their own for the maps."""
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "predict", photos / "a.png")
    assert status == 0 and f"; {DEFAULT}: scfnet" in err
    with Image.open(tmp_path / "maps" / "a.png") as image:
        assert np.array_equal(np.asarray(image), Predictor()(photos / "a.png"))


def test_wrong_combinations(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (["-", photos], "reads one picture"),
        (["-", "-o", tmp_path / "x"], "reads one picture"),
        (["--video", "in.mp4"], "--video needs -o"),
        (["--video", "in.mp4", photos, "-o", "x.mp4"], "--video takes no other INPUT"),
        (["--video", "in.mp4", "-o", "x.mp4", "--format", "png"], "--format is for pictures"),
        (["--video", "in.mp4", "-o", "x.mp4", "--skip-existing"], "--skip-existing is for"),
        (["--batch", 0, photos, "-o", "x"], "positive"),
    ):
        status, _, err = run(capsys, "predict", "--weights", weights, *arguments)
        assert status == 2, arguments
        assert "sodfast: error:" in err and words in err
    assert files_below(tmp_path) == ["photos/a.png", "photos/sub/b.jpg", "weights.safetensors"]


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
