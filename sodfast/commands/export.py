"""``sodfast export``: a network for ONNX runtimes, for torch.export, or for the C library."""

from __future__ import annotations

import argparse
from typing import Any

from . import WorkError


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "export",
        help="a network as .onnx, .pt2 or .sodfast",
        description="Writes the fused network for another runtime, compared with the source first.",
    )
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="a weight file, or the name of weights that ship"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="ends in .onnx, .pt2 or .sodfast"
    )
    parser.add_argument(
        "--photos", nargs="+", default=[], metavar="PHOTO",
        help="compare on these pictures instead of synthetic ones",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ..export import export
    from ..pretrained import from_pretrained

    try:
        model = from_pretrained(arguments.weights)
        difference = export(model, arguments.output, arguments.photos)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise WorkError(error) from error
    print(f"{arguments.output}: logits within {difference:.1g} of the source's")
    return 0
