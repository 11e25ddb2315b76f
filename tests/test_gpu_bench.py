"""The benchmark on a GPU, as far as it goes without one: its stages, its limits, its rows."""

from __future__ import annotations

import csv
import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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


def test_what_tells_most_runs_first(modules: dict[str, ModuleType]) -> None:
    stages = modules["stages"]
    timed = [name for name, *_ in stages.TIMED]
    first = ["bench-x2-L-bf16", "bench-training-24-bf16"]
    assert list(stages.STAGES) == [
        "build", "exercise", "tests", "memcheck", *first,
        "racecheck", "initcheck", "synccheck", "tests-triton",
        *(f"bench-{name}" for name in timed if f"bench-{name}" not in first),
        *(f"triton-{name}" for name in timed), *(f"autotune-{name}" for name in timed),
    ]  # fmt: skip
    assert "compute-sanitizer" not in stages.STAGES["exercise"]


def test_forms_run_in_stages_by_what_they_cost(modules: dict[str, ModuleType]) -> None:
    forms = modules["forms"].FORMS
    assert [form.name for form in forms if form.usual] == [
        "cuda", "cuda graph", "eager", "eager channels_last", "eager graph",
        "eager bf16", "eager bf16 graph", "compile bf16", "compile",
    ]  # fmt: skip
    asked = {"triton": ["triton", "triton graph"], "autotune": ["compile max-autotune"]}
    others = [form.name for form in forms if not form.usual]
    assert others == [*asked["triton"], *asked["autotune"]]
    for name, command in modules["stages"].STAGES.items():
        after = command[command.index("--variants") + 1] if "--variants" in command else ""
        variants = after.split(",") if after else []
        assert variants == asked.get(name.split("-")[0], []), name


@pytest.mark.parametrize("stage", ["tests", "tests-triton"])
def test_tests_on_a_gpu_are_those_that_use_it(modules: dict[str, ModuleType], stage: str) -> None:
    command = [*modules["stages"].STAGES[stage], "--collect-only", "-vv"]
    found = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    profile = re.search(r"hypothesis profile 'unshrunk'.*phases=\((.*?)\)", found.stdout)
    assert profile and "generate" in profile[1] and "shrink" not in profile[1]
    names = re.findall(r"<Function (.*)>", found.stdout)
    wanted = {
        "tests": ["test_goctconv_drawn[cuda]", "test_registration_on_a_gpu[0]",
                  "test_a_cuda_graph_of_the_training_step_trains", "test_nan_and_nothing[cuda]",
                  "test_streams_wait_for_each_other", "test_predict_on_a_gpu"],
        "tests-triton": ["test_decay_without_samples_is_nan[triton]",
                         "test_nan_and_nothing[triton]"],
    }  # fmt: skip
    assert set(wanted[stage]) <= set(names)
    # the rest is all of the backend's, but for the tests that have no other
    backend = {"tests": "cuda", "tests-triton": "triton"}[stage]
    others = [n for n in names if "[" in n and not re.search(rf"\[{backend}[\]-]", n)]
    assert {n.split("[")[0] for n in others} <= {
        "test_registration_on_a_gpu", "test_maps_on_a_gpu_are_the_same_with_and_without_graphs"
    }  # fmt: skip
    assert not [n for n in names if "on-host" in n or "interpreted" in n]


def test_a_stage_that_is_stopped_leaves_nothing_but_its_log(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It may say how far it came, and what it started ends with it, also where it does not."""
    stages, log = modules["stages"], tmp_path / "log"
    monkeypatch.setattr(stages, "GRACE", 1)
    stubborn = "trap 'echo told to stop' INT; sleep 100 & echo $!; while :; do wait; done"
    start = time.monotonic()
    assert stages.watch(["bash", "-c", stubborn], dict(os.environ), log, 1.0) is None
    assert 1 < time.monotonic() - start < 30
    child, words = log.read_text().splitlines()
    assert words == "told to stop"
    assert not runs(int(child))
    # one that ends by itself takes with it what it forgot
    ends = ["bash", "-c", "sleep 100 & echo $!; echo error >&2; exit 3"]
    assert stages.watch(ends, dict(os.environ), log, 60.0) == 3
    child, words = log.read_text().splitlines()
    assert words == "error" and not runs(int(child))


def runs(process: int) -> bool:
    """Whether a process is there and not just waiting to be forgotten."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def fake(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., int]:
    """make gpu with stages of bash in place of its own, on a machine that has everything."""
    stages = modules["stages"]
    scripts = {
        "build": 'echo "$SODFAST_CMAKE_ARGS"',
        "fails": f"echo row >{tmp_path}/gpu.csv; echo it failed; exit 1",
        "hangs": "echo hanging; sleep 100",
        "passes": 'echo "none: $SODFAST_CMAKE_ARGS"',
    }
    monkeypatch.setattr(stages, "STAGES", {n: ["bash", "-c", s] for n, s in scripts.items()})
    monkeypatch.setattr(stages, "DONE", tmp_path / "done")
    monkeypatch.setattr(stages, "RESULTS", tmp_path / "gpu.csv")
    monkeypatch.setattr(stages, "why_not", lambda: "")
    monkeypatch.setattr(stages.signal, "signal", lambda *_: None)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["stages.py", *arguments])
        return stages.main()

    return call


