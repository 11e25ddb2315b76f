"""``sodfast prune``: a smaller CSNet without the channels that training switched off."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from . import UsageError, WorkError, positive

_PICTURES = 8  # of a folder; the spread of outputs needs no more


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "prune",
        help="remove the channels that dynamic weight decay switched off",
        description="Writes the pruned network, prints its channels before and after per block "
        "and scale, parameters and work, and draws the learned channels, the distribution of γ "
        "and the spread of outputs beside it.",
    )
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="a .safetensors file with a CSNet, or csnet-fast"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT.safetensors", help="the file to write"
    )
    parser.add_argument(
        "--mode",
        choices=("exact", "paper"),
        default="exact",
        help="exact (default): the same function, statistics kept; paper: as the authors, "
        "statistics reset, to be trained on",
    )
    parser.add_argument(
        "--criterion",
        choices=("threshold", "ratio", "norm", "median"),
        default="threshold",
        help="|γ| under a threshold (default); a ratio of all |γ|; filter norm; geometric median",
    )
    parser.add_argument(
        "--threshold", type=float, metavar="X", help="for threshold (default: 1e-20)"
    )
    parser.add_argument(
        "--ratio", type=float, metavar="X", help="share to remove, for the others (default: 0.5)"
    )
    parser.add_argument(
        "--size", type=positive, default=224, metavar="N", help="work is counted for N x N pixels"
    )
    parser.add_argument(
        "--images", metavar="PATH", help="a picture or a folder to measure the outputs' spread on"
    )
    parser.add_argument("--no-figures", action="store_true", help="draw nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ..predict import check_writable
    from ..pretrained import from_pretrained, weights_file
    from ..prune import THRESHOLD, prune
    from ..weights import save

    by_threshold = arguments.criterion == "threshold"
    if (arguments.ratio if by_threshold else arguments.threshold) is not None:
        wrong = "--ratio" if by_threshold else "--threshold"
        raise UsageError(f"{wrong} has no meaning with --criterion {arguments.criterion}")
    threshold = THRESHOLD if arguments.threshold is None else arguments.threshold
    ratio = 0.5 if arguments.ratio is None else arguments.ratio
    if arguments.size % 16:
        raise UsageError(f"--size must be a multiple of 16, not {arguments.size}")
    try:
        source, out = weights_file(arguments.weights), Path(arguments.output)
        if out.exists() and source.exists() and out.samefile(source):
            raise UsageError(f"-o {out} would overwrite the weights that are pruned")
        check_writable(out.parent)
        model = from_pretrained(arguments.weights)
        expected: dict[str, Any] = model.preprocessing  # type: ignore[assignment]
        if arguments.images is not None and len(expected["mean"]) == 4:
            raise UsageError(f"--images: {arguments.weights} takes depth maps; leave it out")
        pictures = None
        if arguments.images is not None and not arguments.no_figures:
            pictures = _read_pictures(Path(arguments.images), expected)
        pruned, report = prune(model, arguments.criterion, arguments.mode, threshold, ratio)
    except (OSError, TypeError, ValueError) as error:
        raise WorkError(error) from error
    print(report.table((arguments.size, arguments.size)))
    try:
        save(pruned, arguments.output)
        print(f"{arguments.output}: written")
        if not arguments.no_figures:
            for path in _draw(
                arguments, model, pruned, pictures, threshold if by_threshold else None
            ):
                print(f"{path}: drawn")
    except ImportError as error:  # the figures are an extra
        print(f"sodfast: warning: {error}", file=sys.stderr)
    except (OSError, ValueError) as error:
        raise WorkError(error) from error
    if arguments.mode == "paper":
        print("The running statistics are reset: train it on before use.")
    return 0


def _draw(
    arguments: argparse.Namespace,
    model: Any,
    pruned: Any,
    pictures: list[Any] | None,
    threshold: float | None,
) -> list[Path]:
    import torch

    from ..plot import require_matplotlib
    from ..prune_plot import draw_channels, draw_gammas, draw_spread, output_spread, smooth_pictures

    require_matplotlib()
    out = Path(arguments.output)
    channels, gammas, spread = (
        out.with_name(f"{out.stem}-{name}.png") for name in ("channels", "gamma", "spread")
    )
    draw_channels(
        {"before": model.config["channels"], "pruned": pruned.config["channels"]}, channels
    )
    draw_gammas({"before": model}, gammas, threshold)
    if pictures is None:
        images, title = smooth_pictures(4, model.preprocessing), "on random colour gradients"
    else:
        images = torch.cat(pictures)
        title = f"on {len(images)} pictures of {arguments.images}"
    measured = {"before": output_spread(model, images)}
    if arguments.mode == "exact":  # without statistics there is nothing to measure
        measured["pruned"] = output_spread(pruned, images)
    draw_spread(measured, spread, title)
    return [channels, gammas, spread]


def _read_pictures(path: Path, preprocessing: dict[str, Any]) -> list[Any]:
    from ..preprocess import read_image, to_input

    suffixes = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in suffixes)[:_PICTURES]
    if not files:
        raise ValueError(f"{path}: no pictures in it")
    return [to_input(read_image(file), preprocessing) for file in files]
