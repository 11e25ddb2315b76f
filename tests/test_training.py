"""Training and deploying whole networks on the compiled ops: steps, compile, export, autocast."""

import copy
import importlib
import io
from collections.abc import Callable

import pytest
import torch
from op_cases import CallCounter, instruction_set, instruction_sets, threads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sodfast
from sodfast.nn import CrossStageFusion, ILBlock

pytestmark = pytest.mark.usefixtures("compiled")

REFERENCES = {
    "goctconv": ["goctconv_reference"],
    "goctconv_depthwise": ["goctconv_depthwise_reference"],
    "goctconv_dilated": ["goctconv_dilated_reference"],
    "goctconv_norm_act": ["goctconv_norm_act_reference", "goctconv_update_stats_reference_"],
    "goctconv_norm_depthwise": ["goctconv_norm_depthwise_reference"],
}
TRAINING_OPS = {
    "goctconv",
    "goctconv_grad_input",
    "goctconv_grad_weight",
    "goctconv_dilated",
    "goctconv_dilated_grad_input",
    "goctconv_dilated_grad_weight",
    "goctconv_norm_act",
    "goctconv_norm_act_backward",
    "goctconv_norm_depthwise",
    "goctconv_norm_depthwise_backward",
    "goctconv_update_stats_",
}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """No reference can be called, under any of its names."""

    def poison(*_: object, **__: object) -> None:
        raise AssertionError("the reference was called")

    for module, names in REFERENCES.items():
        for name in names:
            monkeypatch.setattr(importlib.import_module(f"sodfast.ops.{module}"), name, poison)
            monkeypatch.setattr(sodfast.ops, name, poison)


