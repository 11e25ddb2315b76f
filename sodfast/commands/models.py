"""``sodfast models``: the networks with their parameters and their work."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("models", help="the networks, their parameters and their work")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from ..models import count, create_model
    from ..models.registry import VARIANTS
    from ..pretrained import pretrained_names

    print(f"{'model':13}{'configuration':39}{'parameters':>12}{'conv MACs':>12}{'paper MACC':>12}")
    for name, configuration in VARIANTS:
        with torch.device("meta"):  # shapes are enough
            counts = count(create_model(name, **configuration))
        print(
            f"{name:13}{_words(configuration):39}{counts['params']:>12,}"
            f"{counts['conv_macs'] / 1e9:>10.4f} G{counts['paper_macs'] / 1e9:>10.4f} G"
        )
    print(
        "\nWork for one image of 224 x 224. conv MACs: multiply-accumulates of the convolutions.\n"
        "paper MACC: as the papers count, which adds normalisation, activation, resizing, pooling."
    )
    print("\nWeights that come with sodfast, by name:", ", ".join(pretrained_names()))
    return 0


def _words(configuration: dict[str, Any]) -> str:
    """split 3:1, fused stages 1-4, encoder resnet50 …"""
    words = []
    for key, value in configuration.items():
        if key == "split":
            value = ":".join(str(part) for part in value)
        elif key == "fused_stages":
            value = str(value[0]) if len(value) == 1 else f"{value[0]}-{value[-1]}"
        words.append(f"{key.replace('_', ' ')} {value}")
    return ", ".join(words)
