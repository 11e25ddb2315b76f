"""Plans: the fused network as one op, as a file, and without Python."""

import importlib
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import sodfast
from sodfast.models.image import PREPROCESSING
from sodfast.nn import GOctConv, ILBlock, NormAct
from sodfast.ops import _backend
from sodfast.plan import Plan

PACKAGE = Path(sodfast.__file__).parent
SOURCE = Path(__file__).parents[1]
STAGES = [[[3, 2]], [[2, 2]], [[3, 0], [4]], [[3, 2], [3]], [[0, 3], [3]]]
NETWORKS = {
    "csnet": ("csnet", {}),
    "deep": ("csnet", {"fused_stages": (4,)}),
    "wide": ("csnet", {"fused_stages": (1, 2, 3, 4)}),
    "extractor": ("extractor", {"channels": {"stages": STAGES}, "in_channels": 4}),
    "vanilla": ("vanilla", {"channels": {"stages": STAGES}}),
}


def calm(model):
    """Give a model statistics with which rounding does not grow from layer to layer."""
    norms = [m for m in model.modules() if isinstance(m, sodfast.nn.NormAct)]
    with torch.no_grad(), sodfast.use_backend("reference"):
        for norm in norms:
            norm.weight.uniform_(0.1, 0.3)
            norm.bias.normal_(std=0.1)
            norm.slope.normal_(0.2, 0.3)
            norm.momentum = 1.0
        model.train()(torch.randn(4, model.config["in_channels"], 64, 64))
    return model.eval()


@pytest.fixture(params=NETWORKS)
def network(request, compiled, small_channels):
    name, config = NETWORKS[request.param]
    if request.param == "csnet":
        config = {"channels": small_channels}
    elif name == "csnet":
        config = {"width": 0.35, **config}
    torch.manual_seed(0)
    return calm(sodfast.create_model(name, **config))


@pytest.fixture
def plan(compiled, small_csnet):
    return sodfast.fuse(small_csnet())


