"""Dynamic weight decay together with the rest of torch: steps, scaling, state, processes."""

import copy
import gc
import re
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decay_cases import PlainAdam, Stranger, close, gammas, gradients, images, loss_of, regulariser
from torch import Tensor, nn

from sodfast.optim import DynamicWeightDecay, decaying_norms, parameter_groups


@pytest.fixture
def trainee(small_csnet: Callable[..., nn.Module]) -> nn.Module:
    return small_csnet().double().train()


# ---- as an optimizer ----------------------------------------------------------------------------


def test_accumulation_averages_over_all_samples(trainee: nn.Module) -> None:
    decay = DynamicWeightDecay(torch.optim.SGD(trainee.parameters(), lr=0.0), trainee)
    parts = []
    for seed, batch in ((0, 2), (1, 3)):
        loss_of(trainee, images(seed, batch)).backward()
        parts.append([norm.channel_means for _, norm in decaying_norms(trainee)])
        with torch.no_grad():
            trainee(images(9))  # a forward without a backward does not count
    before = gradients(trainee)
    decay.step()
    for old, new, first, second, weight in zip(before, gradients(trainee), *parts, gammas(trainee)):
        term = 3 * torch.cat((first, second)).abs().mean(0) * weight.detach()
        torch.testing.assert_close(new - old, term, rtol=1e-9, atol=1e-12)
    assert decay.penalty() > 0
    again = gradients(trainee)
    with pytest.warns(UserWarning, match="gradient but no means"):
        decay.step()  # nothing was collected since
    close(again, gradients(trainee), 0)


def test_zero_grad_forgets_the_means_of_a_skipped_batch(trainee: nn.Module) -> None:
    decay = DynamicWeightDecay(torch.optim.SGD(trainee.parameters(), lr=0.0), trainee)
    loss_of(trainee, 100 * images(0)).backward()
    decay.zero_grad()
    assert all(weight.grad is None for weight in gammas(trainee))
    loss_of(trainee, images(1)).backward()
    expected = regulariser(trainee).detach()
    torch.testing.assert_close(decay.penalty(), expected)


@pytest.mark.parametrize("kind", [torch.optim.Adam, PlainAdam, torch.optim.LBFGS])
def test_closures(trainee: nn.Module, kind: type[torch.optim.Optimizer]) -> None:
    twin = copy.deepcopy(trainee)
    calls = []

    def closure() -> Tensor:
        decay.zero_grad()
        loss = loss_of(trainee, images(0))
        loss.backward()
        calls.append(loss.item())
        return loss

    def closure_with_loss_term() -> Tensor:
        other.zero_grad()
        loss = loss_of(twin, images(0))
        (loss + 3 * regulariser(twin)).backward()
        return loss

    decay = DynamicWeightDecay(kind(trainee.parameters(), lr=0.01), trainee)
    other = kind(twin.parameters(), lr=0.01)
    for _ in range(2):
        loss = decay.step(closure)
        torch.testing.assert_close(loss, other.step(closure_with_loss_term))
    assert len(calls) >= 2
    close(list(trainee.parameters()), list(twin.parameters()), 1e-7)


