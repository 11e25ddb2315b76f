"""The reader of pickles and old torch files: right on honest ones, and hostile ones run nothing."""

from __future__ import annotations

import collections
import os
import pickle
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_files import (
    PRUNED,
    published_configuration,
    published_state,
    random_model,
    write_pair,
)

from sodfast.convert import convert_csnet, read_configuration
from sodfast.legacy_pickle import CheckpointError, read_checkpoint

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
PROTOCOL = pickle.dumps(1001, protocol=2)
MACHINE = pickle.dumps({"protocol_version": 1001, "little_endian": True}, protocol=2)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(
        tmp_path, published_state(random_model(PRUNED), PRUNED), published_configuration(PRUNED)
    )


def test_reads_what_torch_writes(tmp_path: Path) -> None:
    """Views, shared storages, transposes, empty and scalar tensors, as torch reads them back."""
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    state = collections.OrderedDict(
        whole=base,
        view=base[1:, ::2, 3],
        transposed=base.permute(2, 0, 1),
        scalar=torch.tensor(2.5),
        integer=torch.tensor([[1, -(2**60)]]),
        empty=torch.zeros(3, 0, 2),
        large=torch.linspace(-1, 1, 70_000),
    )
    path = tmp_path / "some.pth"
    torch.save({"state_dict": state, "best": 0.5}, path, _use_new_zipfile_serialization=False)
    ours = read_checkpoint(path)
    theirs = torch.load(path, weights_only=True)["state_dict"]
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        assert torch.equal(ours[key], value), key
    ours["whole"].zero_()  # writable, and nobody else's memory
    assert torch.equal(ours["transposed"], theirs["transposed"])


def test_a_published_checkpoint_cut_anywhere(shared: Path, tmp_path: Path) -> None:
    whole = (shared / "reference" / "sod100k" / "csnet-L-x1.pth.tar").read_bytes()
    cut = tmp_path / "cut.pth.tar"
    rng = random.Random(0)
    lengths = [0, 1, 14, 15, 20, 21, 136, 137, 134_981, 151_960, 151_961, len(whole) - 1]
    for length in [*lengths, *(rng.randrange(len(whole)) for _ in range(15))]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pth\.tar"):
            read_checkpoint(cut)


class Call:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def hostile_pickles(canary: Path) -> dict[str, bytes]:
    """Pickles that make the folder `canary` when they are unpickled in earnest."""
    name = str(canary)
    python = f"__import__('os').mkdir({name!r})"
    text = name.encode()
    unicode = b"X" + struct.pack("<I", len(text)) + text
    call_os = [pickle.dumps(Call(os.system, f"mkdir '{name}'"), protocol=p) for p in range(5)]
    return {
        **{f"os.system, protocol {p}": data for p, data in enumerate(call_os)},
        "os.mkdir": pickle.dumps(Call(os.mkdir, name), protocol=2),
        "eval": pickle.dumps(Call(eval, python), protocol=2),
        "exec": pickle.dumps({"state_dict": Call(exec, python)}, protocol=4),
        "nested": pickle.dumps([[(1, {"a": Call(os.mkdir, name)})]], protocol=3),
        "in an OrderedDict": pickle.dumps(
            collections.OrderedDict(a=Call(os.mkdir, name)), protocol=2
        ),
        "INST": b"(S'" + text + b"'\nios\nmkdir\n.",
        "OBJ": b"(cos\nmkdir\n" + unicode + b"o.",
        "NEWOBJ": b"\x80\x02cos\nmkdir\n" + unicode + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + unicode + b"\x85R.",
        # By way of a module that sounds harmless.
        "dotted name": b"\x80\x04\x8c\x13torch.serialization\x8c\x08os.mkdir\x93"
        + unicode
        + b"\x85R.",
        "under a memo": b"\x80\x02cos\nmkdir\nq\x010h\x01" + unicode + b"\x85R.",
    }


