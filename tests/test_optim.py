"""Dynamic weight decay as an optimizer: the authors' numbers, and how it lives with torch."""

import copy
import gc
import importlib
import json
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import sodfast
from sodfast.convert import convert_csnet
from sodfast.optim import DynamicWeightDecay, decaying_norms, flops_weights, parameter_groups


class PlainAdam(torch.optim.Adam):
    """Adam, but not of the class that is recognised: the decay and the step are two ops."""


@pytest.fixture
def trainee(small_csnet: Callable[..., nn.Module]) -> nn.Module:
    return small_csnet().double().train()


def images(seed: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 32, 48, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def gammas(model: nn.Module) -> list[nn.Parameter]:
    return [norm.weight for _, norm in decaying_norms(model)]


def gradients(model: nn.Module) -> list[Tensor]:
    found = []
    for weight in gammas(model):
        assert weight.grad is not None
        found.append(weight.grad.clone())
    return found


def regulariser(model: nn.Module, absolute: bool = True) -> Tensor:
    """R as the paper's loss term: the slow form that DynamicWeightDecay replaces."""
    total = torch.zeros((), dtype=torch.float64)
    for _, norm in decaying_norms(model):
        means = norm.channel_means.abs() if absolute else norm.channel_means
        total = total + (0.5 * means * norm.weight.square()).sum(1).mean()
    return total


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- the authors' numbers -----------------------------------------------------------------------

LAYERS = {"conv1x1": "norm1", "conv3x3_1": "norm2", "conv3x3_2": "norm3"}


@pytest.mark.parametrize(("key", "factor"), [("ef1.0", None), ("ef2", 2.0)])
def test_golden(shared: Path, backend: str, key: str, factor: float | None) -> None:
    golden = load_file(shared / "golden" / "csnet_dwd_prune.safetensors")
    numbers = json.loads((shared / "golden" / "csnet_dwd_prune.json").read_text())["dwd"][key]
    published = shared / "reference" / "sod100k" / "csnet-L-x1.pth.tar"
    model = convert_csnet(published, published.with_name("csnet-L-x1.bin")).train()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0), lr=0.0)
    decay = DynamicWeightDecay(optimizer, model, lambda_d=3.0, flops_weights=factor)

    loss = F.binary_cross_entropy_with_logits(model(golden["dwd/x"]), golden["dwd/target"])
    assert loss.item() == pytest.approx(numbers["bce"], rel=1e-6)
    loss.backward()
    assert decay.penalty().item() == pytest.approx(numbers["get_flops"], rel=1e-6)
    before = gradients(model)
    decay.step()

    factors = flops_weights(model, factor) if factor else {}
    for old, (name, norm) in zip(before, decaying_norms(model)):
        assert norm.channel_means is not None
        f = torch.ones_like(norm.weight)
        if name in factors:
            counts = torch.tensor(norm.channels)
            f = torch.tensor(factors[name]).repeat_interleave(counts)
        term = 3 * f.double() * norm.channel_means.double().abs().mean(0) * norm.weight.double()
        error = norm.weight.grad.double() - old.double() - term
        # The term to 1e-6; the sum is rounded to float32 besides.
        assert (error.abs() <= 1e-6 * term.abs() + 1.2e-7 * (old.abs() + term.abs())).all()

    found, wanted = [], []
    for stage, block in (("stage0.0", model.stages[0][0]), ("stage2.3", model.stages[2][3])):
        for theirs, ours in LAYERS.items():
            norm = getattr(block, ours)
            for scale, ours_here in enumerate(norm.weight.grad.split(norm.channels)):
                found.append(ours_here.double())
                name = f"dwd/{key}/grad/{stage}.{theirs}.bns.{scale}.weight"
                wanted.append(golden[name].double())
                assert F.cosine_similarity(found[-1], wanted[-1], dim=0) >= 0.99999
    # All together: where PReLU's input is next to 0, rounding chooses the branch, and one such
    # pixel shows in these gradients as some 1e-3.
    assert (torch.cat(found) - torch.cat(wanted)).norm() <= 2e-3 * torch.cat(wanted).norm()


