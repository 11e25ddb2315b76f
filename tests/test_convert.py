"""Published checkpoints become weight files; hostile ones become errors and run nothing."""

from __future__ import annotations

import collections
import os
import pickle
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sodfast
from sodfast.convert import CheckpointError, convert_csnet, read_checkpoint, read_configuration

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
PROTOCOL = pickle.dumps(1001, protocol=2)
MACHINE = pickle.dumps({"protocol_version": 1001, "little_endian": True}, protocol=2)

# One channel configuration with a branch, a bank scale's first branch, and scales that vanished.
PRUNED = {
    "stages": [
        [[3, 2]],
        [[2, 3], [4, 1], [3, 3]],
        [[4, 3], [5, 0], [3, 4], [6]],
        [[5, 4], [0, 6], [4, 4], [7]],
        [[6, 2], [3, 5], [8]],
    ],
    "fuse": [4, 3, 5],
    "bank": [[1, 1, 0, 1, 1], [0, 2, 1, 0, 3], [2, 0, 0, 0, 1]],
    "merge": 7,
}


# -------------------------------------------------------- writing files as the authors' do


def published_state(model: nn.Module, channels: dict[str, Any]) -> dict[str, Tensor]:
    """A model's tensors under the published names, split per scale, depthwise and dilated
    weights divided by 100."""
    ours = model.state_dict()
    theirs: dict[str, Tensor] = collections.OrderedDict()

    def norm(source: str, counts: list[int], norm_name: str, slope_name: str) -> None:
        for i, count in enumerate(counts):
            if not count:
                continue
            rows = slice(sum(counts[:i]), sum(counts[: i + 1]))
            for entry in ("weight", "bias", "running_mean", "running_var"):
                theirs[f"{norm_name.format(i)}.{entry}"] = ours[f"{source}.{entry}"][rows].clone()
            theirs[f"{norm_name.format(i)}.num_batches_tracked"] = torch.tensor(3)
            theirs[f"{slope_name.format(i)}.weight"] = ours[f"{source}.slope"][rows].clone()

    for s, stage in enumerate(channels["stages"]):
        for b, counts in enumerate(stage):
            to, source = f"stage{s}.{b}", f"stages.{s}.{b}"
            theirs[f"{to}.conv1x1.conv.weight"] = ours[f"{source}.conv1.weight"]
            norm(f"{source}.norm1", counts, to + ".conv1x1.bns.{}", to + ".conv1x1.prelus.{}")
            for n in (1, 2):
                layer = f"{to}.conv3x3_{n}"
                for i, part in enumerate(ours[f"{source}.conv{n + 1}.weight"].split(counts)):
                    if counts[i]:
                        theirs[f"{layer}.convs.{i}.weight"] = part / 100
                norm(f"{source}.norm{n + 1}", counts, layer + ".bns.{}", layer + ".prelus.{}")
    fuse = "oct_fuse.fuse"
    theirs[f"{fuse}.conv.weight"] = ours["fusion.mix.conv.weight"]
    norm("fusion.mix.norm", channels["fuse"], fuse + ".bns.{}", fuse + ".prelus.{}")
    for s, row in enumerate(channels["bank"]):
        for d, part in enumerate(ours[f"fusion.bank.weights.{s}"].split(row)):
            if row[d]:
                theirs[f"oct_fuse.ms.convs.{s}.msconv.{d}.weight"] = part / 100
    scales = "oct_fuse.ms.convs.{}"
    totals = [sum(row) for row in channels["bank"]]
    norm("fusion.bank.norm", totals, scales + ".bn", scales + ".prelu")
    theirs["oct_fuse.fuse1x1.conv.weight"] = ours["fusion.merge.conv.weight"]
    norm(
        "fusion.merge.norm",
        [channels["merge"]],
        "oct_fuse.fuse1x1.bns.{}",
        "oct_fuse.fuse1x1.prelus.{}",
    )
    theirs["cls_layer.weight"], theirs["cls_layer.bias"] = ours["head.weight"], ours["head.bias"]
    return theirs


