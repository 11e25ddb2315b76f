"""``sodfast data``: making data sets."""

from __future__ import annotations

import argparse
from typing import Any

from . import UsageError, WorkError, positive


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("data", help="make data sets")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    synth = kinds.add_parser(
        "synth",
        help="synthetic scenes with masks",
        description="Textured objects over textured backgrounds: DIR/images, DIR/masks and, with "
        "--depth, DIR/depth (255 near) and DIR/damage.csv: scenes of several objects, of which "
        "the one that is both near and striking is salient. The same seed gives the same scenes.",
    )
    synth.add_argument("folder", metavar="DIR", help="a new or empty folder")
    synth.add_argument("--n", type=positive, default=1000, metavar="N", help="scenes (1000)")
    synth.add_argument("--seed", type=int, default=0, metavar="S", help="which scenes (0)")
    synth.add_argument("--size", type=positive, default=160, metavar="PIXELS", help="longer side")
    synth.add_argument("--depth", action="store_true", help="write depth maps too")
    synth.add_argument(
        "--damage",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the depth maps that are damaged: other objects dominate, low contrast, distortion",
    )
    synth.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..data.synth import write_scenes

    try:
        with tqdm(total=arguments.n, unit="scene", disable=None) as bar:
            write_scenes(
                arguments.folder, arguments.n, arguments.seed, arguments.depth, arguments.size,
                bar.update, arguments.damage,
            )  # fmt: skip
    except ValueError as error:
        raise UsageError(error) from error
    except OSError as error:
        raise WorkError(error) from error
    return 0
