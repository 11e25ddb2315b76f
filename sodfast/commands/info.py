"""``sodfast info``: versions and backends."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("info", help="versions, backends, and what is used here")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ..ops._backend import info

    print(info())
    return 0
