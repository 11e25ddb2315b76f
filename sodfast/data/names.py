"""What the files and folders of data sets are called: pictures, their masks and depth maps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "ENDINGS",
    "LOSSLESS",
    "is_picture",
    "partner_of",
    "picture_files",
    "role_of",
    "without_tail",
]

# What counts as a picture: the endings that `sodfast predict` looks for.
ENDINGS = frozenset(".jpg .jpeg .jpe .png .webp .bmp .tif .tiff .gif .ppm .pgm .pbm .pnm".split())
# Side by side, the mask is the one that was compressed without loss.
LOSSLESS = frozenset(".png .bmp .gif .pgm .pbm .tif .tiff".split())
# Subfolders by what they hold, the first that fits ("depth_images" are no images); compared in
# lower case, - and blanks as _.
_ROLES = {
    "depth": re.compile(
        r"(.*_)?(raw|smoothed)?(depths?|disparit(y|ies))(_?(maps?|images?|imgs?|png|bmp))?"
    ),
    "image": re.compile(r"(.*_)?(images?|imgs?|img|photos?|pictures?)|rgb(_left)?|left|li"),
    "mask": re.compile(
        r"(.*_)?(masks?|gts?|ground_?truths?)|ground_?truth_masks?|pixelwisegt.*|.*_gt_pixelwise"
    ),
}
_TAILS = {"mask": ("_mask", "-mask", "_gt", "-gt"), "depth": ("_depth", "-depth", "_disparity")}
_IMAGE_TAILS = ("_left", "-left", "_rgb", "-rgb")  # of pictures whose partners lack them


def role_of(name: str) -> str | None:
    """What a folder of this name usually holds: "image", "mask", "depth", or None."""
    plain = re.sub(r"[-\s]+", "_", name.strip().lower())
    return next((role for role, names in _ROLES.items() if names.fullmatch(plain)), None)


def without_tail(stem: str) -> str:
    """A mask's stem as its picture has it: without "_mask" and the like."""
    for tail in _TAILS["mask"]:
        if stem.lower().endswith(tail):
            return stem[: -len(tail)]
    return stem


def is_picture(path: Path) -> bool:
    """Whether a file's name is that of a picture, and not hidden."""
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".")


def picture_files(place: str | os.PathLike[str]) -> Iterator[tuple[str, Path]]:
    """Every picture in a folder and below: its name (folders and stem) and its path, in order.

    Hidden files are passed over. Raises FileNotFoundError when the folder does not exist.
    """
    if not Path(place).is_dir():
        raise FileNotFoundError(f"no such folder: {place}")
    for here, folders, files in os.walk(place):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(here).relative_to(place)
        for file in sorted(files):
            path = Path(here) / file
            if is_picture(path):
                yield (below / path.stem).as_posix(), path


def partner_of(name: str, role: str, files: dict[str, Path]) -> Path | None:
    """Of masks or depth maps by name, the one that belongs to a picture, or None."""
    names = [name]
    names += [name[: -len(tail)] for tail in _IMAGE_TAILS if name.lower().endswith(tail)]
    for one in names:
        for tail in ("", *_TAILS[role]):
            for candidate in (one + tail, one + tail.upper(), one + tail.title()):
                if candidate in files:
                    return files[candidate]
    return None
