"""``sodfast train``: a recipe, data, and a folder for the run."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from . import UsageError, WorkError


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train with dynamic weight decay, eliminate channels, fine-tune, evaluate",
        description="Writes to RUN: weights.safetensors (the result), trained.safetensors (before "
        "channels were eliminated), log.jsonl, curves.png, results.json, and checkpoints. Several "
        "processes: torchrun --nproc-per-node N -m sodfast train …",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="the name of one, or a .toml file")
    parser.add_argument("--data", required=True, metavar="DIR", help="images and masks to learn")
    add_options(parser)
    parser.set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What training and distilling have in common."""
    parser.add_argument(
        "--val", metavar="DIR", help="validate on these, not on a held-out part of --data"
    )
    parser.add_argument("-o", "--output", required=True, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument(
        "--init", metavar="W", help="start from these weights: a file, or a name as in predict"
    )
    parser.add_argument("--device", metavar="D", help="cpu, cuda, … (default: a GPU if there is)")
    parser.add_argument("--cache", metavar="DIR", help="where decoded pictures are kept")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out bad pairs instead of refusing them"
    )


def run(arguments: argparse.Namespace) -> int:
    from ..recipe import load_recipe
    from ..train import train

    try:
        recipe = load_recipe(arguments.recipe, arguments.set)
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(error) from error
    warn_of_encoder(arguments, recipe)
    try:
        table = train(
            recipe, arguments.data, arguments.output, arguments.val, arguments.resume,
            arguments.init, arguments.device, arguments.cache, arguments.skip_bad,
        )  # fmt: skip
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        raise failed(error) from error
    print_table(table, recipe.size, arguments.output)
    return 0


def failed(error: Exception) -> WorkError:
    """What is said of an error of `train`; one that nobody foresaw is raised as it is."""
    from ..train import TrainingError

    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        return WorkError("the run needs more memory than there is")
    if isinstance(error, RuntimeError) and not isinstance(error, TrainingError):
        raise error
    return WorkError(error)


def warn_of_encoder(arguments: argparse.Namespace, recipe: Any) -> None:
    """A large encoder learns little of a few thousand pictures, and nobody sees why."""
    config = recipe.config
    begun = arguments.init is not None or arguments.resume
    if "encoder" in config and not config.get("encoder_weights") and not begun:
        print(
            f"sodfast: warning: the encoder {config['encoder']} begins from random numbers; "
            "--set config.encoder_weights=FILE names pretrained ones",
            file=sys.stderr,
        )


def print_table(table: dict[str, Any], size: int, folder: str) -> None:
    """Prints what `sodfast.train.train` returned."""
    if table:
        print(f"{'':10}{'parameters':>12}{'conv MACs':>12}{'max-F':>8}{'MAE':>8}  {size}²")
    for label, row in table.items():
        scores = "".join(f"{row[k]:>8.4f}" if k in row else f"{'':>8}" for k in ("max_f", "mae"))
        print(
            f"{label:10}{row['params']:>12,}{row['conv_macs'] / 1e9:>10.4f} G{scores}  "
            f"{folder}/{row['file']}"
        )