def test_flops_weights_double_per_finer_scale_and_stage() -> None:
    found = flops_weights(sodfast.create_model("csnet"), 2.0)
    assert found["stages.0.0.norm1"] == [16, 8]
    assert found["stages.1.2.norm3"] == [16, 8]
    assert found["stages.2.0.norm2"] == [8, 4] and found["stages.2.3.norm1"] == [4]
    assert found["stages.4.0.norm1"] == [2, 1] and found["stages.4.3.norm1"] == [1]
    assert len(found) == 54


# ---- what it does -------------------------------------------------------------------------------


@pytest.mark.parametrize("absolute", [True, False])
def test_coupled_is_the_gradient_of_the_loss_term(trainee: nn.Module, absolute: bool) -> None:
    twin = copy.deepcopy(trainee)
    x = images(0)
    loss = loss_of(twin, x)
    (loss + 3 * regulariser(twin, absolute)).backward()
    decay = DynamicWeightDecay(
        torch.optim.SGD(trainee.parameters(), lr=0.1), trainee, absolute=absolute
    )
    loss_of(trainee, x).backward()
    torch.testing.assert_close(decay.penalty(), regulariser(trainee, absolute).detach())
    decay.step()
    close(gradients(trainee), gradients(twin))
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    close(list(trainee.parameters()), list(twin.parameters()))


@pytest.mark.parametrize(("scale_by_lr", "absolute"), [(True, True), (False, False)])
def test_decoupled(trainee: nn.Module, scale_by_lr: bool, absolute: bool) -> None:
    """With both False this is Eq. 3: w − ∇ − λ S w, the optimizer's step standing for ∇."""
    before = [weight.detach().clone() for weight in gammas(trainee)]
    inner = torch.optim.SGD(trainee.parameters(), lr=0.05)
    decay = DynamicWeightDecay(
        inner, trainee, 0.7, mode="decoupled", scale_by_lr=scale_by_lr, absolute=absolute
    )
    loss_of(trainee, images(1)).backward()
    decay.step()
    for old, (_, norm) in zip(before, decaying_norms(trainee)):
        s = (norm.channel_means.abs() if absolute else norm.channel_means).mean(0)
        step = 0.05 * norm.weight.grad
        expected = old - step - (0.05 if scale_by_lr else 1.0) * 0.7 * s * old
        torch.testing.assert_close(norm.weight.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("adamw", [False, True])
def test_fused_with_adam_is_decay_and_adam(
    trainee: nn.Module, compiled: None, mode: str, adamw: bool
) -> None:
    twin = copy.deepcopy(trainee)
    runs = []
    kinds = (torch.optim.AdamW, type("PlainAdamW", (torch.optim.AdamW,), {}))
    for model, kind in zip((trainee, twin), kinds if adamw else (torch.optim.Adam, PlainAdam)):
        inner = kind(parameter_groups(model, 1e-3), lr=1e-3, betas=(0.9, 0.99))
        decay = DynamicWeightDecay(inner, model, mode=mode)
        with sodfast.use_backend("cpu"):
            for step in range(3):
                decay.zero_grad()
                loss_of(model, images(step)).backward()
                decay.step()
        runs.append(decay)
    close(list(trainee.parameters()), list(twin.parameters()), 1e-9)
    ours, theirs = (run.state_dict() for run in runs)
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for one, other in zip(ours["state"].values(), theirs["state"].values()):
        assert one.keys() == other.keys()
        close(list(one.values()), list(other.values()), 1e-9)
    # The state is Adam's own: the plain optimizer goes on with it.
    ours.pop("dynamic_weight_decay")
    torch.optim.Adam(parameter_groups(trainee)).load_state_dict(ours)


def test_training_step_runs_on_compiled_kernels_alone(
    trainee: nn.Module, compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(*_: Any, **__: Any) -> None:
        raise AssertionError("the reference was called")

    module = importlib.import_module("sodfast.ops.decay")
    for name in ("decay_reference_", "adam_decay_reference_"):
        monkeypatch.setattr(module, name, poison)
    for kind in (torch.optim.Adam, PlainAdam):
        decay = DynamicWeightDecay(kind(trainee.parameters(), lr=0.1), trainee)
        before = [weight.detach().clone() for weight in gammas(trainee)]
        with sodfast.use_backend("cpu"):
            decay.zero_grad()
            loss_of(trainee, images(0)).backward()
            decay.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, gammas(trainee)) if a.numel())
        with sodfast.use_backend("reference"), pytest.raises(AssertionError, match="reference"):
            decay = DynamicWeightDecay(PlainAdam(trainee.parameters()), trainee)
            loss_of(trainee, images(0)).backward()
            decay.step()


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


