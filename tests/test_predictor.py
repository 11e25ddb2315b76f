"""`Predictor` and `from_pretrained`: one picture or a list, against the plain network."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_cases import by_hand, picture, small_model
from PIL import Image
from torch import nn

import sodfast
from sodfast import cuda_graph, predict, pretrained
from sodfast.predict import Predictor


def test_predictor_equals_the_plain_network(tmp_path: Path) -> None:
    model = small_model()
    sodfast.save(model, tmp_path / "m.safetensors")
    Image.fromarray(picture()).save(tmp_path / "p.png")
    expected = by_hand(model, picture(), (64, 64))
    assert expected.std() > 5  # the map is not flat
    for predictor in (Predictor(model), Predictor(tmp_path / "m.safetensors")):
        assert predictor.size == (64, 64)
        for source in (tmp_path / "p.png", Image.fromarray(picture()), picture()):
            got = predictor(source)
            assert got.dtype == np.uint8
            assert got.shape == (40, 56)
            # Truncation turns a difference of 1e-6 into one level now and then.
            assert np.abs(got.astype(int) - expected).max() <= 1
            assert (got != expected).mean() < 0.02


def test_predictor_leaves_the_model_as_it_was() -> None:
    model = small_model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    Predictor(model)(picture())
    assert model.training
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_size_is_heeded() -> None:
    model = small_model()
    for size, expected in ((96, (96, 96)), ((48, 112), (48, 112)), (16, (16, 16))):
        predictor = Predictor(model, size=size)
        assert predictor.size == expected
        want = by_hand(model, picture(), expected)
        assert np.abs(predictor(picture()).astype(int) - want).max() <= 1


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (100, "multiple of 16, got 100; the nearest are 96 and 112"),
        (5, "multiple of 16, got 5; the nearest is 16"),
        ((224, 250), "got 250; the nearest are 240 and 256"),
        (0, "positive"),
        (-16, "positive"),
        ((16.0, 16), "positive whole"),
    ],
)
def test_sizes_that_are_refused(size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(small_model(), size=size)


def test_threads_are_set_and_checked() -> None:
    before = torch.get_num_threads()
    try:
        Predictor(small_model(), threads=1)
        assert torch.get_num_threads() == 1
        Predictor(small_model())
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    for value in (0, "2", 1.5, True):
        with pytest.raises(ValueError, match=f"threads must be a whole .* got {value!r}"):
            Predictor(small_model(), threads=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads must be at most 1024, got 20000"):
        Predictor(small_model(), threads=20000)


def test_sizes_of_any_integer() -> None:
    assert Predictor(small_model(), size=np.int64(48)).size == (48, 48)  # type: ignore[arg-type]
    assert Predictor(small_model(), size=[32, 48]).size == (32, 48)  # type: ignore[arg-type]
    for value in ((32,), "32", 32.0, (32, 0), True):
        with pytest.raises(ValueError, match="size must be one or two positive whole numbers"):
            Predictor(small_model(), size=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights is a Conv2d without preprocessing"):
        Predictor(torch.nn.Conv2d(3, 1, 1))


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (301, 2), (17, 33)])
def test_odd_and_tiny_pictures(shape: tuple[int, int]) -> None:
    model = small_model()
    rgb = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    got = Predictor(model)(rgb)
    assert got.shape == shape
    assert np.abs(got.astype(int) - by_hand(model, rgb, (64, 64))).max() <= 1


def test_two_threads_share_a_predictor() -> None:
    predictor = Predictor(small_model())
    pictures = [picture(seed=seed) for seed in range(8)]
    expected = [predictor(p) for p in pictures]
    results: dict[int, list[np.ndarray]] = {}

    def work(number: int) -> None:
        results[number] = [predictor(p) for p in pictures]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert all(np.array_equal(a, b) for a, b in zip(results[number], expected))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_list_gives_the_same_maps_in_order(batch: int, tmp_path: Path) -> None:
    predictor = Predictor(small_model(), batch=batch)
    many: list[Any] = [picture(30 + 3 * seed, 50 - seed, seed=seed) for seed in range(7)]
    Image.fromarray(many[2]).save(tmp_path / "2.png")
    many[2] = tmp_path / "2.png"
    many[5] = Image.fromarray(many[5])
    expected = [predictor(one) for one in many]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for pictures in (many, tuple(many)):
                got = predictor(pictures)
                assert isinstance(got, list) and len(got) == 7
                assert all(np.array_equal(a, b) for a, b in zip(got, expected))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(2)
    assert predictor([]) == []


def test_an_error_in_a_list_is_raised(tmp_path: Path) -> None:
    predictor = Predictor(small_model())
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        predictor([picture(), str(tmp_path / "gone.png"), picture()])
    with pytest.raises(TypeError, match="NoneType"):
        predictor([picture(), None])


def test_batch_and_pixels_are_checked(tmp_path: Path) -> None:
    for name in ("batch", "max_pixels", "threads"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
            Predictor(small_model(), **{name: 0})  # type: ignore[arg-type]
    Image.fromarray(picture()).save(tmp_path / "p.png")
    with pytest.raises(ValueError, match="more than the 100 allowed"):
        Predictor(small_model(), max_pixels=100)(tmp_path / "p.png")


def test_a_predictor_describes_itself() -> None:
    text = Predictor(small_model(), size=(48, 96)).describe()
    for words in ("csnet", "48 x 96", "device cpu", "backend ", "threads"):
        assert words in text
    with sodfast.use_backend("reference"):
        assert "backend reference" in Predictor(small_model()).describe()


# ---------------------------------------------------------------------------- CUDA graphs


class StandIn:
    """For a network in CUDA graphs: it remembers the shapes that these would be captured for."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(x.shape))
        return self.network(x)


