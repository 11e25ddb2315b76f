"""Videos, through the ffmpeg program: it decodes and encodes, raw frames go through pipes.

    ffmpeg -i IN … rawvideo  →  Predictor, frame by frame  →  rawvideo … ffmpeg OUT

Every frame is a picture of its own; nothing is carried from one to the next. Sound is left out.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

from .parallel import ordered_map, share_threads
from .predict import Predictor
from .render import TYPES, render

__all__ = ["VideoError", "predict_video"]

_PIXEL_FORMATS = {"mask": "gray", "cutout": "rgba", "overlay": "rgb24"}
# Opacity survives in few kinds of video.
_TRANSPARENT = {
    ".webm": ["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p"],
    ".mov": ["-c:v", "prores_ks", "-pix_fmt", "yuva444p10le"],
}


class VideoError(ValueError):
    """ffmpeg is missing, or could not read or write the video; says what it said."""


@dataclass(frozen=True)
class _Format:
    """Size in pixels as shown, frames per second and the shape of a pixel, as ffmpeg names them."""

    width: int
    height: int
    rate: str
    pixel_shape: str


def predict_video(
    predictor: Predictor,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    kind: str = "mask",
    progress: Callable[[], object] | None = None,
    refined: bool | None = None,
) -> int:
    """Makes a video of the maps, cutouts or overlays of a video's frames; returns their number.

    kind, refined: as of `sodfast.render.render`. The ending of `target` chooses the format; a
    cutout needs .webm or .mov, which can be transparent. The frame rate becomes constant. The
    file appears whole or not at all. progress is called after every frame.

    Raises FileNotFoundError for a source that is not there, VideoError (a ValueError) where
    ffmpeg is missing or fails, ValueError for another kind or a frame that is too large, and
    OSError where the folder of `target` cannot be written.
    """
    source, target = Path(source), Path(target)
    if kind not in TYPES:
        raise ValueError(f"type must be {', '.join(TYPES)}, got {kind!r}")
    if kind == "cutout" and target.suffix.lower() not in _TRANSPARENT:
        raise ValueError(
            f"a cutout has to be {' or '.join(_TRANSPARENT)}, which can be transparent; "
            f"got {target.name!r}"
        )
    if not source.is_file():
        raise FileNotFoundError(f"no such video file: {source}")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} would overwrite the video it is made of")
    program = shutil.which("ffmpeg")
    if program is None:
        raise VideoError(
            "videos need the program ffmpeg, which is not on the PATH; install it "
            "(Debian, Ubuntu: apt install ffmpeg)"
        )
    form = _probe(program, source)
    if predictor.max_pixels is not None and form.width * form.height > predictor.max_pixels:
        raise ValueError(
            f"{source}: its frames have {form.width} x {form.height} pixels, more than the "
            f"{predictor.max_pixels:,} allowed (max_pixels raises that)"
        )

    def work(frame: np.ndarray) -> bytes:
        return render(frame, predictor(frame), kind, refined).tobytes()

    workers, inner = share_threads(torch.get_num_threads())
    # ffmpeg knows the format by the ending.
    temporary = target.with_name(f".{target.stem}.{os.getpid()}-{secrets.token_hex(4)}")
    temporary = temporary.with_name(temporary.name + target.suffix)
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    try:
        with (
            _Process(_decode_command(program, source, form), f"read {source}") as decoder,
            _Process(
                _encode_command(program, temporary, form, kind), f"write {target}", writes=True
            ) as encoder,
            contextlib.closing(
                ordered_map(work, _frames(decoder.pipe, form, source), workers, inner)
            ) as results,
        ):
            for data in results:
                encoder.write(data)
                count += 1
                if progress is not None:
                    progress()
            decoder.finish()
            if count == 0:
                raise VideoError(f"{source}: holds no frame")
            encoder.finish()
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return count


def _file(path: Path) -> str:
    # Without this ffmpeg takes "-x.mp4" for an option and "http:…" for an address.
    return f"file:{path}"


def _probe(program: str, source: Path) -> _Format:
    """Asks ffmpeg for one frame in a format whose first line says size and rate, as they are
    after the rotation that a telephone's video asks for."""
    command = [program, "-v", "error", "-nostdin", "-i", _file(source), "-map", "0:v:0"]
    command += ["-frames:v", "1", "-pix_fmt", "yuv420p", "-f", "yuv4mpegpipe", "-"]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    line, *_ = done.stdout[:1000].split(b"\n")
    signature, *words = line.decode("ascii", "replace").split(" ")
    if signature != "YUV4MPEG2":
        raise VideoError(f"ffmpeg could not read {source}: {_reason(done.stderr)}")
    # W640 H480 F30000:1001 A1:1 and more: a letter and its value
    values = {word[0]: word[1:] for word in words if word}
    width, height = int(values.get("W", 0)), int(values.get("H", 0))
    rate = values.get("F", "0:0").replace(":", "/")
    if min(width, height) < 1 or not re.fullmatch(r"[1-9]\d*/[1-9]\d*", rate):
        raise VideoError(f"ffmpeg could not tell the size and rate of {source}")
    shape = values.get("A", "0:0").replace(":", "/")
    return _Format(width, height, rate, "1/1" if shape.startswith("0/") else shape)