def published_configuration(channels: dict[str, Any]) -> list[Any]:
    entries: list[Any] = []
    previous: Any = 3
    for stage in channels["stages"]:
        for counts in stage:
            entries.append([previous, np.array(counts, dtype=float)])
            previous = np.array(counts, dtype=float)
    inputs = np.array([stage[-1][0] for stage in channels["stages"][2:]], dtype=float)
    middle = np.array(channels["fuse"], dtype=float)
    table = np.array(channels["bank"], dtype=float)
    merge = np.array([channels["merge"]], dtype=float)
    entries += [[inputs, middle], [middle, table.sum(axis=1), table], [table.sum(axis=1), merge]]
    return [*entries, [len(stage) for stage in channels["stages"][1:]]]


def write_pair(folder: Path, state: Any, entries: Any) -> tuple[Path, Path]:
    checkpoint, configuration = folder / "net.pth.tar", folder / "net.bin"
    content = {"epoch": 3, "arch": "net", "state_dict": state, "optimizer": {"lr": 1e-4, "n": []}}
    torch.save(content, checkpoint, _use_new_zipfile_serialization=False)
    configuration.write_bytes(pickle.dumps(entries, protocol=3))
    return checkpoint, configuration


def random_model(channels: dict[str, Any] | None) -> nn.Module:
    torch.manual_seed(0)
    model = sodfast.create_model("csnet", channels=channels).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(0.1 * torch.rand_like(tensor))
    return model


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


def test_reads_what_torch_writes(tmp_path: Path) -> None:
    """Views, shared storages, transposes, empty and scalar tensors, as torch reads them back."""
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    state = collections.OrderedDict(
        whole=base,
        view=base[1:, ::2, 3],
        transposed=base.permute(2, 0, 1),
        scalar=torch.tensor(2.5),
        integer=torch.tensor([[1, -(2**60)]]),
        empty=torch.zeros(3, 0, 2),
        large=torch.linspace(-1, 1, 70_000),
    )
    path = tmp_path / "some.pth"
    torch.save({"state_dict": state, "best": 0.5}, path, _use_new_zipfile_serialization=False)
    ours = read_checkpoint(path)
    theirs = torch.load(path, weights_only=True)["state_dict"]
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        assert torch.equal(ours[key], value), key
    ours["whole"].zero_()  # writable, and nobody else's memory
    assert torch.equal(ours["transposed"], theirs["transposed"])


# ------------------------------------------------------------------- the published files


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


def test_a_published_checkpoint_cut_anywhere(shared: Path, tmp_path: Path) -> None:
    whole = (shared / "reference" / "sod100k" / "csnet-L-x1.pth.tar").read_bytes()
    cut = tmp_path / "cut.pth.tar"
    rng = random.Random(0)
    lengths = [0, 1, 14, 15, 20, 21, 136, 137, 134_981, 151_960, 151_961, len(whole) - 1]
    for length in [*lengths, *(rng.randrange(len(whole)) for _ in range(15))]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pth\.tar"):
            read_checkpoint(cut)


# ------------------------------------------------------------------------ hostile pickles


class Call:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def hostile_pickles(canary: Path) -> dict[str, bytes]:
    """Pickles that make the folder `canary` when they are unpickled in earnest."""
    name = str(canary)
    python = f"__import__('os').mkdir({name!r})"
    text = name.encode()
    unicode = b"X" + struct.pack("<I", len(text)) + text
    call_os = [pickle.dumps(Call(os.system, f"mkdir '{name}'"), protocol=p) for p in range(5)]
    return {
        **{f"os.system, protocol {p}": data for p, data in enumerate(call_os)},
        "os.mkdir": pickle.dumps(Call(os.mkdir, name), protocol=2),
        "eval": pickle.dumps(Call(eval, python), protocol=2),
        "exec": pickle.dumps({"state_dict": Call(exec, python)}, protocol=4),
        "nested": pickle.dumps([[(1, {"a": Call(os.mkdir, name)})]], protocol=3),
        "in an OrderedDict": pickle.dumps(
            collections.OrderedDict(a=Call(os.mkdir, name)), protocol=2
        ),
        "INST": b"(S'" + text + b"'\nios\nmkdir\n.",
        "OBJ": b"(cos\nmkdir\n" + unicode + b"o.",
        "NEWOBJ": b"\x80\x02cos\nmkdir\n" + unicode + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + unicode + b"\x85R.",
        # By way of a module that sounds harmless.
        "dotted name": b"\x80\x04\x8c\x13torch.serialization\x8c\x08os.mkdir\x93"
        + unicode
        + b"\x85R.",
        "under a memo": b"\x80\x02cos\nmkdir\nq\x010h\x01" + unicode + b"\x85R.",
    }