def test_whole_batches_are_replayed_on_cuda_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = [picture(seed=seed) for seed in range(5)]
    plain = Predictor(small_model(), batch=2)
    assert plain.graphed is None and "graph" not in plain.describe()
    expected = plain(pictures)

    monkeypatch.setattr(cuda_graph, "GraphedNetwork", StandIn)
    monkeypatch.setattr(predict, "_device_of", lambda network: torch.device("cuda"))
    assert Predictor(small_model(), batch=2, cuda_graph=False).graphed is None
    predictor = Predictor(small_model(), batch=2)
    predictor.device = torch.device("cpu")  # where there is no GPU it still has to run
    assert "in a CUDA graph" in predictor.describe()
    for got, want in zip(predictor(pictures), expected):
        assert np.array_equal(got, want)
    for size in (32, 48, 64):
        predictor.run(torch.zeros(2, 3, size, 64))
    predictor(pictures[0])
    assert isinstance(predictor.graphed, StandIn)
    assert predictor.graphed.seen == [(2, 3, 64, 64)] * 3

    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    predictor.graphed = refuse
    with pytest.raises(RuntimeError, match=r"(?s)not permitted.*cuda_graph=False"):
        predictor.run(torch.zeros(2, 3, 64, 64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
@pytest.mark.parametrize("batch", [1, 2])
def test_maps_on_a_gpu_are_the_same_with_and_without_graphs(batch: int) -> None:
    pictures = [picture(30 + 3 * seed, 50, seed=seed) for seed in range(5)]
    graphed, plain = (
        Predictor(small_model().cuda(), batch=batch, cuda_graph=wanted) for wanted in (True, False)
    )
    assert isinstance(graphed.graphed, cuda_graph.GraphedNetwork) and plain.graphed is None
    for got, want in zip(graphed(pictures), plain(pictures)):
        assert np.array_equal(got, want)
    assert len(graphed.graphed._graphs) == 1


# ----------------------------------------------------------------------- from_pretrained


def test_weights_by_path(tmp_path: Path) -> None:
    model = small_model()
    sodfast.save(model, tmp_path / "m.safetensors")
    for path in (tmp_path / "m.safetensors", str(tmp_path / "m.safetensors")):
        back = sodfast.from_pretrained(path)
        assert not back.training
        assert all(torch.equal(model.state_dict()[k], v) for k, v in back.state_dict().items())
    for path in (tmp_path / "gone", "gone.safetensors", "no/such"):
        with pytest.raises(FileNotFoundError, match="gone|such"):
            sodfast.from_pretrained(path)


def test_weights_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"'tiny'.* ships none; the path of .* works too"):
        sodfast.from_pretrained("tiny")
    sodfast.save(small_model(), tmp_path / "tiny.safetensors")
    sodfast.save(small_model(), tmp_path / "large.safetensors")
    assert pretrained.pretrained_names() == ["large", "tiny"]
    assert sodfast.from_pretrained("tiny").name == "csnet"
    assert np.array_equal(sodfast.Predictor("tiny")(picture()), Predictor(small_model())(picture()))
    with pytest.raises(ValueError, match=r"unknown weights 'tinny': known are large, tiny"):
        sodfast.from_pretrained("tinny")


def test_a_file_without_an_ending_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sodfast.save(small_model(), "net")
    assert sodfast.from_pretrained("net").name == "csnet"


def test_the_weights_that_ship() -> None:
    """Small, whole, and right about an easy picture."""
    # side of the square that it sees, parameters, bytes at most
    shipped = {"csnet-fast": (192, 40_811, 1_000_000), "scfnet-lite": (224, 3_196_356, 8_000_000)}
    assert pretrained.pretrained_names() == sorted(shipped)
    assert pretrained.DEFAULT == "scfnet-lite"
    for name, (side, parameters, most) in shipped.items():
        assert (pretrained._FOLDER / f"{name}.safetensors").stat().st_size < most
        model = sodfast.from_pretrained(name)
        assert model.preprocessing["size"] == [side, side]
        assert sodfast.count(model)["params"] == parameters
        assert all(p.dtype == torch.float32 for p in model.parameters())
        for key, tensor in model.state_dict().items():
            assert tensor.isfinite().all(), key
    photo = np.full((120, 160, 3), (70, 110, 60), np.uint8)
    photo[40:80, 60:110] = (220, 60, 40)
    for name in shipped:
        saliency = Predictor(name)(photo).astype(float)
        inside = saliency[45:75, 65:105].mean()
        assert inside > 128 > 64 > saliency[:20].mean(), name
