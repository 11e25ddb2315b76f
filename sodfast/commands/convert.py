"""``sodfast convert``: published CSNet checkpoints to weight files."""

from __future__ import annotations

import argparse
from typing import Any

from . import WorkError


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="published CSNet checkpoints to a weight file",
        description="Reads a published CSNet checkpoint without executing anything in it.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="the .pth.tar file")
    parser.add_argument(
        "--config", required=True, metavar="BIN", help="the .bin file with its channels"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT.safetensors", help="the file to write"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ..convert import convert_csnet
    from ..models import count
    from ..weights import save

    try:
        model = convert_csnet(arguments.checkpoint, arguments.config)
        save(model, arguments.output)
    except (OSError, ValueError) as error:
        raise WorkError(error) from error
    print(f"{arguments.output}: csnet, {count(model)['params']:,} parameters")
    return 0
