"""The pages of docs/ say what is true: their code runs and their pictures exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(page: Path) -> list[str]:
    """The python blocks of a page, each with its line numbers kept for tracebacks."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * text.count("\n", 0, m.start(1)) + m.group(1) for m in CODE.finditer(text)]


def run(page: Path) -> dict[str, object]:
    """Run a page's blocks as one program."""
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)
    return names


def test_resnet_stage_runs(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    page = ROOT / "docs" / "resnet_stage.md"
    assert len(blocks(page)) >= 5, "the page lost its code"
    run(page)
    printed = capsys.readouterr().out
    assert "(96, 32): 67%" in printed
    # what the text says of the two counts: the last shortcut is all that comes on top
    counts = re.search(r"before ([\d,]+) parameters, after ([\d,]+)", printed)
    assert counts is not None
    before, after = (int(n.replace(",", "")) for n in counts.groups())
    assert after - before == 128 * 128


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [t for t in targets if not re.match(r"[a-z]+:", t)]
    missing = [t for t in local if not (page.parent / t).exists()]
    assert not missing, f"{page.name} links to files that are not there: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_figure_was_left_open(page: Path) -> None:
    assert not re.findall(r"@[A-Z0-9]+@", page.read_text(encoding="utf-8"))


def test_distill_page_runs() -> None:
    names = run(ROOT / "docs" / "distill.md")
    assert names["epoch"] == names["epochs"] - 1 == 2  # type: ignore[operator]
    assert names["structure_polishing"].k == 5  # type: ignore[attr-defined]


def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from PIL import Image

    # the file that the README takes as given
    Image.fromarray(np.zeros((48, 64, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = run(ROOT / "README.md")
    saliency, logits = names["saliency"], names["logits"]
    assert isinstance(saliency, np.ndarray) and saliency.shape == (48, 64)
    assert isinstance(logits, torch.Tensor) and logits.shape == (1, 1, 224, 224)
    high, low, y = names["high"], names["low"], names["y"]
    shapes = [tuple(t.shape) for t in (high, low, y) if isinstance(t, torch.Tensor)]
    assert shapes == [(1, 24, 64, 64), (1, 16, 32, 32), (1, 128, 28, 28)]
