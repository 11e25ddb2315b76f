"""Checkpoints that a killed process or a full disk cannot spoil.

A file ``checkpoint-NNNNNNNNN.pt`` is one line of magic, one line with the SHA-256 of the rest,
and the state as torch serialises it (read back with weights_only=True: no code is run). It is
written under another name, fsynced and renamed, and only then does the oldest go: at every
moment at least one whole checkpoint is there, and a damaged one is noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .weights import atomic_write

__all__ = [
    "Damaged",
    "InUse",
    "advice",
    "clean",
    "latest",
    "list_checkpoints",
    "lock",
    "read",
    "save",
]

_MAGIC = b"sodfast checkpoint 1\n"
_NAME = re.compile(r"checkpoint-(\d{9})\.pt")
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")  # as weights.atomic_write names them
KEEP = 2


class Damaged(ValueError):
    """A checkpoint whose content is not what was written."""


class InUse(ValueError):
    """Another process works in this folder."""


@contextlib.contextmanager
def lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Makes the folder, and keeps other processes from training in it: they would spoil each
    other's checkpoints. The lock goes with the process, however that ends. Raises InUse."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # this system has no such lock
        except OSError as error:
            raise InUse(f"{folder}: another process trains in this folder") from error
        yield


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a folder, oldest step first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def save(
    folder: str | os.PathLike[str], step: int, state: dict[str, Any], keep: int = KEEP
) -> Path:
    """Writes the state at `step` and removes all but the newest `keep` checkpoints.

    state: tensors, numbers, strings, and dicts and lists of them. Raises OSError when it
    cannot be written (a full disk): older checkpoints are then all still there.
    """
    folder = Path(folder)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    path = folder / f"checkpoint-{step:09d}.pt"
    with atomic_write(path) as file:
        file.write(_MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n")
        file.write(payload)
    _sync_folder(folder)
    # Not those of a later step: after --resume from an older one they are as good as new.
    older = [other for other in list_checkpoints(folder) if other.name <= path.name]
    for other in older[:-keep]:
        other.unlink(missing_ok=True)
    return path


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself survive a power cut, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state in a checkpoint, tensors on the CPU.

    Raises FileNotFoundError, or Damaged (a ValueError) that names the file and what is wrong.
    """
    data = Path(path).read_bytes()
    head = len(_MAGIC) + 65
    if not data.startswith(_MAGIC) or len(data) < head:
        raise Damaged(f"{path}: not a checkpoint of this version of sodfast, or cut")
    payload = memoryview(data)[head:]
    if hashlib.sha256(payload).hexdigest().encode() != data[len(_MAGIC) : head - 1]:
        raise Damaged(f"{path}: damaged, its content does not have the recorded SHA-256")
    state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise Damaged(f"{path}: holds a {type(state).__name__}, not a state")
    return state


def latest(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest checkpoint that is whole: its path, its state, and what was wrong with newer
    ones. None where there is no checkpoint at all. Raises Damaged when none is whole."""
    complaints: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, read(path), complaints
        except (Damaged, OSError) as error:
            complaints.append(str(error))
    if complaints:
        raise Damaged("no checkpoint is whole:\n  " + "\n  ".join(complaints))
    return None


def advice(folder: str | os.PathLike[str]) -> str:
    """What a stopped run can go on from, as a part of a sentence."""
    files = list_checkpoints(folder)
    if not files:
        return "no checkpoint had been written yet"
    return f"the last checkpoint is {files[-1]}, --resume goes on from it"


def clean(folder: str | os.PathLike[str]) -> list[Path]:
    """Removes the unfinished files that a killed process left in its run's folder."""
    left = [path for path in Path(folder).iterdir() if _TEMPORARY.fullmatch(path.name)]
    for path in left:
        path.unlink(missing_ok=True)
    return left
