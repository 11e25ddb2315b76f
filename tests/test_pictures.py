"""Reading pictures: every kind of file and array to upright RGB."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_cases import picture, saved
from PIL import Image, ImageCms, ImageOps

from sodfast import pictures
from sodfast.pictures import read_image, read_picture


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(picture()).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(read_image(path), expected)
    assert (orientation in (5, 6, 7, 8)) == (expected.shape[:2] == (56, 40))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("orientation", [0, 9, 77, None])
def test_meaningless_exif_is_passed_over(orientation: int | None, tmp_path: Path) -> None:
    exif: Image.Exif | bytes = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff damaged"
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
    path = tmp_path / "odd.png"
    Image.fromarray(picture()).save(path, exif=exif)
    assert np.array_equal(read_image(path), picture())


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats(file_format: str, tmp_path: Path) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    path = tmp_path / "picture.any"  # by content, not by name
    Image.fromarray(picture()).save(path, format=file_format, **options)
    assert np.array_equal(read_image(path), picture())
    assert np.array_equal(read_image(str(path)), picture())


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.dstack([picture(), np.full((40, 56), 255, np.uint8)])
    rgba[:10, :, 3] = 0
    rgba[10:20, :, 3] = 51
    expected = picture().copy()
    expected[:10] = 255
    blend = np.rint(picture()[10:20] * 0.2 + 255 * 0.8)
    for source in (Image.fromarray(rgba), rgba):
        got = read_image(source)
        assert np.array_equal(got[:10], expected[:10])
        assert np.abs(got[10:20] - blend).max() <= 1
        assert np.array_equal(got[20:], expected[20:])

    grey_alpha = np.dstack([picture()[:, :, 0], rgba[:, :, 3]])
    for source in (Image.fromarray(grey_alpha, "LA"), grey_alpha):
        got = read_image(source)
        assert (got[:10] == 255).all()
        assert np.array_equal(got[20:], np.repeat(picture()[20:, :, :1], 3, axis=2))

    palette = Image.fromarray(np.tile(np.array([0, 1], np.uint8), (4, 4)), "P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png")[0, :2].tolist() == [[255, 255, 255], [200, 100, 50]]
    palette.save(tmp_path / "opaque.png")
    assert read_image(tmp_path / "opaque.png")[0, :2].tolist() == [[10, 20, 30], [200, 100, 50]]


def test_grey_of_every_depth(tmp_path: Path) -> None:
    grey = picture()[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    wide = grey.astype(np.uint16) * 257
    for name, image in (
        ("8.png", Image.fromarray(grey)),
        ("16.png", Image.fromarray(wide)),
        ("16.tif", Image.fromarray(wide)),
        ("32.tif", Image.fromarray(wide.astype(np.int32))),
        ("float01.tif", Image.fromarray((grey / 255).astype(np.float32))),
        ("float255.tif", Image.fromarray(grey.astype(np.float32))),
    ):
        image.save(tmp_path / name)
        assert np.array_equal(read_image(tmp_path / name), expected), name
    big_endian = Image.frombytes("I;16B", (56, 40), wide.astype(">u2").tobytes())
    assert np.array_equal(read_image(big_endian), expected)
    # A dark 16-bit picture stays dark, whatever its largest value.
    Image.fromarray(np.full((3, 3), 514, np.uint16)).save(tmp_path / "dark.png")
    assert read_image(tmp_path / "dark.png").max() == 2
    bilevel = Image.fromarray(grey > 128)
    assert np.array_equal(read_image(bilevel)[:, :, 1], (grey > 128) * 255)


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    colours = np.zeros((32, 32, 3), np.uint8)
    colours[:, :16] = (200, 30, 40)
    colours[:, 16:] = (20, 160, 220)
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "c.jpg", quality=98)
    with Image.open(tmp_path / "c.jpg") as image:
        assert image.mode == "CMYK"
    got = read_image(tmp_path / "c.jpg").astype(int)
    assert np.abs(got[:, 2:14] - colours[:, 2:14]).max() <= 8
    assert np.abs(got[:, 18:30] - colours[:, 18:30]).max() <= 8


def test_arrays() -> None:
    rgb = picture()
    assert np.array_equal(read_image(rgb), rgb)
    assert np.array_equal(read_image(rgb[::-1, ::2]), rgb[::-1, ::2])
    assert np.array_equal(read_image(rgb / 255.0), rgb)
    assert np.array_equal(read_image(rgb.astype(np.uint16) * 257), rgb)
    grey = np.repeat(rgb[:, :, :1], 3, axis=2)
    assert np.array_equal(read_image(rgb[:, :, 0]), grey)
    assert np.array_equal(read_image(rgb[:, :, :1]), grey)
    assert np.array_equal(read_image(rgb[:, :, 0] > 9)[:, :, 2], (rgb[:, :, 0] > 9) * 255)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5, np.uint8), r"shape \(5,\)"),
        (np.zeros((2, 2, 5), np.uint8), r"shape \(2, 2, 5\)"),
        (np.zeros((1, 3, 8, 8), np.uint8), r"shape \(1, 3, 8, 8\)"),
        (np.zeros((0, 4, 3), np.uint8), "no pixel"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.full((4, 4, 3), 200.0), "0 ... 1"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), -0.1), "0 ... 1"),
    ],
)
def test_arrays_that_are_no_pictures(array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_image(array)


def test_other_objects_are_no_pictures() -> None:
    with pytest.raises(TypeError, match="Tensor"):
        read_image(torch.zeros(3, 8, 8))  # type: ignore[arg-type]


def test_file_objects() -> None:
    assert np.array_equal(read_image(saved(Image.fromarray(picture()), "PNG")), picture())


def test_pictures_of_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.png"
    Image.fromarray(picture()).save(path)  # 40 x 56 = 2,240 pixels
    assert np.array_equal(read_image(path, max_pixels=2240), picture())
    with pytest.raises(ValueError, match="has 56 x 40 = 2,240 pixels, more than the 2,239 allowed"):
        read_image(path, max_pixels=2239)
    # Without a limit of ours it is Pillow's: where it warns, we refuse.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="2,000"):
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="over twice the 1,000 pixels"):
        read_image(path)
    # An array is there already, and so is what was made of it.
    assert np.array_equal(read_image(picture(), max_pixels=1), picture())


def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large picture is converted a few rows at a time; here a small one is."""
    rgb = picture()
    grey = Image.fromarray(rgb[:, :, 0])
    rgba = Image.fromarray(np.dstack([rgb, rgb[:, :, 1]]))
    palette = Image.fromarray(rgb).quantize(16)
    palette.info["transparency"] = 3
    wide = rgb[:, :, 0].astype(np.uint16) * 200
    turned = Image.fromarray(rgb)
    turned.getexif()[0x0112] = 6
    images = {
        "RGB": Image.fromarray(rgb),
        "RGBA": rgba,
        "LA": rgba.convert("LA"),
        "P": palette,
        "L": grey,
        "1": grey.convert("1"),
        "CMYK": Image.fromarray(rgb).convert("CMYK"),
        "YCbCr": Image.fromarray(rgb).convert("YCbCr"),
        "I;16": Image.fromarray(wide),
        "I;16B": Image.frombytes("I;16B", (56, 40), wide.astype(">u2").tobytes()),
        # The largest value, by which the others are divided, is in one strip only.
        "I": Image.fromarray(wide.astype(np.int32) * 1000),
        "F": Image.fromarray(wide.astype(np.float32) ** 2),
        "turned": turned,
    }
    whole = {name: read_image(image) for name, image in images.items()}
    monkeypatch.setattr(pictures, "_STRIP_PIXELS", 3 * 56 + 5)
    assert len(list(pictures.row_strips(40, 56))) == 14
    for name, image in images.items():
        assert np.array_equal(read_image(image), whole[name]), name
    assert whole["turned"].shape == (56, 40, 3)


