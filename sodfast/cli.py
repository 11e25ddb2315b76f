"""The command line: ``sodfast predict | convert | models | info``.

Exit status: 0 all done; 1 something could not be done; 2 the command makes no sense;
130 interrupted. Every error is a sentence on stderr that begins with "sodfast: error:".
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

__all__ = ["main"]


# The unpruned widths and splits of the papers' tables.
_VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "csnet": (
        *({"width": width} for width in (1.0, 1.2, 1.5, 1.8, 2.0)),
        *({"split": split} for split in ((1, 0), (3, 1), (1, 3), (0, 1))),
    )
}


class UsageError(Exception):
    """The command line itself is wrong: exit status 2."""


class WorkError(Exception):
    """The work could not be done, wholly or in part: exit status 1."""


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
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    predict = commands.add_parser(
        "predict",
        help="saliency maps of pictures",
        description="Writes a grey 8-bit PNG of the same size for every picture: 0 background, "
        "255 salient. Folders are searched with everything below them and keep their structure. "
        "A picture that cannot be read is reported at the end, the others are done.",
    )
    predict.add_argument("inputs", nargs="+", metavar="INPUT", help="a picture or a folder")
    predict.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for the maps (made if need be)"
    )
    predict.add_argument(
        "--weights", required=True, metavar="FILE", help="a .safetensors file of sodfast"
    )
    predict.add_argument(
        "--size",
        type=_positive,
        metavar="N",
        help="the network sees N x N pixels (default: what the weights were trained for)",
    )
    predict.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads (default: all cores)"
    )
    predict.set_defaults(run=_predict)

    convert = commands.add_parser(
        "convert",
        help="published CSNet checkpoints to a weight file",
        description="Reads a published CSNet checkpoint without executing anything in it.",
    )
    convert.add_argument("checkpoint", metavar="CKPT", help="the .pth.tar file")
    convert.add_argument(
        "--config", required=True, metavar="BIN", help="the .bin file with its channels"
    )
    convert.add_argument(
        "-o", "--output", required=True, metavar="OUT.safetensors", help="the file to write"
    )
    convert.set_defaults(run=_convert)

    models = commands.add_parser("models", help="the networks, their parameters and their work")
    models.set_defaults(run=_models)

    info = commands.add_parser("info", help="versions, backends, and what is used here")
    info.set_defaults(run=_info)
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return value


def _predict(arguments: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from .predict import Predictor, check_writable, find_jobs, predict_files
    from .weights import load

    # In this order: what is wrong with the command, the weights or the output folder shows
    # before anything has been made.
    try:
        model = load(arguments.weights)
    except (OSError, ValueError) as error:
        raise WorkError(error) from error
    try:
        predictor = Predictor(model, size=arguments.size, threads=arguments.threads)
        jobs, failures = find_jobs(arguments.inputs, arguments.output)
    except ValueError as error:
        raise UsageError(error) from error
    if not jobs and not failures:
        raise WorkError(f"no pictures found in {', '.join(arguments.inputs)}")
    height, width = predictor.size
    try:
        # Once on nothing: what is wrong with the backend is not wrong with every picture.
        predictor.run(torch.zeros(1, 3, height, width))
    except (RuntimeError, ValueError) as error:
        raise WorkError(f"the network cannot run: {error}") from error
    try:
        check_writable(arguments.output)
        print(
            f"sodfast: {predictor.name} from {arguments.weights}, {height} x {width}, "
            f"{len(jobs)} {'picture' if len(jobs) == 1 else 'pictures'}",
            file=sys.stderr,
        )
        # disable=None: no bar where stderr is no terminal.
        with tqdm(total=len(jobs), unit="map", disable=None) as bar:
            failures += predict_files(predictor, jobs, lambda: bar.update())
    except OSError as error:
        raise WorkError(error) from error
    if failures:
        total = len(jobs) + sum(f.source not in {job.source for job in jobs} for f in failures)
        lines = [f"{failure.source}: {failure.reason}" for failure in failures]
        raise WorkError("\n  ".join([f"{len(failures)} of {total} could not be done:", *lines]))


def _convert(arguments: argparse.Namespace) -> None:
    from .convert import convert_csnet
    from .models import count
    from .weights import save

    try:
        model = convert_csnet(arguments.checkpoint, arguments.config)
        save(model, arguments.output)
    except (OSError, ValueError) as error:
        raise WorkError(error) from error
    print(f"{arguments.output}: csnet, {count(model)['params']:,} parameters")


def _models(arguments: argparse.Namespace) -> None:
    from .models import count, create_model, list_models

    print(f"{'model':8}{'configuration':16}{'parameters':>12}{'conv MACs':>12}{'paper MACC':>12}")
    for name in list_models():
        for configuration in _VARIANTS.get(name, ({},)):
            counts = count(create_model(name, **configuration))
            text = ", ".join(
                f"{key} {value[0]}:{value[1]}" if isinstance(value, tuple) else f"{key} {value}"
                for key, value in configuration.items()
            )
            print(
                f"{name:8}{text or 'default':16}{counts['params']:>12,}"
                f"{counts['conv_macs'] / 1e9:>10.4f} G{counts['paper_macs'] / 1e9:>10.4f} G"
            )
    print(
        "\nWork for one image of 224 x 224. conv MACs: multiply-accumulates of the convolutions.\n"
        "paper MACC: as the papers count, which adds normalisation, activation, resizing, pooling."
    )


def _info(arguments: argparse.Namespace) -> None:
    from .ops._backend import info

    print(info())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. argv: without the program's name."""
    try:
        warnings.showwarning = _show_warning
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
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