@pytest.fixture(params=["one", "two"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "one" else 2)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("isa", ["avx512", "avx2", "sse4.2", "neon"])
@pytest.mark.parametrize("size", [(16, 16), (32, 48), (80, 224), (128, 112)])
def test_result_on_every_instruction_set(network, isa, size, threads):
    module = _backend._C
    if isa not in module.cpu_isas():
        pytest.skip(f"this machine or build has no {isa}")
    fused = sodfast.fuse(network)
    assert isinstance(fused, Plan)
    x = torch.randn(3, network.config["in_channels"], *size)
    with sodfast.use_backend("reference"):
        eager = fused(x)
        expected = network.double()(x.double())
    # Deep random networks amplify rounding, eager torch's as ours; the blocks below are exact.
    limit = 2 * (eager - expected).norm() + 5e-5 * expected.norm()
    before = module.cpu_isa()
    module.set_cpu_isa(isa)
    try:
        results = [torch.cat([fused(image) for image in x.split(1)]), fused(x)]
    finally:
        module.set_cpu_isa(before)
    for result in results:
        assert (result - expected).norm() < limit
    assert torch.equal(*results)


class OneBlock(torch.nn.Module):
    """An image through one block and a head, to test the steps without a network's depth."""

    fusable_pairs = (("first", "norm"),)
    name, preprocessing = "one", {**PREPROCESSING, "size": [32, 32]}

    def __init__(self, first, block):
        super().__init__()
        self.config = {"in_channels": 3}
        self.first, self.norm = GOctConv(3, first, 3), NormAct(first)
        self.block = block
        outs = block.conv1.out_channels
        self.head = GOctConv(outs, 1, bias=True)

    def forward(self, image):
        logits = self.head(self.block(self.norm(self.first(image))))[0]
        return torch.nn.functional.interpolate(
            logits, size=image.shape[-2:], mode="bilinear", align_corners=False
        )

    def add_to(self, plan, image):
        xs = plan.block(self.first, [image], self.first)
        (logits,) = plan.block(self.head, self.block.add_to(plan, xs), self.head)
        return plan.upsample(logits)


@torch.no_grad()
@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize(
    "ins, outs",
    [
        ((5,), (3,)),
        ((7, 9), (13, 2)),
        ((4, 0, 3), (0, 5)),
        ((2, 3, 4, 1), (3, 2, 9, 8)),
        ((3,), (4, 6, 17)),
    ],
)  # fmt: skip
def test_one_block_on_every_instruction_set(compiled, settle, ins, outs, kernel, stride):
    torch.manual_seed(0)
    model = OneBlock(ins, ILBlock(ins, outs, kernel, stride))
    settle(model, torch.randn(4, 3, 64, 64))
    module = _backend._C
    fused = sodfast.fuse(model)
    before = module.cpu_isa()
    model.double()
    for size in ((16, 16), (48, 112), (96, 80)):
        x = torch.randn(1, 3, *size)
        with sodfast.use_backend("reference"):
            expected = model(x.double())
        for isa in module.cpu_isas():
            module.set_cpu_isa(isa)
            try:
                result = fused(x)
            finally:
                module.set_cpu_isa(before)
            assert (result - expected).abs().max() < 2e-5 * expected.abs().max()


@torch.no_grad()
def test_file_round_trip(plan, tmp_path):
    path = tmp_path / "x.sodfast"
    plan.save(path)
    loaded = sodfast.load_plan(path)
    x = torch.randn(2, 3, 32, 64)
    assert torch.equal(loaded(x), plan(x))
    assert [name for name, _, _ in loaded.times(x[:1], 2)][:2] == ["step 1", "step 2"]
    times = plan.times(x[:1], 3)
    assert times[0][0] == "stages.0.0" and times[-1][0] == "upsample"
    assert all(ms > 0 for _, ms, _ in times)


def test_work_of_the_steps_is_that_of_the_network(plan, small_csnet):
    pixels = 64 * 64
    total = sum(step.macs_per_pixel for step in plan.steps) * pixels
    assert total == sodfast.count(small_csnet(), (64, 64))["conv_macs"]


def patched(plan, position, value):
    """The plan's bytes with a word changed, and the checksum made to fit."""
    data = bytearray(plan.blob.numpy().tobytes())
    struct.pack_into("<I", data, position, value)
    struct.pack_into("<I", data, 24, zlib.crc32(data[120:]))
    return bytes(data)


def test_bad_files_are_refused_with_their_name(plan, tmp_path):
    path = tmp_path / "x.sodfast"
    good = plan.blob.numpy().tobytes()
    flipped = bytearray(good)
    flipped[-1] ^= 1
    words = 120 + 8 * struct.unpack_from("<I", good, 28)[0]
    cases = {
        "empty": b"",
        "no .sodfast file": b"GIF89a" + good[6:],
        "the file has 500 bytes": good[:500],
        "checksum is wrong": bytes(flipped),
        "format 9": patched(plan, 8, 9),
        "byte order": patched(plan, 12, 0x04030201),
        "has 0 tensors": patched(plan, 28, 0),
        "4097 channels": patched(plan, 120, 4097),
        "unknown kind 77": patched(plan, words, 77),
        "has 0 scales": patched(plan, words + 8, 0),
        "before it is written": patched(plan, words + 12, 3),
        "weights beyond the end": patched(plan, words + 4 * 16, 0x7FFFFFFF),
    }
    for message, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(ValueError) as caught:
            sodfast.load_plan(path)
            pytest.fail(f"not refused: {message}")
        assert message in str(caught.value) and "x.sodfast" in str(caught.value)
    with pytest.raises(FileNotFoundError):
        sodfast.load_plan(tmp_path / "none")


def test_bad_images_are_refused(plan):
    with pytest.raises(ValueError, match="40x48.*multiples of 16"):
        plan(torch.randn(1, 3, 40, 48))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        plan(torch.randn(1, 1, 32, 32))
    with pytest.raises(RuntimeError, match="40x48"):
        torch.ops.sodfast.run_plan(torch.randn(1, 3, 40, 48), plan.blob)
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.sodfast.run_plan(torch.randn(1, 3, 32, 32).double(), plan.blob)
    with pytest.raises(RuntimeError, match="uint8"):
        torch.ops.sodfast.run_plan(torch.randn(1, 3, 32, 32), plan.blob.float())
    assert plan(torch.randn(0, 3, 32, 32)).shape == (0, 1, 32, 32)


def test_op_keeps_torchs_rules(plan):
    torch.library.opcheck(torch.ops.sodfast.run_plan, (torch.randn(2, 3, 32, 32), plan.blob))


def test_gradient_is_refused(plan):
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match="for inference"):
        plan(x).sum().backward()