class Stranger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.conv(x))))


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


# ---- refusals -----------------------------------------------------------------------------------


def test_bad_arguments_are_refused(trainee: nn.Module) -> None:
    sgd = torch.optim.SGD(trainee.parameters(), lr=0.1)
    for error, message, arguments in (
        (TypeError, "optimizer must be.*Sequential", {"optimizer": nn.Sequential()}),
        (ValueError, "mode.*'both'", {"mode": "both"}),
        (ValueError, "lambda_d.*-1", {"lambda_d": -1.0}),
        (ValueError, "lambda_d.*nan", {"lambda_d": float("nan")}),
        (ValueError, "scale_by_lr=False.*coupled", {"scale_by_lr": False}),
        (ValueError, "flops_weights names 'nowhere'", {"flops_weights": {"nowhere": 2.0}}),
        (ValueError, "factor must be above 0, not 0", {"flops_weights": 0}),
        (
            ValueError,
            r"flops_weights\['stages.0.0.norm1'\] must hold 2 .* or 5 .*, not 3",
            {"flops_weights": {"stages.0.0.norm1": [1.0, 2.0, 3.0]}},
        ),
    ):
        with pytest.raises(error, match=message):
            DynamicWeightDecay(**{"optimizer": sgd, "model": trainee, **arguments})
    with pytest.raises(ValueError, match="norm1: weight is not among the optimizer's"):
        DynamicWeightDecay(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), trainee)
    with pytest.warns(UserWarning, match="weight_decay 0.1 acts besides"):
        DynamicWeightDecay(torch.optim.SGD(trainee.parameters(), 0.1, weight_decay=0.1), trainee)


def test_bad_registrations_are_refused() -> None:
    net = Stranger()
    frozen = nn.Parameter(torch.ones(6), requires_grad=False)
    decay = DynamicWeightDecay(torch.optim.SGD([*net.parameters(), frozen], lr=0.1))
    with pytest.raises(RuntimeError, match="nothing is under dynamic weight decay"):
        decay.step()
    for error, message, arguments in (
        (TypeError, "weight must be a parameter", (torch.ones(6), net.norm)),
        (TypeError, "weight must be a parameter", (net.conv.weight, net.norm)),
        (ValueError, "frozen", (frozen, net.norm)),
        (TypeError, "means must be a module or a function", (net.norm.weight, torch.ones(2, 6))),
        (ValueError, "not among", (nn.Parameter(torch.ones(6)), net.norm)),
    ):
        with pytest.raises(error, match=message):
            decay.register(*arguments)
    decay.register(net.norm.weight, lambda: torch.ones(2, 7), name="body.norm")
    with pytest.raises(ValueError, match="registered already"):
        decay.register(net.norm.weight, net.act)
    with pytest.raises(ValueError, match=r"body.norm: the means must be \(samples, 6\).*\(2, 7\)"):
        net(torch.randn(2, 3, 8, 8)).sum().backward()


def test_frozen_weights_are_left_alone(trainee: nn.Module) -> None:
    first = gammas(trainee)[0]
    first.requires_grad_(False)
    before = first.clone()
    decay = DynamicWeightDecay(torch.optim.SGD(trainee.parameters(), lr=0.1), trainee)
    loss_of(trainee, images(0)).backward()
    decay.step()
    assert torch.equal(first, before)
