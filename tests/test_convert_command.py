"""``sodfast convert``: a weight file, or a sentence and nothing executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from command_line import run, write_photos

import sodfast


def test_convert_and_predict(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared / "reference" / "sod100k"
    out = tmp_path / "x1.safetensors"
    arguments = ("convert", folder / "csnet-L-x1.pth.tar", "--config", folder / "csnet-L-x1.bin")
    status, stdout, _ = run(capsys, *arguments, "-o", out)
    assert status == 0
    assert "93,647 parameters" in stdout
    assert sodfast.load(out).config["weight_gain"] == 1
    status, _, _ = run(
        capsys, "predict", write_photos(tmp_path), "-o", tmp_path / "maps", "--weights", out
    )
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
