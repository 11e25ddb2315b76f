"""What the subcommands of `sodfast` share: the two ways to fail, and types of arguments.

A subcommand is a module with two functions, named in the list of `sodfast.cli`:

    add_parser(subparsers) -> None      its arguments; ends with parser.set_defaults(run=run)
    run(arguments) -> int               does it, returns the exit status

What it needs beyond argparse is imported inside `run`, so that `sodfast --help` stays quick.
"""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["UsageError", "WorkError", "new_file", "new_png", "positive"]


class UsageError(Exception):
    """The command line itself is wrong: exit status 2."""


class WorkError(Exception):
    """The work could not be done, wholly or in part: exit status 1."""


def positive(text: str) -> int:
    """A type for argparse: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return value


def new_file(text: str) -> str:
    """A type for argparse: a file to write, in a folder that is there, before any work is done."""
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {Path(text).parent} for {text!r}")
    return text


def new_png(text: str) -> str:
    """The same of a file with the ending .png."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    return new_file(text)
