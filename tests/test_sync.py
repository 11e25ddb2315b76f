"""Two processes with shared batch statistics against one."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import sodfast
from sodfast import checkpoint
from sodfast.data.synth import write_scenes
from sodfast.nn import NormAct
from sodfast.optim import DynamicWeightDecay, parameter_groups
from sodfast.runlog import read_log
from sodfast.sync import SyncNormAct, synchronise

CHANNELS = (3, 0, 2)


def inputs() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Four pictures on three scales, one of them absent, and gradients for the result."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, c, 8 >> s, 8 >> s) for s, c in enumerate(CHANNELS)]
    xs = [torch.randn(s, generator=generator) * 0.02 + 0.3 for s in shapes]
    return xs, [torch.randn(s, generator=generator) for s in shapes]


def make() -> NormAct:
    norm = NormAct(CHANNELS)
    generator = torch.Generator().manual_seed(2)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return norm


def step(norm: NormAct, xs: list[torch.Tensor], grads: list[torch.Tensor]) -> dict[str, Any]:
    xs = [x.clone().requires_grad_() for x in xs]
    ys = norm(xs)
    torch.autograd.backward(ys, grads)
    return {
        "ys": [y.detach() for y in ys],
        "grads": [x.grad for x in xs],
        "parameters": [p.grad for p in norm.parameters()],
        "buffers": [norm.running_mean, norm.running_var],
        "means": norm.channel_means,
    }


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def train_step(model: torch.nn.Module, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """One step of CSNet with dynamic weight decay, in float64, on every world-th picture."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)[rank::world]
    truth = torch.rand(4, 1, 32, 32, generator=generator, dtype=torch.float64)[rank::world]
    inner = torch.optim.SGD(parameter_groups(model), lr=1e-3)
    optimizer = DynamicWeightDecay(inner, model)
    F.binary_cross_entropy_with_logits(model(x), truth).backward()
    if world > 1:  # what DDP does
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
    optimizer.step()
    return model.state_dict()


def make_model() -> torch.nn.Module:
    torch.manual_seed(4)
    return sodfast.create_model("csnet", width=0.2).double().train()


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    xs, grads = inputs()
    norm = synchronise(make())
    assert type(norm) is SyncNormAct
    result = step(norm, [x[rank::2] for x in xs], [g[rank::2] for g in grads])
    result["model"] = train_step(synchronise(make_model()), rank, 2)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    mp.spawn(_rank, (free_port(), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    xs, grads = inputs()
    one = step(make(), xs, grads)
    close = {"rtol": 1e-4, "atol": 1e-5}
    for name in ("ys", "grads"):
        for wanted, *parts in zip(one[name], *(rank[name] for rank in ranks)):
            torch.testing.assert_close(torch.stack(parts, 1).flatten(0, 1), wanted, **close)
    means = torch.stack([rank["means"] for rank in ranks], 1).flatten(0, 1)
    torch.testing.assert_close(means, one["means"], **close)
    for wanted, a, b in zip(one["parameters"], *(rank["parameters"] for rank in ranks)):
        torch.testing.assert_close(a + b, wanted, **close)
    for wanted, a, b in zip(one["buffers"], *(rank["buffers"] for rank in ranks)):
        torch.testing.assert_close(a, wanted, **close)
        assert torch.equal(a, b)

    # A whole network: in float64, as the gradients of a fresh one are too steep for less.
    before = {name: value.clone() for name, value in make_model().state_dict().items()}
    for name, wanted in train_step(make_model()).items():
        torch.testing.assert_close(ranks[0]["model"][name], wanted, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(ranks[1]["model"][name], wanted, rtol=1e-8, atol=1e-10)
        assert not torch.equal(wanted, before[name]), f"{name} did not move"


def test_in_one_process_it_is_the_plain_norm() -> None:
    """Bit for bit forward; backward but for the last bits: sums are taken in another precision."""
    xs, grads = inputs()
    plain, synced = step(make(), xs, grads), step(synchronise(make()), xs, grads)
    assert all(torch.equal(a, b) for a, b in zip(plain.pop("ys"), synced.pop("ys")))
    for name in plain:
        torch.testing.assert_close(synced[name], plain[name], rtol=2e-6, atol=2e-5)


def test_a_single_value_per_channel_is_refused() -> None:
    one = [torch.randn(1, 3, 4, 4), torch.randn(1, 0, 2, 2), torch.randn(1, 2, 1, 1)]
    with pytest.raises(ValueError, match="more than one value per channel"):
        synchronise(make())(one)


@pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
)
def test_training_in_two_processes_is_training_in_one(tmp_path: Path) -> None:
    write_scenes(tmp_path / "set", 24, seed=1, size=40)
    settings = {
        "size": 32, "epochs": 1, "finetune_epochs": 0, "prune": "false", "batch_size": 24,
        "held_out": 0.0, "lr": 0.1, "config.width": 0.2, "sync_bn": "true", "log_every": 1,
        # Steps of Adam have the same size however small the gradient: rounding would decide.
        "optimizer": "sgd", "weight_decay": 0,
    }  # fmt: skip
    (tmp_path / "recipe.toml").write_text("")
    for name, launcher in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                 str(free_port())]),
    ):  # fmt: skip
        command = [sys.executable, *launcher, "-m", "sodfast", "train",
                   str(tmp_path / "recipe.toml"), "--data", str(tmp_path / "set"),
                   "-o", str(tmp_path / name), "--cache", str(tmp_path / "cache"),
                   "--device", "cpu"]  # fmt: skip
        command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        subprocess.run(
            command, check=True, timeout=500, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    one, two = (checkpoint.latest(tmp_path / name)[1]["parameters"] for name in ("one", "two"))
    # One step of all pictures. In float32: the statistics are summed exactly in both runs, so
    # that the forwards are the same to the bit and no maximum or kink falls the other way.
    torch.manual_seed(1)  # the recipe's
    fresh = sodfast.create_model("csnet", width=0.2)
    for name, parameter in fresh.named_parameters():
        step_one, step_two = one[name] - parameter.detach(), two[name] - parameter.detach()
        # The parameter's own rounding shows in a difference as small as a step.
        rounding = 1e-7 * float(parameter.detach().norm())
        assert (step_two - step_one).norm() <= 1e-5 * step_one.norm() + rounding, name
    moved = one["stages.2.0.conv1.weight"] - fresh.state_dict()["stages.2.0.conv1.weight"]
    assert moved.norm() > 1e-3 * one["stages.2.0.conv1.weight"].norm()
    for name, buffer in fresh.named_buffers():
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-8)
        assert not torch.equal(one[name], buffer), f"{name} did not move"
    losses = [read_log(tmp_path / name, "step")[0]["loss"] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    start = json.loads((tmp_path / "two" / "log.jsonl").read_text().splitlines()[0])
    assert start["processes"] == 2
