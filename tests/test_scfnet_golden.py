"""SCFNet and its losses against inputs and outputs of the original program."""

import json

import numpy as np
import pytest
import scfnet_golden as golden
import torch

import sodfast
from sodfast import nn, ops
from sodfast.optim import parameter_groups

EVAL, STEP = "M3_0.5_eval/", "M3_0.5_trainstep/"


@pytest.fixture(scope="module")
def tensors(shared):
    return golden.read(shared)


@pytest.fixture(scope="module")
def numbers(shared):
    return json.loads((shared / "golden" / "scfnet.json").read_text())


def build(tensors, prefix, **config):
    model = sodfast.create_model("scfnet", **config)
    golden.load(model, tensors, prefix)
    return model


@torch.no_grad()
def test_features_and_maps(tensors):
    model = build(tensors, f"{EVAL}state_dict/").eval()
    x = tensors[f"{EVAL}x"]
    for number, feature in enumerate(model.encoder(x)):
        theirs = tensors[f"{EVAL}feats/{number + 1}"]
        torch.testing.assert_close(feature, theirs, rtol=1e-5, atol=1e-5)
    maps = model.maps(x)
    assert len(maps) == 4
    for number, logits in enumerate(maps):
        theirs = tensors[f"{EVAL}outs/{number}"]
        assert theirs.std() > 0.01
        assert (logits - theirs).abs().max() <= 1e-5
    assert torch.equal(model(x), maps[0])


def test_dice(tensors, numbers):
    logits, truth = tensors["losses/logits"], tensors["losses/mask"]
    assert nn.DiceLoss()(logits, truth).item() == pytest.approx(numbers["losses/dice"], abs=1e-6)
    teacher = tensors["losses/teacher_logits"].sigmoid()
    found = nn.DiceLoss()(logits, teacher).item()
    assert found == pytest.approx(numbers["losses/kd_dice"], abs=1e-6)


def added_one_by_one(x):
    """Per image, in float32, as the original's sums round: 6e-6 of a loss at the thickest."""
    return torch.from_numpy(x.flatten(1).numpy().cumsum(1, dtype=np.float32)[:, -1])


def test_boundary_dice(tensors, numbers):
    """The original's figures to 1e-6 with its order of summation, ours to 1e-6 of float64."""
    logits, truth = tensors["losses/logits"], tensors["losses/mask"]
    thickness = nn.ProgressiveBoundary("code")
    epochs = [int(key.rsplit("/", 1)[1]) for key in numbers if key.startswith("losses/bd/")]
    assert len(epochs) == 14
    for epoch in epochs:
        k = thickness(epoch)
        p, g = (ops.boundary(z, k) for z in (logits.sigmoid(), truth))
        dice = (1 + added_one_by_one(2 * p * g)) / (1 + added_one_by_one(p + g))
        expected = numbers[f"losses/bd/{epoch}"]
        assert (1 - dice).mean().item() == pytest.approx(expected, abs=1e-6)
        exact = nn.BoundaryDiceLoss(k)(logits.double(), truth.double()).item()
        assert exact == pytest.approx(expected, abs=1e-5)
        assert nn.BoundaryDiceLoss(k)(logits, truth).item() == pytest.approx(exact, abs=1e-6)
        both = nn.DiceLoss()(logits, truth).item() + 0.5 * exact
        found = nn.StructurePolishingLoss(0.5, k)(logits, truth).item()
        assert found == pytest.approx(both, abs=1e-6)


def test_schedule(numbers):
    thickness = nn.ProgressiveBoundary("code")
    assert [thickness(e) for e in range(69)] == [numbers[f"losses/size/{e}"] for e in range(69)]


def test_one_step_of_training(tensors, numbers):
    """Losses before and after one step, every gradient and every number of the state.

    In float64: an input of a ReLU that is nearly 0 falls to either side by float32's rounding,
    which changes gradients by half a hundredth, as it did where the golden ones were made.
    """
    before = f"{STEP}state_before/"
    model = build(tensors, before, biased_variance=True).train().double()
    criterion = nn.MultiLevelLoss(nn.StructurePolishingLoss(k=nn.ProgressiveBoundary("code")(0)))
    groups = parameter_groups(model, 5e-4, encoder_lr=0.1, encoder_norm_decay=False)
    for group in groups:
        group["lr"] = 0.01 * group.get("lr_scale", 1.0)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    x, truth = tensors[f"{STEP}x"].double(), tensors[f"{STEP}mask"].double()
    loss = criterion(model(x), truth)
    loss.backward()
    assert loss.item() == pytest.approx(numbers[f"{STEP}loss/0"], abs=1e-5)
    gradients = golden.translated(model, tensors, f"{STEP}grads/")
    parameters = dict(model.named_parameters())
    assert gradients.keys() == parameters.keys()
    # The constant: biases before a batch norm have no gradient but rounding.
    for name, theirs in gradients.items():
        ours = parameters[name].grad
        assert ours is not None
        assert (ours - theirs).norm() <= 5e-3 * theirs.norm() + 2e-6, name
    optimizer.step()
    state = model.state_dict()
    after = golden.translated(model, tensors, f"{STEP}state_after1/")
    assert len(after) == len(golden.theirs(model))
    for name, theirs in after.items():
        error = (state[name] - theirs).abs().max()
        scale = max(1.0, theirs.abs().max().item()) if "running" in name else 1.0
        assert error <= 1e-5 * scale, (name, error)
    loss = criterion(model(x), truth)
    assert loss.item() == pytest.approx(numbers[f"{STEP}loss/1"], abs=1e-5)


def test_gradients_in_float32(tensors):
    """Those of that step against float64's; a value at the edge of a ReLU may go either way."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        model = build(tensors, f"{STEP}state_before/", biased_variance=True).train().to(dtype)
        x, truth = tensors[f"{STEP}x"].to(dtype), tensors[f"{STEP}mask"].to(dtype)
        nn.MultiLevelLoss(nn.StructurePolishingLoss(k=13))(model(x), truth).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, exact in gradients[1].items():
        assert (gradients[0][name] - exact).norm() <= 3e-2 * exact.norm() + 2e-6, name


def test_the_variance_is_torch_s_without_the_option(tensors):
    """The two differ by n / (n - 1), which the smallest features show."""
    name = "deepen.1.running_var"
    results = {}
    for biased in (False, True):
        model = build(tensors, f"{STEP}state_before/", biased_variance=biased).train()
        model(tensors[f"{STEP}x"])
        results[biased] = model.state_dict()[name]
    theirs = golden.translated(model, tensors, f"{STEP}state_after1/")[name]
    assert (results[True] - theirs).abs().max() <= 1e-5
    assert (results[False] - theirs).abs().max() > 1e-4
