"""Files to files: the same whatever the threads, bad files reported, nothing half-written."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_cases import by_hand, picture, saved, small_model
from PIL import Image

from sodfast import predict
from sodfast.jobs import Job
from sodfast.parallel import chunks, ordered_map, share_threads
from sodfast.predict import Predictor, find_jobs, predict_files
from sodfast.render import render


def test_a_bad_file_does_not_stop_the_others(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in (1, 3):
        Image.fromarray(picture(seed=number)).save(photos / f"{number}.png")
    jpeg = saved(Image.fromarray(picture(400, 400)), "JPEG").getvalue()
    (photos / "0.jpg").write_bytes(b"just some text\n" * 20)
    (photos / "2.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (photos / "4.png").write_bytes(b"")
    seen = []
    jobs, _ = find_jobs([photos], tmp_path / "out")
    failures = predict_files(Predictor(small_model()), jobs, lambda: seen.append(1))
    assert [failure.source.name for failure in failures] == ["0.jpg", "2.jpg", "4.png"]
    assert failures[0].reason.startswith("not a picture")
    assert "truncated" in failures[1].reason
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1.png", "3.png"]
    assert len(seen) == 5
    with Image.open(tmp_path / "out" / "3.png") as image:
        assert image.mode == "L"
        got = np.asarray(image)
    assert np.abs(got.astype(int) - by_hand(small_model(), picture(seed=3), (64, 64))).max() <= 1


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven pictures of different sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(7):
        Image.fromarray(picture(30 + 5 * seed, 60 - seed, seed=seed)).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads; afterwards it is what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_same_files_for_any_threads_and_batch(
    photos: Path, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    contents = []
    for number, (count, batch) in enumerate([(1, 1), (1, 3), (2, 1), (3, 2), (5, 9)]):
        threads(count)
        out = tmp_path / f"out{number}"
        seen: list[int] = []
        jobs, _ = find_jobs([photos], out)
        failures = predict_files(
            Predictor(small_model(), batch=batch), jobs, lambda seen=seen: seen.append(1)
        )
        assert not failures
        assert len(seen) == 7
        assert torch.get_num_threads() == count
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert len(contents[0]) == 7
    assert all(content == contents[0] for content in contents)


@pytest.mark.parametrize("kind", ["cutout", "overlay"])
@pytest.mark.parametrize("file_format", ["png", "webp"])
def test_cutouts_and_overlays(kind: str, file_format: str, photos: Path, tmp_path: Path) -> None:
    predictor = Predictor(small_model())
    jobs, _ = find_jobs([photos], tmp_path / "out", f".{file_format}")
    assert not predict_files(predictor, jobs, None, kind, file_format)
    for seed, job in enumerate(jobs):
        rgb = picture(30 + 5 * seed, 60 - seed, seed=seed)
        with Image.open(job.target) as image:
            assert image.format == file_format.upper()
            got = np.asarray(image)
        expected = render(rgb, predictor(rgb), kind)
        if file_format == "png":
            assert np.array_equal(got, expected)
        elif kind == "cutout":
            assert np.array_equal(got[:, :, 3], expected[:, :, 3])
        else:
            assert got.shape == expected.shape


def test_unknown_kinds_and_formats(photos: Path, tmp_path: Path) -> None:
    jobs, _ = find_jobs([photos], tmp_path / "out")
    for arguments in (("sticker", "png"), ("mask", "jpg")):
        with pytest.raises(ValueError, match="must be .* got '(sticker|jpg)'"):
            predict_files(Predictor(small_model()), jobs, None, *arguments)
    assert not (tmp_path / "out").exists()


def test_failures_come_in_the_order_of_the_jobs(
    photos: Path, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    threads(3)
    for seed in (0, 3, 4, 6):
        (photos / f"{seed}.png").write_bytes(b"no picture")
    os.mkfifo(photos / "5x.png")  # reading it would wait for ever
    jobs, _ = find_jobs([photos], tmp_path / "out")
    for batch in (1, 2, 8):
        failures = predict_files(Predictor(small_model(), batch=batch), jobs)
        assert [f.source.name for f in failures] == [
            "0.png", "3.png", "4.png", "5x.png", "6.png",
        ]  # fmt: skip
        assert failures[3].reason == "is not a file"
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1.png", "2.png", "5.png"]


def test_one_map_of_a_batch_may_be_impossible(photos: Path, tmp_path: Path) -> None:
    class Broken(Predictor):
        def run(self, network_input: torch.Tensor) -> torch.Tensor:
            logits = super().run(network_input).clone()
            logits[1] = float("nan")
            return logits

    jobs, _ = find_jobs([photos], tmp_path / "out")
    failures = predict_files(Broken(small_model(), batch=7), jobs)
    assert [(f.source.name, f.reason) for f in failures] == [
        ("1.png", "the network's output holds NaN")
    ]
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_pictures_are_computed_at_the_same_time_but_not_too_many(
    photos: Path, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    threads(2)
    both = threading.Barrier(2)
    lock = threading.Lock()
    inside, most, inner = 0, 0, set()

    class Meeting(Predictor):
        def run(self, network_input: torch.Tensor) -> torch.Tensor:
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
                inner.add(torch.get_num_threads())
            both.wait(60)  # nobody goes on before there are two
            with lock:
                inside -= 1
            return super().run(network_input)

    jobs, _ = find_jobs([photos], tmp_path / "out")
    assert not predict_files(Meeting(small_model()), jobs[:6])
    assert most == 2
    assert inner == {1}


def test_the_next_file_is_read_while_one_is_computed(
    photos: Path, tmp_path: Path, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(1)
    jobs, _ = find_jobs([photos], tmp_path / "out")
    read = {job: threading.Event() for job in jobs}
    original = predict._Files.read
    waited = []

    def observed(self: predict._Files, job: Job) -> None:
        original(self, job)
        read[job].set()

    class Waiting(Predictor):
        def run(self, network_input: torch.Tensor) -> torch.Tensor:
            if len(waited) < 6:
                waited.append(read[jobs[len(waited) + 1]].wait(60))
            return super().run(network_input)

    monkeypatch.setattr(predict._Files, "read", observed)
    assert not predict_files(Waiting(small_model()), jobs)
    assert waited == [True] * 6


def test_an_interruption_leaves_only_whole_files(
    photos: Path, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    threads(2)
    jobs, _ = find_jobs([photos], tmp_path / "out")
    jobs = [Job(job.source, job.target.with_name(f"{n}.png")) for n, job in enumerate(20 * jobs)]
    done = 0

    def progress() -> None:
        nonlocal done
        done += 1
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_files(Predictor(small_model()), jobs, progress)
    # Nothing is at work any more, and what is there is whole.
    assert not [t for t in threading.enumerate() if t.name.startswith("sodfast")]
    assert torch.get_num_threads() == 2
    written = list((tmp_path / "out").iterdir())
    assert 3 <= len(written) < 40
    for path in written:
        assert path.suffix == ".png"
        with Image.open(path) as image:
            image.load()


def test_a_file_that_cannot_be_written_ends_it(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"a file")
    jobs = [Job(photos / "0.png", tmp_path / "out" / "0.png")]
    with pytest.raises(OSError, match="out"):
        predict_files(Predictor(small_model()), jobs)


# ------------------------------------------------------------------------------ parallel


def test_ordered_map_keeps_the_order_and_takes_few_items_ahead() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            yield number

    def slowest_first(number: int) -> int:
        time.sleep(0.02 if number % 5 == 0 else 0)
        return number * number

    results = ordered_map(slowest_first, items(), workers=3)
    assert next(results) == 0
    assert len(taken) <= 10
    assert list(results) == [number * number for number in range(1, 50)]


def test_ordered_map_raises_in_turn_and_stops() -> None:
    called = []

    def work(number: int) -> int:
        called.append(number)
        if number == 4:
            raise RuntimeError("four")
        return number

    results = ordered_map(work, range(1000), workers=2)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="four"):
        next(results)
    assert len(called) < 20


def test_sharing_threads() -> None:
    assert share_threads(1) == (1, 1)
    assert share_threads(2) == (2, 1)
    assert share_threads(4, 1) == (1, 4)
    assert share_threads(4, 3) == (3, 1)
    assert share_threads(4, 0) == (1, 4)
    assert share_threads(64) == (8, 8)
    assert list(chunks(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(chunks([], 2)) == []
