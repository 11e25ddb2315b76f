"""Videos: the frames, the pipes and what goes wrong, with a stand-in for ffmpeg and with ffmpeg."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from command_line import run, write_weights
from picture_cases import picture, small_model

from sodfast.predict import Predictor
from sodfast.render import render
from sodfast.video import VideoError, predict_video

# Knows the three forms in which video.py calls ffmpeg. Its "videos" are a line with width,
# height and rate and then the raw frames; a written one begins with the command line.
STAND_IN = """
    import pathlib, sys
    arguments = sys.argv[1:]
    name = arguments[arguments.index("-i") + 1]
    if name != "pipe:0":
        head, _, body = pathlib.Path(name.removeprefix("file:")).read_bytes().partition(b"\\n")
        if head == b"damaged":
            sys.exit("[mov @ 0x55d0] first complaint\\nsecond complaint")
        width, height, rate = head.decode().split()
        if "yuv4mpegpipe" in arguments:
            sys.stdout.write(f"YUV4MPEG2 W{width} H{height} F{rate} Ip A4:3 C420jpeg\\nFRAME\\n")
        else:
            assert arguments[-2:] == ["rawvideo", "-"], arguments
            assert arguments[arguments.index("-pix_fmt") + 1] == "rgb24", arguments
            sys.stdout.buffer.write(body.removesuffix(b"then fail"))
            if body.endswith(b"then fail"):
                sys.exit("lost the rest")
    else:
        target = pathlib.Path(arguments[-1].removeprefix("file:"))
        if target.suffix == ".fail":
            target.write_bytes(b"half a file")
            sys.exit("cannot write such a thing")
        with open(target, "wb") as file:
            file.write(" ".join(arguments).encode() + b"\\n" + sys.stdin.buffer.read())
