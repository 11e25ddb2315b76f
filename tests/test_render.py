"""Maps, cutouts and overlays, and the files that they become."""

from __future__ import annotations

import io

import numpy as np
import pytest
from picture_cases import picture
from PIL import Image

from sodfast import pictures
from sodfast.pictures import Picture
from sodfast.render import cutout, encode, overlay, render


@pytest.fixture
def saliency() -> np.ndarray:
    """Zero in the upper part, 255 in the lower, something between them."""
    ramp = np.clip(np.arange(40) * 20 - 200, 0, 255).astype(np.uint8)
    return np.repeat(ramp[:, None], 56, axis=1)


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_a_mask_is_the_map(saliency: np.ndarray) -> None:
    assert render(picture(), saliency, "mask") is saliency


def test_cutout_has_straight_alpha_and_no_hidden_background(saliency: np.ndarray) -> None:
    rgba = cutout(picture(), saliency)
    assert rgba.shape == (40, 56, 4) and rgba.dtype == np.uint8
    assert np.array_equal(rgba[:, :, 3], saliency)
    seen = saliency > 0
    assert 0 < seen.sum() < seen.size
    assert (saliency[seen] < 255).any()  # also along the edge the colours are the picture's
    assert np.array_equal(rgba[seen][:, :3], picture()[seen])
    assert not rgba[~seen].any()


def test_overlay_keeps_the_object_and_dims_the_rest(
    saliency: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = picture()
    result = overlay(photo, saliency)
    assert result.shape == photo.shape and result.dtype == np.uint8
    assert np.array_equal(result[saliency == 255], photo[saliency == 255])
    grey = photo @ np.array([0.299, 0.587, 0.114])
    dimmed = np.repeat(0.3 * grey[:, :, None], 3, axis=2)
    assert np.abs(result[saliency == 0] - dimmed[saliency == 0]).max() <= 1
    share = saliency[:, :, None] / 255
    assert np.abs(result - (share * photo + (1 - share) * dimmed)).max() <= 2
    monkeypatch.setattr(pictures, "_STRIP_PIXELS", 3 * 56)
    assert np.array_equal(overlay(photo, saliency), result)


def test_arguments_that_make_no_sense(saliency: np.ndarray) -> None:
    with pytest.raises(ValueError, match="type must be mask, cutout, overlay, got 'sticker'"):
        render(picture(), saliency, "sticker")
    with pytest.raises(ValueError, match="format must be png, webp, got 'jpg'"):
        encode(saliency, "jpg")
    for function in (cutout, overlay):
        with pytest.raises(ValueError, match=r"shape \(39, 56, 3\)"):
            function(picture(), saliency[1:])
        with pytest.raises(ValueError, match="float64"):
            function(picture(), saliency / 255)


@pytest.mark.parametrize("file_format", ["png", "webp"])
def test_files_hold_what_was_rendered(file_format: str, saliency: np.ndarray) -> None:
    mask = opened(encode(saliency, file_format))
    assert mask.format == file_format.upper()
    assert mask.mode == ("L" if file_format == "png" else "RGB")
    assert np.array_equal(np.asarray(mask.convert("L")), saliency)

    rgba = cutout(picture(), saliency)
    back = np.asarray(opened(encode(rgba, file_format)))
    assert np.array_equal(back[:, :, 3], saliency)
    shining = overlay(picture(), saliency)
    again = np.asarray(opened(encode(shining, file_format)).convert("RGB"))
    if file_format == "png":
        assert np.array_equal(back, rgba)
        assert np.array_equal(again, shining)
    else:  # colours are compressed
        solid = saliency == 255
        assert np.abs(back[solid].astype(int) - rgba[solid]).mean() < 8
        assert np.abs(again.astype(int) - shining).mean() < 8


@pytest.mark.parametrize("file_format", ["png", "webp"])
def test_colours_keep_their_profile(file_format: str, saliency: np.ndarray) -> None:
    profile = bytes(16) + b"RGB " + bytes(108)
    source = Picture(picture(), profile)
    for kind, expected in (("cutout", profile), ("overlay", profile), ("mask", None)):
        data = encode(render(source, saliency, kind), file_format, source.icc_profile)
        assert opened(data).info.get("icc_profile") == expected


def test_what_webp_cannot_hold_is_an_error() -> None:
    with pytest.raises(ValueError, match="16,383"):
        encode(np.zeros((1, 16384), np.uint8), "webp")
