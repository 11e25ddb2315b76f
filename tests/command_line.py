"""Runs the command line for its tests: inside this process, or in one of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sodfast
from sodfast.cli import main

ROOT = Path(__file__).parents[1]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = sodfast.create_model("csnet", width=0.5)
    model.preprocessing = {**model.preprocessing, "size": [64, 64]}
    return model


def write_weights(folder: Path) -> Path:
    """A file with a small network for pictures of 64 x 64."""
    path = folder / "weights.safetensors"
    sodfast.save(small_model(), path)
    return path


def write_photos(folder: Path) -> Path:
    """The folder photos with a.png and sub/b.jpg, 50 x 30 each."""
    folder = folder / "photos"
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


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sodfast", *map(str, arguments)]


def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }
