"""Pictures and their masks (and depth maps), found by the usual names of folders.

What is understood, in any mixture of upper and lower case::

    images/ masks/                          and image, imgs, img, rgb; mask, gt, ground_truth_mask …
    DUTS-TR-Image/ DUTS-TR-Mask/            also DUTS-TE-…
    DUT-OMRON-image/ pixelwiseGT-new-PNG/
    imgs/pascal/ masks/pascal/              PASCAL-S: folders below keep their names
    Imgs/0001.jpg Imgs/0001.png             MSRA10K, SOD: side by side, in a folder or right here
    RGB/ GT/ depth/                         RGB-D sets: NJU2K, NLPR, SIP, DES (RGBD135), LFSD,
                                            STERE, also left/ or LI/, Depth_maps/, disparity/

A folder that holds nothing but one other folder (as archives unpack) is looked through. A
picture and its mask share the name up to the ending; a mask may add ``_mask`` or ``_gt``, a
depth map ``_depth``, a picture ``_left`` or ``_rgb``. A text file can
name a part of a folder, see `find_data`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .names import ENDINGS, LOSSLESS, is_picture, partner_of, picture_files, role_of, without_tail

__all__ = [
    "DataFolder",
    "Pair",
    "Unlabelled",
    "find_data",
    "find_depth",
    "find_images",
    "find_pairs",
    "find_truths",
    "read_names",
]


@dataclass(frozen=True)
class Pair:
    """One picture with its ground truth.

    name: the file's name up to its ending, with the folders below the data set's own where
    there are any ("pascal/12"). depth: the depth map, where it was asked for.
    """

    name: str
    image: Path
    mask: Path
    depth: Path | None = None


@dataclass(frozen=True)
class Unlabelled:
    """One picture without ground truth; name: as of :class:`Pair`."""

    name: str
    image: Path
    mask: None = None
    depth: None = None


@dataclass(frozen=True)
class DataFolder:
    """A data set as it was found.

    name: the folder's name. pairs: sorted by name. problems: a sentence for every file that
    has no partner or cannot be told from another; nothing is left out without one.
    """

    name: str
    root: Path
    pairs: list[Pair]
    problems: list[str] = field(default_factory=list)


def find_pairs(
    folder: str | os.PathLike[str],
    depth: bool = False,
    names: str | os.PathLike[str] | None = None,
) -> list[Pair]:
    """The pairs of a complete data set, sorted by name; see `find_data` for the arguments.

    Raises what `find_data` raises, and ValueError that lists the files without a partner.
    """
    found = find_data(folder, depth=depth, names=names)
    if found.problems:
        shown = "\n  ".join(found.problems[:10])
        more = f"\n  and {len(found.problems) - 10} more" if found.problems[10:] else ""
        raise ValueError(f"{found.root}: images and masks do not match:\n  {shown}{more}")
    return found.pairs


def find_data(
    folder: str | os.PathLike[str],
    depth: bool = False,
    names: str | os.PathLike[str] | None = None,
) -> DataFolder:
    """Finds the pictures and masks of a data set.

    folder: a folder as described at the top of this module; or a text file, a line per pair,
    that gives the image, the mask (and the depth map) as paths relative to itself, separated
    by blanks, tabs or commas. depth: depth maps must be there too. names: a text file with
    a name per line, with or without ending: only these, and each of them must be there.

    Raises FileNotFoundError when `folder` or `names` does not exist, and ValueError when no
    layout is recognised or nothing is found in it. Files without a partner are no error
    here: they stand in `problems`.
    """
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"no such data folder: {root}")
    if root.is_file():
        found = _from_list(root, depth)
    else:
        places = _layout(root)
        if places is None:
            raise ValueError(
                f"{root}: found neither folders of images and masks (images/ and masks/, or the "
                "names that DUTS, ECSSD, HKU-IS, DUT-OMRON … use) nor photos and masks side by side"
            )
        found = _collect(root, places, depth)
    if names is not None:
        found = _only(found, Path(names))
    if not found.pairs:
        first = f"; {found.problems[0]}" if found.problems else ""
        raise ValueError(f"{root}: no image has a mask of the same name{first}")
    return found


def find_images(source: str | os.PathLike[str]) -> list[Unlabelled]:
    """Pictures to learn from without ground truth, sorted by name.

    source: a folder, with everything below it (of a data set as for `find_data` its images
    alone); or a text file with the path of a picture per line, relative to itself.

    Raises FileNotFoundError, and ValueError where there are no pictures, two share a name, or
    a line names none.
    """
    root = Path(source)
    if not root.exists():
        raise FileNotFoundError(f"no such folder of images: {root}")
    if root.is_file():
        files = []
        for number, line in read_names(root):
            path = root.parent / line
            if not path.is_file():
                raise ValueError(f"{root}, line {number}: {path} does not exist")
            files.append((Path(line).with_suffix("").as_posix(), path))
    else:
        places = _layout(root)
        files = list(picture_files(places["image"] if places is not None else root))
        if places is not None and places["mask"] == places["image"]:
            # Side by side: the mask was compressed without loss.
            files = [(name, path) for name, path in files if path.suffix.lower() not in LOSSLESS]
    if not files:
        raise ValueError(f"{root}: no pictures found")
    found: dict[str, Unlabelled] = {}
    for name, path in files:
        if name in found:
            first = found[name].image
            raise ValueError(f"{root}: two pictures are named {name!r}: {first} and {path}")
        found[name] = Unlabelled(name, path)
    return [found[name] for name in sorted(found)]


def find_truths(folder: str | os.PathLike[str]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Ground truths to score maps against: name to mask, and name to photo where there are any.

    folder: a data set as for `find_data`, or simply a folder of masks, with everything below
    it. Raises FileNotFoundError, and ValueError where nothing is found or two masks share
    a name.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    # A folder that is named for masks is taken for what it says, whatever else is in it.
    places = None if role_of(root.resolve().name) == "mask" else _layout(root)
    images: dict[str, Path] = {}
    if places is not None:
        found = _collect(root, places, depth=False)
        ambiguous = [text for text in found.problems if text.startswith("more than one mask")]
        if ambiguous:
            raise ValueError(f"{root}: {ambiguous[0]}")
        images = {pair.name: pair.image for pair in found.pairs}
        masks = {pair.name: pair.mask for pair in found.pairs}
        if places["mask"] != places["image"]:
            # also the masks that have no photo: a map may be there for them
            taken = set(masks.values())
            masks.update(
                (name, path) for name, path in picture_files(places["mask"]) if path not in taken
            )
    else:
        masks = {}
        for name, path in picture_files(root):
            if name in masks:
                raise ValueError(f"two masks are named {name!r}: {masks[name]} and {path}")
            masks[name] = path
    if not masks:
        raise ValueError(f"no masks found in {root}")
    return dict(sorted(masks.items())), images


def _layout(root: Path) -> dict[str, Path] | None:
    """Where images, masks and depth maps lie; the same folder for both when side by side."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    by_role: dict[str, list[Path]] = {}
    for path in folders:
        role = role_of(path.name)
        if role is not None:
            by_role.setdefault(role, []).append(path)
    for role, paths in by_role.items():
        if len(paths) > 1 and role != "depth":
            listed = ", ".join(path.name for path in paths)
            raise ValueError(
                f"{root}: more than one folder of {role}s ({listed}); "
                "keep one of them here, or give a list of pairs"
            )
    # Some sets have the sensor's map and a smoothed one: the plainest name counts, "depth".
    places = {role: min(paths, key=lambda p: len(p.name)) for role, paths in by_role.items()}
    if "image" in places and "mask" in places:
        return places
    for place in (root, *([places["image"]] if "image" in places else [])):
        stems: dict[bool, set[str]] = {True: set(), False: set()}
        for path in filter(is_picture, place.iterdir()):
            lossless = path.suffix.lower() in LOSSLESS
            stems[lossless].add(without_tail(path.stem) if lossless else path.stem)
        if stems[True] & stems[False]:
            return {"image": place, "mask": place}
    if len(folders) == 1 and not any(is_picture(path) for path in root.iterdir()):
        return _layout(folders[0])
    return None


def _collect(root: Path, places: dict[str, Path], depth: bool) -> DataFolder:
    if depth and "depth" not in places:
        raise ValueError(f"{root}: depth maps were asked for, but there is no folder depth/")
    problems: list[str] = []
    side_by_side = places["image"] == places["mask"]
    groups: dict[str, dict[str, list[Path]]] = {"image": {}, "mask": {}, "depth": {}}
    for name, path in picture_files(places["image"]):
        lossless = side_by_side and path.suffix.lower() in LOSSLESS
        groups["mask" if lossless else "image"].setdefault(name, []).append(path)
    for role in ("mask", "depth"):
        if role in places and not (role == "mask" and side_by_side):
            for name, path in picture_files(places[role]):
                groups[role].setdefault(name, []).append(path)

    single: dict[str, dict[str, Path]] = {}
    for role, group in groups.items():
        single[role] = {name: paths[0] for name, paths in group.items() if len(paths) == 1}
        for paths in group.values():
            if len(paths) > 1:
                listed = " and ".join(path.name for path in paths)
                problems.append(f"more than one {role} of the same name: {listed}")

    pairs: list[Pair] = []
    used: set[Path] = set()
    for name, image in single["image"].items():
        partners = {role: partner_of(name, role, single[role]) for role in ("mask", "depth")}
        mask = partners["mask"]
        if mask is not None:
            used.add(mask)
        if mask is None:
            problems.append(f"{_show(image, root)} has no mask")
        elif depth and partners["depth"] is None:
            problems.append(f"{_show(image, root)} has no depth map")
        else:
            pairs.append(Pair(name, image, mask, partners["depth"] if depth else None))
    problems += [
        f"{_show(mask, root)} has no image" for mask in single["mask"].values() if mask not in used
    ]
    pairs.sort(key=lambda pair: pair.name)
    return DataFolder(root.resolve().name, root, pairs, problems)


