"""Pictures and masks found by the usual names of folders; nothing left out in silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sodfast.data.folders import (
    Pair,
    find_data,
    find_pairs,
    find_truths,
)
from sodfast.data.grey import read_grey
from sodfast.data.names import picture_files, role_of


def touch(root: Path, *names: str) -> None:
    """Files by name; what is in them is nobody's business here."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def relative(root: Path, pairs: list[Pair]) -> list[tuple[str, str, str]]:
    return [
        (p.name, p.image.relative_to(root).as_posix(), p.mask.relative_to(root).as_posix())
        for p in pairs
    ]


# A data set as it is published: its files, and the first pair that has to come out.
PUBLISHED = {
    "plain": (["images/b.webp", "images/a.webp", "masks/a.png", "masks/b.png"],
              ("a", "images/a.webp", "masks/a.png")),
    "DUTS-TR": (["DUTS-TR-Image/n0.jpg", "DUTS-TR-Mask/n0.png"],
                ("n0", "DUTS-TR-Image/n0.jpg", "DUTS-TR-Mask/n0.png")),
    "DUTS-TE": (["DUTS-TE-Image/n0.jpg", "DUTS-TE-Mask/n0.png"],
                ("n0", "DUTS-TE-Image/n0.jpg", "DUTS-TE-Mask/n0.png")),
    "ECSSD": (["images/0001.jpg", "ground_truth_mask/0001.png"],
              ("0001", "images/0001.jpg", "ground_truth_mask/0001.png")),
    "PASCAL-S": (["datasets/imgs/pascal/1.jpg", "datasets/masks/pascal/1.png"],
                 ("pascal/1", "datasets/imgs/pascal/1.jpg", "datasets/masks/pascal/1.png")),
    "HKU-IS": (["imgs/0004.png", "gt/0004.png", "trainImgSet.mat"],
               ("0004", "imgs/0004.png", "gt/0004.png")),
    "DUT-OMRON": (["DUT-OMRON-image/im005.jpg", "pixelwiseGT-new-PNG/im005.png"],
                  ("im005", "DUT-OMRON-image/im005.jpg", "pixelwiseGT-new-PNG/im005.png")),
    "MSRA10K": (["MSRA10K_Imgs_GT/Imgs/100.jpg", "MSRA10K_Imgs_GT/Imgs/100.png",
                 "MSRA10K_Imgs_GT/Readme.txt"],
                ("100", "MSRA10K_Imgs_GT/Imgs/100.jpg", "MSRA10K_Imgs_GT/Imgs/100.png")),
    "SOD": (["1001.jpg", "1001.png", "1002.jpg", "1002.png"], ("1001", "1001.jpg", "1001.png")),
    "capitals": (["Image/a.JPG", "Mask/a.PNG"], ("a", "Image/a.JPG", "Mask/a.PNG")),
    "tails": (["img/a.jpg", "GT/a_mask.png"], ("a", "img/a.jpg", "GT/a_mask.png")),
    "tails beside": (["a.jpg", "a_gt.png"], ("a", "a.jpg", "a_gt.png")),
    "RGB-D": (["RGB/a.jpg", "GT/a.png", "depth/a_Depth.bmp"], ("a", "RGB/a.jpg", "GT/a.png")),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_layouts_of_published_sets(tmp_path: Path, name: str) -> None:
    files, first = PUBLISHED[name]
    root = tmp_path / name
    touch(root, *files, "._a.jpg", "Thumbs.db")
    found = find_data(root)
    assert found.name == name and found.problems == []
    assert relative(root, found.pairs)[0] == first
    assert [p.name for p in found.pairs] == sorted(p.name for p in found.pairs)
    assert find_pairs(root) == found.pairs


def test_depth_maps(tmp_path: Path) -> None:
    touch(tmp_path, "RGB/a.jpg", "RGB/b.jpg", "GT/a.png", "GT/b.png", "depth/a_Depth.bmp")
    found = find_data(tmp_path, depth=True)
    assert [(p.name, p.depth and p.depth.name) for p in found.pairs] == [("a", "a_Depth.bmp")]
    assert found.problems == ["RGB/b.jpg has no depth map"]
    assert all(p.depth is None for p in find_data(tmp_path).pairs)
    touch(tmp_path / "flat", "images/a.jpg", "masks/a.png")
    with pytest.raises(ValueError, match="there is no folder depth/"):
        find_data(tmp_path / "flat", depth=True)


def test_files_without_a_partner_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "images/b.jpg", "images/b.png", "images/c.jpg")
    touch(tmp_path, "masks/a.png", "masks/d.png", "masks/b.png")
    found = find_data(tmp_path)
    assert [p.name for p in found.pairs] == ["a"]
    assert found.problems == [
        "more than one image of the same name: b.jpg and b.png",
        "images/c.jpg has no mask",
        "masks/b.png has no image",
        "masks/d.png has no image",
    ]
    with pytest.raises(ValueError, match="do not match") as caught:
        find_pairs(tmp_path)
    assert all(problem in str(caught.value) for problem in found.problems)