def test_row_strips_cover_every_row_once() -> None:
    for shape in ((1, 1), (5, 1 << 21), (3000, 4000), (100_000, 3)):
        rows = [row for strip in pictures.row_strips(*shape) for row in range(shape[0])[strip]]
        assert rows == list(range(shape[0]))


def test_colour_profiles(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, image, stored, expected in (
        ("rgb.jpg", Image.fromarray(picture()), profile, profile),
        ("rgb.png", Image.fromarray(picture()), profile, profile),
        ("none.png", Image.fromarray(picture()), None, None),
        # A profile for grey or CMYK says nothing about the RGB that comes out.
        ("grey.jpg", Image.fromarray(picture()[:, :, 0]), profile[:16] + b"GRAY" + profile[20:], 0),
        ("short.jpg", Image.fromarray(picture()), b"short", 0),
    ):
        image.save(tmp_path / name, icc_profile=stored)
        assert read_picture(tmp_path / name).icc_profile == (expected or None), name
    assert read_picture(picture()).icc_profile is None


def test_the_allowance_of_pixels_is_shared() -> None:
    allowance = pictures._Allowance(100)
    entered, leave = threading.Event(), threading.Event()

    def take(pixels: int) -> threading.Thread:
        def work() -> None:
            with allowance(pixels):
                entered.set()
                leave.wait(60)

        entered.clear()
        thread = threading.Thread(target=work)
        thread.start()
        return thread

    threads = [take(60)]
    assert entered.wait(60)
    threads.append(take(40))
    assert entered.wait(60)  # fits beside it
    threads.append(take(1000))  # more than there is: waits until it is alone
    assert not entered.wait(0.2)
    leave.set()
    for thread in threads:
        thread.join(60)
    assert entered.is_set()
    assert allowance._free == 100
