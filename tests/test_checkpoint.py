"""Checkpoints: whole or not at all, damage noticed, two kept."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sodfast import checkpoint


def state(value: float) -> dict:
    return {"tensor": torch.full((1000,), value), "step": int(value), "inner": {"a": [1.5, None]}}


def test_round_trip(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 7, state(7))
    back = checkpoint.read(path)
    assert torch.equal(back["tensor"], state(7)["tensor"])
    assert back["inner"] == {"a": [1.5, None]} and back["step"] == 7


def test_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, state(step))
    names = [path.name for path in checkpoint.list_checkpoints(tmp_path)]
    assert names == ["checkpoint-000000003.pt", "checkpoint-000000004.pt"]
    assert checkpoint.latest(tmp_path)[1]["step"] == 4


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "missing") is None


@pytest.mark.parametrize("where", [3, 40, 200, -1])
def test_one_flipped_bit_is_noticed_and_the_older_one_is_taken(tmp_path: Path, where: int) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    path = checkpoint.save(tmp_path, 2, state(2))
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(checkpoint.Damaged, match="checkpoint-000000002.pt"):
        checkpoint.read(path)
    found, saved, complaints = checkpoint.latest(tmp_path)
    assert found.name == "checkpoint-000000001.pt" and saved["step"] == 1
    assert "checkpoint-000000002.pt" in complaints[0]


@pytest.mark.parametrize("length", [0, 10, 60, 90, 2000])
def test_a_cut_file_is_noticed(tmp_path: Path, length: int) -> None:
    path = checkpoint.save(tmp_path, 2, state(2))
    assert path.stat().st_size > 2000
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(checkpoint.Damaged):
        checkpoint.latest(tmp_path)


def test_no_code_is_run(tmp_path: Path) -> None:
    """A checkpoint with a pickled object other than tensors and plain values is refused."""
    path = checkpoint.save(tmp_path, 1, {"object": Path("x")})
    with pytest.raises(Exception, match="(?i)weights.only"):
        checkpoint.read(path)


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 1000 bytes: what a full disk looks like from inside.

    Not a fixture: pytest writes its progress before it tears one down, perhaps to a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_older_ones(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    checkpoint.save(tmp_path, 2, state(2))
    with small_files(), pytest.raises(OSError) as caught:
        checkpoint.save(tmp_path, 3, state(3))
    assert caught.value.filename.endswith("checkpoint-000000003.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-000000001.pt",
        "checkpoint-000000002.pt",
    ]
    assert checkpoint.latest(tmp_path)[1]["step"] == 2


def test_clean_removes_only_what_a_killed_save_left(tmp_path: Path) -> None:
    kept = checkpoint.save(tmp_path, 1, state(1))
    other = tmp_path / ".hidden"
    other.write_text("mine")
    left = tmp_path / ".checkpoint-000000002.pt.4711-0123abcd.tmp"
    left.write_bytes(b"half")
    assert checkpoint.clean(tmp_path) == [left]
    assert sorted(tmp_path.iterdir()) == sorted([kept, other])