def _decode_command(program: str, source: Path, form: _Format) -> list[str]:
    command = [program, "-v", "error", "-nostdin", "-i", _file(source), "-map", "0:v:0"]
    return [*command, "-r", form.rate, "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]


def _encode_command(program: str, target: Path, form: _Format, kind: str) -> list[str]:
    command = [program, "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", _PIXEL_FORMATS[kind]]
    command += ["-s", f"{form.width}x{form.height}", "-r", form.rate, "-i", "pipe:0"]
    filters = f"setsar={form.pixel_shape}"
    if kind == "cutout":
        command += _TRANSPARENT[target.suffix.lower()]
    elif target.suffix.lower() != ".gif":
        command += ["-pix_fmt", "yuv420p"]  # what players expect; it has no odd sizes
        filters += ",pad=ceil(iw/2)*2:ceil(ih/2)*2"
    return [*command, "-vf", filters, "-an", _file(target)]


def _frames(pipe: IO[bytes], form: _Format, source: Path) -> Iterator[np.ndarray]:
    shape = (form.height, form.width, 3)
    size = form.height * form.width * 3
    while data := pipe.read(size):
        if len(data) < size:
            raise VideoError(f"{source}: ends in the middle of a frame")
        yield np.frombuffer(data, np.uint8).reshape(shape)


def _reason(output: bytes) -> str:
    # The first complaint is the cause, the others follow from it; "[mov @ 0x55…]" says nobody
    # anything.
    lines = output.decode(errors="replace").strip().splitlines()
    return re.sub(r"^(\[[^]]* @ 0x[^]]*\] )+", "", lines[0])[:300] if lines else "it gave no reason"


class _Process:
    """An ffmpeg with one pipe, which is stopped when the block ends, however it ends."""

    def __init__(self, command: list[str], task: str, writes: bool = False) -> None:
        self.task = task
        # A file, not a pipe: nobody has to read along.
        self.messages = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if writes else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if writes else subprocess.PIPE,
            stderr=self.messages,
            start_new_session=True,  # Ctrl-C is for us, and we stop them
        )
        pipe = self.process.stdin if writes else self.process.stdout
        assert pipe is not None
        self.pipe = pipe

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        with contextlib.suppress(OSError):  # what was still to be written
            self.pipe.close()
        self.process.wait()
        self.messages.close()

    def write(self, data: bytes) -> None:
        try:
            self.pipe.write(data)
        except BrokenPipeError:
            self.process.wait()
            raise self._failed() from None

    def finish(self) -> None:
        """Waits for the process to end by itself. Raises VideoError when it reports a failure."""
        try:
            self.pipe.close()
        except BrokenPipeError:
            self.process.wait()
            raise self._failed() from None
        if self.process.wait() != 0:
            raise self._failed()

    def _failed(self) -> VideoError:
        self.messages.seek(0)
        return VideoError(f"ffmpeg could not {self.task}: {_reason(self.messages.read())}")
