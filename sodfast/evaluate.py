"""Scoring: a folder of maps against its ground truth, or a network on data sets.

Nothing is left out in silence. Every truth is either scored or stands in `Evaluation.missing`
or `Evaluation.failures`; what is unusual about a pair that was scored stands in its notes.
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .data.folders import find_data, find_truths, read_names
from .data.grey import read_depth, read_grey
from .data.names import picture_files, role_of
from .jobs import Failure, describe
from .metrics import FIGURES, ImageScores, Scores, score
from .parallel import ordered_map, share_threads

if TYPE_CHECKING:
    from .predict import Predictor

__all__ = [
    "Evaluation",
    "ScoredMap",
    "cores",
    "describe_model",
    "evaluate_maps",
    "evaluate_network",
    "measure_speed",
    "worst_maps",
]

# Called once per truth, with the number of all truths.
Progress = Callable[[int], object]

# What can be unusual about a pair that was scored.
EMPTY, FULL = "empty truth", "full truth"
GRADED = "truth with grey values"
ZERO_ONE = "truth of zeros and ones"
CONSTANT = "constant map"
FLAT_DEPTH = "constant depth map"
RESIZED = "map resized"
NOTES = (EMPTY, FULL, GRADED, ZERO_ONE, CONSTANT, FLAT_DEPTH, RESIZED)


@dataclass(frozen=True)
class ScoredMap:
    """One map's figures, where it came from, and what is unusual about it (NOTES)."""

    name: str
    scores: ImageScores
    notes: tuple[str, ...]
    truth: Path
    photo: Path | None = None
    prediction: Path | None = None
    depth: Path | None = None


@dataclass
class Evaluation:
    """A data set's figures, and the account of every file.

    name: the data set. truths: how many ground truths there are. maps: those that were
    scored, sorted by name. failures: pairs that could not be scored, with the reason.
    missing: truths without a map. surplus: maps without a truth. seconds: wall time.
    """

    name: str
    truths: int
    maps: list[ScoredMap] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    seconds: float = 0.0
    scores: Scores = field(default_factory=Scores)

    @property
    def complete(self) -> bool:
        """Whether every truth was scored."""
        return len(self.maps) == self.truths and not self.failures

    @property
    def notes(self) -> dict[str, list[str]]:
        """For each note that occurs, the names of the maps that carry it."""
        found = {note: [m.name for m in self.maps if note in m.notes] for note in NOTES}
        return {note: names for note, names in found.items() if names}

    def figures(self) -> dict[str, dict[str, float]]:
        """Convention to figure to value; see `sodfast.metrics.Scores.figures`."""
        return self.scores.figures()


def worst_maps(maps: Iterable[ScoredMap], count: int, by: str = "mae") -> list[ScoredMap]:
    """The `count` worst of some maps, the worst first.

    by: which figure of the PySODMetrics convention decides. ValueError for an unknown one.
    """
    if by not in FIGURES:
        raise ValueError(f"by must be one of {', '.join(FIGURES)}, got {by!r}")
    sign = -1 if by == "mae" else 1
    return sorted(maps, key=lambda m: sign * getattr(m.scores.pysodmetrics, by))[:count]


