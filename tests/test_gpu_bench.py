"""The benchmark on a GPU, as far as it goes without one: its stages, its limits, its rows."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"

pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="not a source tree: no bench/")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The benchmark's own modules, imported the way run.py imports them."""
    path, before = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCH))
    names = ("run", "stages", "forms", "works", "scfnet_works")
    yield {name: importlib.import_module(f"gpu.{name}") for name in names}
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_every_case_belongs_to_one_stage(modules: dict[str, ModuleType]) -> None:
    timed = modules["stages"].TIMED
    used = set()
    for kind in ("op", "inference", "training"):
        for work in (*modules["works"].works(kind), *modules["scfnet_works"].scfnet_works(kind)):
            text = f"{work.name}: {work.label}"
            stages = [
                name
                for name, stage_kind, words, dtype in timed
                if stage_kind == kind
                and dtype in ("", work.dtype)
                and all(word in text for word in words.split())
            ]
            assert len(stages) == 1, f"{text} {work.dtype}: {stages}"
            used.update(stages)
    assert used == {name for name, *_ in timed}


def test_stages_ask_for_known_variants(modules: dict[str, ModuleType]) -> None:
    known = {form.name: form for form in modules["forms"].FORMS}
    slow = [form for form in known.values() if form.slow]
    assert [form.compiled for form in slow] == ["max-autotune"]
    for name, command in modules["stages"].STAGES.items():
        if name.startswith("autotune-"):
            assert known[command[command.index("--variants") + 1]].slow
        else:
            assert "--variants" not in command


def test_a_fused_block_moves_its_input_and_output_alone(modules: dict[str, ModuleType]) -> None:
    blocks = [w for w in modules["works"].works("op") if w.name == "ilblock" and w.dtype == "fp32"]
    work = next(w for w in blocks if w.layer == "stages.1.1")
    block, numel = work.module(), 0
    for shape in work.shapes():
        numel += shape[0] * shape[1] * shape[2] * shape[3]
    for i, channels in enumerate(block.conv1.out_channels):
        numel += work.batch * channels * (224 >> i) ** 2
    numel += sum(p.numel() for p in block.parameters())
    assert modules["forms"].limit_bytes(work) == 4 * numel
    # Of a network that trains every layer counts.
    training = next(iter(modules["works"].works("training")))
    layers = [type(m).__name__ for m in modules["forms"]._layers(training.module())]
    assert "NormAct" in layers and "SimplifiedGOctConv" in layers and "ILBlock" not in layers


def test_rows_compare_with_those_of_other_stages(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, path = modules["run"], tmp_path / "gpu.csv"
    monkeypatch.setattr(run, "RESULTS", path)

    def row(variant: str, ms: float | None, **others: Any) -> dict[str, Any]:
        common = {"revision": "1", "device": "d", "torch": "2", "kind": "op", "name": "n",
                  "case": "c", "dtype": "bf16", "variant": variant}  # fmt: skip
        measured = {"median_ms": ms} if ms else {"reason": "it failed"}
        return common | {"baseline": not variant.startswith("cuda")} | measured | others

    def ratios() -> dict[str, tuple[str, str]]:
        with open(path, newline="", encoding="utf-8") as file:
            return {r["variant"]: (r["best_baseline"], r["ratio"]) for r in csv.DictReader(file)}

    for given in (row("eager", 8.0), row("cuda", 2.0), row("compile", None)):
        run.append(given)
    assert given.get("ratio") is None
    assert ratios() == {"eager": ("eager", "1"), "cuda": ("eager", "4"), "compile": ("", "")}
    late = row("compile max-autotune", 4.0)
    run.append(late)
    run.append(row("cuda of another case", 1.0, case="other"))
    assert late["ratio"] == 1.0
    assert ratios() == {
        "eager": ("compile max-autotune", "0.5"),
        "cuda": ("compile max-autotune", "2"),
        "compile": ("", ""),
        "compile max-autotune": ("compile max-autotune", "1"),
        "cuda of another case": ("", ""),
    }
