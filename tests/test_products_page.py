"""docs/cut_out_products.md: its commands and its Python do what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from command_line import files_below, run
from PIL import Image

import sodfast
from sodfast.pictures import read_image
from sodfast.refine import refine

PAGE = Path(__file__).parents[1] / "docs" / "cut_out_products.md"


def blocks(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the page takes as given: something red on green paper, twice."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "products"
    (folder / "shoes").mkdir(parents=True)
    for name, left in (("bag.jpg", 60), ("shoes/red.jpg", 40)):
        photo = np.full((120, 160, 3), (70, 110, 60), np.uint8)
        photo[40:80, left : left + 50] = (220, 60, 40)
        Image.fromarray(photo).save(folder / name)
    return folder


@pytest.mark.usefixtures("products")
def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 3
    for line in commands:
        program, *arguments = shlex.split(line)
        assert program == "sodfast"
        status, _, err = run(capsys, *arguments)
        assert status == 0, err
        assert ("2 already done" in err) == ("--skip-existing" in arguments)
    for folder in ("cutouts", "overlays"):
        assert files_below(tmp_path / folder) == ["bag.png", "shoes/red.png"]
    with Image.open(tmp_path / "cutouts" / "bag.png") as image:
        assert image.mode == "RGBA" and image.size == (160, 120)


def test_the_python(products: Path, tmp_path: Path) -> None:
    names: dict[str, object] = {"__name__": PAGE.stem}
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec"), names)
    assert files_below(tmp_path / "sharp") == ["bag.png", "shoes/red.png"]
    photo = read_image(products / "bag.jpg")
    opacity = refine(photo, sodfast.Predictor()(photo))
    with Image.open(tmp_path / "sharp" / "bag.png") as image:
        alpha = np.asarray(image)[:, :, 3]
    assert (alpha[opacity <= 90] == 0).all()
    assert (alpha[opacity >= 165] == 255).all()
    for name in files_below(tmp_path / "white"):
        with Image.open(tmp_path / "white" / name) as image:
            assert image.size == (1000, 1000)
            edge = np.asarray(image)[:60]
        assert edge.min() > 245
    assert files_below(tmp_path / "white"), "nothing stood out in any picture"
