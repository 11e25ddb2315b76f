"""``sodfast predict``: pictures, folders and videos to maps, cutouts or overlays."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any

from ..pretrained import DEFAULT
from . import UsageError, WorkError, positive

if TYPE_CHECKING:
    from ..predict import Predictor

# render.TYPES and render.FORMATS, without importing torch for --help
_TYPES = ("mask", "cutout", "overlay")
_FORMATS = ("png", "webp")
_MAX_STDIN = 1 << 30  # bytes


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "predict",
        help="saliency maps, cutouts or overlays of pictures",
        description="Writes a file of the same size for every picture. Folders are searched with "
        "everything below them and keep their structure. A picture that cannot be read is reported "
        "at the end, the others are done.",
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="a picture, a folder, a quoted pattern such as 'photos/**/*.jpg', or - to read one "
        "picture from standard input and write to standard output",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="folder for the files, made if need be (maps)",
    )
    parser.add_argument(
        "--weights",
        metavar="W",
        default=DEFAULT,
        help="a .safetensors file of sodfast, or the name of weights that ship with it "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=positive,
        metavar="N",
        help="the network sees N x N pixels (default: what the weights were trained for)",
    )
    parser.add_argument(
        "--type",
        choices=_TYPES,
        default="mask",
        help="mask: grey, 0 background, 255 salient (default); cutout: the picture with the map "
        "as its opacity; overlay: the picture with all but the object grey and dark",
    )
    parser.add_argument(
        "--refine",
        action=argparse.BooleanOptionalAction,
        help="move the map's edge onto the picture's and clear the haze around it (default: yes "
        "for cutouts and overlays, no for masks)",
    )
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        help="of the files (default: png); webp compresses the colours of cutouts and overlays",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=1,
        metavar="N",
        help="pictures that go through the network at once (default: 1, best on a CPU)",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="CPU threads (default: all cores, or what OMP_NUM_THREADS says)",
    )
    parser.add_argument("--device", metavar="D", default="cpu", help="cpu, cuda, … (default: cpu)")
    parser.add_argument(
        "--no-cuda-graph",
        action="store_true",
        help="on a CUDA device, start the network kernel by kernel",
    )
    parser.add_argument(
        "--skip-existing", action="store_true", help="leave out pictures whose file is there"
    )
    parser.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="refuse larger pictures before decoding them (default: 89 million, WebP 59 million)",
    )
    parser.add_argument(
        "--depth",
        metavar="DIR",
        help="depth maps named like the pictures, for weights that take them; a picture without "
        "one is reported, and one whose depth map is constant too",
    )
    parser.add_argument(
        "--distance",
        action="store_true",
        help="depth maps are distances: far is bright (default: near is bright)",
    )
    parser.add_argument(
        "--video",
        metavar="IN",
        help="a video instead of pictures; -o is then the video to write (needs ffmpeg)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    from ..jobs import describe
    from ..parallel import keep_freed_memory

    keep_freed_memory()
    with _pillow_guard(arguments.max_pixels):
        predictor = _predictor(arguments)
        _check_depth(arguments, predictor)
        if arguments.video is not None:
            return _video(arguments, predictor)
        if arguments.inputs == ["-"]:
            return _standard_input(arguments, predictor)
        try:
            return _files(arguments, predictor)
        except OSError as error:
            raise WorkError(error if error.filename else describe(error)) from error


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what makes no sense; fills in the folder where none was named."""
    if arguments.video is not None:
        if arguments.inputs:
            raise UsageError("--video takes no other INPUT")
        if arguments.output is None:
            raise UsageError("--video needs -o OUT, the video to write")
        for name in ("format", "skip_existing"):
            if getattr(arguments, name):
                raise UsageError(f"--{name.replace('_', '-')} is for pictures, not for --video")
    elif not arguments.inputs:
        raise UsageError("INPUT is missing: name pictures, folders or -")
    elif "-" in arguments.inputs:
        if len(arguments.inputs) > 1 or arguments.output not in (None, "-"):
            raise UsageError("- reads one picture and writes to standard output: no more, no -o")
        if sys.stdout is not None and sys.stdout.isatty():
            raise UsageError("a picture would go to the terminal; redirect it: … - > map.png")
    elif arguments.output is None:
        arguments.output = "maps"
    for name in ("output", "weights"):
        if getattr(arguments, name) == "":
            raise UsageError(f"--{name} is empty")


