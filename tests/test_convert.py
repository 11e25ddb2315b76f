"""Published checkpoints become models: every tensor under its name, and the published logits."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_files import (
    PRUNED,
    published_configuration,
    published_state,
    random_model,
    write_pair,
)
from safetensors.torch import load_file

import sodfast
from sodfast.convert import CheckpointError, convert_csnet, read_checkpoint, read_configuration


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(
        tmp_path, published_state(random_model(PRUNED), PRUNED), published_configuration(PRUNED)
    )


def test_pruned_network_with_vanished_scales_and_branches(pair: tuple[Path, Path]) -> None:
    model, back = random_model(PRUNED), convert_csnet(*pair)
    assert back.config["channels"] == PRUNED
    assert back.config["weight_gain"] == 1
    assert not back.training
    state = model.state_dict()
    assert state.keys() == back.state_dict().keys()
    for key, value in back.state_dict().items():
        assert torch.allclose(value, state[key], rtol=1e-6, atol=0), key
    x = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.allclose(model(x), back(x), atol=1e-5)


def test_the_conversion_loads_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = convert_csnet(*pair)
    sodfast.save(model, tmp_path / "net.safetensors")
    back = sodfast.load(tmp_path / "net.safetensors")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in back.state_dict().items())


def test_denormals_are_flushed_after_the_gain(tmp_path: Path) -> None:
    state = published_state(random_model(PRUNED), PRUNED)
    state["stage0.0.conv3x3_1.convs.0.weight"][0, 0, 0] = torch.tensor([1e-42, 5e-31, 5e-33])
    state["stage0.0.conv1x1.bns.0.weight"][:2] = torch.tensor([1e-42, -1e-31])
    model = convert_csnet(*write_pair(tmp_path, state, published_configuration(PRUNED)))
    # 5e-31 times 100 is over 1e-30 and stays.
    kernel = model.get_parameter("stages.0.0.conv2.weight")[0, 0, 0]
    assert kernel.tolist() == pytest.approx([0, 5e-29, 0], rel=1e-5, abs=0)
    assert model.get_parameter("stages.0.0.norm1.weight")[:2].tolist() == [0, 0]


@pytest.fixture(params=["csnet-L-x1", "csnet-L-x2"])
def published(request: pytest.FixtureRequest, shared: Path) -> tuple[str, Path, Path]:
    folder = shared / "reference" / "sod100k"
    name = request.param
    return name, folder / f"{name}.pth.tar", folder / f"{name}.bin"


def test_published_logits(published: tuple[str, Path, Path], shared: Path) -> None:
    name, *files = published
    model = convert_csnet(*files)
    fused = sodfast.fuse(model)
    golden = load_file(shared / "golden" / "csnet.safetensors")
    with torch.no_grad():
        for case in ("x1", "x2", "ximg"):
            assert (model(golden[case]) - golden[f"{name}/{case}"]).abs().max() < 1e-4
            assert (fused(golden[case]) - golden[f"{name}/{case}"]).abs().max() < 1e-4


def test_published_tensors_equal_torchs_own_reading(published: tuple[str, Path, Path]) -> None:
    _, checkpoint, configuration = published
    theirs = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    ours = read_checkpoint(checkpoint)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    state = convert_csnet(checkpoint, configuration).state_dict()
    stored = theirs["stage3.1.conv3x3_2.convs.1.weight"]
    scale_0 = theirs["stage3.1.conv3x3_2.convs.0.weight"].shape[0]
    converted = state["stages.3.1.conv3.weight"][scale_0:]
    kept = (stored * 100).abs() >= 1e-30
    assert torch.equal(converted[kept], (stored * 100)[kept])
    assert not converted[~kept].any()
    plain = theirs["stage3.1.conv1x1.conv.weight"]  # no gain here
    kept = plain.abs() >= 1e-30
    assert torch.equal(state["stages.3.1.conv1.weight"][kept], plain[kept])


def test_published_configurations(published: tuple[str, Path, Path]) -> None:
    name, checkpoint, configuration = published
    channels = read_configuration(configuration)
    params = sum(p.numel() for p in convert_csnet(checkpoint, configuration).parameters())
    if name == "csnet-L-x1":
        assert params == 93_647
        assert channels["stages"][1:3] == [
            [[9, 10], [10, 10], [10, 10]],
            [[19, 13], [19, 17], [20, 12], [34]],
        ]
        assert channels["fuse"] == [12, 24, 24]
        assert channels["bank"] == [[1, 2, 2, 2, 4], [1, 4, 4, 4, 5], [2, 2, 4, 5, 4]]
        assert channels["merge"] == 60
    else:
        assert params == 140_894
        assert channels["stages"][0] == [[13, 10]]
        assert channels["stages"][4] == [[18, 31], [31, 27], [26, 44], [64]]
        assert channels["bank"] == [[2, 1, 2, 2, 1], [0, 6, 6, 7, 5], [0, 1, 3, 7, 7]]
        assert channels["merge"] == 79


def test_published_weights_have_no_subnormal_number(published: tuple[str, Path, Path]) -> None:
    _, checkpoint, configuration = published
    stored = torch.cat([t.flatten() for t in read_checkpoint(checkpoint).values()]).float()
    assert ((stored != 0) & (stored.abs() < 1e-30)).sum() > 1000  # the file has many
    for key, value in convert_csnet(checkpoint, configuration).state_dict().items():
        assert not ((value != 0) & (value.abs() < 1e-30)).any(), key


def test_files_that_do_not_belong_together(shared: Path) -> None:
    folder = shared / "reference" / "sod100k"
    with pytest.raises(CheckpointError, match=r"csnet-L-x1\.pth\.tar.*csnet-L-x2\.bin"):
        convert_csnet(folder / "csnet-L-x1.pth.tar", folder / "csnet-L-x2.bin")


def test_a_configuration_cut_anywhere(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole = pair[1].read_bytes()
    path = tmp_path / "cut.bin"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.bin"):
            read_configuration(path)


def test_configurations_that_make_no_sense(tmp_path: Path) -> None:
    good = published_configuration(PRUNED)
    path = tmp_path / "net.bin"

    def refused(entries: Any, match: str) -> None:
        path.write_bytes(pickle.dumps(entries, protocol=3))
        with pytest.raises(CheckpointError, match=match):
            read_configuration(path)

    path.write_bytes(pickle.dumps(good, protocol=3))
    assert read_configuration(path) == PRUNED
    refused([], "not a CSNet configuration")
    refused({"a": 1}, "not a CSNet configuration")
    refused(good[1:], "number of blocks")
    refused([*good[:-1], [3, 4, 4, 99]], "number of blocks")
    refused([*good[:-1], [3, 4, -4, 3]], "number of blocks")
    refused([[3], *good[1:]], "wrong length")
    refused([good[0], [np.array([9.0, 9.0]), good[1][1]], *good[2:]], r"takes \[9, 9\]")
    refused([[3, np.array([np.nan, 2.0])], *good[1:]], "impossible")
    refused([[3, np.array([1.5, 2.0])], *good[1:]], "impossible")
    refused([[3, np.array([-1.0, 2.0])], *good[1:]], "impossible")
    refused([[3, np.array([1e9, 2.0])], *good[1:]], "impossible")
    refused([[3, np.array([])], *good[1:]], "malformed")
    refused([[3, "eight"], *good[1:]], "malformed")
    refused([[3, np.zeros((9, 9))], *good[1:]], "malformed")


def test_checkpoints_that_lack_or_add_tensors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    state = published_state(random_model(PRUNED), PRUNED)
    entries = published_configuration(PRUNED)
    for key in ("cls_layer.bias", "stage0.0.conv1x1.prelus.1.weight"):
        less = {k: v for k, v in state.items() if k != key}
        with pytest.raises(CheckpointError, match=f"lacks the tensor {key}"):
            convert_csnet(*write_pair(tmp_path, less, entries))
    with pytest.raises(CheckpointError, match="'surplus'"):
        convert_csnet(*write_pair(tmp_path, {**state, "surplus": torch.zeros(1)}, entries))
    with pytest.raises(ValueError, match=r"head\.bias has shape \(2,\)"):
        convert_csnet(*write_pair(tmp_path, {**state, "cls_layer.bias": torch.zeros(2)}, entries))
    with pytest.raises(CheckpointError, match="something else than tensors"):
        convert_csnet(*write_pair(tmp_path, {**state, "cls_layer.bias": 3}, entries))
    with pytest.raises(CheckpointError, match="no 'state_dict'"):
        convert_csnet(*write_pair(tmp_path, {}, entries))
