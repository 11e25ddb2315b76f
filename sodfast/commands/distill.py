"""``sodfast distill``: a teacher, pictures without ground truth, and a folder for the run."""

from __future__ import annotations

import argparse
from typing import Any

from . import UsageError
from .train import add_options, failed, print_table, warn_of_encoder


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "distill",
        help="train on what a trained network says of pictures",
        description="Any network teaches any other. The teacher sees every augmented batch, or "
        "(--set teach=offline) labels all pictures once. With loss dkd (the recipes rgbd-dkd, …) "
        "teacher and ground truth of --data are weighed for every picture, and --images is not "
        "needed. Writes to RUN what sodfast train writes.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="of the student: a name or a .toml file")
    parser.add_argument("--teacher", required=True, metavar="W", help="its weights, as in predict")
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="pictures without ground truth: a folder, or a text file with a path per line",
    )
    parser.add_argument("--data", metavar="DIR", help="images and masks, to mix in or for dkd")
    add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ..distill import distill
    from ..recipe import load_recipe

    try:
        recipe = load_recipe(arguments.recipe, arguments.set)
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(error) from error
    if arguments.images is None and recipe.loss != "dkd":
        raise UsageError("--images is missing: pictures without ground truth (only dkd needs none)")
    warn_of_encoder(arguments, recipe)
    try:
        table = distill(
            recipe, arguments.teacher, arguments.images, arguments.output, arguments.data,
            val=arguments.val, resume=arguments.resume, init=arguments.init,
            device=arguments.device, cache_folder=arguments.cache, skip_bad=arguments.skip_bad,
        )  # fmt: skip
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        raise failed(error) from error
    print_table(table, recipe.size, arguments.output)
    return 0