@contextlib.contextmanager
def _pillow_guard(max_pixels: int | None) -> Iterator[None]:
    """Pillow's guard stays on, at the limit asked for, and ours speaks instead of its warning."""
    from PIL import Image

    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        if max_pixels is not None:
            Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _predictor(arguments: argparse.Namespace) -> Predictor:
    """The network, tried once: what is wrong with the command, the weights or the backend
    shows before anything has been read or made."""
    import torch

    from ..predict import Predictor
    from ..pretrained import from_pretrained

    try:
        model = from_pretrained(arguments.weights)
    except (OSError, ValueError) as error:
        raise WorkError(error) from error
    try:
        if torch.device(arguments.device).type == "meta":
            raise RuntimeError("it has no memory")
        model = model.to(arguments.device)
    except (AssertionError, ImportError, RuntimeError) as error:  # torch's, each a device's own
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {arguments.device} cannot be used: {reason}") from error
    try:
        predictor = Predictor(
            model,
            size=arguments.size,
            threads=arguments.threads,
            batch=arguments.batch,
            max_pixels=arguments.max_pixels,
            disparity=not arguments.distance,
            cuda_graph=not arguments.no_cuda_graph,
        )
    except ValueError as error:
        raise UsageError(error) from error
    height, width = predictor.size
    try:
        predictor.run(torch.zeros(1, predictor.channels, height, width))
    except (RuntimeError, ValueError) as error:
        raise WorkError(f"the network cannot run: {error}") from error
    return predictor


def _check_depth(arguments: argparse.Namespace, predictor: Predictor) -> None:
    """Depth maps are there exactly where the network takes them."""
    if predictor.channels == 3:
        for name in ("depth", "distance"):
            if getattr(arguments, name):
                raise UsageError(f"--{name} has no meaning: {arguments.weights} takes RGB alone")
    elif arguments.video is not None or arguments.inputs == ["-"]:
        raise UsageError(f"{arguments.weights} takes depth maps: pictures from files only")
    elif arguments.depth is None:
        raise UsageError(f"{arguments.weights} takes depth maps: --depth DIR is missing")


def _say(arguments: argparse.Namespace, predictor: Predictor, what: str) -> None:
    print(f"sodfast: {what}; {arguments.weights}: {predictor.describe()}", file=sys.stderr)


def _files(arguments: argparse.Namespace, predictor: Predictor) -> int:
    from tqdm import tqdm

    from ..jobs import add_depth
    from ..predict import check_writable, find_jobs, predict_files

    file_format = arguments.format or "png"
    try:
        jobs, failures = find_jobs(arguments.inputs, arguments.output, f".{file_format}")
    except ValueError as error:
        raise UsageError(error) from error
    if not jobs and not failures:
        raise WorkError(
            f"no pictures found in {', '.join(arguments.inputs)}; "
            "JPEG, PNG, WebP, BMP, TIFF, GIF and PPM are read"
        )
    total = len({*(job.source for job in jobs), *(failure.source for failure in failures)})
    if arguments.depth is not None:
        try:
            jobs, lacking = add_depth(jobs, arguments.output, arguments.depth)
        except ValueError as error:
            raise WorkError(error) from error
        failures += lacking
    what = f"{len(jobs)} {'picture' if len(jobs) == 1 else 'pictures'}"
    if arguments.skip_existing:
        count = len(jobs)
        jobs = [job for job in jobs if not job.target.exists()]
        what += f", {count - len(jobs)} already done"
    check_writable(arguments.output)
    _say(arguments, predictor, what)
    # disable=None: no bar where stderr is no terminal.
    with tqdm(total=len(jobs), unit="picture", disable=None) as bar:
        failures += predict_files(
            predictor, jobs, lambda: bar.update(), arguments.type, file_format,
            lambda text: bar.write(f"sodfast: warning: {text}", file=sys.stderr),
            arguments.refine,
        )  # fmt: skip
    if failures:
        lines = [f"{failure.source}: {failure.reason}" for failure in failures]
        raise WorkError("\n  ".join([f"{len(failures)} of {total} could not be done:", *lines]))
    return 0


def _standard_input(arguments: argparse.Namespace, predictor: Predictor) -> int:
    from ..jobs import describe
    from ..pictures import read_picture
    from ..predict import make_file

    if sys.stdin is None or sys.stdout is None:
        raise UsageError("- needs standard input and standard output, and one of them is closed")
    _say(arguments, predictor, "standard input to standard output")
    data = sys.stdin.buffer.read(_MAX_STDIN + 1)
    if len(data) > _MAX_STDIN:
        raise WorkError(f"standard input: more than {_MAX_STDIN:,} bytes")
    try:
        picture = read_picture(BytesIO(data), arguments.max_pixels)
        result = make_file(
            picture,
            predictor(picture.rgb),
            arguments.type,
            arguments.format or "png",
            arguments.refine,
        )
    except Exception as error:  # whatever a damaged picture provokes
        raise WorkError(f"standard input: {describe(error)}") from error
    try:
        sys.stdout.buffer.write(result)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What could not be written would be tried, and complained of, once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise WorkError(f"standard output: {describe(error)}") from error
    return 0


def _video(arguments: argparse.Namespace, predictor: Predictor) -> int:
    from tqdm import tqdm

    from ..video import VideoError, predict_video

    _say(arguments, predictor, f"the video {arguments.video}")
    try:
        with tqdm(unit="frame", disable=None) as bar:
            predict_video(
                predictor, arguments.video, arguments.output, arguments.type,
                lambda: bar.update(), arguments.refine,
            )  # fmt: skip
    except (OSError, VideoError) as error:
        raise WorkError(error) from error
    except ValueError as error:
        raise UsageError(error) from error
    return 0