"""

FRAMES = [picture(18, 31, seed=seed) for seed in range(9)]  # odd sizes


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "ffmpeg"
    program.write_text(f"#!{sys.executable}\n{textwrap.dedent(STAND_IN)}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def write_video(path: Path, ending: bytes = b"") -> Path:
    path.write_bytes(b"31 18 25:2\n" + b"".join(f.tobytes() for f in FRAMES) + ending)
    return path


@pytest.mark.parametrize(
    ("kind", "name", "pixels"),
    [("mask", "o.mp4", "gray"), ("overlay", "o.mkv", "rgb24"), ("cutout", "o.webm", "rgba")],
)
@pytest.mark.usefixtures("stand_in")
def test_every_frame_in_its_order(
    kind: str, name: str, pixels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    predictor = Predictor(small_model())
    # A name that ffmpeg would take for an option.
    source, target = write_video(Path("-in.mp4")), Path("new") / name
    seen: list[int] = []
    assert predict_video(predictor, source, target, kind, lambda: seen.append(1)) == 9
    assert len(seen) == 9
    command, _, body = target.read_bytes().partition(b"\n")
    assert body == b"".join(render(f, predictor(f), kind).tobytes() for f in FRAMES)
    words = command.decode()
    assert f"-f rawvideo -pix_fmt {pixels} -s 31x18 -r 25/2 -i pipe:0" in words
    assert "setsar=4/3" in words
    assert ("yuva420p" in words) == (kind == "cutout")
    assert [path.name for path in target.parent.iterdir()] == [name]


@pytest.mark.usefixtures("stand_in")
def test_what_goes_wrong_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    predictor = Predictor(small_model())
    source, out = write_video(tmp_path / "in.mp4"), tmp_path / "out"
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(b"damaged\n")
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"31 18 25:1\n")
    nonsense = tmp_path / "nonsense.mp4"
    nonsense.write_bytes(b"31 0 25:1\n")
    cut = write_video(tmp_path / "cut.mp4", b"not a whole frame")
    failing = write_video(tmp_path / "failing.mp4", b"then fail")
    for video, name, words in (
        (damaged, "o.mp4", r"could not read .*damaged\.mp4: first complaint$"),
        (empty, "o.mp4", "holds no frame"),
        (nonsense, "o.mp4", "could not tell the size"),
        (cut, "o.mp4", "middle of a frame"),
        (failing, "o.mp4", "could not read .*failing.mp4: lost the rest"),
        (source, "o.fail", r"could not write .*o\.fail: cannot write such a thing"),
    ):
        with pytest.raises(VideoError, match=words):
            predict_video(predictor, video, out / name)
        assert not out.exists() or not list(out.iterdir()), words
    with pytest.raises(FileNotFoundError, match=r"gone\.mp4"):
        predict_video(predictor, tmp_path / "gone.mp4", out / "o.mp4")
    with pytest.raises(ValueError, match=r"\.webm or \.mov.*'o\.mp4'"):
        predict_video(predictor, source, out / "o.mp4", "cutout")
    with pytest.raises(ValueError, match="'sticker'"):
        predict_video(predictor, source, out / "o.mp4", "sticker")
    with pytest.raises(ValueError, match="overwrite"):
        predict_video(predictor, source, source)
    with pytest.raises(ValueError, match="31 x 18 pixels, more than the 500 allowed"):
        predict_video(Predictor(small_model(), max_pixels=500), source, out / "o.mp4")
    assert source.read_bytes().startswith(b"31 18")


@pytest.mark.usefixtures("stand_in")
def test_an_interruption_leaves_the_old_file(tmp_path: Path) -> None:
    source, target = write_video(tmp_path / "in.mp4"), tmp_path / "out" / "o.mp4"
    target.parent.mkdir()
    target.write_bytes(b"an older one")

    def progress() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_video(Predictor(small_model()), source, target, "mask", progress)
    assert [path.name for path in target.parent.iterdir()] == ["o.mp4"]
    assert target.read_bytes() == b"an older one"


def test_without_ffmpeg_there_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    weights, source = write_weights(tmp_path), write_video(tmp_path / "in.mp4")
    arguments = ("predict", "--video", source, "-o", tmp_path / "o.mp4", "--weights", weights)
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert "sodfast: error: videos need the program ffmpeg, which is not on the PATH" in err
    assert not (tmp_path / "o.mp4").exists()


@pytest.mark.usefixtures("stand_in")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, source = write_weights(tmp_path), write_video(tmp_path / "in.mp4")
    arguments = ("predict", "--weights", weights, "--video", source, "--type", "overlay", "-o")
    status, _, err = run(capsys, *arguments, tmp_path / "o.mp4")
    assert status == 0 and f"the video {source}" in err and "csnet" in err
    assert (tmp_path / "o.mp4").stat().st_size > 9 * 18 * 31 * 3
    status, _, err = run(capsys, *arguments, tmp_path / "o.fail")
    assert status == 1 and "cannot write such a thing" in err
    status, _, err = run(capsys, *arguments, source)
    assert status == 2 and "overwrite" in err


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the program ffmpeg is not installed")
def test_with_ffmpeg_itself(tmp_path: Path) -> None:
    ffmpeg = [str(shutil.which("ffmpeg")), "-v", "error", "-y"]
    environment = {**os.environ, "AV_LOG_FORCE_NOCOLOR": "1"}

    def decode(path: Path, pixels: str, *options: str) -> np.ndarray:
        command = [*ffmpeg, *options, "-i", str(path), "-f", "rawvideo", "-pix_fmt", pixels, "-"]
        done = subprocess.run(command, check=True, capture_output=True, env=environment)
        return np.frombuffer(done.stdout, np.uint8)

    frames = [picture(90, 121, seed=seed) for seed in range(5)]
    source = tmp_path / "in.mkv"
    subprocess.run(
        [*ffmpeg, *"-f rawvideo -pix_fmt rgb24 -s 121x90 -r 5 -i - -c:v ffv1".split(), source],
        check=True,
        input=b"".join(frame.tobytes() for frame in frames),
        env=environment,
    )
    predictor = Predictor(small_model())
    expected = np.stack([predictor(frame) for frame in frames]).astype(int)

    assert predict_video(predictor, source, tmp_path / "mask.mp4") == 5
    mask = decode(tmp_path / "mask.mp4", "gray").reshape(5, 90, 122)[:, :, :121]
    assert np.abs(mask - expected).mean() < 12  # lossy, but these frames in this order
    assert predict_video(predictor, source, tmp_path / "cut.webm", "cutout") == 5
    alpha = decode(tmp_path / "cut.webm", "rgba", "-c:v", "libvpx-vp9").reshape(5, 90, 121, 4)
    assert np.abs(alpha[:, :, :, 3] - expected).mean() < 12
    assert predict_video(predictor, source, tmp_path / "overlay.mp4", "overlay") == 5
