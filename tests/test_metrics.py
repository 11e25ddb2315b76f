"""The figures against other people's programs (golden values) and against their formulas.

The golden values come from tests/golden/make_pysodmetrics.py, run in another environment.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import metric_cases
from hypothesis import given
from hypothesis import strategies as st

from sodfast.metrics import (
    CONVENTIONS,
    FIGURES,
    Counted,
    KDSCFNetToolbox,
    PySODMetrics,
    SalMetric,
    Scores,
    e_measure,
    nearest_foreground,
    s_measure,
    score,
    weighted_f_measure,
)

CASES = {name: (prediction, truth) for name, prediction, truth in metric_cases.cases()}
PYSODMETRICS = "mae max_f mean_f adaptive_f weighted_f s max_e mean_e adaptive_e".split()


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    path = Path(__file__).parent / "golden" / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------- golden values


def test_the_golden_inputs_are_the_same_to_the_bit(golden: dict[str, Any]) -> None:
    assert metric_cases.digest() == golden["inputs_sha256"]
    assert golden["pysodmetrics_images"].keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_equals_pysodmetrics_image_by_image(golden: dict[str, Any], name: str) -> None:
    metric = PySODMetrics()
    metric.add(*CASES[name])
    result, wanted = metric.result(), golden["pysodmetrics_images"][name]
    for figure in PYSODMETRICS:
        assert getattr(result, figure) == pytest.approx(wanted[figure], abs=1e-9), figure
    for curve in ("f_measure", "e_measure"):
        got = getattr(result, curve)[golden["thresholds"]]
        np.testing.assert_allclose(got, wanted[curve], rtol=0, atol=1e-9, err_msg=curve)


def test_equals_the_programs_over_a_set(golden: dict[str, Any]) -> None:
    scores = Scores()
    for prediction, truth in CASES.values():
        scores.add(score(prediction, truth))
    figures = scores.figures()
    for figure in PYSODMETRICS:
        wanted = golden["pysodmetrics"][figure]
        assert figures["pysodmetrics"][figure] == pytest.approx(wanted, abs=1e-9), figure
    for figure in ("mae", "max_f", "mean_f"):
        wanted = golden["salmetric_formula"][figure]
        assert figures["salmetric"][figure] == pytest.approx(wanted, abs=1e-9), figure
        # The program itself computes in float32 and prints six digits.
        wanted = golden["salmetric_program"][figure]
        assert figures["salmetric"][figure] == pytest.approx(wanted, abs=3e-6), figure
    for convention, entry in (("pysodmetrics", "pysodmetrics"), ("salmetric", "salmetric_formula")):
        result = getattr(scores, convention).result()
        for curve in ("precision", "recall", "f_measure"):
            got = getattr(result, curve)[golden["thresholds"]]
            np.testing.assert_allclose(got, golden[entry][curve], rtol=0, atol=1e-9)
    result = scores.salmetric.result()
    assert result.threshold == golden["salmetric_formula"]["threshold"]
    for curve in ("precision", "recall"):
        wanted = golden["salmetric_program"][f"{curve}_at_max_f"]
        assert getattr(result, curve)[result.threshold] == pytest.approx(wanted, abs=3e-6)


def test_equals_the_kd_scfnet_toolbox(golden: dict[str, Any]) -> None:
    wanted = golden["kd_scfnet_toolbox"]
    metric = KDSCFNetToolbox()
    for name in wanted["images"]:
        metric.add(*CASES[name])
    result = metric.result()
    assert result.images == result.images_with_truth == len(wanted["images"]) > 30
    for figure in ("mae", "max_f", "adaptive_e"):  # the toolbox counts in float32
        assert getattr(result, figure) == pytest.approx(wanted[figure], abs=1e-6), figure
    for curve in ("precision", "recall", "f_measure"):
        got = getattr(result, curve)[golden["thresholds"][:-1]]
        np.testing.assert_allclose(got, wanted[curve], rtol=0, atol=1e-6, err_msg=curve)


def test_the_toolbox_at_every_threshold() -> None:
    rng = np.random.default_rng(9)
    for low, high in ((0, 254), (3, 54), (10, 95), (200, 203), (0, 255), (7, 8)):
        prediction = rng.integers(low, high + 1, (16, 16), dtype=np.uint8)
        prediction[0, :2] = low, high
        truth = rng.random((16, 16)) < 0.4
        metric = KDSCFNetToolbox()
        metric.add(prediction, truth)
        steps = prediction.astype(int) - low
        for t, recall in enumerate(metric.result().recall):
            marked = steps * 255 >= t * (high - low)  # step / range ≥ t / 255, in whole numbers
            assert recall == (marked & truth).sum() / truth.sum(), (low, high, t)


def test_the_golden_script_knows_nothing_of_sodfast() -> None:
    for name in ("make_pysodmetrics.py", "metric_cases.py"):
        text = (Path(__file__).parent / "golden" / name).read_text(encoding="utf-8")
        imports = [
            line for line in text.splitlines() if line.lstrip().startswith(("import", "from"))
        ]
        assert imports and not any("sodfast" in line for line in imports)


# -------------------------------------------------------------- SalMetric, by its formula


def written_out(
    pairs: list[tuple[np.ndarray, np.ndarray]], beta_squared: float = 0.3
) -> tuple[float, float]:
    """Max-F and MAE with one comparison per threshold and no histogram."""
    precisions, recalls, errors = [], [], []
    for prediction, truth in pairs:
        inside = truth > 128
        precision, recall = [], []
        for threshold in range(256):
            marked = prediction > threshold
            hits = np.logical_and(marked, inside).sum()
            precision.append((hits + 1e-4) / (marked.sum() + 1e-4))
            recall.append((hits + 1e-4) / (inside.sum() + 1e-4))
        precisions.append(precision)
        recalls.append(recall)
        errors.append(np.abs(prediction.astype(float) - truth).mean() / 255)
    p, r = np.mean(precisions, axis=0), np.mean(recalls, axis=0)
    f = (1 + beta_squared) * p * r / (beta_squared * p + r)
    return float(f.max()), float(np.mean(errors))


def random_pairs(seed: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        shape = tuple(rng.integers(1, 40, size=2))
        truth = (rng.random(shape) < rng.random()) * rng.choice([129, 200, 255])
        noise = rng.normal(0, rng.choice([5, 60, 200]), shape)
        prediction = np.clip(truth * rng.random() + noise, 0, 255).astype(np.uint8)
        pairs.append((prediction, truth.astype(np.uint8)))
    return pairs


@pytest.mark.parametrize("seed", range(10))
def test_equals_the_formula_threshold_by_threshold(seed: int) -> None:
    pairs = random_pairs(seed, count=12)
    metric = SalMetric()
    for prediction, truth in pairs:
        metric.add(prediction, truth)
    result = metric.result()
    max_f, mae = written_out(pairs)
    assert result.max_f == pytest.approx(max_f, abs=1e-12)
    assert result.mae == pytest.approx(mae, abs=1e-12)
    assert result.images == 12
    assert result.f_measure[result.threshold] == result.max_f == result.f_measure.max()


def test_worked_by_hand() -> None:
    # Four pixels; the truth is the left two. Over 100 three are marked, two of them right:
    # P = 2/3, R = 1, F = 1.3 * 2/3 / (0.3 * 2/3 + 1). Over 200 one, right: P = 1, R = 1/2.
    prediction = np.array([[220, 150, 150, 10]], dtype=np.uint8)
    truth = np.array([[255, 255, 0, 0]], dtype=np.uint8)
    metric = SalMetric()
    metric.add(prediction, truth)
    result = metric.result()
    assert result.precision[100] == pytest.approx(2 / 3, abs=1e-4)
    assert result.recall[100] == pytest.approx(1, abs=1e-4)
    assert result.f_measure[100] == pytest.approx(1.3 * (2 / 3) / 1.2, abs=1e-4)
    assert result.precision[200] == pytest.approx(1, abs=1e-4)
    assert result.recall[200] == pytest.approx(1 / 2, abs=1e-4)
    assert result.mae == pytest.approx((35 + 105 + 150 + 10) / 255 / 4, abs=1e-12)


def test_threshold_is_strict_and_truth_is_over_128() -> None:
    metric = SalMetric()
    metric.add(np.array([[7, 7]], dtype=np.uint8), np.array([[128, 129]], dtype=np.uint8))
    result = metric.result()
    assert result.precision[6] == pytest.approx(1 / 2, abs=1e-3)  # both marked, one is truth
    assert result.recall[7] == pytest.approx(0, abs=1e-3)  # nothing is over 7


def test_precision_and_recall_are_averaged_before_f() -> None:
    full = np.full((4, 4), 255, np.uint8)
    half = np.zeros((4, 4), np.uint8)
    half[:2] = 255
    pairs = [(full, half), (half, full)]
    separate = []
    metric = SalMetric()
    for prediction, truth in pairs:
        metric.add(prediction, truth)
        alone = SalMetric()
        alone.add(prediction, truth)
        separate.append(alone.result().max_f)
    joint = metric.result().max_f
    assert joint == pytest.approx(1.3 * 0.75 * 0.75 / (1.3 * 0.75), abs=1e-4)
    assert abs(joint - np.mean(separate)) > 0.01


@pytest.mark.parametrize("truth_value", [0, 255])
@pytest.mark.parametrize("map_value", [0, 255])
def test_empty_and_full(truth_value: int, map_value: int) -> None:
    pair = (np.full((5, 7), map_value, np.uint8), np.full((5, 7), truth_value, np.uint8))
    metric = SalMetric()
    metric.add(*pair)
    result = metric.result()
    assert (result.max_f, result.mae) == pytest.approx(written_out([pair]), abs=1e-12)
    assert result.mae == float(truth_value != map_value)


def test_bool_truth_equals_its_8_bit_form() -> None:
    [(prediction, truth)] = random_pairs(3, count=1)
    one, other = SalMetric(), SalMetric()
    one.add(prediction, (truth > 128).astype(np.uint8) * 255)
    other.add(prediction, truth > 128)
    assert one.result().max_f == other.result().max_f
    assert one.result().mae == other.result().mae


def test_errors_name_the_argument() -> None:
    metric = SalMetric()
    good = np.zeros((2, 3), np.uint8)
    with pytest.raises(ValueError, match="no image"):
        metric.result()
    with pytest.raises(TypeError, match="prediction must be uint8, got float32"):
        metric.add(good.astype(np.float32), good)
    with pytest.raises(TypeError, match="truth must be uint8 or bool, got int64"):
        metric.add(good, good.astype(np.int64))
    with pytest.raises(ValueError, match=r"truth has shape \(3, 2\), but prediction has \(2, 3\)"):
        metric.add(good, good.T)
    with pytest.raises(ValueError, match=r"\(H, W\), got shape \(2, 3, 1\)"):
        metric.add(good[:, :, None], good[:, :, None])
    with pytest.raises(ValueError, match="no pixel"):
        metric.add(good[:0], good[:0])
    with pytest.raises(ValueError, match="beta_squared must be positive, got 0"):
        SalMetric(beta_squared=0)
    with pytest.raises(ValueError, match="no image"):  # a refused image leaves no trace
        metric.result()
    with pytest.raises(ValueError, match="beta_squared must be positive, got -1"):
        KDSCFNetToolbox(beta_squared=-1)
    for other in (PySODMetrics(), KDSCFNetToolbox(), Scores().salmetric):
        with pytest.raises(ValueError, match="no image"):
            other.result()
    for measure in (PySODMetrics().add, KDSCFNetToolbox().add, score):
        with pytest.raises(TypeError, match="prediction must be uint8, got float32"):
            measure(good.astype(np.float32), good)
        with pytest.raises(ValueError, match=r"truth has shape \(3, 2\)"):
            measure(good, good.T)


# ------------------------------------------------------------- what the others leave open


def test_empty_and_full_truths_in_every_convention() -> None:
    rng = np.random.default_rng(5)
    prediction = rng.integers(0, 256, (20, 30), dtype=np.uint8)
    prediction[0, :2] = 0, 255
    mean = prediction.mean() / 255
    empty, full = np.zeros((20, 30), np.uint8), np.full((20, 30), 255, np.uint8)

    scored = score(prediction, empty)
    ours = scored.pysodmetrics
    assert (ours.max_f, ours.adaptive_f, ours.weighted_f) == (0, 0, 0)
    assert ours.s == pytest.approx(1 - mean) and ours.mae == pytest.approx(mean)
    assert ours.max_e == pytest.approx((600 - (prediction == 255).sum()) / 599)
    assert scored.kd_scfnet_toolbox.recall is None
    assert scored.positives == 0

    scored = score(prediction, full)
    assert scored.pysodmetrics.s == pytest.approx(mean)
    assert scored.pysodmetrics.max_f == 1
    assert scored.kd_scfnet_toolbox.mae == pytest.approx(1 - mean)

    metric = KDSCFNetToolbox()
    metric.add(prediction, empty)
    assert np.isnan(metric.result().max_f) and metric.result().mae == pytest.approx(mean)
    metric.add(prediction, full)
    result = metric.result()
    assert (result.images, result.images_with_truth) == (2, 1)
    assert result.max_f == 1  # the image that has no recall takes nothing away


def test_structure_where_pysodmetrics_is_undefined() -> None:
    truth = np.zeros((12, 15), np.uint8)
    truth[:, -1] = 255  # the centroid lies in the last column: two parts have no pixel
    prediction = np.random.default_rng(0).integers(0, 256, truth.shape, dtype=np.uint8)
    assert 0 <= s_measure(Counted(prediction, truth)) <= 1
    assert s_measure(Counted(truth, truth)) == pytest.approx(1)
    # A constant map, and a part without foreground: both constant there, whatever the value.
    truth = np.zeros((40, 40), np.uint8)
    truth[0, 0], truth[-1, -1] = 255, 255
    values = [s_measure(Counted(np.full_like(truth, v), truth)) for v in range(1, 256)]
    assert np.abs(np.diff(values)).max() < 0.02


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2)])
def test_the_smallest_images(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        truth = rng.integers(0, 2, shape).astype(np.uint8) * 255
        figures = Scores()
        figures.add(score(rng.integers(0, 256, shape, dtype=np.uint8), truth))
        for name, values in figures.figures().items():
            for figure, value in values.items():
                undefined = name == "kd_scfnet_toolbox" and figure == "max_f" and not truth.any()
                assert np.isnan(value) == undefined, (name, figure)
                # E divides by one pixel less than there are.
                assert undefined or 0 <= value <= truth.size / max(truth.size - 1, 1) + 1e-12


def test_perfect_and_inverted_maps() -> None:
    truth = CASES["perfect"][1]
    for figure, value in (("mae", 0), ("max_f", 1), ("weighted_f", 1), ("s", 1), ("adaptive_f", 1)):
        assert getattr(score(truth, truth).pysodmetrics, figure) == pytest.approx(value, abs=1e-6)
    assert score(255 - truth, truth).pysodmetrics.mae == 1
    assert score(255 - truth, truth).salmetric.mae == 1


def test_every_figure_has_a_name_and_no_other() -> None:
    scores = Scores()
    scores.add(score(*CASES["soft 3"]))
    figures = scores.figures()
    assert figures.keys() == CONVENTIONS.keys()
    assert list(figures["pysodmetrics"]) == list(FIGURES)
    assert list(figures["salmetric"]) == ["mae", "max_f", "mean_f"]
    assert list(figures["kd_scfnet_toolbox"]) == ["mae", "max_f", "adaptive_e"]


def test_layout_in_memory_does_not_matter() -> None:
    prediction, truth = CASES["large"]
    wanted = score(prediction, truth)
    spread = np.zeros((prediction.shape[0] * 2, prediction.shape[1] * 3), np.uint8)
    spread[::2, ::3] = prediction
    for other in (np.asfortranarray(prediction), spread[::2, ::3]):
        got = score(other, np.asfortranarray(truth))
        assert got.salmetric.mae == wanted.salmetric.mae
        for figure in PYSODMETRICS:
            value = getattr(got.pysodmetrics, figure)
            assert value == pytest.approx(getattr(wanted.pysodmetrics, figure), abs=1e-12)


def test_scoring_in_threads() -> None:
    names = [name for name in CASES if name.startswith("soft")]
    wanted = {name: score(*CASES[name]).pysodmetrics.weighted_f for name in names}
    got: dict[str, float] = {}

    def work(name: str) -> None:
        got[name] = score(*CASES[name]).pysodmetrics.weighted_f

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == wanted


# ------------------------------------------------------------ the measures, by definition


@st.composite
def masks(draw: Callable[..., Any]) -> np.ndarray:
    """(H, W) bool with at least one True, from nearly empty to nearly full."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inside = rng.random((height, width)) < draw(st.sampled_from([0.002, 0.02, 0.2, 0.9]))
    if not inside.any():
        inside[rng.integers(height), rng.integers(width)] = True
    return inside


