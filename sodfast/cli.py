"""The command line, ``sodfast``: the list of its subcommands, and how they end.

Exit status: 0 all done; 1 something could not be done; 2 the command makes no sense;
130 interrupted. Every error is a sentence on stderr that begins with "sodfast: error:".
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from .commands import UsageError, WorkError

__all__ = ["main"]

# The modules of the subcommands, in the order of --help. Each has add_parser and run.
_SUBCOMMANDS = (
    "commands.predict",
    "commands.convert",
    "commands.export",
    "commands.evaluate",
    "commands.plot",
    "commands.prune",
    "commands.models",
    "commands.train",
    "commands.distill",
    "commands.ablate",
    "commands.data",
    "commands.info",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise UsageError(message)


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = _Parser(
        prog="sodfast",
        description="Salient object detection with tiny networks.",
    )
    parser.add_argument("--version", action="version", version=f"sodfast {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in _SUBCOMMANDS:
        import_module(f".{module}", __package__).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. argv: without the program's name."""
    try:
        warnings.showwarning = _show_warning
        arguments = _parser().parse_args(argv)
        status = arguments.run(arguments)
        if sys.stdout is not None:  # None: it was closed before we began
            sys.stdout.flush()
        return int(status)
    except UsageError as error:
        return _complain(error, 2)
    except WorkError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        print("sodfast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"sodfast: warning: {message}", file=sys.stderr)


def _complain(error: Exception, status: int) -> int:
    cause = error.args[0] if error.args else error
    if isinstance(cause, OSError) and cause.strerror and cause.filename:
        text = f"{cause.filename}: {cause.strerror[:1].lower()}{cause.strerror[1:]}"
    else:
        text = str(cause)
    print(f"sodfast: error: {text}", file=sys.stderr)
    return status