def test_what_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such data folder: .*gone"):
        find_data(tmp_path / "gone")
    with pytest.raises(ValueError, match="found neither folders of images and masks"):
        find_data(tmp_path)
    touch(tmp_path, "images/a.jpg", "images/b.jpg")
    with pytest.raises(ValueError, match="found neither"):
        find_data(tmp_path)
    touch(tmp_path, "masks/c.png")
    with pytest.raises(ValueError, match="no image has a mask of the same name; images/a.jpg has"):
        find_data(tmp_path)
    touch(tmp_path, "gt/a.png")
    with pytest.raises(ValueError, match=r"more than one folder of masks \(gt, masks\)"):
        find_data(tmp_path)


def test_lists_of_pairs(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.jpg", "y/a.png", "x/b c.jpg", "y/b c.png", "z/a.png")
    listed = tmp_path / "train_pair.lst"
    listed.write_text("# what it is\nx/b c.jpg, y/b c.png\n\nx/a.jpg,y/a.png,z/a.png\n")
    found = find_data(listed)
    assert found.name == "train_pair" and found.problems == []
    assert relative(tmp_path, found.pairs) == [
        ("a", "x/a.jpg", "y/a.png"),
        ("b c", "x/b c.jpg", "y/b c.png"),
    ]
    listed.write_text("x/a.jpg y/a.png z/a.png\nx/gone.jpg y/a.png z/a.png\n")
    found = find_data(listed, depth=True)
    assert [p.depth for p in found.pairs] == [tmp_path / "z/a.png"]
    assert len(found.problems) == 1 and "line 2" in found.problems[0]
    listed.write_text("x/a.jpg y/a.png\nx/a.jpg\n")
    with pytest.raises(ValueError, match=r"train_pair\.lst, line 2: image and mask expected"):
        find_data(listed)
    listed.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="not a text file"):
        find_data(listed)


def test_lists_of_names(tmp_path: Path) -> None:
    for name in ("a", "b", "v1.2"):
        touch(tmp_path, f"images/{name}.jpg", f"masks/{name}.png")
    names = tmp_path / "test.txt"
    names.write_text("v1.2\nb.jpg\n")
    assert [p.name for p in find_data(tmp_path, names=names).pairs] == ["b", "v1.2"]
    names.write_text("b\nq\n")
    found = find_data(tmp_path, names=names)
    assert [p.name for p in found.pairs] == ["b"]
    assert len(found.problems) == 1 and "line 2: 'q' has no image" in found.problems[0]
    with pytest.raises(FileNotFoundError, match="no such list of names"):
        find_data(tmp_path, names=tmp_path / "gone.txt")


def test_truths_to_score_against(tmp_path: Path) -> None:
    root = tmp_path / "set"
    touch(root, "images/a.jpg", "masks/a.png", "masks/b.png")
    for folder, photos in ((root, {"a"}), (root / "masks", set())):
        masks, images = find_truths(folder)
        assert list(masks) == ["a", "b"] and images.keys() == photos
    touch(tmp_path, "flat/sub/a.png", "flat/b.png")
    assert list(find_truths(tmp_path / "flat")[0]) == ["b", "sub/a"]
    touch(root, "masks/a.bmp")
    for folder in (root, root / "masks"):
        with pytest.raises(ValueError, match=r"a\.bmp and .*a\.png"):
            find_truths(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no masks found"):
        find_truths(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_truths(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list(picture_files(tmp_path / "gone"))


def test_roles() -> None:
    for name in ("images", "Imgs", "DUTS-TE-Image", "my photos", "RGB"):
        assert role_of(name) == "image", name
    for name in ("masks", "GT", "ground_truth_mask", "DUT-OMRON-gt-pixelwise", "Ground Truth"):
        assert role_of(name) == "mask", name
    assert role_of("depth") == "depth"
    for name in ("ECSSD", "predictions", "imagination", "results"):
        assert role_of(name) is None, name


def test_the_shared_sets(shared: Path) -> None:
    assert len(find_pairs(shared / "data" / "ECSSD")) == 1000
    assert len(find_pairs(shared / "data" / "DUTS-TR")) == 10553


@pytest.mark.parametrize("kind", ["L", "1", "P", "LA", "RGB", "RGBA", "16 bit"])
def test_grey_files_keep_their_values(tmp_path: Path, kind: str) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(8, 32)
    if kind == "1":
        values = (values > 99).astype(np.uint8) * 255
        image = Image.fromarray(values > 0)
    elif kind == "16 bit":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(values).convert(kind)
        if "A" in kind:
            image.putalpha(100)
    image.save(tmp_path / "a.png")
    got = read_grey(tmp_path / "a.png")
    assert got.dtype == np.uint8 and np.array_equal(got, values)


def test_a_coloured_mask_is_refused(tmp_path: Path) -> None:
    colours = np.zeros((4, 4, 3), np.uint8)
    colours[1, 1] = (200, 10, 10)
    Image.fromarray(colours).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="in colours"):
        read_grey(tmp_path / "a.png")
