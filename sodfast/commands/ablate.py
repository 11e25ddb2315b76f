"""``sodfast ablate``: one of the papers' ablations, from real runs."""

from __future__ import annotations

import argparse
from typing import Any

from ..ablations import ABLATIONS
from . import UsageError, WorkError, positive


def add_parser(subparsers: Any) -> None:
    listed = "\n".join(
        f"  {name:11}{len(entry.runs) or 'n':>3} runs  {entry.title} ({entry.paper})"
        for name, entry in ABLATIONS.items()
    )
    parser = subparsers.add_parser(
        "ablate",
        help="the papers' ablations: train the runs of one, make its table and plot",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains every run of an ablation with the recipe and writes table.md, "
        "table.json and plot.png to DIR\nafter each. Given again it goes on where it was. "
        f"NAME is one of:\n\n{listed}",
    )
    parser.add_argument("name", metavar="NAME", choices=list(ABLATIONS), help="see above")
    parser.add_argument("--data", metavar="DIR", help="images and masks to learn")
    parser.add_argument(
        "--val", metavar="DIR", help="score on these, not on a held-out part of --data"
    )
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="a folder for it all")
    parser.add_argument(
        "--teacher",
        action="append",
        default=[],
        metavar="W",
        help="weights to distil; for teacher once for each that is compared",
    )
    parser.add_argument("--images", metavar="DIR", help="teacher: pictures without ground truth")
    parser.add_argument(
        "--recipe",
        metavar="R",
        help="what all runs share (csnet-fast; loss: fs-scfnet; teacher: kd-scfnet; rgbd: "
        "rgbd-dkd-ne; rgb-dkd: rgbd-dkd)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting of it"
    )
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="runs per line of the table (1)"
    )
    parser.add_argument("--device", metavar="D", help="cpu, cuda, … (default: a GPU if there is)")
    parser.add_argument("--cache", metavar="DIR", help="where decoded pictures are kept")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ..ablate import ablate, as_markdown, plan
    from ..train import TrainingError

    ablation = ABLATIONS[arguments.name]
    if ablation.taught and arguments.images is None:
        raise UsageError(f"{arguments.name} needs --images")
    if not ablation.taught and arguments.data is None:
        raise UsageError(f"{arguments.name} needs --data")
    try:
        runs = plan(
            ablation, arguments.recipe, arguments.set, arguments.seeds, arguments.teacher
        )  # fmt: skip
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(error) from error
    try:
        rows = ablate(
            ablation, runs, arguments.data, arguments.output, arguments.val, arguments.device,
            arguments.cache, images=arguments.images,
        )  # fmt: skip
    except (ImportError, OSError, TrainingError, ValueError) as error:
        raise WorkError(error) from error
    if rows:
        print(as_markdown(ablation, rows))
    return 0
