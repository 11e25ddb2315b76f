"""The cache, the order of batches, the augmentation, synthetic scenes."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from sodfast.data import cache as cache_module
from sodfast.data.augment import augment, draw, draw_colour, uniform
from sodfast.data.batches import Batches, hold_out
from sodfast.data.cache import BadPairs, build_cache, open_data, open_images
from sodfast.data.folders import find_pairs
from sodfast.data.synth import make_scene, write_scenes
from sodfast.data.synth_depth import make_depth_scene
from sodfast.preprocess import read_image, to_input

PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder / "set", 12, seed=3, size=48)
    return folder / "set"


# ---- cache ----------------------------------------------------------------------------------


def test_cache_holds_what_the_network_would_see(scenes: Path, tmp_path: Path) -> None:
    cache = open_data(scenes, 32, tmp_path, progress=False)
    assert cache.images.shape == (12, 32, 32, 3) and cache.masks.shape == (12, 32, 32)
    assert cache.names == [f"{n:06d}" for n in range(12)]
    for row in (0, 11):
        rgb = read_image(scenes / "images" / f"{row:06d}.png")
        wanted = to_input(rgb, {**PLAIN, "size": [32, 32]})[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(cache.images[row] - wanted).max() <= 0.501  # rounded to 8 bits
        mask = read_image(scenes / "masks" / f"{row:06d}.png")
        wanted = to_input(mask, {**PLAIN, "size": [32, 32]})[0, 0].numpy() * 255
        assert np.abs(cache.masks[row] - wanted).max() <= 0.501


def test_cache_is_used_again_until_a_file_changes(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    original = cache_module._decode
    monkeypatch.setattr(
        cache_module, "_decode", lambda pair, *how: (decoded.append(pair), original(pair, *how))[1]
    )
    pairs = find_pairs(scenes)
    first = build_cache(pairs, 16, tmp_path, progress=False)
    assert len(decoded) == 12
    again = build_cache(pairs, 16, tmp_path, progress=False)
    assert len(decoded) == 12 and np.array_equal(first.images, again.images)
    build_cache(pairs, 24, tmp_path, progress=False)
    assert len(decoded) == 24  # another size is another cache
    os.utime(pairs[0].image, ns=(1, 1))
    build_cache(pairs, 16, tmp_path, progress=False)
    assert len(decoded) == 36


def test_a_cut_cache_is_built_again(scenes: Path, tmp_path: Path) -> None:
    pairs = find_pairs(scenes)
    before = build_cache(pairs, 16, tmp_path, progress=False)
    wanted = np.array(before.images)
    file = next(tmp_path.glob("*.images"))
    file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(build_cache(pairs, 16, tmp_path, progress=False).images, wanted)


def test_bad_pairs_are_listed_and_refused_or_skipped(tmp_path: Path) -> None:
    write_scenes(tmp_path / "set", 4, size=32)
    (tmp_path / "set/images/000001.png").write_bytes(b"no picture")
    Image.new("L", (5, 7)).save(tmp_path / "set/masks/000002.png")
    with pytest.raises(BadPairs) as caught:
        open_data(tmp_path / "set", 16, tmp_path / "cache", progress=False)
    assert set(caught.value.reasons) == {"000001", "000002"}
    assert "the mask 5x7" in str(caught.value) and "000001" in str(caught.value)
    cache = open_data(tmp_path / "set", 16, tmp_path / "cache", skip_bad=True, progress=False)
    assert cache.names == ["000000", "000003"] and len(cache.images) == len(cache.masks) == 2

    (tmp_path / "set/masks/000000.png").unlink()
    with pytest.raises(ValueError, match="000000.png has no mask"):
        open_data(tmp_path / "set", 16, tmp_path / "cache", progress=False)
    cache = open_data(tmp_path / "set", 16, tmp_path / "cache", skip_bad=True, progress=False)
    assert cache.names == ["000003"]


# ---- augmentation ---------------------------------------------------------------------------


def test_without_crop_and_flip_pictures_stay_as_they_are() -> None:
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    masks = torch.randint(0, 256, (2, 16, 16), dtype=torch.uint8)
    theta = torch.from_numpy(draw(1, 0, np.arange(2), crop=0.0, horizontal_flip=0.0))
    x, truth = augment(images, masks, theta, 16, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    centre, spread = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    wanted = ((images.float() / 255 - centre) / spread).permute(0, 3, 1, 2)
    assert torch.allclose(x, wanted, atol=1e-4)
    assert torch.allclose(truth[:, 0], masks.float() / 255, atol=1e-5)


@pytest.mark.parametrize(
    ("horizontal", "vertical", "dims"), [(1, 0, [2]), (0, 1, [1]), (1, 1, [1, 2])]
)
def test_flips(horizontal: float, vertical: float, dims: list[int]) -> None:
    masks = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8)
    images = masks[..., None].expand(3, 12, 12, 3)
    theta = draw(1, 0, np.arange(3), 0.0, horizontal, vertical)
    x, truth = augment(images, masks, torch.from_numpy(theta), 12, **PLAIN)
    wanted = masks.flip(dims).float() / 255
    assert torch.allclose(truth[:, 0], wanted, atol=1e-5)
    assert torch.allclose(x[:, 1], wanted, atol=1e-5)  # the picture moves as its mask does


def test_crops_stay_inside_and_differ() -> None:
    theta = draw(5, 2, np.arange(2000), crop=15 / 224)
    half_width, centre = np.abs(theta[:, 0, 0]), theta[:, 0, 2]
    left, right = (1 + centre - half_width) / 2, (1 - centre - half_width) / 2
    for cut in (left, right):
        assert cut.min() >= -1e-6 and cut.max() <= 15 / 224 + 1e-6
        assert abs(cut.mean() - 15 / 448) < 0.002
    assert abs((theta[:, 0, 0] < 0).mean() - 0.5) < 0.05
    assert np.all(theta[:, 1, 1] > 0)  # no vertical flip was asked for


def test_blur_and_brightness_change_the_picture_alone() -> None:
    torch.manual_seed(0)
    images = torch.randint(60, 180, (40, 24, 24, 3), dtype=torch.uint8)
    masks = torch.randint(0, 256, (40, 24, 24), dtype=torch.uint8)
    whole = torch.eye(2, 3).expand(40, 2, 3)

    def seen(colour: np.ndarray) -> torch.Tensor:
        x, truth = augment(images, masks, whole, 24, **PLAIN, colour=colour)
        assert torch.allclose(truth[:, 0], masks.float() / 255, atol=1e-5)
        return x.permute(0, 2, 3, 1) * 255

    bright = draw_colour(1, 2, np.arange(40), brightness=0.5)
    assert not bright[:, 0].any()
    factor, shift = (torch.from_numpy(bright[:, n]).view(-1, 1, 1, 1) for n in (1, 2))
    wanted = (images.float() * factor + shift).clamp(0, 255)
    assert torch.allclose(seen(bright), wanted, atol=1e-2)

    blurred = draw_colour(1, 2, np.arange(40), blur=0.5)
    found = seen(blurred)
    some = blurred[:, 0] > 0
    assert 8 < some.sum() < 32
    assert torch.allclose(found[~some], images[~some].float(), atol=1e-2)
    for number in np.flatnonzero(some):
        sigma, half = 0.3 * ((blurred[number, 0] - 1) / 2 - 1) + 0.8, int(blurred[number, 0]) // 2
        # scipy's is the same Gaussian: cut off at half a window, mirrored at the edge pixel
        wanted_one = ndimage.gaussian_filter(
            images[number].numpy().astype(float), (sigma, sigma, 0), mode="mirror",
            truncate=(half + 0.1) / sigma,
        )  # fmt: skip
        assert np.abs(found[number].numpy() - wanted_one).max() < 0.01


def test_colours_are_drawn_as_documented() -> None:
    drawn = draw_colour(3, 1, np.arange(20_000), blur=0.1, brightness=0.5)
    sides, numbers = np.unique(drawn[:, 0], return_counts=True)
    assert sides.tolist() == [0, 3, 5, 7, 9]
    assert numbers[1:] / len(drawn) == pytest.approx([0.025] * 4, abs=0.005)
    assert drawn[:, 1].min() == pytest.approx(0.5, abs=0.01)
    assert drawn[:, 1].max() == pytest.approx(1.5, abs=0.01)
    assert set(drawn[:, 2]) == set(range(-15, 15))
    # Independent of where a picture is cut, and of which others are in the batch.
    again = draw_colour(3, 1, np.array([7]), blur=0.1, brightness=0.5)
    assert np.array_equal(again[0], drawn[7])
    for bad in ({"blur": 1.5}, {"brightness": -0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be from 0 to 1"):
            draw_colour(1, 0, np.arange(2), **bad)


def test_draws_depend_on_seed_epoch_and_index_only() -> None:
    whole = draw(1, 3, np.arange(50))
    assert np.array_equal(whole[[7, 30]], draw(1, 3, np.array([7, 30])))
    assert not np.array_equal(whole, draw(1, 4, np.arange(50)))
    assert not np.array_equal(whole, draw(2, 3, np.arange(50)))


def test_uniform_numbers_are_uniform_and_independent() -> None:
    u = uniform(0, 0, np.arange(20000), 3)
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 0.01 and np.abs(u.var(0) - 1 / 12).max() < 0.005
    correlation = np.corrcoef(np.vstack([u.T, [*u[1:, 0].tolist(), 0.5]]))
    assert np.abs(correlation - np.eye(4)).max() < 0.03


@pytest.mark.parametrize("bad", [{"crop": 0.5}, {"crop": -0.1}, {"horizontal_flip": 1.5}])
def test_draw_refuses(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        draw(0, 0, np.arange(2), **bad)


# ---- batches --------------------------------------------------------------------------------


def test_batches_cover_an_epoch_once_and_differ_between_epochs(
    scenes: Path, tmp_path: Path
) -> None:
    cache = open_data(scenes, 16, tmp_path, progress=False)
    batches = Batches(cache, np.arange(12), 4, seed=1, **PLAIN)
    assert batches.per_epoch == 3
    epochs = [np.concatenate([batches.indices(3 * e + b)[1] for b in range(3)]) for e in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    batches.close()


def test_ranks_share_what_one_process_would_see(scenes: Path, tmp_path: Path) -> None:
    cache = open_data(scenes, 16, tmp_path, progress=False)
    single = Batches(cache, np.arange(12), 4, seed=1, **PLAIN)
    ranks = [Batches(cache, np.arange(12), 4, 1, **PLAIN, rank=r, world=2) for r in range(2)]
    for number in (0, 1, 5, 2):  # forwards, across an epoch, and back
        x, truth = single.get(number, 16)
        parts = [b.get(number, 16) for b in ranks]
        together = torch.stack([p[0] for p in parts], 1).flatten(0, 1)
        assert torch.equal(x, together)
        assert torch.equal(truth, torch.stack([p[1] for p in parts], 1).flatten(0, 1))
    for batches in (single, *ranks):
        batches.close()


def test_batches_refuse_what_does_not_divide(scenes: Path, tmp_path: Path) -> None:
    cache = open_data(scenes, 16, tmp_path, progress=False)
    with pytest.raises(ValueError, match="batch_size 3 must be a multiple of 2"):
        Batches(cache, np.arange(12), 3, 1, **PLAIN, world=2)
    with pytest.raises(ValueError, match="batch_size is 16, but there are 12"):
        Batches(cache, np.arange(12), 16, 1, **PLAIN)


def test_hold_out_depends_on_names_alone() -> None:
    names = [f"picture {n}" for n in range(200)]
    train, held = hold_out(names, 0.05)
    assert len(held) == 10 and sorted([*train, *held]) == list(range(200))
    turned = names[::-1]
    _, other = hold_out(turned, 0.05)
    assert {names[i] for i in held} == {turned[i] for i in other}
    assert len(hold_out(names, 0.0)[1]) == 0


# ---- synthetic scenes -----------------------------------------------------------------------


def test_scenes_are_functions_of_seed_and_index(tmp_path: Path) -> None:
    for array, again in zip(make_scene(1, 5, 64), make_scene(1, 5, 64)):
        assert np.array_equal(array, again)
    assert not np.array_equal(make_scene(1, 5, 64)[0], make_scene(1, 6, 64)[0])
    write_scenes(tmp_path / "a", 3, seed=1, depth=True, size=64)
    write_scenes(tmp_path / "b", 3, seed=1, size=64)
    image, mask, _ = make_scene(1, 2, 64)
    for kind, wanted in (("images", image), ("masks", mask)):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "b" / kind / "000002.png")), wanted)
    scene = make_depth_scene(1, 2, 64)
    for kind, wanted in (("images", scene.image), ("masks", scene.mask), ("depth", scene.depth)):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a" / kind / "000002.png")), wanted)
    assert len(find_pairs(tmp_path / "a", depth=True)) == 3


def test_scenes_vary_and_each_has_an_object_that_differs_from_the_background() -> None:
    shares, centres, contrasts = [], [], []
    for index in range(60):
        image, mask, depth = make_scene(0, index, 64)
        inside = mask == 255
        assert set(np.unique(mask)) <= {0, 255} and image.shape[:2] == mask.shape == depth.shape
        shares.append(inside.mean())
        centres.append(np.argwhere(inside).mean(0) / mask.shape)
        difference = image[inside].mean(0).astype(float) - image[~inside].mean(0)
        contrasts.append(np.abs(difference).max())
        assert depth[inside].mean() > depth[~inside].mean() + 30
    assert min(shares) > 0 and max(shares) < 0.9 and np.std(shares) > 0.05
    assert np.std(centres, axis=0).min() > 0.08  # not all in the middle
    assert np.quantile(contrasts, 0.1) > 20


def test_write_scenes_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        write_scenes(tmp_path, 1)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        write_scenes(tmp_path / "b", 0)
    with pytest.raises(ValueError, match="size must be at least 16 pixels, got 8"):
        make_scene(0, 0, 8)


def test_links_and_names_that_lead_nowhere(tmp_path: Path) -> None:
    """A broken link is a bad picture like any; a name may hold bytes that are no UTF-8."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (b"a.jpg", b"\xff\xfe.jpg"):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            Image.new("RGB", (20, 24)).save(file, format="JPEG")
    (folder / "broken.jpg").symlink_to("nowhere.jpg")
    options: dict[str, Any] = {"folder": tmp_path / "cache", "progress": False}
    with pytest.raises(ValueError, match="broken"):
        open_images(folder, 16, **options)
    cache = open_images(folder, 16, skip_bad=True, **options)
    assert len(cache.names) == 2
    assert sorted(map(len, hold_out(cache.names, 0.5))) == [1, 1]
