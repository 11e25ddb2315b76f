"""Damaged and hostile JPEG, PNG and WebP files through the command: a map or an error each."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from command_line import command, environment, write_weights
from picture_cases import picture, saved
from PIL import Image

# Sides that a header may claim: wrong by a little, nothing, thin, huge, and just about allowed.
SIDES = (0, 1, 2, 39, 41, 57, 255, 4096, 9000, 16383, 16384, 40_000, 65_535)


def whole_files() -> list[tuple[str, bytes]]:
    """Honest files of every kind that the three formats have, with their endings."""
    rgb = Image.fromarray(picture(40, 56))
    rgba = Image.fromarray(np.dstack([picture(40, 56), picture(40, 56, seed=1)[:, :, 0]]))
    grey, wide = rgb.convert("L"), Image.fromarray(picture()[:, :, 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    written = [
        (".jpg", rgb, {"quality": 90}),
        (".jpg", rgb, {"progressive": True, "exif": exif, "icc_profile": b"p" * 200}),
        (".jpg", grey, {"optimize": True, "restart_marker_rows": 1}),
        (".jpg", rgb.convert("CMYK"), {}),
        (".png", rgb, {}),
        (".png", rgba, {"exif": exif}),
        (".png", wide, {}),
        (".png", rgb.quantize(16), {"transparency": 1}),
        (".png", grey.convert("1"), {}),
        (".webp", rgb, {}),
        (".webp", rgba, {"lossless": True, "exif": exif}),
        (".webp", rgba, {"quality": 50}),
        (".webp", rgb, {"save_all": True, "append_images": [grey.convert("RGB")]}),
    ]
    formats = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
    return [
        (ending, saved(image, formats[ending], **options).getvalue())
        for ending, image, options in written
    ]


def mutate(data: bytes, ending: str, rng: random.Random) -> bytes:
    """One or a few changes: noise, cuts, repetitions, and headers that lie about the size."""
    changed = bytearray(data)
    changes = (noise, noise, noise, noise, early_noise, cut, remove, repeat, insert, lie, lie)
    for _ in range(rng.choice((1, 1, 1, 1, 3))):
        rng.choice(changes)(changed, rng)
    if ending == ".png" and rng.random() < 0.7:
        repair_checksums(changed)  # or nothing but the checksum would be tested
    return bytes(changed)


def noise(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        if data:
            data[rng.randrange(len(data))] = rng.choice((0, 0xFF, rng.randrange(256)))


def early_noise(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 3)):
        if data:
            data[rng.randrange(min(len(data), 200))] = rng.randrange(256)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randint(0, len(data)) :]


def remove(data: bytearray, rng: random.Random) -> None:
    start = rng.randint(0, len(data))
    del data[start : start + rng.randint(1, 40)]


def repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randint(0, len(data))
    data[start:start] = data[start : start + rng.randint(1, 400)] * rng.randint(1, 3)


def insert(data: bytearray, rng: random.Random) -> None:
    start = rng.randint(0, len(data))
    data[start:start] = rng.randbytes(rng.randint(1, 40))


def lie(data: bytearray, rng: random.Random) -> None:
    """Overwrites the width and height wherever one of the formats keeps them."""
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    for marker, offset, form in (
        (b"IHDR", 4, ">II"),
        (b"\xff\xc0", 5, ">HH"),  # JPEG: height first
        (b"\xff\xc2", 5, ">HH"),
        (b"\x9d\x01\x2a", 3, "<HH"),  # VP8
        (b"VP8L", 9, "14 bits"),
        (b"VP8X", 12, "24 bits"),
    ):
        place = data.find(marker)
        if place < 0:
            continue
        less_one = max(0, width - 1), max(0, height - 1)
        if form == "14 bits":
            packed = (less_one[0] & 0x3FFF) | (less_one[1] & 0x3FFF) << 14
            claim = packed.to_bytes(4, "little")
        elif form == "24 bits":
            claim = b"".join(side.to_bytes(3, "little") for side in less_one)
        else:
            claim = struct.pack(form, width, height)
        if place + offset + len(claim) <= len(data):
            data[place + offset : place + offset + len(claim)] = claim


def repair_checksums(data: bytearray) -> None:
    place = 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            return
        struct.pack_into(">I", data, end, zlib.crc32(data[place + 4 : end]))
        place = end + 4


def predict(folder: Path, weights: Path, out: Path) -> tuple[int, str, int]:
    """Runs the command on a folder: its exit status, what it said, its peak memory in bytes."""
    with open(out.with_suffix(".txt"), "w+") as messages:
        process = subprocess.Popen(
            command("predict", folder, "-o", out, "--weights", weights, "--threads", 2),
            stderr=messages,
            env={**environment(), "PYTHONFAULTHANDLER": "1"},
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        messages.seek(0)
        return process.returncode, messages.read(), usage.ru_maxrss * 1024


def check(files: dict[str, bytes], tmp_path: Path) -> tuple[int, int, int]:
    """Every file became a map or was named with a reason: maps, errors, peak memory in bytes.

    files: contents by name; no two with the same stem.
    """
    folder, out = tmp_path / "photos", tmp_path / "maps"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    status, said, memory = predict(folder, write_weights(tmp_path), out)
    assert status in (0, 1), said[-3000:]  # a crash would be a signal, a negative number
    assert "Traceback" not in said
    failed = {Path(name).stem for name in re.findall(r"^  .*?/([^/:]+): .", said, re.MULTILINE)}
    mapped = {path.stem for path in out.iterdir()}
    assert mapped.isdisjoint(failed)
    assert mapped | failed == {Path(name).stem for name in files}
    for path in out.iterdir():
        with Image.open(path) as image:
            assert image.mode == "L" and min(image.size) > 0
    return len(mapped), len(failed), memory


def test_mutated_files(tmp_path: Path, full: bool) -> None:
    rng = random.Random(3)
    originals = whole_files()
    files = {}
    for number in range(10_000 if full else 300):
        ending, data = originals[number % len(originals)]
        files[f"{number}{ending}"] = mutate(data, ending, rng)
    mapped, failed, memory = check(files, tmp_path)
    print(f"{mapped} maps, {failed} errors, {memory / 1e6:.0f} MB")
    # Neither everything refused nor everything harmless: then it would prove nothing.
    assert min(mapped, failed) > 0.15 * len(files)
    assert memory < 1.5e9


def png_of_zeros(width: int, height: int, colour: int, bytes_per_pixel: int) -> bytes:
    """A valid PNG, a thousand times smaller than its pixels."""
    packer = zlib.compressobj(1)
    row = bytes(1 + width * bytes_per_pixel)
    packed = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")):
        checksum = zlib.crc32(kind + content)
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    return data


def test_small_files_that_become_as_large_as_is_allowed(tmp_path: Path, full: bool) -> None:
    """89 million pixels out of some hundred bytes, several at the same time."""
    if not full:
        pytest.skip("a long test: --full runs it")
    jpeg = bytearray(saved(Image.fromarray(picture(40, 56)), "JPEG").getvalue())
    struct.pack_into(">HH", jpeg, jpeg.find(b"\xff\xc0") + 5, 9400, 9500)
    webp = saved(Image.new("RGBA", (7700, 7700), (9, 8, 7, 100)), "WEBP", lossless=True, method=0)
    files = {
        "0.jpg": bytes(jpeg),  # the decoder fills up what is not there with grey
        "1.png": png_of_zeros(9400, 9500, colour=6, bytes_per_pixel=4),
        "2.png": png_of_zeros(9400, 9500, colour=2, bytes_per_pixel=3),
        "3.webp": webp.getvalue(),
        "4.png": png_of_zeros(9500, 9500, colour=2, bytes_per_pixel=3),  # more than is allowed
    }
    mapped, failed, memory = check(files, tmp_path)
    assert (mapped, failed) == (4, 1)
    assert memory < 1.5e9