HOSTILE = sorted(hostile_pickles(Path("x")))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_execute_nothing(kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = hostile_pickles(canary)[kind]
    pickle.loads(payload)  # the payload is live:
    assert canary.is_dir()
    canary.rmdir()

    path = tmp_path / "hostile.bin"
    keys = pickle.dumps([], protocol=2)
    good = pickle.dumps({"state_dict": {}}, protocol=2)
    for content in (
        payload,
        MAGIC + payload,
        MAGIC + PROTOCOL + payload,
        MAGIC + PROTOCOL + MACHINE + payload + keys,
        MAGIC + PROTOCOL + MACHINE + good + payload,
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"hostile\.bin"):
            read_checkpoint(path)
        with pytest.raises(CheckpointError, match=r"hostile\.bin"):
            read_configuration(path)
    assert not canary.exists()


def test_a_hostile_object_inside_a_real_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    state = published_state(random_model(PRUNED), PRUNED)
    for content in (
        {"state_dict": state, "epoch": Call(os.mkdir, str(canary))},
        {"state_dict": {**state, "extra": Call(os.mkdir, str(canary))}},
        Call(os.mkdir, str(canary)),
    ):
        torch.save(content, pair[0], _use_new_zipfile_serialization=False)
        with pytest.raises(CheckpointError, match=r"mkdir.*nothing of it was executed"):
            convert_csnet(*pair)
    assert not canary.exists()


def test_stand_ins_cannot_be_called_as_if_they_were_the_real_thing(tmp_path: Path) -> None:
    """Allowed names with arguments that the real functions would be dangerous with."""
    path = tmp_path / "odd.bin"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    array = b"cnumpy.core.multiarray\n_reconstruct\n"
    for body in (
        rebuild + b")R.",
        rebuild + b"(NNNNNNtR.",
        rebuild + b"(K\x01K\x00)))NtR.",
        array + b"(cnumpy\ndtype\nK\x00\x85U\x01btR.",
        array + b"(cnumpy\nndarray\nK\x00\x85C\x01btR(K\x01J\xff\xff\xff\x7f\x85NNNtb.",
        b"cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.",
        b"cnumpy\ndtype\nX\x02\x00\x00\x00V8\x85R.",
        b"cnumpy\ndtype\n)R.",
        b"cnumpy\nndarray\n(K\x03tR.",
        b"ctorch\nFloatStorage\nK\x05\x85R.",
        b"ccollections\nOrderedDict\n(((K\x01K\x02ttR.",
        b"ccollections\nOrderedDict\n)RK\x01b.",
        b"ccollections\nOrderedDict\n}b.",
        b"K\x01)R.",
        b"K\x01K\x02b.",
    ):
        path.write_bytes(MAGIC + PROTOCOL + MACHINE + b"\x80\x03" + body)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
        path.write_bytes(b"\x80\x03" + body)
        with pytest.raises(CheckpointError):
            read_configuration(path)


def test_claims_of_huge_sizes_cost_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.bin"

    def storage(count: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
        number = lambda n: b"\x8a\x08" + struct.pack("<q", n)  # noqa: E731
        numbers = lambda ns: b"(" + b"".join(map(number, ns)) + b"t"  # noqa: E731
        return (
            b"\x80\x02}X\x0a\x00\x00\x00state_dict}X\x01\x00\x00\x00a"
            b"ctorch._utils\n_rebuild_tensor_v2\n(("
            b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00kX\x03\x00\x00\x00cpu"
            + number(count)
            + b"NtQK\x00"
            + numbers(shape)
            + numbers(stride)
            + b"\x89}tRss."
            + pickle.dumps(["k"], protocol=2)
            + struct.pack("<q", count)
            + b"\x00" * 64
        )

    preamble = MAGIC + PROTOCOL + MACHINE
    path.write_bytes(preamble + storage(16, (4, 4), (4, 1)))
    assert read_checkpoint(path)["a"].shape == (4, 4)  # the honest form of what follows
    bodies = [
        storage(1 << 40, (1 << 40,), (1,)),
        storage(1 << 62, (1,), (1,)),
        storage(-1, (1,), (1,)),
        storage(1 << 20, (16,), (1,)),
        storage(16, (1 << 30, 1 << 30), (0, 0)),
        storage(16, (17,), (0,)),
        storage(16, (17,), (1,)),
        storage(16, (4, 4), (1 << 50, 1)),
        storage(16, (2, 2), (-4, 1)),
        storage(16, (-2, 2), (1, 1)),
        storage(16, (1,) * 70, (1,) * 70),
        storage(16, (1 << 39, 1 << 39, 0), (1, 1, 1)),
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.",  # BINUNICODE8
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",  # BINBYTES8
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",  # BYTEARRAY8
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",  # FRAME
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01.",  # LONG4
        b"\x80\x02Nr\xff\xff\xff\xff.",  # LONG_BINPUT: a memo of 4 billion entries
        b"L" + b"9" * 100_000 + b"L\n.",
        b"I" + b"9" * 100_000 + b"\n.",
    ]
    tracemalloc.start()
    try:
        for body in bodies:
            path.write_bytes(preamble + body)
            with pytest.raises(CheckpointError, match=r"huge\.bin"):
                read_checkpoint(path)
            path.write_bytes(body)
            with pytest.raises(CheckpointError, match=r"huge\.bin"):
                read_configuration(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_many_tensors_of_one_storage_cost_no_memory(tmp_path: Path) -> None:
    storage = torch.zeros(250_000)
    path = tmp_path / "shared.pth"
    for count, accepted in ((5, True), (500, False)):  # 5 MB, and a claim of 500 MB
        state = {f"t{i}": storage[: 250_000 - i] for i in range(count)}
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
        assert path.stat().st_size < 2e6
        if accepted:
            assert len(read_checkpoint(path)) == count
            continue
        tracemalloc.start()
        try:
            with pytest.raises(CheckpointError, match=r"shared\.pth.*bytes together"):
                read_checkpoint(path)
            assert tracemalloc.get_traced_memory()[1] < 20e6
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    "body",
    {
        "lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "tuples": b"\x80\x02N" + b"\x85" * 300_000 + b".",
        "marks": b"\x80\x02" + b"(" * 300_000 + b"t" * 300_000 + b".",
        # Hashing a tuple this deep overflows the C stack of an ordinary unpickler.
        "key": b"\x80\x02}N" + b"\x85" * 300_000 + b"K\x01s.",
        "cycle": b"\x80\x02]q\x01h\x01a.",
        "many steps": b"\x80\x02N" + b"q\x01" * 1_000_001 + b".",
    }.items(),
    ids=lambda item: item[0],
)
def test_deep_long_and_circular_pickles(body: tuple[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "deep.bin"
    for preamble in (b"", MAGIC + PROTOCOL + MACHINE):
        path.write_bytes(preamble + body[1])
        with pytest.raises(CheckpointError, match=r"deep\.bin"):
            (read_checkpoint if preamble else read_configuration)(path)


def test_damaged_files_are_read_or_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Random damage: tensors and lists, or CheckpointError, and no other exception."""
    rng = random.Random(1)
    folder = tmp_path / "damaged"
    folder.mkdir()
    outcomes = {"read": 0, "refused": 0}
    for source, read, trials in (
        (pair[0], read_checkpoint, 60),
        (pair[1], read_configuration, 1500),
    ):
        whole = source.read_bytes()
        for _ in range(trials):
            data = bytearray(whole)
            # Checkpoints: mostly in their pickles, not in the numbers.
            region = len(data) // 2 if source == pair[0] else len(data)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(region)] = rng.randrange(256)
            path = folder / "f"
            path.write_bytes(data)
            try:
                result = read(path)
            except CheckpointError:
                outcomes["refused"] += 1
            else:
                outcomes["read"] += 1
                assert isinstance(result, dict)
    assert min(outcomes.values()) > 50


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


def test_other_kinds_of_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    with pytest.raises(FileNotFoundError, match=r"other\.pth"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="is not a file"):
        read_checkpoint(tmp_path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match=r"other\.pth: is in torch\.save's zip format"):
        read_checkpoint(path)
    for content in (b"", b"text, no checkpoint", pickle.dumps({"state_dict": {}}, protocol=2)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a checkpoint written by torch"):
            read_checkpoint(path)
    with open(path, "wb") as stream:
        stream.truncate(100 << 20)
    with pytest.raises(CheckpointError, match="104,857,600 bytes"):
        read_checkpoint(path)
    other = MACHINE.replace(b"\x88", b"\x89")  # little_endian: False
    path.write_bytes(MAGIC + PROTOCOL + other)
    with pytest.raises(CheckpointError, match="little-endian"):
        read_checkpoint(path)
