"""Pictures to saliency maps: `Predictor` for Python, `predict_files` for folders."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
import torch
from torch import nn

from .preprocess import check_preprocessing, read_image, to_input, to_map
from .weights import atomic_write, load

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Failure", "Job", "Predictor", "find_jobs", "predict_files"]

Picture = Union[str, os.PathLike[str], "Image.Image", np.ndarray]

# What a folder is searched for. A file that is named itself is tried whatever its name.
SUFFIXES = frozenset(".jpg .jpeg .jpe .png .webp .bmp .tif .tiff .gif .ppm .pgm .pbm .pnm".split())


class Predictor:
    """A network ready for pictures.

    >>> predictor = Predictor("csnet-x2-L.safetensors")
    >>> saliency = predictor("photo.jpg")          # (H, W) uint8, the photo's own size

    weights: a file written by `sodfast.save`, or a model from `sodfast.create_model` or
    `sodfast.load` (it is copied, fused, and left as it was). size: side of the square that
    the network sees, or (height, width); None takes what the weights were trained for.
    threads: sets torch's number of CPU threads, for the whole process; None leaves it.

    Raises FileNotFoundError or ValueError for weights that cannot be read, and ValueError for
    a size that is no multiple of what the network needs (the nearest sizes are named).
    Calls from several threads at once are allowed.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] | nn.Module,
        size: int | tuple[int, int] | None = None,
        threads: int | None = None,
    ) -> None:
        from .fuse import fuse

        if threads is not None and (isinstance(threads, bool) or threads < 1):
            raise ValueError(f"threads must be at least 1, got {threads}")
        model = weights if isinstance(weights, nn.Module) else load(weights)
        self.name = str(getattr(model, "name", type(model).__name__))
        self.preprocessing = check_preprocessing(getattr(model, "preprocessing", None))
        self.size = _check_size(size, self.preprocessing, getattr(model, "size_multiple", 16))
        self.network = fuse(model)
        if threads is not None:
            torch.set_num_threads(threads)

    def prepare(self, picture: Picture) -> tuple[torch.Tensor, tuple[int, int]]:
        """Decodes and normalises: the input (1, 3, h, w) float32 and the picture's (H, W).

        See `sodfast.preprocess.read_image` for what is read, and for the errors.
        """
        rgb = read_image(picture)
        return to_input(rgb, self.preprocessing, self.size), (rgb.shape[0], rgb.shape[1])

    def run(self, network_input: torch.Tensor) -> torch.Tensor:
        """The network alone: (1, 3, h, w) float32 to logits (1, 1, h, w)."""
        with torch.inference_mode():
            return self.network(network_input)

    def __call__(self, picture: Picture) -> np.ndarray:
        """The saliency map of one picture, (H, W) uint8: 0 background … 255 salient.

        picture: a path, a PIL image, or an array ((H, W[, C]) uint8, uint16, bool, or floats
        in 0 … 1). EXIF orientation is applied, so the map is upright.
        """
        network_input, size = self.prepare(picture)
        return to_map(self.run(network_input), size)


def _check_size(
    size: int | tuple[int, int] | None, preprocessing: dict, multiple: int
) -> tuple[int, int]:
    if size is None:
        size = (preprocessing["size"][0], preprocessing["size"][1])
    elif isinstance(size, int):
        size = (size, size)
    height, width = size
    for value in (height, width):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"size must be positive whole numbers of pixels, got {size}")
        if value % multiple:
            below = value // multiple * multiple
            nearest = [n for n in (below, below + multiple) if n > 0]
            raise ValueError(
                f"size must be a multiple of {multiple}, got {value}; "
                f"the nearest are {' and '.join(map(str, nearest))}"
                if len(nearest) > 1
                else f"size must be a multiple of {multiple}, got {value}; "
                f"the nearest is {nearest[0]}"
            )
    return height, width


@dataclass(frozen=True)
class Job:
    """One picture and the file that its map goes to."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Failure:
    """One picture without a map, and why, as a sentence for people."""

    source: Path
    reason: str


def find_jobs(
    inputs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> tuple[list[Job], list[Failure]]:
    """Which maps to make: files as they are named, folders with everything below them.

    A folder's structure is kept under `output`; ``a/b.jpg`` becomes ``a/b.png``. Where two
    pictures would share a map's name (b.jpg and b.png), both keep their own ending:
    ``b.jpg.png`` and ``b.png.png``. Hidden files, and `output` itself where it lies inside
    an input folder, are passed over. An input that does not exist is a Failure.

    Raises ValueError where a map would overwrite one of the pictures.
    """
    output = Path(output)
    output_resolved = output.resolve()
    found: dict[Path, tuple[Path, Path]] = {}  # resolved: the picture, its name under output
    failures: list[Failure] = []
    for entry in map(Path, inputs):
        if entry.is_dir():
            for path in _walk(entry, output_resolved, failures):
                found.setdefault(path.resolve(), (path, path.relative_to(entry)))
        elif entry.exists():
            found.setdefault(entry.resolve(), (entry, Path(entry.name)))
        else:
            failures.append(Failure(entry, "no such file or folder"))

    wanted: dict[Path, int] = {}
    for _, relative in found.values():
        name = relative.with_suffix(".png")
        wanted[name] = wanted.get(name, 0) + 1
    jobs: list[Job] = []
    taken: dict[Path, Path] = {}
    for source, relative in found.values():
        name = relative.with_suffix(".png")
        if wanted[name] > 1:
            name = relative.with_name(relative.name + ".png")
        if name in taken:
            failures.append(
                Failure(source, f"its map would have the same name as that of {taken[name]}")
            )
            continue
        taken[name] = source
        target = output / name
        if (output_resolved / name) in found:
            raise ValueError(
                f"the map of {source} would overwrite the picture {target}; "
                "choose another output folder"
            )
        jobs.append(Job(source, target))
    return jobs, failures


def _walk(folder: Path, skip: Path, failures: list[Failure]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        failures.append(Failure(Path(error.filename or folder), describe(error)))

    for place, folders, files in os.walk(folder, onerror=unreadable):
        here = Path(place)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (here / name).resolve() != skip
        )
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield here / name


def predict_files(
    predictor: Predictor,
    jobs: Sequence[Job],
    progress: Callable[[], object] | None = None,
) -> list[Failure]:
    """Writes the map of every job as an 8-bit grey PNG; returns the jobs that failed.

    A picture that cannot be read or mapped does not stop the others. Each map is written
    under a temporary name and renamed. progress is called after every job. Raises OSError
    when a map cannot be written: the next one could not be either.
    """
    failures = []
    for job in jobs:
        try:
            saliency = predictor(job.source)
        except Exception as error:  # whatever a damaged file provokes: it is one file
            failures.append(Failure(job.source, describe(error)))
        else:
            write_map(saliency, job.target)
        if progress is not None:
            progress()
    return failures


def write_map(saliency: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Writes a map (H, W) uint8 as a PNG, whole or not at all; makes the folder."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No fsync: a map is made again in milliseconds, and waiting for the disk takes longer.
    with atomic_write(path, sync=False) as file:
        Image.fromarray(saliency).save(file, format="PNG")


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Makes the output folder and proves that files can be made in it, before any work.

    Raises OSError with a sentence that names the folder.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            reason = "it, or something above it, is a file"
        else:
            reason = describe(error)
        raise OSError(f"cannot write to the output folder {folder}: {reason}") from error


def describe(error: BaseException) -> str:
    """An exception as one line for people."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not a picture, or of a kind that is not read (JPEG, PNG, WebP, BMP, TIFF, GIF, PPM)"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, (OSError, ValueError)):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else text[:297] + "..."