@torch.no_grad()
def test_nan_and_subnormal_numbers(plan):
    x = torch.randn(1, 3, 64, 64)
    x[0, 0, 0, 0] = torch.nan
    y = plan(x)
    assert y[0, 0, 0, 0].isnan()
    # An image of subnormal numbers is as good as black.
    torch.testing.assert_close(
        plan(torch.full((1, 3, 32, 32), 1e-40)), plan(torch.zeros(1, 3, 32, 32))
    )


@torch.no_grad()
def test_two_plans_in_turn_from_two_threads(compiled, small_csnet):
    plans = [sodfast.fuse(small_csnet(seed)) for seed in range(2)]
    images = [torch.randn(1, 3, 32 + 16 * i, 48) for i in range(3)]
    expected = {(p, i): plans[p](images[i]) for p in range(2) for i in range(3)}
    wrong = []

    @torch.no_grad()
    def work(seed):
        for step in range(40):
            key = (step + seed) % 2, (step * seed) % 3
            if not torch.equal(plans[key[0]](images[key[1]]), expected[key]):
                wrong.append(key)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@torch.no_grad()
def test_any_number_of_threads(compiled, small_csnet):
    """They may change between calls, and the map does not depend on them."""
    plan, image = sodfast.fuse(small_csnet()), torch.randn(1, 3, 160, 224)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = plan(image)
    try:
        for number in (2, 5, 1, 3, 5, 2):
            torch.set_num_threads(number)
            for _ in range(5):
                assert torch.equal(plan(image), expected), number
    finally:
        torch.set_num_threads(before)


FORKING = """
import os, signal, sys, torch, sodfast
torch.set_num_threads(2)
plan = sodfast.load_plan(sys.argv[1])
with torch.no_grad():
    image = torch.linspace(-1, 1, 3 * 160 * 224).view(1, 3, 160, 224)
    expected = plan(image).numpy().tobytes()
    child = os.fork()
    same = plan(image).numpy().tobytes() == expected
if child:
    _, status = os.waitpid(child, 0)
    same = same and status == 0
sys.exit(0 if same else 1)
"""


CROWDED = """
import resource, sys, torch, sodfast
plan = sodfast.load_plan(sys.argv[1])
image = torch.linspace(-1, 1, 3 * 160 * 224).view(1, 3, 160, 224)
torch.set_num_threads(1)
with torch.no_grad():
    expected = plan(image).numpy().tobytes()
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + (200 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(500)
    same = plan(image).numpy().tobytes() == expected
sys.exit(0 if same else 1)
"""


def test_as_many_threads_as_the_system_gives(plan, tmp_path):
    """Here there is room for the stacks of some twenty, of 500 that were asked for."""
    path = tmp_path / "network.sodfast"
    plan.save(path)
    command = [sys.executable, "-c", CROWDED, str(path)]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_forked_process_has_threads_of_its_own(plan, tmp_path):
    """As of a data loader or a web server: threads do not outlive a fork, nor does it hang."""
    path = tmp_path / "network.sodfast"
    plan.save(path)
    command = [sys.executable, "-c", FORKING, str(path)]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------- without Python