def test_gradient_scaler(trainee: nn.Module) -> None:
    """A step that overflows is skipped, and neither its gradients nor its means stay."""
    twin = copy.deepcopy(trainee)
    for model, scaled in ((trainee, True), (twin, False)):
        inner = torch.optim.SGD(model.parameters(), lr=0.01)
        decay = DynamicWeightDecay(inner, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for seed in range(3):
            decay.zero_grad()
            factor = float("inf") if seed == 1 else 1.0
            if seed == 1 and not scaled:
                model(images(seed))  # it moves the running statistics
                continue
            scaler.scale(factor * loss_of(model, images(seed))).backward()
            scaler.unscale_(decay)
            scaler.step(decay)
            scaler.update()
    close(list(trainee.parameters()), list(twin.parameters()), 1e-10)


def test_schedulers_and_parameter_groups(trainee: nn.Module) -> None:
    inner = torch.optim.SGD(parameter_groups(trainee), lr=0.1)
    decay = DynamicWeightDecay(inner, trainee, mode="decoupled")
    assert isinstance(decay, torch.optim.Optimizer)
    assert decay.param_groups is inner.param_groups and decay.state is inner.state
    assert [group["weight_decay"] for group in decay.param_groups] == [5e-3, 0.0]
    assert sum(len(group["params"]) for group in decay.param_groups) == len(
        list(trainee.parameters())
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler complains where it finds no step
        scheduler = torch.optim.lr_scheduler.StepLR(decay, 1, gamma=0.1)
        loss_of(trainee, images(0)).backward()
        decay.step()
        scheduler.step()
    assert [group["lr"] for group in inner.param_groups] == [pytest.approx(0.01)] * 2
    extra = nn.Parameter(torch.ones(3))
    decay.add_param_group({"params": [extra], "lr": 0.5})
    assert inner.param_groups[2]["params"] == [extra]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_state_resumes_bit_for_bit(
    trainee: nn.Module, kind: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    """Also between two backwards of one accumulated step."""

    def run(model: nn.Module, decay: DynamicWeightDecay, backwards: range) -> None:
        for i in backwards:
            loss_of(model, images(i)).backward()
            if i % 2:
                decay.step()
                decay.zero_grad()

    torch.manual_seed(0)
    twin = copy.deepcopy(trainee)
    decay = DynamicWeightDecay(kind(trainee.parameters(), lr=0.01), trainee, lambda_d=2.0)
    run(trainee, decay, range(3))
    # What the model's and the optimizer's state dictionaries hold, and the pending gradients.
    state = {"model": trainee.state_dict(), "optimizer": decay.state_dict()}
    state["grads"] = [p.grad for p in trainee.parameters()]
    torch.save(state, tmp_path / "state.pt")
    run(trainee, decay, range(3, 6))

    state = torch.load(tmp_path / "state.pt")
    resumed = DynamicWeightDecay(kind(twin.parameters(), lr=1.0), twin, mode="decoupled")
    twin.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    assert resumed.lambda_d == 2.0 and resumed.mode == "coupled"
    for parameter, grad in zip(twin.parameters(), state["grads"]):
        parameter.grad = grad
    run(twin, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(trainee.parameters(), twin.parameters()))


def test_state_of_another_network_is_refused(trainee: nn.Module) -> None:
    decay = DynamicWeightDecay(torch.optim.SGD(trainee.parameters(), lr=0.1), trainee)
    state = decay.state_dict()
    state["dynamic_weight_decay"]["means"].pop()
    with pytest.raises(ValueError, match=r"holds \d+ weights.*here are"):
        decay.load_state_dict(state)
    state.pop("dynamic_weight_decay")
    decay.load_state_dict(state)  # of a run without dynamic weight decay


def test_compiled_model(trainee: nn.Module) -> None:
    twin = copy.deepcopy(trainee)
    for model, compile_it in ((trainee, False), (twin, True)):
        decay = DynamicWeightDecay(torch.optim.SGD(model.parameters(), lr=0.1), model)
        forward = torch.compile(model, backend="aot_eager") if compile_it else model
        for seed in range(2):
            decay.zero_grad()
            loss_of(forward, images(seed)).backward()
            decay.step()
    close(list(trainee.parameters()), list(twin.parameters()), 1e-9)


def test_nothing_is_left_behind(trainee: nn.Module) -> None:
    """Copies of a model are not watched, and a decay that is gone leaves no hook."""
    decay = DynamicWeightDecay(torch.optim.SGD(trainee.parameters(), lr=0.1), trainee)
    twin = copy.deepcopy(trainee)
    loss_of(twin, images(0)).backward()
    assert all(entry.means is None for entry in decay._entries)
    gone = weakref.ref(decay)
    del decay
    gc.collect()
    assert gone() is None
    assert all(not weight._post_accumulate_grad_hooks for weight in gammas(trainee))


# ---- strangers' networks ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["activation module", "norm and function", "function", "metric"])
def test_registering_any_norm(how: str) -> None:
    torch.manual_seed(0)
    net = Stranger()
    nn.init.normal_(net.norm.weight)
    x = torch.randn(5, 3, 12, 12)
    y = F.relu(copy.deepcopy(net).norm(net.conv(x))).detach()
    metric = (lambda z: z.amax((2, 3))) if how == "metric" else None
    s = y.amax((2, 3)).mean(0) if how == "metric" else y.mean((2, 3)).mean(0)
    decay = DynamicWeightDecay(torch.optim.SGD(net.parameters(), lr=0.0), metric=metric)
    if how == "norm and function":
        decay.register(net.norm.weight, net.norm, F.relu)
    elif how == "function":
        decay.register(net.norm.weight, lambda: y.mean((2, 3)))
    else:
        decay.register(net.norm.weight, net.act)
    net(x).square().mean().backward()
    before = net.norm.weight.grad.clone()
    decay.step()
    term = net.norm.weight.grad - before
    torch.testing.assert_close(term, 3 * s * net.norm.weight.detach(), rtol=1e-5, atol=1e-7)
    if how in ("activation module", "norm and function"):
        decay.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            copy.deepcopy(net)(x).sum().backward()  # a copy's hooks are dead
        assert all(entry.means is None for entry in decay._entries)


def test_a_metric_of_feature_maps_on_our_own_norms(trainee: nn.Module) -> None:
    decay = DynamicWeightDecay(
        torch.optim.SGD(trainee.parameters(), lr=0.0), trainee, metric=lambda y: y.mean((2, 3))
    )
    loss_of(trainee, images(0)).backward()
    torch.testing.assert_close(decay.penalty(), regulariser(trainee).detach())


def _worker(rank: int, folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    results[rank] = _train_scales(slice(2 * rank, 2 * rank + 2), True)
    torch.distributed.destroy_process_group()


class Scales(nn.Module):
    """y = γ x: a "norm" that does not mix samples, so that two halves are one whole."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        self.means = (x * self.weight).detach()
        return x * self.weight


def _train_scales(part: slice, distributed: bool) -> list[float]:
    torch.manual_seed(0)
    batches = torch.randn(3, 4, 5)[:, part]
    scales = Scales()
    model = nn.parallel.DistributedDataParallel(scales) if distributed else scales
    decay = DynamicWeightDecay(torch.optim.Adam(scales.parameters(), lr=0.1))
    decay.register(scales.weight, lambda: scales.means)
    for x in batches:
        decay.zero_grad()
        model(x).square().mean().backward()
        decay.step()
    return scales.weight.tolist()


def test_two_processes_are_one(tmp_path: Path) -> None:
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_worker, (str(tmp_path), results), nprocs=2)
        first, second = results[0], results[1]
    assert first == second
    assert first == pytest.approx(_train_scales(slice(0, 4), False), rel=1e-5, abs=1e-6)


def test_the_page_about_a_plain_resnet(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[1] / "docs" / "slim_a_resnet.md"
    code = re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(code) == 5, "the page lost its code"
    exec(compile("\n".join(code), str(page), "exec"), {"__name__": page.stem})
    printed = capsys.readouterr().out
    found = re.search(r"([\d,]+) → ([\d,]+), right ([\d.]+)% → ([\d.]+)%", printed)
    assert found is not None
    before, after, right_before, right_after = (float(n.replace(",", "")) for n in found.groups())
    assert after < 0.75 * before
    assert right_before > 95 and right_after > right_before - 2
