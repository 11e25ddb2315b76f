"""Dynamic weight decay as an optimizer: the authors' numbers, and how it lives with torch."""

import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decay_cases import PlainAdam, Stranger, close, gammas, gradients, images, loss_of, regulariser
from safetensors.torch import load_file
from torch import nn

import sodfast
from sodfast.convert import convert_csnet
from sodfast.optim import DynamicWeightDecay, decaying_norms, flops_weights, parameter_groups


@pytest.fixture
def trainee(small_csnet: Callable[..., nn.Module]) -> nn.Module:
    return small_csnet().double().train()


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
