"""``sodfast eval``: the figures of maps, or of a network on data sets."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import UsageError, WorkError, new_file, new_png, positive

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..evaluate import Evaluation
    from ..predict import Predictor


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="score maps against their ground truth, or a network on data sets",
        usage="%(prog)s PRED_DIR GT_DIR [options]\n"
        "       %(prog)s --weights FILE --data DIR [DIR ...] [options]",
        description="MAE, F, weighted F, S and E in three conventions, each labelled. Truths "
        "without a map, sizes that differ and files that cannot be read are reported, the "
        "others are scored; the exit status is then 1.",
    )
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="PRED_DIR GT_DIR",
        help="maps, and the masks of the same names (or a data set's folder)",
    )
    network = parser.add_argument_group("a network instead of maps")
    network.add_argument("--weights", metavar="FILE", help="a .safetensors file of sodfast")
    network.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="DIR",
        help="data sets: images/ and masks/, or the names that DUTS, ECSSD, HKU-IS … use",
    )
    network.add_argument("--size", type=positive, metavar="N", help="the network sees N x N pixels")
    network.add_argument(
        "--distance", action="store_true", help="depth maps are distances: far is bright"
    )
    network.add_argument(
        "--no-speed", action="store_true", help="do not measure images per second (2 s)"
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="default: all cores, or OMP_NUM_THREADS"
    )
    parser.add_argument("--names", metavar="FILE", help="only these: a text file, a name per line")
    parser.add_argument(
        "--resize", action="store_true", help="resize maps of another size to their truth"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="the photos for --sheet, when scoring a folder of maps"
    )
    out = parser.add_argument_group("what to write")
    form = out.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="JSON on stdout, curves included")
    form.add_argument("--markdown", action="store_true", help="a Markdown table on stdout")
    out.add_argument(
        "--curves",
        type=new_png,
        metavar="FILE.png",
        help="precision-recall and F over the threshold",
    )
    out.add_argument("--per-image", type=new_file, metavar="FILE.csv", help="a line per map")
    out.add_argument(
        "--sheet", type=new_png, metavar="FILE.png", help="the worst maps: photo | truth | map"
    )
    out.add_argument("--worst", type=positive, metavar="N", help="how many for --sheet (20)")
    out.add_argument(
        "--worst-by",
        choices=("mae", "max_f", "adaptive_f", "weighted_f", "s", "mean_e"),
        default="mae",
        help="what makes a map a bad one (mae)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ..parallel import keep_freed_memory
    from ..report import as_json, as_markdown, as_text, csv_per_image

    _check(arguments)
    keep_freed_memory()
    if arguments.curves:
        from ..plot import require_matplotlib

        try:  # before the work, not after it
            require_matplotlib()
        except ImportError as error:
            raise WorkError(error) from error
    model: dict[str, Any] | None = None
    predictor: Predictor | None = None
    try:
        if arguments.weights:
            evaluations, model, predictor = evaluate_weights(
                arguments.weights,
                arguments.data,
                arguments.threads,
                arguments.size,
                arguments.names,
                speed=not arguments.no_speed,
                disparity=not arguments.distance,
            )
        else:
            evaluations = [_maps(arguments)]
    except (OSError, ValueError) as error:
        raise WorkError(error) from error

    if arguments.json:
        print(json.dumps(as_json(evaluations, model), indent=1))
    else:
        print((as_markdown if arguments.markdown else as_text)(evaluations, model))
    try:
        if arguments.per_image:
            _write(arguments.per_image, csv_per_image(evaluations))
        if arguments.curves:
            from ..plot import draw_curves

            draw_curves([e for e in evaluations if e.maps], arguments.curves)
        if arguments.sheet:
            _sheet(arguments, evaluations, predictor)
    except (OSError, ValueError) as error:
        raise WorkError(error) from error
    left_out = sum(e.truths - len(e.maps) for e in evaluations)
    if left_out or not all(e.complete for e in evaluations):
        total = sum(e.truths for e in evaluations)
        lines = [f"{left_out} of {total} could not be scored:"]
        for evaluation in evaluations:
            lines += [f"{evaluation.name}: {name}: no map" for name in evaluation.missing]
            lines += [f"{f.source}: {f.reason}" for f in evaluation.failures]
        raise WorkError("\n  ".join([*lines[:21], *(["…"] if lines[21:] else [])]))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """What the parser cannot say."""
    if arguments.weights or arguments.data:
        if arguments.folders:
            raise UsageError("give either PRED_DIR GT_DIR, or --weights and --data")
        if not arguments.weights or not arguments.data:
            missing = "--data DIR" if arguments.weights else "--weights FILE"
            raise UsageError(f"{missing} is missing")
        for option, name in ((arguments.resize, "--resize"), (arguments.images, "--images")):
            if option:
                raise UsageError(f"{name} belongs to the scoring of a folder of maps")
    elif len(arguments.folders) != 2:
        raise UsageError(
            "two folders are needed, PRED_DIR and GT_DIR; or --weights FILE --data DIR"
        )
    else:
        for name in ("size", "no_speed", "distance"):
            if getattr(arguments, name):
                raise UsageError(f"--{name.replace('_', '-')} belongs to --weights")
    if arguments.worst and not arguments.sheet:
        raise UsageError("--worst needs --sheet FILE.png")


def _maps(arguments: argparse.Namespace) -> Evaluation:
    from ..evaluate import evaluate_maps

    predictions, truths = arguments.folders
    with _bar() as progress:
        return evaluate_maps(
            predictions,
            truths,
            photos=arguments.images,
            names=arguments.names,
            resize=arguments.resize,
            threads=arguments.threads,
            progress=progress,
        )


def evaluate_weights(
    weights: str,
    data: Sequence[str],
    threads: int | None = None,
    size: int | None = None,
    names: str | None = None,
    speed: bool = True,
    disparity: bool = True,
) -> tuple[list[Evaluation], dict[str, Any], Predictor]:
    """One network on some data sets: an evaluation of each, what the network costs, and it."""
    import torch

    from ..data.folders import find_data
    from ..evaluate import cores, describe_model, evaluate_network, measure_speed
    from ..predict import Predictor

    try:
        predictor = Predictor(weights, size=size, disparity=disparity)
    except ValueError as error:
        raise (UsageError if size else WorkError)(error) from error
    if not disparity and predictor.channels == 3:
        raise UsageError(f"--distance has no meaning: {weights} takes RGB alone")
    # What is wrong with the last folder shows before the first has taken its time.
    found = [find_data(folder, predictor.channels == 4, names) for folder in data]
    try:
        # Once on nothing: what is wrong with the backend is not wrong with every picture.
        predictor.run(torch.zeros(1, predictor.channels, *predictor.size))
    except (RuntimeError, ValueError) as error:
        raise WorkError(f"the network cannot run: {error}") from error
    model = describe_model(weights, predictor)
    threads = threads or cores()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        if speed:
            with contextlib.suppress(OSError, ValueError):  # the evaluation will say why
                first = found[0].pairs[0]
                model["images_per_second"] = measure_speed(
                    predictor, first.image, depth=first.depth
                )
    finally:
        torch.set_num_threads(before)
    evaluations = []
    for folder in data:
        with _bar() as progress:
            evaluations.append(
                evaluate_network(predictor, folder, names, threads=threads, progress=progress)
            )
    return evaluations, model, predictor


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    # disable=None: no bar where stderr is no terminal.
    with tqdm(unit="map", disable=None) as bar:

        def progress(total: int) -> None:
            bar.total = total
            bar.update()

        yield progress


def _write(path: str, text: str) -> None:
    from ..weights import atomic_write

    with atomic_write(path, sync=False) as file:
        file.write(text.encode("utf-8"))


def _sheet(
    arguments: argparse.Namespace, evaluations: list[Evaluation], predictor: Predictor | None
) -> None:
    from ..evaluate import worst_maps
    from ..sheet import draw_sheet

    scored = [m for evaluation in evaluations for m in evaluation.maps]
    if not scored:
        raise ValueError("nothing was scored, so there is no sheet to draw")
    worst = worst_maps(scored, arguments.worst or 20, arguments.worst_by)
    if not any(m.photo for m in worst):
        print("sodfast: the sheet has no photos; --images DIR says where they are", file=sys.stderr)
    draw_sheet(worst, arguments.sheet, predictor)
