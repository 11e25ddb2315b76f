"""Weight files: a round trip keeps everything; whatever is not such a file is refused."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sodfast
from sodfast.weights import atomic_write, flush_denormals


def small_model(seed: int = 0) -> nn.Module:
    """A small CSNet with statistics and slopes that are not the initial ones."""
    torch.manual_seed(seed)
    model = sodfast.create_model("csnet", width=0.5)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.mul_(1 + 0.1 * torch.rand_like(tensor)).add_(0.01 * torch.rand_like(tensor))
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    sodfast.save(small_model(), path)
    return path


def rewrite(path: Path, **changes: Any) -> None:
    """Writes the file again with some entries of its description changed or (None) removed."""
    tensors = load_file(path)
    description = json.loads(read_metadata(path)["sodfast"])
    for key, value in changes.items():
        if value is None:
            del description[key]
        else:
            description[key] = value
    save_file(tensors, path, metadata={"sodfast": json.dumps(description)})


def read_metadata(path: Path) -> dict[str, str]:
    with open(path, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(length))["__metadata__"]


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    model = small_model()
    model.preprocessing = {**model.preprocessing, "size": [96, 128], "mean": [0.1, 0.2, 0.3]}
    path = tmp_path / "m.safetensors"
    sodfast.save(model, path)
    back = sodfast.load(str(path))
    assert back.name == model.name == "csnet"
    assert back.config == model.config
    assert back.preprocessing == model.preprocessing
    assert not back.training
    state, state_back = model.state_dict(), back.state_dict()
    assert state.keys() == state_back.keys()
    assert all(torch.equal(state[key], state_back[key]) for key in state)
    assert [p.requires_grad for p in back.parameters()] == [True] * len(list(model.parameters()))
    x = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), back(x))


def test_the_file_alone_describes_the_network(file: Path) -> None:
    description = json.loads(read_metadata(file)["sodfast"])
    assert description["format"] == 1
    assert description["model"] == "csnet"
    assert description["preprocessing"]["size"] == [224, 224]
    assert description["config"]["channels"]["stages"][0] == [[5, 5]]


def test_loading_draws_no_random_numbers(file: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    sodfast.load(file)
    assert torch.equal(torch.rand(3), expected)


def test_the_loaded_model_does_not_depend_on_the_file(file: Path) -> None:
    model = sodfast.load(file)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with open(file, "r+b") as stream:
        stream.seek(0)
        stream.write(b"\xff" * file.stat().st_size)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_denormals_are_flushed_at_load_and_nothing_else_is(tmp_path: Path) -> None:
    model = small_model()
    weight = model.get_parameter("stages.1.0.norm1.weight")
    values = torch.tensor([1e-42, -1e-31, 1e-29, -3e-30, float("nan")])
    with torch.no_grad():
        weight[:5] = values
    sodfast.save(model, tmp_path / "d.safetensors")
    loaded = sodfast.load(tmp_path / "d.safetensors").get_parameter("stages.1.0.norm1.weight")
    assert loaded[:2].tolist() == [0.0, 0.0]
    assert torch.equal(loaded[2:4], values[2:4])
    assert loaded[4].isnan()
    assert torch.equal(loaded[5:], weight[5:])


def test_flush_denormals_leaves_integers_and_makes_a_copy() -> None:
    numbers = torch.tensor([0, 1, 2])
    copy = flush_denormals(numbers)
    copy[0] = 5
    assert numbers.tolist() == [0, 1, 2]


def test_half_precision_files_load_as_float32(file: Path) -> None:
    metadata = read_metadata(file)
    save_file({k: v.half() for k, v in load_file(file).items()}, file, metadata=metadata)
    assert {v.dtype for v in sodfast.load(file).state_dict().values()} == {torch.float32}


# ---------------------------------------------------------------------- what is refused


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        sodfast.load(path)
    message = str(caught.value)
    assert path.name in message
    for word in words:
        assert word in message


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        sodfast.load(tmp_path / "nowhere.safetensors")
    refused(tmp_path, "not a file")


def test_cut_files(file: Path) -> None:
    whole = file.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 4, len(whole) - 1]:
        file.write_bytes(whole[:length])
        refused(file)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    for content in (b"hello, this is text", os.urandom(5000), b"\xff" * 100, b"{}" * 20):
        path.write_bytes(content)
        refused(path, "not a safetensors file")
    plan = tmp_path / "network.sodfast"
    plan.write_bytes(b"sodfast" * 100)
    refused(plan, "a plan, not weights: sodfast.load_plan")
    save_file({"a": torch.zeros(2)}, path)
    refused(path, "not written by sodfast")
    save_file({"a": torch.zeros(2)}, path, metadata={"format": "pt"})
    refused(path, "not written by sodfast")


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def test_a_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "evil.safetensors"
    path.write_bytes(pickle.dumps(Evil(canary)))
    pickle.loads(path.read_bytes())  # the file is live:
    assert canary.is_dir()
    canary.rmdir()
    refused(path)
    torch.save({"state_dict": Evil(canary)}, path)
    refused(path)
    assert not canary.exists()


def test_wrong_descriptions(file: Path) -> None:
    whole = file.read_bytes()
    config = json.loads(read_metadata(file)["sodfast"])["config"]
    preprocessing = json.loads(read_metadata(file)["sodfast"])["preprocessing"]
    for words, changes in (
        (("format is 2", "reads 1"), {"format": 2}),
        (("format is None",), {"format": None}),
        (("lacks 'model'",), {"model": None}),
        (("lacks 'config'",), {"config": None}),
        (("lacks 'preprocessing'",), {"preprocessing": None}),
        (("'nosuchnet'",), {"model": "nosuchnet"}),
        (("wrong type",), {"model": ["csnet"]}),
        (("wrong type",), {"config": [1, 2]}),
        (("colour",), {"config": {**config, "colour": "red"}}),
        (("configuration",), {"config": {**config, "channels": [[1], "x"]}}),
        (("configuration",), {"config": {**config, "channels": {"stages": 3}}}),
        (("size",), {"preprocessing": {**preprocessing, "size": [224]}}),
        (("std",), {"preprocessing": {**preprocessing, "std": [0.0, 1.0, 1.0]}}),
        (("resample",), {"preprocessing": {**preprocessing, "resample": "magic"}}),
        (("extra",), {"preprocessing": {**preprocessing, "extra": 1}}),
        (("mean",), {"preprocessing": {**preprocessing, "mean": ["a", "b", "c"]}}),
    ):
        file.write_bytes(whole)
        rewrite(file, **changes)
        refused(file, *words)
    save_file(load_file(file), file, metadata={"sodfast": "{no json"})
    refused(file, "no JSON")
    save_file(load_file(file), file, metadata={"sodfast": "[" * 100_000})
    refused(file, "no JSON")
    save_file(load_file(file), file, metadata={"sodfast": "[1]"})
    refused(file, "format")


def test_a_configuration_that_lies_costs_no_memory(file: Path) -> None:
    config = json.loads(read_metadata(file)["sodfast"])["config"]
    large = json.loads(json.dumps(config).replace("5", "900"))  # some 700 MB if it were made
    rewrite(file, config=large)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(file, "shape")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_tensors_that_do_not_fit(file: Path) -> None:
    metadata, tensors = read_metadata(file), load_file(file)

    def with_tensors(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, file, metadata=metadata)

    with_tensors({k: v for k, v in tensors.items() if k != "head.bias"})
    refused(file, "lacks head.bias")
    with_tensors({**tensors, "surplus": torch.zeros(1)})
    refused(file, "has surplus")
    with_tensors({**tensors, "head.bias": torch.zeros(2)})
    refused(file, "head.bias", "(2,)", "(1,)")
    with_tensors({**tensors, "head.bias": torch.zeros(1, dtype=torch.int64)})
    refused(file, "head.bias", "int64")


def test_save_refuses_what_load_could_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(TypeError, match="Linear"):
        sodfast.save(nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match="fused"):
        sodfast.save(sodfast.fuse(small_model()), path)
    model = small_model()
    model.preprocessing = {"size": [0, 0]}
    with pytest.raises(ValueError, match="preprocessing"):
        sodfast.save(model, path)
    with pytest.raises(OSError):
        sodfast.save(small_model(), tmp_path / "no" / "folder" / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------- atomic writing


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sodfast.save(small_model(seed=1), file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_the_final_name_appears_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    with atomic_write(path) as stream:
        stream.write(b"half")
        stream.flush()
        assert not path.exists()
        assert [p.name.startswith(".out.bin.") for p in tmp_path.iterdir()] == [True]
    assert path.read_bytes() == b"half"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_get_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    with atomic_write(tmp_path / "ours") as stream:
        stream.write(b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