HOSTILE = sorted(hostile_pickles(Path("x")))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_execute_nothing(kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = hostile_pickles(canary)[kind]
    pickle.loads(payload)  # the payload is live:
    assert canary.is_dir()
    canary.rmdir()

    path = tmp_path / "hostile.bin"
    keys = pickle.dumps([], protocol=2)
    good = pickle.dumps({"state_dict": {}}, protocol=2)
    for content in (
        payload,
        MAGIC + payload,
        MAGIC + PROTOCOL + payload,
        MAGIC + PROTOCOL + MACHINE + payload + keys,
        MAGIC + PROTOCOL + MACHINE + good + payload,
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"hostile\.bin"):
            read_checkpoint(path)
        with pytest.raises(CheckpointError, match=r"hostile\.bin"):
            read_configuration(path)
    assert not canary.exists()


def test_a_hostile_object_inside_a_real_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    state = published_state(random_model(PRUNED), PRUNED)
    for content in (
        {"state_dict": state, "epoch": Call(os.mkdir, str(canary))},
        {"state_dict": {**state, "extra": Call(os.mkdir, str(canary))}},
        Call(os.mkdir, str(canary)),
    ):
        torch.save(content, pair[0], _use_new_zipfile_serialization=False)
        with pytest.raises(CheckpointError, match=r"mkdir.*nothing of it was executed"):
            convert_csnet(*pair)
    assert not canary.exists()


def test_stand_ins_cannot_be_called_as_if_they_were_the_real_thing(tmp_path: Path) -> None:
    """Allowed names with arguments that the real functions would be dangerous with."""
    path = tmp_path / "odd.bin"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    array = b"cnumpy.core.multiarray\n_reconstruct\n"
    for body in (
        rebuild + b")R.",
        rebuild + b"(NNNNNNtR.",
        rebuild + b"(K\x01K\x00)))NtR.",
        array + b"(cnumpy\ndtype\nK\x00\x85U\x01btR.",
        array + b"(cnumpy\nndarray\nK\x00\x85C\x01btR(K\x01J\xff\xff\xff\x7f\x85NNNtb.",
        b"cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.",
        b"cnumpy\ndtype\nX\x02\x00\x00\x00V8\x85R.",
        b"cnumpy\ndtype\n)R.",
        b"cnumpy\nndarray\n(K\x03tR.",
        b"ctorch\nFloatStorage\nK\x05\x85R.",
        b"ccollections\nOrderedDict\n(((K\x01K\x02ttR.",
        b"ccollections\nOrderedDict\n)RK\x01b.",
        b"ccollections\nOrderedDict\n}b.",
        b"K\x01)R.",
        b"K\x01K\x02b.",
    ):
        path.write_bytes(MAGIC + PROTOCOL + MACHINE + b"\x80\x03" + body)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
        path.write_bytes(b"\x80\x03" + body)
        with pytest.raises(CheckpointError):
            read_configuration(path)


def test_claims_of_huge_sizes_cost_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.bin"

    def storage(count: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
        number = lambda n: b"\x8a\x08" + struct.pack("<q", n)  # noqa: E731
        numbers = lambda ns: b"(" + b"".join(map(number, ns)) + b"t"  # noqa: E731
        return (
            b"\x80\x02}X\x0a\x00\x00\x00state_dict}X\x01\x00\x00\x00a"
            b"ctorch._utils\n_rebuild_tensor_v2\n(("
            b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00kX\x03\x00\x00\x00cpu"
            + number(count)
            + b"NtQK\x00"
            + numbers(shape)
            + numbers(stride)
            + b"\x89}tRss."
            + pickle.dumps(["k"], protocol=2)
            + struct.pack("<q", count)
            + b"\x00" * 64
        )

    preamble = MAGIC + PROTOCOL + MACHINE
    path.write_bytes(preamble + storage(16, (4, 4), (4, 1)))
    assert read_checkpoint(path)["a"].shape == (4, 4)  # the honest form of what follows
    bodies = [
        storage(1 << 40, (1 << 40,), (1,)),
        storage(1 << 62, (1,), (1,)),
        storage(-1, (1,), (1,)),
        storage(1 << 20, (16,), (1,)),
        storage(16, (1 << 30, 1 << 30), (0, 0)),
        storage(16, (17,), (0,)),
        storage(16, (17,), (1,)),
        storage(16, (4, 4), (1 << 50, 1)),
        storage(16, (2, 2), (-4, 1)),
        storage(16, (-2, 2), (1, 1)),
        storage(16, (1,) * 70, (1,) * 70),
        storage(16, (1 << 39, 1 << 39, 0), (1, 1, 1)),
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.",  # BINUNICODE8
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",  # BINBYTES8
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",  # BYTEARRAY8
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",  # FRAME
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01.",  # LONG4
        b"\x80\x02Nr\xff\xff\xff\xff.",  # LONG_BINPUT: a memo of 4 billion entries
        b"L" + b"9" * 100_000 + b"L\n.",
        b"I" + b"9" * 100_000 + b"\n.",
    ]
    tracemalloc.start()
    try:
        for body in bodies:
            path.write_bytes(preamble + body)
            with pytest.raises(CheckpointError, match=r"huge\.bin"):
                read_checkpoint(path)
            path.write_bytes(body)
            with pytest.raises(CheckpointError, match=r"huge\.bin"):
                read_configuration(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_many_tensors_of_one_storage_cost_no_memory(tmp_path: Path) -> None:
    storage = torch.zeros(250_000)
    path = tmp_path / "shared.pth"
    for count, accepted in ((5, True), (500, False)):  # 5 MB, and a claim of 500 MB
        state = {f"t{i}": storage[: 250_000 - i] for i in range(count)}
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
        assert path.stat().st_size < 2e6
        if accepted:
            assert len(read_checkpoint(path)) == count
            continue
        tracemalloc.start()
        try:
            with pytest.raises(CheckpointError, match=r"shared\.pth.*bytes together"):
                read_checkpoint(path)
            assert tracemalloc.get_traced_memory()[1] < 20e6
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    "body",
    {
        "lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "tuples": b"\x80\x02N" + b"\x85" * 300_000 + b".",
        "marks": b"\x80\x02" + b"(" * 300_000 + b"t" * 300_000 + b".",
        # Hashing a tuple this deep overflows the C stack of an ordinary unpickler.
        "key": b"\x80\x02}N" + b"\x85" * 300_000 + b"K\x01s.",
        "cycle": b"\x80\x02]q\x01h\x01a.",
        "many steps": b"\x80\x02N" + b"q\x01" * 1_000_001 + b".",
    }.items(),
    ids=lambda item: item[0],
)
def test_deep_long_and_circular_pickles(body: tuple[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "deep.bin"
    for preamble in (b"", MAGIC + PROTOCOL + MACHINE):
        path.write_bytes(preamble + body[1])
        with pytest.raises(CheckpointError, match=r"deep\.bin"):
            (read_checkpoint if preamble else read_configuration)(path)


def test_damaged_files_are_read_or_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Random damage: tensors and lists, or CheckpointError, and no other exception."""
    rng = random.Random(1)
    folder = tmp_path / "damaged"
    folder.mkdir()
    outcomes = {"read": 0, "refused": 0}
    for source, read, trials in (
        (pair[0], read_checkpoint, 60),
        (pair[1], read_configuration, 1500),
    ):
        whole = source.read_bytes()
        for _ in range(trials):
            data = bytearray(whole)
            # Checkpoints: mostly in their pickles, not in the numbers.
            region = len(data) // 2 if source == pair[0] else len(data)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(region)] = rng.randrange(256)
            path = folder / "f"
            path.write_bytes(data)
            try:
                result = read(path)
            except CheckpointError:
                outcomes["refused"] += 1
            else:
                outcomes["read"] += 1
                assert isinstance(result, dict)
    assert min(outcomes.values()) > 50


def test_other_kinds_of_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    with pytest.raises(FileNotFoundError, match=r"other\.pth"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="is not a file"):
        read_checkpoint(tmp_path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match=r"other\.pth: is in torch\.save's zip format"):
        read_checkpoint(path)
    for content in (b"", b"text, no checkpoint", pickle.dumps({"state_dict": {}}, protocol=2)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a checkpoint written by torch"):
            read_checkpoint(path)
    with open(path, "wb") as stream:
        stream.truncate(100 << 20)
    with pytest.raises(CheckpointError, match="104,857,600 bytes"):
        read_checkpoint(path)
    other = MACHINE.replace(b"\x88", b"\x89")  # little_endian: False
    path.write_bytes(MAGIC + PROTOCOL + other)
    with pytest.raises(CheckpointError, match="little-endian"):
        read_checkpoint(path)