def evaluate_maps(
    predictions: str | os.PathLike[str],
    truths: str | os.PathLike[str],
    photos: str | os.PathLike[str] | None = None,
    names: str | os.PathLike[str] | None = None,
    resize: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Scores a folder of maps against a folder of ground truths, matched by name.

    predictions: maps as 8-bit grey pictures, also in folders below. truths: masks, or a
    whole data set (see `sodfast.data.folders`). photos: where the pictures are, for sheets;
    None takes those of the data set, if any. names: a text file, only these truths. resize:
    a map of another size is resized to the truth, bilinearly, where it would otherwise be a
    failure. threads: None takes all cores. progress is called once
    per truth with their number.

    Raises FileNotFoundError and ValueError for folders that do not exist, hold nothing, have
    two files of one name, or have no name in common.
    """
    start = time.perf_counter()
    masks, pictures = find_truths(truths)
    maps: dict[str, Path] = {}
    for name, path in picture_files(predictions):
        if name in maps:
            raise ValueError(f"two maps are named {name!r}: {maps[name]} and {path}")
        maps[name] = path
    if not maps:
        raise ValueError(f"no maps found in {predictions}")
    if not maps.keys() & masks.keys():
        raise ValueError(
            f"no map has the name of a truth: the maps are named like {min(maps)!r}, "
            f"the truths like {min(masks)!r}"
        )
    if photos is not None:
        pictures = dict(picture_files(photos))
    wanted = list(masks) if names is None else _listed(names, masks)
    result = Evaluation(_set_name(truths), len(wanted))
    result.missing = [name for name in wanted if name not in maps]
    result.surplus = [name for name in maps if name not in masks]

    def one(name: str) -> ScoredMap:
        truth, notes = _read_truth(masks[name])
        prediction = read_grey(maps[name])
        if prediction.shape != truth.shape:
            if not resize:
                raise ValueError(
                    f"the map is {_size(prediction)}, but its truth {_size(truth)} "
                    "(--resize resizes maps to their truths)"
                )
            prediction = _resize(prediction, truth.shape)
            notes.append(RESIZED)
        return _scored(name, prediction, truth, notes, masks[name], pictures.get(name), maps[name])

    present = [name for name in wanted if name in maps]
    _fill(result, present, one, lambda name: maps[name], threads, progress)
    result.seconds = time.perf_counter() - start
    return result


def evaluate_network(
    predictor: Predictor,
    data: str | os.PathLike[str],
    names: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    keep: Callable[[str, np.ndarray], object] | None = None,
) -> Evaluation:
    """Runs a network on a data set and scores its maps, exactly as if they had been written.

    data: a data set as `sodfast.data.folders.find_data` finds it, with names, and with depth maps
    where the network takes them. threads: so many pictures at once, each on one thread; None
    takes all cores. progress is called once per pair with their number. keep(name, map) is called
    with every map, from several threads.

    A picture without mask (or the reverse) is a failure in the result; its mask counts as a
    truth. Raises what `find_data` raises.
    """
    start = time.perf_counter()
    found = find_data(data, depth=predictor.channels == 4, names=names)
    pairs = {pair.name: pair for pair in found.pairs}
    result = Evaluation(found.name, len(pairs) + len(found.problems))
    result.failures = [Failure(found.root, problem) for problem in found.problems]

    def one(name: str) -> ScoredMap:
        pair = pairs[name]
        truth, notes = _read_truth(pair.mask)
        depth = None if pair.depth is None else read_depth(pair.depth, predictor.disparity)
        if depth is not None and not np.ptp(depth):
            notes.append(FLAT_DEPTH)
        prediction = predictor(pair.image, depth)
        if prediction.shape != truth.shape:
            raise ValueError(f"the photo is {_size(prediction)}, but its truth {_size(truth)}")
        if keep is not None:
            keep(name, prediction)
        scored = _scored(name, prediction, truth, notes, pair.mask, pair.image, None)
        return replace(scored, depth=pair.depth)

    _fill(result, list(pairs), one, lambda name: pairs[name].image, threads, progress)
    result.seconds = time.perf_counter() - start
    return result


def _fill(
    result: Evaluation,
    names: list[str],
    one: Callable[[str], ScoredMap],
    source: Callable[[str], Path],
    threads: int | None,
    progress: Progress | None,
) -> None:
    """Scores `names` in several threads, and adds them up in order: the sums do not depend
    on which thread was first."""

    def attempt(name: str) -> ScoredMap | Failure:
        try:
            return one(name)
        except Exception as error:  # whatever a damaged file provokes: it is one file
            return Failure(source(name), describe(error))

    workers, inner = share_threads(threads or cores(), len(names))
    with contextlib.closing(ordered_map(attempt, names, workers, inner)) as outcomes:
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                result.failures.append(outcome)
            else:
                result.maps.append(outcome)
                result.scores.add(outcome.scores)
            if progress is not None:
                progress(len(names))


def cores() -> int:
    """How many processors this process may use, or what OMP_NUM_THREADS says, as torch takes it."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def _read_truth(path: Path) -> tuple[np.ndarray, list[str]]:
    """A mask (H, W) uint8, and what is unusual about it."""
    truth = read_grey(path)
    levels = np.flatnonzero(np.bincount(truth.ravel(), minlength=256))
    notes = []
    if levels[-1] == 1:
        truth, levels = truth * np.uint8(255), levels * 255
        notes.append(ZERO_ONE)
    if ((levels > 0) & (levels < 255)).any():
        notes.append(GRADED)
    return truth, notes


def _scored(
    name: str,
    prediction: np.ndarray,
    truth: np.ndarray,
    notes: list[str],
    mask: Path,
    photo: Path | None,
    written: Path | None,
) -> ScoredMap:
    scores = score(prediction, truth)
    if scores.positives == 0:
        notes.append(EMPTY)
    elif scores.positives == truth.size:
        notes.append(FULL)
    if scores.constant:
        notes.append(CONSTANT)
    return ScoredMap(name, scores, tuple(notes), mask, photo, written)


def _resize(prediction: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    from PIL import Image

    resized = Image.fromarray(prediction).resize(
        (shape[1], shape[0]), Image.Resampling.BILINEAR, reducing_gap=None
    )
    return np.asarray(resized)


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"


def _set_name(folder: str | os.PathLike[str]) -> str:
    """What a data set is called: its folder, or the one above a folder of masks."""
    path = Path(folder).resolve()
    return path.parent.name if role_of(path.name) and path.parent.name else path.name


def _listed(names: str | os.PathLike[str], masks: dict[str, Path]) -> list[str]:
    wanted = []
    for number, line in read_names(names):
        name = next((n for n in (line, Path(line).with_suffix("").as_posix()) if n in masks), None)
        if name is None:
            raise ValueError(f"{names}, line {number}: there is no truth named {line!r}")
        wanted.append(name)
    return sorted(dict.fromkeys(wanted))


def describe_model(weights: str | os.PathLike[str], predictor: Predictor) -> dict[str, Any]:
    """What there is to say of a network without running it on data, ready for JSON.

    weights: the file or the name that the predictor was made from. parameters (learned
    numbers); conv_macs and paper_macs, both ways of counting, at the input size (see
    `sodfast.count`); parameters_mib at 4 bytes each; file_mib, None for a name.
    """
    from .models import count
    from .pretrained import from_pretrained

    counts = count(from_pretrained(weights), predictor.size)
    is_file = os.path.isfile(weights)
    return {
        "name": predictor.name,
        "weights": Path(weights).name,
        "input_size": list(predictor.size),
        "parameters": counts["params"],
        "conv_macs": counts["conv_macs"],
        "paper_macs": counts["paper_macs"],
        "parameters_mib": counts["params"] * 4 / 2**20,
        "file_mib": os.path.getsize(weights) / 2**20 if is_file else None,
    }


def measure_speed(
    predictor: Predictor,
    photo: str | os.PathLike[str],
    seconds: float = 2.0,
    depth: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Images per second of a network, batch 1, ready for JSON.

    depth: the photo's depth map, for a network that takes it.
    network: the calls of the network alone. file_to_map: with decoding the photo, and up to
    the map in the photo's size. Medians of at least 5 calls each, in turn, after 2 for
    warming up, in about `seconds`; with torch's number of threads.
    """
    import torch

    network_input, _ = predictor.prepare(photo, depth)
    calls = {
        "network": lambda: predictor.run(network_input),
        "file_to_map": lambda: predictor(photo, depth),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while len(times["network"]) < 7 or time.perf_counter() - begin < seconds:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    rates = {name: 1 / statistics.median(values[2:]) for name, values in times.items()}
    return {**rates, "threads": torch.get_num_threads(), "machine": _machine()}


def _machine() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