def small_csnet(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return sodfast.create_model("csnet", width=0.2).to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images and saliency maps."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 32, 48, generator=generator)
    return images.to(dtype), (images.mean(1, keepdim=True) > 0).to(dtype)


def train(model: nn.Module, images: Tensor, maps: Tensor, steps: int) -> list[float]:
    """Returns the losses; SGD, because Adam's first steps hang on the sign of tiny gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = nn.functional.binary_cross_entropy_with_logits(model(images), maps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_poisoned_references_do_not_matter(poisoned: None) -> None:
    """Training, evaluation and the fused form run on compiled kernels alone."""
    model = small_csnet()
    images, maps = batch()
    before = copy.deepcopy(model.state_dict())
    with sodfast.use_backend("cpu"), CallCounter() as calls:
        losses = train(model, images, maps, 3)
    assert set(calls.counts) == TRAINING_OPS
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in after if "running" in name)
    assert sum(not torch.equal(before[name], after[name]) for name in after) > 0.9 * len(after)
    with sodfast.use_backend("cpu"), torch.inference_mode():
        logits = model.eval()(images)
        torch.testing.assert_close(sodfast.fuse(model)(images), logits, rtol=0, atol=5e-5)
    with sodfast.use_backend("reference"), pytest.raises(AssertionError, match="was called"):
        model(images)


@pytest.mark.parametrize("isa", instruction_sets())
def test_several_steps_go_where_the_reference_goes(isa: str) -> None:
    """In float64 to the last digits; in float32 as near to float64 as eager comes."""
    found = {}
    for backend, dtype in (
        ("reference", torch.float64),
        ("reference", torch.float32),
        ("cpu", torch.float64),
        ("cpu", torch.float32),
    ):
        model = small_csnet(dtype)
        with sodfast.use_backend(backend), instruction_set(isa), threads(1):
            losses = train(model, *batch(dtype), 4)
        state = torch.cat([t.flatten().double() for t in model.state_dict().values()])
        found[backend, dtype] = torch.cat([state, torch.tensor(losses).double()])
    exact = found["reference", torch.float64]
    assert (found["cpu", torch.float64] - exact).abs().max() < 1e-7
    error, eager = ((found[b, torch.float32] - exact).norm() for b in ("cpu", "reference"))
    assert error <= 2 * eager + 1e-6 * exact.norm()


def test_gradient_of_the_evaluated_model() -> None:
    """Fine-tuning with frozen statistics, and saliency of the input alone."""
    gradients = {}
    for backend, dtype in (("reference", torch.float64), ("cpu", torch.float64)):
        model, images = small_csnet(dtype).eval(), batch(dtype)[0].requires_grad_()
        with sodfast.use_backend(backend):
            loss = model(images).square().mean()
            gradients[backend] = torch.autograd.grad(loss, [images, *model.parameters()])
            model.requires_grad_(False)
            (alone,) = torch.autograd.grad(model(images).square().mean(), images)
        torch.testing.assert_close(alone, gradients[backend][0])
    torch.testing.assert_close(gradients["cpu"], gradients["reference"], rtol=1e-7, atol=1e-12)


def test_threads_and_runs_do_not_change_a_bit() -> None:
    torch.manual_seed(0)
    shapes = [(2, 9, 96, 64), (2, 10, 48, 32), (2, 4, 24, 16)]
    xs = [torch.randn(shape) for shape in shapes]
    for build in (
        lambda: ILBlock((9, 10, 4), (13, 12), kernel_size=3, stride=2),
        lambda: CrossStageFusion((9, 10, 4), (6, 8, 8), [[1, 2, 2, 2, 4]] * 3, 20),
    ):
        torch.manual_seed(0)
        block = build()
        first = None
        for number in (2, 2, 1, 3):
            twin = copy.deepcopy(block)
            leaves = [x.clone().requires_grad_() for x in xs]
            with sodfast.use_backend("cpu"), threads(number):
                ys = twin(leaves)
                torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
            found = [*ys, *(x.grad for x in leaves), *(p.grad for p in twin.parameters())]
            found += twin.buffers()
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(found, first)), f"{number} threads"


def outputs_and_gradients(call: Callable, module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    module.zero_grad()
    leaves = [x.clone().requires_grad_() for x in inputs]
    ys = call(leaves if len(leaves) > 1 else leaves[0])
    ys = [ys] if isinstance(ys, Tensor) else list(ys)
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(y.shape, dtype=y.dtype, generator=generator) for y in ys]
    torch.autograd.backward(ys, grads)
    return [
        *(y.detach() for y in ys),
        *(x.grad for x in leaves),
        *(p.grad.clone() for p in module.parameters()),
        *(b.clone() for b in module.buffers()),
    ]


@pytest.mark.parametrize("name", ["block", "csnet"])
def test_compiled_training_step_equals_the_eager_one(name: str) -> None:
    """No graph break; outputs, gradients and running statistics, with the default compiler.

    In float64, where the order of torch's own sums does not show.
    """
    torch.manual_seed(0)
    double = torch.float64
    if name == "block":
        module: nn.Module = ILBlock((6, 5), (7, 0, 4), kernel_size=3, stride=2).to(double)
        inputs = [torch.randn(2, 6, 24, 16).to(double), torch.randn(2, 5, 12, 8).to(double)]
    else:
        module, inputs = small_csnet(double), [batch(double)[0]]
    twin = copy.deepcopy(module)
    torch._dynamo.reset()
    with sodfast.use_backend("cpu"), CallCounter() as calls:
        expected = outputs_and_gradients(module, module, *inputs)
    with sodfast.use_backend("cpu"):
        fast = torch.compile(twin, fullgraph=True)
        found = outputs_and_gradients(fast, twin, *inputs)
    assert calls.counts["goctconv_norm_act_backward"] > 0
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    torch._dynamo.reset()


@pytest.mark.parametrize("form", ["block", "fused block", "csnet", "fused csnet"])
def test_export_round_trip(form: str) -> None:
    torch.manual_seed(0)
    if "block" in form:
        module: nn.Module = ILBlock((6, 5), (7, 4), kernel_size=3, stride=2).eval()
        arguments: tuple = ([torch.randn(2, 6, 16, 24), torch.randn(2, 5, 8, 12)],)
    else:
        module, arguments = small_csnet().eval(), (batch()[0],)
    if "fused" in form:
        module = sodfast.fuse(module)
    with sodfast.use_backend("cpu"), torch.no_grad():
        file = io.BytesIO()
        torch.export.save(torch.export.export(module, arguments), file)
        file.seek(0)
        program = torch.export.load(file)
        with CallCounter() as calls:
            found = program.module()(*arguments)
        torch.testing.assert_close(found, module(*arguments), rtol=0, atol=0)
    assert calls.counts["run_plan" if form == "fused csnet" else "goctconv"] > 0


@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains_in_float32(inputs: torch.dtype) -> None:
    model, twin = small_csnet(), small_csnet()
    images, maps = batch()
    block = ILBlock((3,), (4, 4))
    with sodfast.use_backend("cpu"), torch.autocast("cpu", torch.bfloat16):
        assert all(y.dtype == torch.float32 for y in block([images.to(inputs)]))
        logits = model(images.to(inputs))
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), maps)
    loss.backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None and grad.dtype == torch.float32 and grad.isfinite().all(), name
        assert grad.any(), name
    # Only the head and what torch makes of its result are in half precision.
    expected = twin(images.to(inputs).float())
    torch.testing.assert_close(logits.float(), expected, rtol=0.02, atol=0.02)


def test_checkpointed_and_accumulated_gradients() -> None:
    """Recomputing a block's forward, and two backward passes into the same gradients."""
    torch.manual_seed(0)
    block = ILBlock((6, 5), (7, 4)).double().eval()
    xs = [torch.randn(1, 6, 8, 8).double().requires_grad_(), torch.randn(1, 5, 4, 4).double()]
    parameters = list(block.parameters())
    with sodfast.use_backend("cpu"):
        expected = torch.autograd.grad(sum(y.square().sum() for y in block(xs)), parameters)
        for _ in range(2):
            ys = checkpoint(block, xs, use_reentrant=False)
            sum(y.square().sum() for y in ys).backward()
    for parameter, grad in zip(parameters, expected):
        torch.testing.assert_close(parameter.grad, 2 * grad)


def test_channels_last_images_give_the_same() -> None:
    model, (images, _) = small_csnet(), batch()
    with sodfast.use_backend("cpu"), torch.no_grad():
        first, second = copy.deepcopy(model), model.to(memory_format=torch.channels_last)
        logits = second(images.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(logits, first(images), rtol=1e-5, atol=1e-6)
