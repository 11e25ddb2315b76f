"""Reads pickles and torch.save's older format without executing anything in them.

A checkpoint is a pickle, and unpickling executes whatever the file says. So nothing here
unpickles: `run_pickle` interprets the few opcodes that lists, dictionaries, numbers, text
and arrays need, refuses every other one, and where a pickle names a function to call, one of
four functions of this file (`_CALLS`) is called in its place or the file is refused. Every
size is checked against the bytes that are there before anything is allocated.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["Array", "CheckpointError", "read_bytes", "read_checkpoint", "run_pickle"]

_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of torch.save's older format
_PROTOCOL = 1001  # the second
_MAX_BYTES = 64 << 20  # the published files have 0.7 MB
_MAX_OPCODES = 1_000_000  # the published files have 40,000


class CheckpointError(ValueError):
    """The file is damaged, hostile, or of another kind than the published checkpoints."""


# ------------------------------------------------------------------ what a pickle may build


@dataclass(frozen=True)
class _Name:
    """A global that the pickle named. Looked up in tables of ours, never imported."""

    text: str


@dataclass
class _Storage:
    dtype: np.dtype
    count: int
    data: bytes | None = None  # filled in after the pickles have been read


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Dtype:
    """numpy.dtype's stand-in: its state says only little-endian, which is checked."""

    def __init__(self, code: str) -> None:
        self.code = code


class Array:
    """numpy.ndarray's stand-in; `value` is there after its state has been read."""

    value: np.ndarray | None = None


_STORAGES: dict[str, np.dtype] = {
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.LongStorage": np.dtype("<i8"),
}
_ARRAY_DTYPES: dict[str, np.dtype] = {
    code: np.dtype("<" + code) for code in ("f4", "f8", "i4", "i8")
}


def _is_count(value: object, limit: int = 1 << 40) -> bool:
    return type(value) is int and 0 <= value < limit


def _make_tensor(*arguments: Any) -> _Tensor:
    # storage, offset, shape, stride, requires_grad, hooks
    if len(arguments) != 6:
        raise CheckpointError("a tensor record has the wrong number of entries")
    storage, offset, shape, stride = arguments[:4]
    good = (
        isinstance(storage, _Storage)
        and _is_count(offset)
        and type(shape) is tuple
        and type(stride) is tuple
        and len(shape) == len(stride) <= 8
        and all(map(_is_count, shape + stride))
        and _is_count(math.prod(n for n in shape if n))
    )
    if not good:
        raise CheckpointError("a tensor record is malformed")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
    # The second condition keeps a stride of 0 from turning one number into terabytes.
    if 0 not in shape and (last >= storage.count or math.prod(shape) > storage.count):
        raise CheckpointError("a tensor reaches beyond its storage")
    return _Tensor(storage, offset, shape, stride)


def _make_ordered_dict(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise CheckpointError("an OrderedDict with contents in its constructor")
    return {}


def _make_array(*arguments: Any) -> Array:
    if len(arguments) != 3 or arguments[0] != _Name("numpy.ndarray"):
        raise CheckpointError("an array record is malformed")
    return Array()


def _make_dtype(*arguments: Any) -> _Dtype:
    if not arguments or type(arguments[0]) is not str or arguments[0] not in _ARRAY_DTYPES:
        raise CheckpointError("an array's numbers are of a kind that is not read")
    return _Dtype(arguments[0])


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _make_ordered_dict,
    "torch._utils._rebuild_tensor_v2": _make_tensor,
    "numpy.core.multiarray._reconstruct": _make_array,
    "numpy._core.multiarray._reconstruct": _make_array,
    "numpy.dtype": _make_dtype,
}
_NAMES = {*_CALLS, *_STORAGES, "numpy.ndarray"}


def _set_state(target: Any, state: Any) -> None:
    """The BUILD opcode: only arrays have a state that matters here."""
    if type(target) is dict:
        return  # an OrderedDict's attributes: torch keeps version numbers there
    if isinstance(target, _Dtype) and type(state) is tuple and len(state) >= 2:
        if state[1] not in ("<", "|"):
            raise CheckpointError("an array is not little-endian")
        return
    if isinstance(target, Array) and type(state) is tuple and len(state) == 5:
        _, shape, kind, fortran, data = state
        good = (
            type(shape) is tuple
            and len(shape) <= 2
            and all(_is_count(n, 1 << 20) for n in shape)
            and isinstance(kind, _Dtype)
            and fortran is False
            and type(data) is bytes
        )
        if good:
            dtype = _ARRAY_DTYPES[kind.code]
            if len(data) == math.prod(shape) * dtype.itemsize:
                target.value = np.frombuffer(data, dtype=dtype).reshape(shape)
                return
    raise CheckpointError("an object's state is malformed")


