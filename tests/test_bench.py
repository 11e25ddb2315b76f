"""The benchmark: one small case end to end, its files, and its refusals."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import sodfast
from sodfast.ops._backend import available

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
SMALLEST = ["--op", "goctconv_depthwise", "--case", "csnet-x1-L stages.4.1.conv2"]

pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="not a source tree: no bench/")


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / "run.py"), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The benchmark's own modules, imported the way run.py imports them."""
    sys.path.insert(0, str(BENCH))
    before = set(sys.modules)
    yield {name: importlib.import_module(name) for name in ("run", "cases", "cost", "networks")}
    sys.path.remove(str(BENCH))
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_one_case_end_to_end(tmp_path: Path) -> None:
    if available()["cpu"]:
        pytest.skip(available()["cpu"])
    # A table from before some columns were thought of: its row must stay.
    table = tmp_path / "cpu.csv"
    table.write_text("date,variant,forgotten\n2020-02-02,abacus,7\n")
    done = run(
        *SMALLEST, "--quick", "--rounds", "1", "--variants", "eager,eager channels_last,cpu",
        "--results", tmp_path, "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with open(table, newline="", encoding="utf-8") as file:
        old, *rows = csv.DictReader(file)
    assert (old["date"], old["variant"], old["forgotten"]) == ("2020-02-02", "abacus", "7")
    assert old["median_ms"] == ""
    assert [row["variant"] for row in rows] == ["eager", "eager channels_last", "cpu"]
    assert [row["baseline"] for row in rows] == ["1", "1", "0"]

    best = min(float(row["median_ms"]) for row in rows[:2])
    for row in rows:
        assert row["variant"] in done.stdout and row["reason"] == ""
        for column in "date revision machine os python torch compiler isa malloc".split():
            assert row[column], column
        assert (row["threads"], row["dtype"], row["rounds"]) == ("1", "float32", "1")
        assert row["shape"] == "1×25×28² + 1×24×14²"
        assert int(row["macs"]) == 9 * (25 * 28**2 + 24 * 14**2)
        # in and out, and per channel 9 weights, a bias and a slope; 4 bytes each
        assert int(row["bytes"]) == 4 * (2 * (25 * 28**2 + 24 * 14**2) + 9 * 49)
        values = {
            key: float(row[key])
            for key in """median_ms p20_ms p80_ms samples gmac_per_s sgemm_gmac_per_s
                share_of_sgemm conv_gmac_per_s share_of_conv gb_per_s copy_gb_per_s
                share_of_copy ratio""".split()
        }
        assert values["samples"] >= 3
        assert 0 < values["p20_ms"] <= values["median_ms"] <= values["p80_ms"]
        seconds = 1e-3 * values["median_ms"]
        gmacs, gigabytes = (1e-9 * int(row[work]) / seconds for work in ("macs", "bytes"))
        assert values["gmac_per_s"] == pytest.approx(gmacs, rel=1e-3)
        assert values["gb_per_s"] == pytest.approx(gigabytes, rel=1e-3)
        for share, limit, rate in (
            ("share_of_sgemm", "sgemm_gmac_per_s", gmacs),
            ("share_of_conv", "conv_gmac_per_s", gmacs),
            ("share_of_copy", "copy_gb_per_s", gigabytes),
        ):
            assert values[share] == pytest.approx(rate / values[limit], rel=1e-3)
        assert values["ratio"] == pytest.approx(best / values["median_ms"], rel=1e-3)
    assert {row["best_baseline"] for row in rows} == {
        min(rows[:2], key=lambda row: float(row["median_ms"]))["variant"]
    }

    report = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert set(report["limits"]) == {"sgemm", "conv", "L2", "L3", "memory"}
    assert [row["variant"] for row in report["rows"]] == [row["variant"] for row in rows]
    for full, short in zip(report["rows"], rows):
        assert full["median_ms"] == pytest.approx(float(short["median_ms"]), rel=1e-3)


def test_samples_of_all_rounds_count(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rounds are interleaved, a variant that fails is not tried again, samples are pooled."""
    bench = modules["run"]
    arguments = ["run.py", *SMALLEST, "--rounds", "3", "--variants", "eager,compile,cpu"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--results", str(tmp_path)])
    seconds = {"eager": iter([[4.0, 4.0], [6.0, 8.0], [8.0]]), "cpu": iter([[3.0], [2.0], [1.0]])}
    turns = []

    def start(_options: object, _tree: Path, case: object = None, variant: object = None) -> dict:
        if case is None:
            return {"limits": dict.fromkeys(["sgemm", "conv", "L2", "L3", "memory"], 1.0)}
        name = variant.name  # type: ignore[attr-defined]
        turns.append(name)
        if name == "compile":
            return {"reason": "it would not"}
        return {"samples": next(seconds[name]), "peak_bytes": len(turns) * 10**6}

    monkeypatch.setattr(bench, "start", start)
    assert bench.main() == 0
    assert turns == ["eager", "compile", "cpu", "eager", "cpu", "eager", "cpu"]
    with open(tmp_path / "cpu.csv", newline="", encoding="utf-8") as file:
        eager, compiled, ours = csv.DictReader(file)
    # median, its quantiles, the number of samples, the ratio, the peak, the rounds
    columns = ("median_ms", "p20_ms", "p80_ms", "samples", "ratio", "peak_mb", "rounds")
    assert [float(eager[c]) for c in columns] == [6000, 4000, 8000, 5, 1, 6, 3]
    assert [float(ours[c]) for c in columns] == [2000, 1400, 2600, 3, 3, 7, 3]
    assert (compiled["reason"], compiled["ratio"]) == ("it would not", "")
    assert ours["best_baseline"] == "eager"


def test_baseline_that_cannot_run_is_a_row_with_a_reason(tmp_path: Path) -> None:
    done = run(
        *SMALLEST, "--quick", "--rounds", "1", "--variants", "compile,eager",
        "--results", tmp_path, CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "c"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path / "cpu.csv", newline="", encoding="utf-8") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert "no-such-compiler" in rows["compile"]["reason"]
    assert rows["compile"]["median_ms"] == rows["compile"]["ratio"] == ""
    assert rows["compile"]["reason"] in done.stdout
    assert float(rows["eager"]["ratio"]) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--op", "gconv"], "unknown op 'gconv'; known are boundary, "),
        (["--model", "csnet2"], "unknown model 'csnet2'; known are csnet, csnet-train"),
        (
            ["--variants", "jit"],
            "unknown variant 'jit'; known are Adam alone, hooks and loss term, eager, ",
        ),
        (["--case", "stages.9"], "no case has 'stages.9' in its name; known are\nboundary: "),
        (["--backend", "triton"], f"--backend triton: {available()['triton']}"),
        (["--base", "no-such-revision"], "--base no-such-revision: git knows no such revision"),
    ],
)
def test_refusals(
    modules: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    if "--backend" in arguments and not available()[arguments[1]]:
        pytest.skip(f"{arguments[1]} can run here")
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit) as refused:
        modules["run"].main()
    assert message in str(refused.value)


def test_networks_are_the_published_ones(modules: dict[str, ModuleType]) -> None:
    networks = modules["networks"]
    parameters = {
        name: sum(p.numel() for p in networks.build_network(name).parameters())
        for name in networks.NETWORKS
    }
    assert parameters == {
        "csnet-x1": 210_985,
        "csnet-x2": 788_631,
        "csnet-x1-L": 93_647,
        "csnet-x2-L": 140_894,
    }


def test_macs_are_those_of_count(modules: dict[str, ModuleType]) -> None:
    find_case, cost_of = modules["cases"].find_case, modules["cost"].cost_of
    model = modules["networks"].build_network("csnet-x2-L")
    inference = cost_of(find_case("csnet: csnet-x2-L, inference"))
    assert inference.macs == sodfast.count(model)["conv_macs"]

    # Both gradients of a convolution cost as much as itself; the image needs none.
    training = cost_of(find_case("csnet-train: csnet-x1, training"))
    first = 8 * 9 * 3 * (10 * 224**2 + 10 * 112**2)
    per_image = sodfast.count(modules["networks"].build_network("csnet-x1"))["conv_macs"]
    assert training.macs == 3 * 8 * per_image - first
