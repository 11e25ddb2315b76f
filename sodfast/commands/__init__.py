"""What the subcommands of `sodfast` share: the two ways to fail, and types of arguments.

A subcommand is a module with two functions, named in the list of `sodfast.cli`:

    add_parser(subparsers) -> None      its arguments; ends with parser.set_defaults(run=run)
    run(arguments) -> int               does it, returns the exit status

What it needs beyond argparse is imported inside `run`, so that `sodfast --help` stays quick.
"""

from __future__ import annotations

import argparse

__all__ = ["UsageError", "WorkError", "positive"]


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
