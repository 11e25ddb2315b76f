"""Depth: files of every kind, data sets' names, cache, joint augmentation, damaged scenes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sodfast
from sodfast.data.augment import augment, draw
from sodfast.data.batches import Batches
from sodfast.data.cache import BadPairs, open_data
from sodfast.data.folders import find_data, find_depth
from sodfast.data.grey import read_depth
from sodfast.data.synth import write_scenes
from sodfast.data.synth_depth import (
    DAMAGES,
    damage_of,
    make_depth_scene,
    read_damage,
)
from sodfast.preprocess import to_input

RGBD = {"size": [8, 8], "mean": [0.0] * 4, "std": [1.0] * 4, "resample": "bilinear"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("depth") / "set"
    write_scenes(folder, 12, seed=3, depth=True, size=48, damage=0.5)
    return folder


# ---- files -------------------------------------------------------------------------------------


def test_eight_bits_are_taken_as_they_are(tmp_path: Path) -> None:
    grey = np.array([[0, 10], [200, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "d.png")
    assert np.array_equal(read_depth(tmp_path / "d.png"), grey)
    assert np.array_equal(read_depth(tmp_path / "d.png", disparity=False), 255 - grey)


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_wider_maps_use_the_whole_range_and_nothing_measured_is_far(
    tmp_path: Path, mode: str
) -> None:
    millimetres = np.array([[0, 500], [1000, 1500]])
    kind = np.uint16 if mode == "I;16" else np.float32
    Image.fromarray(millimetres.astype(kind)).save(tmp_path / "d.tif")
    assert read_depth(tmp_path / "d.tif").tolist() == [[0, 1], [128, 255]]
    assert read_depth(tmp_path / "d.tif", disparity=False).tolist() == [[0, 255], [128, 1]]


@pytest.mark.parametrize("disparity", [True, False])
def test_one_distance_is_told_from_nothing_measured(tmp_path: Path, disparity: bool) -> None:
    Image.fromarray(np.array([[0, 700], [700, 0]], np.uint16)).save(tmp_path / "d.png")
    assert read_depth(tmp_path / "d.png", disparity).tolist() == [[0, 255], [255, 0]]


def test_a_depth_map_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    grain = np.random.default_rng(0).integers(0, 256, (40, 40)).astype(np.uint8)
    Image.fromarray(grain).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:800])
    (tmp_path / "text.png").write_text("no picture")
    for name, reason in (("cut.png", "truncated|broken"), ("text.png", "not a picture")):
        with pytest.raises(ValueError, match=f"the depth map .*{name}: .*({reason})"):
            read_depth(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_depth(tmp_path / "none.png")


def test_a_map_with_nothing_in_it_stays_constant(tmp_path: Path) -> None:
    for value in (0, 700):
        Image.fromarray(np.full((3, 4), value, np.uint16)).save(tmp_path / "d.png")
        assert np.ptp(read_depth(tmp_path / "d.png")) == 0
    Image.fromarray(np.full((3, 4), np.nan, np.float32)).save(tmp_path / "d.tif")
    with pytest.raises(ValueError, match="NaN"):
        read_depth(tmp_path / "d.tif")
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (3, 4, 3)).astype(np.uint8)).save(
        tmp_path / "c.png"
    )
    with pytest.raises(ValueError, match="colours"):
        read_depth(tmp_path / "c.png")


@pytest.mark.parametrize(
    ("folders", "tails"),
    [
        (("RGB", "GT", "depth"), ("", "", "")),  # NJU2K, SIP as they are passed on
        (("RGB_left", "GT", "depth"), ("_left", "_left", "_left")),  # NJU2K
        (("RGB", "groundtruth", "Depth"), ("", "", "_Depth")),  # NLPR
        (("RGB", "GT", "Depth"), ("", "", "_Depth")),  # DES, RGBD135
        (("image", "ground_truth", "depth_maps"), ("", "_GT", "_depth")),  # LFSD
        (("left", "mask", "disparity"), ("_left", "", "")),  # STERE
        (("LI", "GT", "Depth maps"), ("", "", "")),
        (("RGB", "GT", "Depth_Images"), ("", "", "")),
    ],
)
def test_the_usual_names(tmp_path: Path, folders: tuple[str, ...], tails: tuple[str, ...]) -> None:
    for folder, tail, ending in zip(folders, tails, (".jpg", ".png", ".bmp")):
        (tmp_path / folder).mkdir()
        for name in ("000001", "12_b"):
            Image.new("L", (4, 4)).save(tmp_path / folder / f"{name}{tail}{ending}")
    found = find_data(tmp_path, depth=True)
    assert len(found.pairs) == 2 and not found.problems
    assert all(pair.depth.parent.name == folders[2] for pair in found.pairs)
    assert all(p.image.stem[:4] == p.mask.stem[:4] == p.depth.stem[:4] for p in found.pairs)


def test_the_plainest_of_several_depth_folders_counts(tmp_path: Path) -> None:
    for folder in ("RGB", "GT", "rawDepth", "smoothedDepth", "depth"):
        (tmp_path / folder).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / folder / "a.png")
    assert find_data(tmp_path, depth=True).pairs[0].depth.parent.name == "depth"


def test_find_depth(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "a" / "1_depth.png")
    partner = find_depth(tmp_path)
    assert partner("a/1") == tmp_path / "a" / "1_depth.png" and partner("1") is None
    with pytest.raises(FileNotFoundError):
        find_depth(tmp_path / "none")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="no depth maps"):
        find_depth(tmp_path / "b")
    Image.new("L", (4, 4)).save(tmp_path / "a" / "1_depth.bmp")
    with pytest.raises(ValueError, match="two depth maps are named 'a/1_depth'.*bmp and .*png"):
        find_depth(tmp_path)


def test_a_list_takes_parts_of_several_sets(tmp_path: Path) -> None:
    """As the usual training set does: some pairs of NJU2K and some of NLPR, and no others."""
    write_scenes(tmp_path / "NJU2K", 6, seed=1, depth=True, size=32)
    write_scenes(tmp_path / "NLPR", 5, seed=2, depth=True, size=32)
    wanted = [("NJU2K", i) for i in (0, 2, 5)] + [("NLPR", i) for i in (1, 2)]
    lines = ["# image, mask, depth map"]
    for name, i in wanted:
        lines.append(
            "\t".join(f"{name}/{kind}/{i:06d}.png" for kind in ("images", "masks", "depth"))
        )
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    found = find_data(tmp_path / "train.txt", depth=True)
    # Two files are called 000002: the folders tell them apart.
    assert [p.name for p in found.pairs] == [f"{n}/images/{i:06d}" for n, i in wanted]
    cache = open_data(tmp_path / "train.txt", 16, tmp_path / "cache", progress=False, depth=True)
    whole = {
        name: open_data(tmp_path / name, 16, tmp_path / "cache", progress=False, depth=True)
        for name in ("NJU2K", "NLPR")
    }
    assert len(cache) == 5
    for row, (name, i) in enumerate(wanted):
        for part in ("images", "masks", "depths"):
            assert np.array_equal(getattr(cache, part)[row], getattr(whole[name], part)[i])


# ---- the cache and the batches -------------------------------------------------------------------


def test_the_cache_holds_depth_and_forgets_it_when_a_file_or_the_meaning_changes(
    scenes: Path, tmp_path: Path
) -> None:
    def opened(**how: bool) -> np.ndarray:
        cache = open_data(scenes, 24, tmp_path, progress=False, depth=True, **how)
        assert cache.depths.shape == (12, 24, 24) and cache.depths.dtype == np.uint8
        return np.array(cache.depths)

    near = opened()
    assert np.array_equal(near, opened())
    assert np.abs(near.astype(int) + opened(disparity=False) - 255).max() <= 1
    path = scenes / "depth" / "000004.png"
    before = path.read_bytes()
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    changed = opened()
    path.write_bytes(before)
    assert [bool((near[i] != changed[i]).any()) for i in range(12)] == [i == 4 for i in range(12)]
    plain = open_data(scenes, 24, tmp_path, progress=False)
    assert plain.depths is None and len(plain) == 12


def test_missing_constant_and_misshapen_depth_is_reported(tmp_path: Path) -> None:
    write_scenes(tmp_path / "set", 5, seed=1, depth=True, size=32)
    depth = tmp_path / "set" / "depth"
    Image.new("L", Image.open(depth / "000001.png").size, 77).save(depth / "000001.png")
    Image.effect_noise((10, 90), 50).save(depth / "000002.png")
    small = Image.open(depth / "000004.png")  # a coarser sensor is no mistake
    small.resize((small.width // 2, small.height // 2)).save(depth / "000004.png")
    with pytest.raises(BadPairs) as caught:
        open_data(tmp_path / "set", 16, tmp_path / "cache", progress=False, depth=True)
    assert set(caught.value.reasons) == {"000001", "000002"}
    assert "constant (77 of 255)" in str(caught.value) and "10x90" in str(caught.value)
    (depth / "000003.png").unlink()
    with pytest.raises(ValueError, match=r"000003.png has no depth map"):
        open_data(tmp_path / "set", 16, tmp_path / "cache", progress=False, depth=True)
    cache = open_data(
        tmp_path / "set", 16, tmp_path / "cache", skip_bad=True, progress=False, depth=True
    )
    assert cache.names == ["000000", "000004"] and len(cache.depths) == 2
    assert len(cache.bad) == 3


def test_image_mask_and_depth_move_together() -> None:
    masks = torch.randint(0, 256, (6, 20, 20), dtype=torch.uint8)
    images = masks[..., None].expand(6, 20, 20, 3)
    theta = torch.from_numpy(draw(3, 1, np.arange(6), 0.2, 0.5, 0.5, rotation=25.0))
    x, truth = augment(images, masks, theta, 16, [0.0] * 4, [1.0] * 4, depths=masks)
    assert x.shape == (6, 4, 16, 16)
    assert torch.allclose(x, truth.expand(6, 4, 16, 16), atol=1e-6)
    x, truth = augment(images, masks, theta, 16, [0.0] * 3, [1.0] * 3, depths=255 - masks)
    assert torch.allclose(x, truth.expand(6, 3, 16, 16), atol=1e-6)
    with pytest.raises(ValueError, match="takes depth"):
        augment(images, masks, theta, 16, [0.0] * 4, [1.0] * 4)


def test_rotation() -> None:
    theta = draw(1, 0, np.arange(400), 0.0, 0.0, rotation=10.0)
    angles = np.rad2deg(np.arctan2(theta[:, 1, 0], theta[:, 0, 0]))
    assert -10 <= angles.min() < -9 and 9 < angles.max() <= 10 and abs(angles.mean()) < 1
    assert np.allclose(np.linalg.det(theta[:, :, :2]), 1, atol=1e-6)
    # What is not turned stays what it was before there was a rotation.
    assert np.array_equal(draw(1, 0, np.arange(9)), draw(1, 0, np.arange(9), rotation=0.0))
    # 90 degrees of a picture with one bright corner.
    masks = torch.zeros(1, 8, 8, dtype=torch.uint8)
    masks[0, :4, :4] = 255
    quarter = torch.tensor([[[0.0, -1, 0], [1, 0, 0]]])
    _, truth = augment(masks[..., None].expand(1, 8, 8, 3), masks, quarter, 8, [0] * 3, [1] * 3)
    assert truth[0, 0, 4:, :4].min() > 0.99 and truth.mean() < 0.3
    with pytest.raises(ValueError, match="rotation"):
        draw(1, 0, np.arange(2), rotation=-1)


def test_batches_carry_depth(scenes: Path, tmp_path: Path) -> None:
    cache = open_data(scenes, 24, tmp_path, progress=False, depth=True)
    rows = np.arange(12)
    batches = Batches(cache, rows, 4, 1, [0.0] * 4, [1.0] * 4, crop=0, horizontal_flip=0)
    x, _ = batches.get(0, 24)
    _, picked = batches.indices(0)
    assert torch.allclose(x[:, 3], torch.from_numpy(cache.depths[picked]).float() / 255, atol=1e-5)
    assert batches.labelled_names(0) == [cache.names[row] for row in picked]
    batches.close()
    plain = open_data(scenes, 24, tmp_path, progress=False)
    with pytest.raises(ValueError, match="depth maps are wanted"):
        Batches(plain, rows, 4, 1, [0.0] * 4, [1.0] * 4)


# ---- the network's input ---------------------------------------------------------------------


def test_input_with_depth_is_the_input_without_it_and_one_more_plane() -> None:
    random = np.random.default_rng(1)
    rgb = random.integers(0, 256, (13, 17, 3)).astype(np.uint8)
    depth = random.integers(0, 256, (26, 34)).astype(np.uint8)
    own = {**RGBD, "mean": [0.4, 0.5, 0.6, 0.1], "std": [0.2, 0.3, 0.4, 2.0]}
    x = to_input(rgb, own, (8, 8), depth)
    colours = {**own, "mean": own["mean"][:3], "std": own["std"][:3]}
    assert torch.equal(x[:, :3], to_input(rgb, colours, (8, 8)))
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(depth)[None, None].float(), (8, 8), mode="bilinear", align_corners=False
    )
    assert torch.allclose(x[:, 3:], (wanted / 255 - 0.1) / 2, atol=1e-5)
    with pytest.raises(ValueError, match="there is none"):
        to_input(rgb, own)
    with pytest.raises(ValueError, match="takes no depth"):
        to_input(rgb, colours, None, depth)
    with pytest.raises(ValueError, match="the image is 17x13, the depth map 13x17"):
        to_input(rgb, own, None, np.zeros((17, 13), np.uint8))
    with pytest.raises(ValueError, match=r"\(H, W\) uint8"):
        to_input(rgb, own, None, np.zeros((13, 17), np.float32))
    one = to_input(rgb[:1, :1], own, (8, 8), depth[:1, :1])
    assert torch.isfinite(one).all() and (one[0, 3] == one[0, 3, 0, 0]).all()


@pytest.mark.parametrize("name", ["csnet", "extractor", "scfnet", "csf", "fpn-rgbd"])
def test_networks_with_depth_say_so(name: str) -> None:
    with torch.device("meta"):
        for channels in (3, 4):
            extra = {"encoder": "resnet50"} if name == "csf" else {}
            pre = sodfast.create_model(name, in_channels=channels, **extra).preprocessing
            assert len(pre["mean"]) == len(pre["std"]) == channels
    assert pre["mean"][3] == 0 and pre["std"][3] == 1


# ---- scenes -----------------------------------------------------------------------------------


def test_neither_the_picture_nor_the_depth_alone_tells() -> None:
    """In every scene something as striking lies far off, and something as near is not salient."""
    nearer_others = 0
    for index in range(40):
        scene = make_depth_scene(5, index, 80)
        inside = scene.mask == 255
        assert inside.mean() >= 0.01 and scene.damage == ""
        near = np.median(scene.depth[inside])
        ground = np.median(scene.depth[~inside])
        assert near > ground + 40
        nearer_others += (scene.depth[~inside] >= near).mean() > 0.01
    assert nearer_others > 10


def test_damage_changes_the_depth_alone_and_does_what_it_says() -> None:
    for index in range(12):
        intact = make_depth_scene(5, index, 64)
        inside = intact.mask == 255

        def contrast(depth: np.ndarray, inside: np.ndarray = inside) -> float:
            return float(np.median(depth[inside])) - float(np.median(depth[~inside]))

        for kind in DAMAGES:
            scene = make_depth_scene(5, index, 64, kind)
            assert scene.damage == kind
            assert np.array_equal(scene.image, intact.image)
            assert np.array_equal(scene.mask, intact.mask)
            again = make_depth_scene(5, index, 64, kind)
            assert np.array_equal(scene.depth, again.depth) and np.ptp(scene.depth) > 0
            if kind == "distorted":
                moved = np.abs(scene.depth.astype(int) - intact.depth)[inside]
                assert moved.mean() > 15
            else:
                assert contrast(scene.depth) < 0.25 * contrast(intact.depth)


@pytest.mark.parametrize("seed", [1, 5])
def test_something_else_dominates_wherever_that_is_the_damage(seed: int) -> None:
    """Also where the far object is hidden: at least 2 % of the picture, not of what is salient,
    come nearer by a quarter of the range, and the salient object goes far."""
    for index in range(150):
        intact, scene = (make_depth_scene(seed, index, 48, kind) for kind in ("", "dominated"))
        salient = intact.mask == 255
        nearer = scene.depth.astype(int) - intact.depth
        assert (nearer[~salient] > 64).sum() >= 0.02 * salient.size, index
        assert nearer[salient].mean() < -64 and np.array_equal(scene.image, intact.image)


def test_the_share_of_damage_is_met_and_recorded(scenes: Path) -> None:
    kinds = [damage_of(7, index, 0.3) for index in range(1000)]
    assert sum(map(bool, kinds)) == 300
    assert all(80 < kinds.count(kind) < 120 for kind in DAMAGES)
    assert not any(damage_of(7, i, 0.0) for i in range(99)) and damage_of(7, 3, 1.0)
    recorded = read_damage(scenes / "damage.csv")
    assert list(recorded) == [f"{i:06d}" for i in range(12)]
    for index, (name, kind) in enumerate(recorded.items()):
        scene = make_depth_scene(3, index, 48, 0.5)
        assert scene.damage == kind
        assert np.array_equal(np.asarray(Image.open(scenes / f"depth/{name}.png")), scene.depth)
    assert sum(map(bool, recorded.values())) == 6


def test_synth_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="damage must be from 0 to 1, got 1.5"):
        write_scenes(tmp_path / "a", 2, depth=True, damage=1.5)
    with pytest.raises(ValueError, match="there are none"):
        write_scenes(tmp_path / "a", 2, damage=0.5)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="damage must be a share or one of"):
        make_depth_scene(0, 0, 32, "holes")
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="not a list of name and damage"):
        read_damage(tmp_path / "x.csv")
