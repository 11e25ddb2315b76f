"""Makes tests/golden/metrics.json: metric values from other people's programs.

Run it in an environment of its own, without sodfast:

    python3 -m venv ENV && ENV/bin/pip install pysodmetrics==1.6.2
    ENV/bin/python tests/golden/make_pysodmetrics.py \
        [--salmetric PROGRAM] [--toolbox saliency_toolbox.py]

The sources of the values:

pysodmetrics       PySODMetrics by lartpang (MIT), as pip installs it; the versions are written
                   into the file.
salmetric_formula  what SalMetric by Qibin Hou (sal_metric.cpp) computes, written out below
                   threshold by threshold in float64.
salmetric_program  that program itself, --salmetric; it computes in float32 and prints six
                   digits. (The committed values: built with g++ against a stand-in for the
                   four things that it uses of OpenCV; the images are handed over as PGM.)
kd_scfnet_toolbox  saliency_toolbox.py by Mehrdad Noori, commit 922e8096, which the KD-SCFNet
                   paper's repository uses, --toolbox. It cannot score an empty truth, it takes
                   a full one for empty, and where a stretched level falls on a threshold
                   (always at the last, elsewhere when the map's range shares a divisor with
                   255) its rounding errors decide; it gets the other images and thresholds.

Nothing of sodfast is imported. A value that a rerun does not give stays as it was only if
its program was not named.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import platform
import re
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from metric_cases import cases, digest

OUT = Path(__file__).with_name("metrics.json")
THRESHOLDS = list(range(0, 256, 17))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--salmetric", metavar="PROGRAM")
    parser.add_argument("--toolbox", metavar="FILE")
    arguments = parser.parse_args()
    assert importlib.util.find_spec("sodfast") is None, "use an environment without sodfast"

    golden: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    golden["inputs_sha256"] = digest()
    golden["versions"] = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name)
        for name in ("pysodmetrics", "numpy", "scipy", "opencv-python-headless")
    }
    golden["thresholds"] = THRESHOLDS
    golden["pysodmetrics_images"] = {
        name: {
            key: value
            for key, value in pysodmetrics([(prediction, truth)]).items()
            if key not in ("precision", "recall")
        }
        for name, prediction, truth in cases()
    }
    everything = [(prediction, truth) for _, prediction, truth in cases()]
    golden["pysodmetrics"] = pysodmetrics(everything)
    golden["salmetric_formula"] = salmetric_formula(everything)
    if arguments.salmetric:
        golden["salmetric_program"] = salmetric_program(arguments.salmetric, everything)
    if arguments.toolbox:
        golden["kd_scfnet_toolbox"] = kd_scfnet_toolbox(arguments.toolbox)
    text = json.dumps(rounded(golden), indent=1)
    # lists of numbers on one line
    text = re.sub(r"\[[^]\"]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    OUT.write_text(text + "\n")
    print(f"{OUT}: {len(everything)} images")


def rounded(value: Any) -> Any:
    """Floats to 10 digits; NaN and infinities are refused."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, np.ndarray)):
        return [rounded(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        assert np.isfinite(value)
        return round(float(value), 10)
    return value


def pysodmetrics(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    import py_sod_metrics as sod

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Fmeasure says that FmeasureV2 is its successor
        f = sod.Fmeasure()
    mae, s, e, weighted = sod.MAE(), sod.Smeasure(), sod.Emeasure(), sod.WeightedFmeasure()
    handler = sod.FmeasureHandler(with_dynamic=True, with_adaptive=True, beta=0.3)
    f2 = sod.FmeasureV2(metric_handlers={"f": handler})
    for prediction, truth in pairs:
        for metric in (mae, s, e, weighted, f, f2):
            metric.step(prediction, truth)
    f_results, e_results = f.get_results(), e.get_results()["em"]
    again = f2.get_results()["f"]
    assert abs(again["adaptive"] - f_results["fm"]["adp"]) < 1e-12
    assert np.abs(again["dynamic"] - f_results["fm"]["curve"]).max() < 1e-12
    # Their curves run from threshold 255 down to 0.
    f_curve, e_curve = f_results["fm"]["curve"][::-1], e_results["curve"][::-1]
    return {
        "mae": mae.get_results()["mae"],
        "max_f": f_curve.max(),
        "mean_f": f_curve.mean(),
        "adaptive_f": f_results["fm"]["adp"],
        "weighted_f": weighted.get_results()["wfm"],
        "s": s.get_results()["sm"],
        "max_e": e_curve.max(),
        "mean_e": e_curve.mean(),
        "adaptive_e": e_results["adp"],
        "f_measure": f_curve[THRESHOLDS],
        "e_measure": e_curve[THRESHOLDS],
        "precision": f_results["pr"]["p"][::-1][THRESHOLDS],
        "recall": f_results["pr"]["r"][::-1][THRESHOLDS],
    }


def salmetric_formula(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    epsilon, beta_squared = 1e-4, 0.3
    precision, recall, mae = np.zeros(256), np.zeros(256), 0.0
    for prediction, truth in pairs:
        mae += np.abs(prediction.astype(float) - truth.astype(float)).mean() / 255 / len(pairs)
        b = truth > 128
        for threshold in range(256):
            a = prediction > threshold
            both = float((a & b).sum())
            precision[threshold] += (both + epsilon) / (a.sum() + epsilon) / len(pairs)
            recall[threshold] += (both + epsilon) / (b.sum() + epsilon) / len(pairs)
    f = (1 + beta_squared) * precision * recall / (beta_squared * precision + recall)
    return {
        "mae": mae,
        "max_f": f.max(),
        "mean_f": f.mean(),
        "threshold": int(f.argmax()),
        "f_measure": f[THRESHOLDS],
        "precision": precision[THRESHOLDS],
        "recall": recall[THRESHOLDS],
    }


def salmetric_program(program: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for number, pair in enumerate(pairs):
            names = [f"{folder}/{number}-{kind}.pgm" for kind in ("map", "truth")]
            for name, image in zip(names, pair):
                header = f"P5\n{image.shape[1]} {image.shape[0]}\n255\n".encode()
                Path(name).write_bytes(header + image.tobytes())
            lines.append(" ".join(names))
        listed = Path(folder, "list.txt")
        listed.write_text("\n".join(lines) + "\n")
        printed = subprocess.run(
            [program, str(listed), "1"], check=True, capture_output=True, text=True
        ).stdout

    def number(label: str) -> float:
        found = re.search(rf"^{re.escape(label)}:\s*(\S+)", printed, re.MULTILINE)
        assert found, f"no {label} in {printed[-500:]}"
        return float(found[1])

    return {
        "mae": number("MAE"),
        "max_f": number("Max_F-measre"),
        "mean_f": number("Mean_F-measre"),
        "precision_at_max_f": number("Precision"),
        "recall_at_max_f": number("Recall"),
    }


def kd_scfnet_toolbox(path: str) -> dict[str, Any]:
    # A namespace that newer SciPy has dropped; what is used here does not need it.
    sys.modules.setdefault(
        "scipy.ndimage.morphology", types.SimpleNamespace(distance_transform_edt=None)
    )
    spec = importlib.util.spec_from_file_location("saliency_toolbox", path)
    assert spec is not None and spec.loader is not None
    toolbox = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toolbox)

    used, errors, alignments, precisions, recalls = [], [], [], [], []
    for name, prediction, truth in cases():
        span = int(prediction.max()) - int(prediction.min())
        if not 0 < (truth > 128).sum() < truth.size or (span < 255 and math.gcd(span, 255) > 1):
            continue
        used.append(name)
        truth = (truth > 128).astype(np.float32)
        stretched = toolbox.norm_img(prediction)
        errors.append(toolbox.mean_square_error(truth, stretched))
        alignments.append(toolbox.e_measure(truth, stretched))
        precision, recall = toolbox.prec_recall(truth, stretched, 256)
        precisions.append(precision)
        recalls.append(recall)
    precision = np.mean(np.hstack(precisions), 1).astype(float)
    recall = np.mean(np.hstack(recalls), 1).astype(float)
    precision, recall = precision[:255], recall[:255]
    f = 1.3 * precision * recall / (0.3 * precision + recall)
    return {
        "images": used,
        "mae": np.mean(errors),
        "max_f": f.max(),
        "adaptive_e": np.mean(alignments),
        "f_measure": f[THRESHOLDS[:-1]],
        "precision": precision[THRESHOLDS[:-1]],
        "recall": recall[THRESHOLDS[:-1]],
    }


if __name__ == "__main__":
    main()