# -------------------------------------------------------------------- the restricted reader

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINBYTES "
    "SHORT_BINBYTES".split()
)
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def run_pickle(stream: io.BytesIO, load_persistent: Callable[[Any], Any] | None = None) -> Any:
    """Interprets one pickle and returns what it builds; leaves `stream` just behind it.

    An iterative machine: nesting in the file never becomes nesting of calls here, and no
    object from the file is ever hashed (but text and integers), compared or printed.
    """
    argument: Any
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def take(count: int) -> list[Any]:
        if len(stack) - (marks[-1] if marks else 0) < count:
            raise CheckpointError("the pickle takes more than it has put down")
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    def take_to_mark() -> list[Any]:
        if not marks:
            raise CheckpointError("the pickle closes a list that it has not opened")
        return take(len(stack) - marks.pop())

    def top(kind: type) -> Any:
        if not stack or type(stack[-1]) is not kind:
            raise CheckpointError(f"the pickle treats something as a {kind.__name__} that is none")
        return stack[-1]

    def set_items(items: list[Any]) -> None:
        target = top(dict)
        if len(items) % 2 or not all(type(key) in (str, int) for key in items[::2]):
            raise CheckpointError("a dictionary key that is neither text nor a whole number")
        target.update(zip(items[::2], items[1::2]))

    def named(text: str) -> _Name:
        if text not in _NAMES:
            raise CheckpointError(
                f"the pickle asks for {text[:80]!r}, which is not allowed "
                "(nothing of it was executed)"
            )
        return _Name(text)

    steps = 0
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            steps += 1
            if steps > _MAX_OPCODES:
                raise CheckpointError(f"the pickle has more than {_MAX_OPCODES} steps")
            op = opcode.name
            if op in _LITERALS:
                stack.append(argument)
            elif op in _CONSTANTS:
                stack.append(_CONSTANTS[op])
            elif op in _EMPTY:
                stack.append(_EMPTY[op]())
            elif op in _TUPLES:
                stack.append(tuple(take(_TUPLES[op])))
            elif op == "MARK":
                marks.append(len(stack))
            elif op == "TUPLE":
                stack.append(tuple(take_to_mark()))
            elif op in ("APPEND", "APPENDS"):
                items = take(1) if op == "APPEND" else take_to_mark()
                top(list).extend(items)
            elif op in ("SETITEM", "SETITEMS"):
                set_items(take(2) if op == "SETITEM" else take_to_mark())
            elif op in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                [value] = take(1)
                stack.append(value)
                memo[len(memo) if op == "MEMOIZE" else argument] = value
            elif op in ("BINGET", "LONG_BINGET"):
                if argument not in memo:
                    raise CheckpointError("the pickle recalls something it has not kept")
                stack.append(memo[argument])
            elif op == "GLOBAL":
                stack.append(named(argument.replace(" ", ".", 1)))
            elif op == "STACK_GLOBAL":
                module, name = take(2)
                if type(module) is not str or type(name) is not str:
                    raise CheckpointError("a name in the pickle is no text")
                stack.append(named(f"{module}.{name}"))
            elif op == "REDUCE":
                function, arguments = take(2)
                call = _CALLS.get(function.text) if isinstance(function, _Name) else None
                if call is None or type(arguments) is not tuple:
                    raise CheckpointError("the pickle calls something that is no function")
                stack.append(call(*arguments))
            elif op == "BUILD":
                target, state = take(2)
                _set_state(target, state)
                stack.append(target)
            elif op == "BINPERSID" and load_persistent is not None:
                stack.append(load_persistent(*take(1)))
            elif op == "STOP":
                [value] = take(1)
                return value
            elif op not in ("PROTO", "FRAME"):
                raise CheckpointError(f"the pickle has the step {op}, which is not allowed")
    except CheckpointError:
        raise
    except (ValueError, OverflowError, struct.error) as error:  # genops: cut, or bad numbers
        raise CheckpointError(f"the pickle is cut or damaged ({error!s:.120})") from error
    raise CheckpointError("the pickle has no end")