@given(masks())
def test_nearest_foreground_against_all_pairs(inside: np.ndarray) -> None:
    rows, columns, squared = nearest_foreground(inside)
    # Sorted by column, then row: argmin takes the first of equals.
    x, y = np.nonzero(inside.T)
    grid = np.indices(inside.shape)
    distances = (grid[0][..., None] - y) ** 2 + (grid[1][..., None] - x) ** 2
    first = distances.argmin(axis=-1)
    assert np.array_equal(squared, distances.min(axis=-1))
    assert np.array_equal(columns, x[first])
    assert np.array_equal(rows, y[first])


def test_nearest_foreground_of_large_images_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from sodfast.metrics import weighted

    inside = np.random.default_rng(2).random((90, 70)) < 0.003
    whole = nearest_foreground(inside)
    monkeypatch.setattr(weighted, "_BAND", 64)  # less than a row
    for one, other in zip(whole, nearest_foreground(inside)):
        assert np.array_equal(one, other)
    long = np.zeros((2, 30_000), bool)
    long[1, 29_999] = True
    assert nearest_foreground(long)[2][0, 0] == 29_999**2 + 1
    with pytest.raises(ValueError, match="at least one foreground pixel"):
        nearest_foreground(np.zeros((3, 3), bool))


@given(masks(), st.integers(0, 2**32 - 1))
def test_weighted_f_by_its_definition(inside: np.ndarray, seed: int) -> None:
    prediction = np.random.default_rng(seed).integers(0, 256, inside.shape, dtype=np.uint8)
    image = Counted(prediction, inside)
    m = prediction / 255.0
    if m.max() > m.min():
        m = (m - m.min()) / (m.max() - m.min())
    rows, columns, squared = nearest_foreground(inside)
    error = np.abs(m - inside)
    offsets = np.arange(-3, 4)
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets**2) / 50)
    padded = np.pad(error[rows, columns], 3)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7))
    smooth = (windows * (kernel / kernel.sum())).sum(axis=(2, 3))
    weighted = np.where(
        inside, np.minimum(error, smooth), error * (2 - 0.5 ** (np.sqrt(squared) / 5))
    )
    hits = inside.sum() - weighted[inside].sum()
    recall = 1 - weighted[inside].mean()
    precision = hits / (hits + weighted[~inside].sum() + 1e-300)
    wanted = 2 * recall * precision / (recall + precision + 1e-300)
    assert weighted_f_measure(image) == pytest.approx(wanted, abs=1e-9)


@given(masks(), st.integers(0, 2**32 - 1))
def test_e_by_its_definition(inside: np.ndarray, seed: int) -> None:
    marked = np.random.default_rng(seed).random(inside.shape) < 0.4
    b, g = marked - marked.mean(), inside - inside.mean()
    with np.errstate(invalid="ignore"):
        alignment = np.where(b**2 + g**2 > 0, 2 * b * g / (b**2 + g**2), 0)
    if inside.all():
        total = marked.sum()
    else:
        total = ((1 + alignment) ** 2 / 4).sum()
    counts = np.array([(marked & inside).sum()]), np.array([marked.sum()])
    got = e_measure(*counts, int(inside.sum()), inside.size)
    assert got[0] == pytest.approx(total / max(inside.size - 1, 1), abs=1e-9)