def test_logs_and_results_are_kept_whatever_becomes_of_a_stage(
    fake: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    kept = tmp_path / "kept"
    monkeypatch.setenv("SODFAST_CMAKE_ARGS", "-DSODFAST_CUDA_ARCHITECTURES=90")
    assert fake("--keep", str(kept), "--limit", "3") == 1
    logs = {path.name: path.read_text() for path in kept.iterdir()}
    assert logs == {
        "build.log": "-DSODFAST_CUDA=ON -DSODFAST_CUDA_ARCHITECTURES=90\n",
        "fails.log": "it failed\n", "hangs.log": "hanging\n", "gpu.csv": "row\n",
    }  # fmt: skip
    out = capfd.readouterr().out
    assert "it failed\n== fails: failed in" in out and "== hangs: stopped after" in out
    assert out.endswith("make gpu: failed: fails, hangs; no time for: passes\n")
    assert [path.name for path in (tmp_path / "done").iterdir()] == ["build"]


def test_the_next_call_goes_on_behind_what_passed(
    fake: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    monkeypatch.delenv("SODFAST_CMAKE_ARGS", raising=False)
    assert fake("build", "passes") == 0
    assert (tmp_path / "done" / "passes.log").read_text() == "none: \n"  # without --keep
    assert fake("--limit", "2") == 1
    out = capfd.readouterr().out
    assert "== build: done before" in out and "== hangs: stopped" in out
    assert fake("build") == 0  # asked for by name it runs again
    assert "-DSODFAST_CUDA=ON\n== build: passed" in capfd.readouterr().out


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


def test_a_row_says_by_what_it_was_measured(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, forms = modules["run"], modules["forms"].FORMS
    prepared = []

    def time_of(prepare: Callable, seconds: float) -> Any:
        prepare()
        return run.Timed([0.002], 3 * 2**20, int(prepared[-1] == "compile"))

    class Form(modules["forms"].Form):
        def prepare(self, work: Any) -> None:
            prepared.append(self.name)

    monkeypatch.setattr(run, "FORMS", [Form(**vars(form)) for form in forms])
    monkeypatch.setattr(run, "time_of", time_of)
    monkeypatch.setattr(run.torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(run._backend, "available", lambda: dict.fromkeys(run._backend.BACKENDS, ""))
    monkeypatch.setenv("SODFAST_REVISION", "abc")
    names = [form.name for form in forms]
    work = next(w for w in modules["works"].works("inference") if w.dtype == "bf16")
    monkeypatch.setattr(run, "limit_bytes", lambda work: 1000)

    def rows(work: Any, l2: int) -> dict[str, dict[str, Any]]:
        prepared.clear()
        found = list(run.rows_of(work, names, run.Machine(1e12, l2), 0.5))
        assert [row["variant"] for row in found] == prepared
        return {row["variant"]: row for row in found}

    half = rows(work, 500)
    assert prepared == names and half["cuda"]["revision"] == "abc"
    assert {name for name, row in half.items() if row["peak_mb"] == 3.0} == {
        "cuda", "eager", "eager channels_last", "eager bf16", "triton"
    }  # fmt: skip
    assert all(row["peak_mb"] in (3.0, None) for row in half.values())
    assert {name: row["note"] for name, row in half.items() if row["note"]} == {
        "compile": "1 CUDA graphs skipped"
    }
    small = rows(work, 501)
    assert small["cuda"]["note"] == "fits twice L2"
    assert small["compile"]["note"] == "fits twice L2; 1 CUDA graphs skipped"
    # Parameters to convert: in half precision, where there are some and they do not train.
    for other in (
        next(w for w in modules["works"].works("inference") if w.dtype == "fp32"),
        next(w for w in modules["works"].works("training") if w.dtype == "bf16"),
        next(
            w for w in modules["scfnet_works"].scfnet_works("op")
            if w.dtype == "bf16" and not w.training
        ),
    ):  # fmt: skip
        assert list(rows(other, 0)) == [name for name in names if "bf16" not in name]


def test_a_table_compares_what_was_measured_before_its_baseline(
    modules: dict[str, ModuleType],
) -> None:
    common = {"name": "n", "case": "c", "dtype": "bf16", "limit_ms": 1.0, "p20_ms": 1.0,
              "p80_ms": 1.0, "share_of_limit": 0.5, "note": ""}  # fmt: skip
    rows = [
        {**common, "variant": "cuda", "median_ms": 2.0, "peak_mb": 3.0},
        {**common, "variant": "eager", "median_ms": 8.0, "peak_mb": None, "ratio": 1.0},
        {**common, "variant": "compile", "reason": "it failed"},
    ]
    _, ours, eager, failed = modules["run"].table(rows).splitlines()
    assert "3.0 MB   4.00 x best" in ours and "– MB   1.00 x best" in eager
    assert failed.endswith("not measured: it failed")
    assert "– x best" in modules["run"].table(rows[:1])


def test_maps_count_what_must_move_at_least(modules: dict[str, ModuleType]) -> None:
    """Sizes in one map of the finest scale, by hand."""
    found = {
        work.label.removesuffix(f" batch {work.batch}"): work.values()
        for work in modules["scfnet_works"].scfnet_works("op")
        if work.name in ("scfm", "dkd") and work.dtype == "fp32"
    }
    x, y = 64 * 16 * 88**2, 64 * 16 * 44**2
    assert found["x + up(y) ×2 88² channels_last inference"] == 2 * x + y
    # x, y, result; its gradient, which is x's; y's
    assert found["x + up(y) ×2 88² channels_last training"] == 3 * x + 2 * y
    # x, y, result; these again with its gradient in its place; both gradients
    assert found["x + x up(y) ×2 88² training"] == 2 * (2 * x + y) + x + y
    # student, teacher, truth; the gradient written, read and written; loss, θ, α and β
    assert found["256² training"] == 6 * 32 * 256**2 + 1 + 3 * 32