def find_depth(folder: str | os.PathLike[str]) -> Callable[[str], Path | None]:
    """Depth maps by the picture's name: a function that returns the file, or None.

    folder: with everything below it; names match as in a data set ("a/1" and a/1_depth.png).
    Raises FileNotFoundError, and ValueError where there is no picture in it or two share a name.
    """
    files: dict[str, Path] = {}
    for name, path in picture_files(folder):
        if name in files:
            raise ValueError(f"two depth maps are named {name!r}: {files[name]} and {path}")
        files[name] = path
    if not files:
        raise ValueError(f"no depth maps found in {folder}")
    return lambda name: partner_of(name, "depth", files)


def _show(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def read_names(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """The lines of a list with their numbers; empty ones and those that begin with # left out.

    Raises FileNotFoundError, and ValueError for a file that is no text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such list of names: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file") from error
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _from_list(path: Path, depth: bool) -> DataFolder:
    """A list of pairs: image, mask and depth map per line, relative to the list."""
    wanted = 3 if depth else 2
    pairs: list[Pair] = []
    problems: list[str] = []
    for number, line in read_names(path):
        columns = re.split(r"\s*[,\t]\s*" if re.search(r"[,\t]", line) else r"\s+", line)
        if len(columns) < wanted:
            expected = "image, mask and depth map" if depth else "image and mask"
            raise ValueError(f"{path}, line {number}: {expected} expected, got {line!r:.80}")
        files = [path.parent / column for column in columns[:wanted]]
        missing = [file for file in files if not file.is_file()]
        if missing:
            problems.append(f"line {number}: {missing[0]} does not exist")
        else:
            name = Path(columns[0]).with_suffix("").as_posix()
            pairs.append(Pair(name, files[0], files[1], files[2] if depth else None))
    stems = [Path(pair.name).name for pair in pairs]
    if len(set(stems)) == len(stems):  # the folders only count where they are needed
        pairs = [Pair(stem, p.image, p.mask, p.depth) for stem, p in zip(stems, pairs)]
    pairs.sort(key=lambda pair: pair.name)
    return DataFolder(path.stem, path, pairs, problems)


def _only(found: DataFolder, names: Path) -> DataFolder:
    """The pairs that a list of names asks for, and a problem for each that is not there."""
    by_name = {pair.name: pair for pair in found.pairs}
    pairs: dict[str, Pair] = {}
    problems: list[str] = []
    for number, line in read_names(names):
        name = line
        if name not in by_name and Path(line).suffix.lower() in ENDINGS:
            name = Path(line).with_suffix("").as_posix()
        if name in by_name:
            pairs[name] = by_name[name]
        else:
            problems.append(f"{names}, line {number}: {line!r} has no image with a mask here")
    return DataFolder(found.name, found.root, [pairs[name] for name in sorted(pairs)], problems)