def read_bytes(path: Path) -> bytes:
    """A whole small file. Raises FileNotFoundError, or CheckpointError for a folder and for a
    file larger than any of this kind."""
    if not path.exists():
        raise FileNotFoundError(f"file not found: {path}")
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a file")
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(
            f"{path}: has {path.stat().st_size:,} bytes; a CSNet checkpoint has under "
            f"{_MAX_BYTES:,}"
        )
    return path.read_bytes()


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The "state_dict" of a file in torch.save's older (not zip) format.

    Returns names to float32 or int64 tensors on the CPU, which own their memory. Raises
    FileNotFoundError, or CheckpointError (a ValueError) naming the file and what is wrong
    with it. Executes nothing from the file.
    """
    path = Path(path)
    data = read_bytes(path)
    if data[:4] == b"PK\x03\x04":
        raise CheckpointError(
            f"{path}: is in torch.save's zip format; the published checkpoints are in the older "
            "one. If you trust the file, rewrite it with torch.save(…, "
            "_use_new_zipfile_serialization=False)"
        )
    try:
        return _read_older_format(io.BytesIO(data))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_older_format(stream: io.BytesIO) -> dict[str, torch.Tensor]:
    # Five pickles: a magic number, the protocol, the machine, the object, the storages' keys.
    # Then for each key the count as int64, and the numbers.
    try:
        magic = run_pickle(stream)
    except CheckpointError as error:
        raise CheckpointError("is not a checkpoint written by torch.save") from error
    if type(magic) is not int or magic != _MAGIC:
        raise CheckpointError("is not a checkpoint written by torch.save")
    protocol = run_pickle(stream)
    if type(protocol) is not int or protocol != _PROTOCOL:
        raise CheckpointError("is in a version of torch.save's format that is not read")
    machine = run_pickle(stream)
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise CheckpointError("was not written on a little-endian machine")

    storages: dict[str, _Storage] = {}

    def load_persistent(record: Any) -> _Storage:
        # "storage", class, key, device, count, view
        if type(record) is not tuple or len(record) != 6:
            raise CheckpointError("a storage record is malformed")
        word, kind, key, _, count, view = record
        dtype = _STORAGES.get(kind.text) if isinstance(kind, _Name) else None
        good = type(word) is str and word == "storage" and type(key) is str and view is None
        if dtype is None or not good or not _is_count(count):
            raise CheckpointError("a storage record is malformed")
        if count * dtype.itemsize > len(stream.getbuffer()):
            raise CheckpointError(f"a storage claims {count:,} numbers, more than the file holds")
        storage = storages.setdefault(key, _Storage(dtype, count))
        if storage.dtype != dtype or storage.count != count:
            raise CheckpointError("two storages have the same key")
        return storage

    content = run_pickle(stream, load_persistent)
    keys = run_pickle(stream)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise CheckpointError("the list of storages is malformed")
    if len(keys) != len(storages) or set(keys) != storages.keys():
        raise CheckpointError("the list of storages does not fit the tensors")
    for key in keys:
        storage = storages[key]
        size = storage.count * storage.dtype.itemsize
        header, body = stream.read(8), stream.read(size)
        if len(header) < 8 or len(body) < size:
            raise CheckpointError(f"is cut: it ends within the numbers, at byte {stream.tell():,}")
        if int.from_bytes(header, "little") != storage.count:
            raise CheckpointError("a storage's length contradicts its record")
        storage.data = body

    state = content.get("state_dict") if type(content) is dict else None
    if type(state) is not dict or not state:
        raise CheckpointError("holds no 'state_dict'")
    if not all(type(name) is str and isinstance(t, _Tensor) for name, t in state.items()):
        raise CheckpointError("its 'state_dict' holds something else than tensors")
    # Many tensors may share one storage, and each becomes a copy.
    total = sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in state.values())
    if total > _MAX_BYTES:
        raise CheckpointError(f"its tensors have {total:,} bytes together, more than plausible")
    return {name: _materialise(record) for name, record in state.items()}


def _materialise(record: _Tensor) -> torch.Tensor:
    assert record.storage.data is not None
    flat = np.frombuffer(record.storage.data, dtype=record.storage.dtype)
    if 0 in record.shape:
        return torch.from_numpy(np.zeros(record.shape, dtype=flat.dtype))
    steps = [step * flat.itemsize for step in record.stride]
    # In bounds: _make_tensor has checked the last element against the storage.
    view = np.lib.stride_tricks.as_strided(flat[record.offset :], record.shape, steps)
    return torch.from_numpy(np.array(view))
