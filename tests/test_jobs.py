"""Which files are made of which: folders, patterns, names that collide."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sodfast.jobs import Job, find_jobs


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_folders_keep_their_structure(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    touch(photos / "b.JPG", photos / "sub" / "deep" / "c.webp", photos / "a.png")
    touch(photos / "notes.txt", photos / ".hidden.png", photos / ".cache" / "d.png")
    jobs, failures = find_jobs([photos], out)
    assert not failures
    assert [(j.source.relative_to(photos), j.target.relative_to(out)) for j in jobs] == [
        (Path("a.png"), Path("a.png")),
        (Path("b.JPG"), Path("b.png")),
        (Path("sub/deep/c.webp"), Path("sub/deep/c.png")),
    ]


def test_files_are_taken_whatever_their_name_and_once(tmp_path: Path) -> None:
    touch(tmp_path / "photo.dat", tmp_path / "in" / "a.png")
    jobs, failures = find_jobs(
        [tmp_path / "photo.dat", tmp_path / "in", tmp_path / "in" / "a.png", tmp_path / "gone.jpg"],
        tmp_path / "out",
    )
    assert [job.target.name for job in jobs] == ["photo.png", "a.png"]
    assert [(f.source.name, f.reason) for f in failures] == [("gone.jpg", "no such file or folder")]


def test_pictures_of_one_name_keep_their_endings(tmp_path: Path) -> None:
    touch(tmp_path / "in" / "a.jpg", tmp_path / "in" / "a.png", tmp_path / "in" / "b.jpg")
    touch(tmp_path / "other" / "b.jpg")
    jobs, failures = find_jobs([tmp_path / "in"], tmp_path / "out")
    assert [job.target.name for job in jobs] == ["a.jpg.png", "a.png.png", "b.png"]
    assert not failures
    # Two folders with the same name in each: there is no second name to give.
    jobs, failures = find_jobs([tmp_path / "in" / "b.jpg", tmp_path / "other"], tmp_path / "out")
    assert [job.target.name for job in jobs] == ["b.jpg.png"]
    assert [failure.source for failure in failures] == [tmp_path / "other" / "b.jpg"]


def test_maps_inside_the_input_folder_are_no_pictures(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg", tmp_path / "maps" / "a.png")
    jobs, _ = find_jobs([tmp_path], tmp_path / "maps")
    assert [job.source.name for job in jobs] == ["a.jpg"]


def test_a_picture_is_never_overwritten(tmp_path: Path) -> None:
    touch(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"overwrite the picture .*a\.png"):
        find_jobs([tmp_path / "a.png"], tmp_path)
    assert (tmp_path / "a.png").read_bytes() == b"x"


def names(jobs: list[Job], out: Path) -> list[str]:
    return [str(job.target.relative_to(out)) for job in jobs]


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    touch(photos / "a.jpg", photos / "b.PNG", photos / "notes.txt", photos / "sub" / "c.jpg")
    touch(photos / "sub" / "deep" / "d.jpg", photos / "sub" / "deep" / "e.webp")
    for pattern, expected in (
        ("*.jpg", ["a.png"]),
        ("**/*.jpg", ["a.png", "sub/c.png", "sub/deep/d.png"]),
        ("?.*", ["a.png", "b.png"]),
        ("s*/*", ["sub/c.png", "sub/deep/d.png", "sub/deep/e.png"]),
        # Everything in there: pictures, and folders with what is below them.
        ("*", ["a.png", "b.png", "sub/c.png", "sub/deep/d.png", "sub/deep/e.png"]),
    ):
        jobs, failures = find_jobs([f"{photos}/{pattern}"], out)
        assert not failures
        assert sorted(names(jobs, out)) == expected, pattern
    monkeypatch.chdir(photos)
    assert sorted(names(find_jobs(["**/*.jpg"], out)[0], out)) == [
        "a.png", "sub/c.png", "sub/deep/d.png",
    ]  # fmt: skip
    jobs, failures = find_jobs(["*.tif", "a.jpg"], out)
    assert names(jobs, out) == ["a.png"]
    assert [f.reason for f in failures] == ["no picture fits this pattern"]


def test_patterns_pass_over_the_output(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg", tmp_path / "maps" / "a.png", tmp_path / "maps" / "sub" / "b.png")
    for pattern in ("*", "**", "**/*"):
        jobs, failures = find_jobs([tmp_path / pattern], tmp_path / "maps")
        assert names(jobs, tmp_path / "maps") == ["a.png"], pattern
        assert not failures


def test_a_name_that_looks_like_a_pattern(tmp_path: Path) -> None:
    touch(tmp_path / "photo[1].jpg", tmp_path / "photo1.jpg")
    jobs, failures = find_jobs([tmp_path / "photo[1].jpg"], tmp_path / "out")
    assert [job.source.name for job in jobs] == ["photo[1].jpg"]
    assert not failures


def test_another_ending(tmp_path: Path) -> None:
    touch(tmp_path / "in" / "a.jpg", tmp_path / "in" / "a.png", tmp_path / "in" / "b.webp")
    jobs, _ = find_jobs([tmp_path / "in"], tmp_path / "out", ".webp")
    assert names(jobs, tmp_path / "out") == ["a.jpg.webp", "a.png.webp", "b.webp"]


def test_broken_links(tmp_path: Path) -> None:
    os.symlink(tmp_path / "nowhere.jpg", tmp_path / "link.jpg")
    jobs, failures = find_jobs([tmp_path / "link.jpg"], tmp_path / "out")
    assert not jobs
    assert [failure.reason for failure in failures] == ["is a broken link"]


def test_an_output_among_the_inputs_is_refused(tmp_path: Path) -> None:
    """The next time what was written there would be taken for pictures."""
    touch(tmp_path / "in" / "a.jpg")
    with pytest.raises(ValueError, match="is one of the folders to read"):
        find_jobs([tmp_path / "in"], tmp_path / "x" / ".." / "in")
    jobs, _ = find_jobs([tmp_path / "in"], tmp_path / "in" / "maps")  # is passed over
    assert [job.source.name for job in jobs] == ["a.jpg"]


def test_empty_names_are_refused(tmp_path: Path) -> None:
    """As of a shell's variable that is not set; Path("") is the current folder."""
    for inputs, output in (([""], tmp_path), ([tmp_path, ""], tmp_path / "out"), ([tmp_path], "")):
        with pytest.raises(ValueError, match="is empty: name a folder"):
            find_jobs(inputs, output)
