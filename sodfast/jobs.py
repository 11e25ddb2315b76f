"""Which files to make of which: folders, patterns and names for `sodfast predict`."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["Failure", "Job", "add_depth", "describe", "find_jobs"]

# What a folder is searched for. A file that is named itself is tried whatever its name.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .tif .tiff .gif .ppm .pgm .pbm .pnm".split()
)


@dataclass(frozen=True)
class Job:
    """One picture and the file that is made of it; depth: its depth map, if it has any."""

    source: Path
    target: Path
    depth: Path | None = None


@dataclass(frozen=True)
class Failure:
    """One picture of which nothing could be made, and why, as a sentence for people."""

    source: Path
    reason: str


def find_jobs(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    suffix: str = ".png",
) -> tuple[list[Job], list[Failure]]:
    """Which files to make: files as they are named, folders with everything below them.

    An input that does not exist but has ``*``, ``?`` or ``[`` in it is a pattern; ``**`` goes
    through folders. The structure below a folder, or below the part of a pattern before the
    first of these characters, is kept under `output`; ``a/b.jpg`` becomes ``a/b.png`` (or
    another `suffix`). Where two pictures would share a name (b.jpg and b.png), both keep
    their own ending: ``b.jpg.png`` and ``b.png.png``. Hidden files, and `output` itself where
    it lies inside an input folder, are passed over. An input that does not exist, and a
    pattern that nothing fits, is a Failure.

    Raises ValueError for an empty name, where the output is one of the folders, and where one of
    the pictures would be overwritten.
    """
    for what, place in (("the output", output), *(("an input", place) for place in inputs)):
        if not os.fspath(place):
            raise ValueError(f"{what} is empty: name a folder or a picture ('.' is this folder)")
    output = Path(output)
    output_resolved = output.resolve()
    found: dict[Path, tuple[Path, Path]] = {}  # resolved: the picture, its name under output
    failures: list[Failure] = []
    for entry, base in _expand(inputs, output_resolved, failures):
        if entry.is_dir():
            if entry.resolve() == output_resolved:
                raise ValueError(
                    f"the output folder {output} is one of the folders to read: what is written "
                    "would be taken for pictures the next time; choose another"
                )
            for path in _walk(entry, output_resolved, failures):
                found.setdefault(path.resolve(), (path, path.relative_to(base or entry)))
        else:
            name = entry.relative_to(base) if base else Path(entry.name)
            found.setdefault(entry.resolve(), (entry, name))

    wanted: dict[Path, int] = {}
    for _, relative in found.values():
        name = relative.with_suffix(suffix)
        wanted[name] = wanted.get(name, 0) + 1
    jobs: list[Job] = []
    taken: dict[Path, Path] = {}
    for source, relative in found.values():
        name = relative.with_suffix(suffix)
        if wanted[name] > 1:
            name = relative.with_name(relative.name + suffix)
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


def add_depth(
    jobs: Sequence[Job], output: str | os.PathLike[str], depth: str | os.PathLike[str]
) -> tuple[list[Job], list[Failure]]:
    """The jobs with their depth maps, and a Failure for each picture that has none.

    output: as of find_jobs. depth: a folder. Names match as the pictures' names under `output`
    do ("a/1.jpg" and a/1.png or a/1_depth.png). Raises what
    `sodfast.data.folders.find_depth` raises.
    """
    from .data.folders import find_depth

    partner = find_depth(depth)
    ready: list[Job] = []
    failures: list[Failure] = []
    for job in jobs:
        below = job.target.relative_to(output)
        # Of two pictures b.jpg and b.png the files are called b.jpg.png and b.png.png.
        name = below.with_name(job.source.stem).as_posix()
        found = partner(name)
        if found is None:
            failures.append(Failure(job.source, f"no depth map named {name} in {depth}"))
        else:
            ready.append(replace(job, depth=found))
    return ready, failures


def _expand(
    inputs: Sequence[str | os.PathLike[str]], skip: Path, failures: list[Failure]
) -> Iterator[tuple[Path, Path | None]]:
    """Yields what is there, with the fixed folder that a pattern begins with, or None."""

    def fits(path: Path) -> bool:
        # "photos/*": every folder and what looks like a picture, but not our own output.
        if skip in (path.resolve(), *path.resolve().parents):
            return False
        return path.is_dir() or path.suffix.lower() in SUFFIXES

    for entry in map(Path, inputs):
        text = str(entry)
        if entry.exists():
            yield entry, None
        elif not glob.has_magic(text):
            reason = "is a broken link" if entry.is_symlink() else "no such file or folder"
            failures.append(Failure(entry, reason))
        else:
            parts = entry.parts
            fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
            matches = [p for p in sorted(map(Path, glob.glob(text, recursive=True))) if fits(p)]
            if not matches:
                failures.append(Failure(entry, "no picture fits this pattern"))
            for path in matches:
                yield path, Path(*parts[:fixed])


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