def build(source, output, *options):
    """A program of C or C++ linked with libsodfast, or a skip where that cannot be."""
    if not (PACKAGE / "lib" / "libsodfast.so").exists():
        pytest.skip("libsodfast was not built")
    compiler = shutil.which("g++" if source.suffix == ".cpp" else "gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    command = [compiler, "-O1", "-Wall", "-Wextra", "-Werror", *options, str(source), "-o"]
    command += [str(output), f"-I{PACKAGE / 'include'}", f"-L{PACKAGE / 'lib'}", "-lsodfast"]
    command += ["-lm", "-ldl", f"-Wl,-rpath,{PACKAGE / 'lib'}"]
    subprocess.run(command, check=True)
    return output


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@torch.no_grad()
def test_example_in_c_gives_the_same_map(plan, tmp_path):
    example = build(SOURCE / "csrc" / "plan" / "example.c", tmp_path / "example", "-std=c11")
    network = tmp_path / "x.sodfast"
    plan.save(network)
    photo = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    (tmp_path / "photo.ppm").write_bytes(b"P6\n224 224\n255\n" + photo.tobytes())
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    x = (torch.from_numpy(photo).permute(2, 0, 1) / 255 - mean) / std
    expected = (255 * plan(x[None]).sigmoid()[0, 0]).round().numpy()
    for threads in (1, 2):
        code, text = run(example, network, tmp_path / "photo.ppm", tmp_path / "map.pgm", threads)
        assert code == 0, text
        header, data = (tmp_path / "map.pgm").read_bytes().split(b"255\n", 1)
        assert header == b"P5\n224 224\n"
        got = np.frombuffer(data, np.uint8).reshape(224, 224)
        assert np.abs(got - expected).max() <= 1
    assert np.ptp(expected) > 1  # a map, not a constant


def test_example_in_c_tells_what_is_wrong(plan, tmp_path):
    example = build(SOURCE / "csrc" / "plan" / "example.c", tmp_path / "example", "-std=c11")
    network = tmp_path / "x.sodfast"
    plan.save(network)
    photo = tmp_path / "photo.ppm"
    photo.write_bytes(b"P6\n2 2\n255\n12")
    result = tmp_path / "map.pgm"
    for arguments, message in (
        (("none", photo, result), "No such file"),
        ((photo, photo, result), "no .sodfast file"),
        ((network, photo, result), "not a binary PPM file"),
        ((network, photo, result, 0), "threads must be 1 to 256"),
    ):
        code, text = run(example, *arguments)
        assert code == 1 and message in text
    assert not result.exists()


def test_nothing_is_allocated_after_the_first_calls(plan, tmp_path):
    program = build(SOURCE / "tests" / "native" / "allocations.c", tmp_path / "allocations")
    plan.save(tmp_path / "x.sodfast")
    code, text = run(program, tmp_path / "x.sodfast", 64)
    first, *later = map(int, text.split())
    assert code == 0 and first > 0 and later == [0] * 4


def test_memory_of_one_map(compiled, tmp_path, monkeypatch):
    """csnet-L-x2 stays under 12 MB at 224x224."""
    monkeypatch.syspath_prepend(SOURCE / "bench")
    channels = importlib.import_module("networks").X2_L
    program = build(SOURCE / "tests" / "native" / "allocations.c", tmp_path / "allocations")
    sodfast.fuse(sodfast.create_model("csnet", channels=channels)).save(tmp_path / "x.sodfast")
    code, text = run(program, tmp_path / "x.sodfast", 224)
    assert code == 0 and 1_000_000 < int(text.split()[0]) < 12_000_000


def test_damaged_files_never_crash(network, tmp_path, full):
    program = build(SOURCE / "tests" / "native" / "fuzz_plan.cpp", tmp_path / "fuzz", "-std=c++17")
    sodfast.fuse(network).save(tmp_path / "x.sodfast")
    code, text = run(program, 5000 if full else 300, 1, tmp_path / "x.sodfast")
    assert code == 0, text
    assert " 0 results" not in text and " 0 refused" not in text
