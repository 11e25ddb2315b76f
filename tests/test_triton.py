"""The Triton kernels: values and gradients of every op and dtype, on a GPU or interpreted.

Interpreting costs some hundred microseconds per operation of a program, whatever its tensors'
sizes: hence small shapes, and few.
"""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import test_boundary
import test_decay
import test_dkd
import test_goctconv
import test_goctconv_depthwise
import test_goctconv_dilated
import test_goctconv_norm_act
import test_scfm
import test_structure_polishing
import torch
from op_cases import Call, Source
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_kernels import HALVES, available, check_kernels, device_of, running

import sodfast
from sodfast import ops
from sodfast.ops import _backend, _triton

DTYPES = (torch.float32, *HALVES)


def sloped(tensors: dict[str, list[Tensor]], channels: int) -> dict[str, list[Tensor]]:
    return {**tensors, "slope": [Source(9).uniform(channels, low=-2.0, high=2.0)]}


GOctConv = test_goctconv.Case
CROSS_SCALE = [
    GOctConv(2, (6, 10), (3, 2), (2, 3), layout="every second column"),
    GOctConv(1, (4, 6), (2, 1), (1, 2), kernel=3, bias=False),
    GOctConv(1, (8, 4), (1, 0, 2), (1, 0, 1)),
    GOctConv(1, (8, 8), (1, 2), (1, 1, 1), stride=2),
    GOctConv(1, (5, 7), (2,), (3,), kernel=3, stride=2, layout="channels_last"),
    GOctConv(1, (8, 20), (70,), (3, 67)),
    GOctConv(0, (4, 4), (2, 1), (1, 2), kernel=3),
]


@pytest.mark.parametrize("case", CROSS_SCALE, ids=str)
def test_cross_scale(triton: str, case: GOctConv) -> None:
    for dtype in DTYPES if case is CROSS_SCALE[0] else DTYPES[:1]:
        check_kernels(
            triton, dtype, case.run(ops.goctconv), case.run(ops.goctconv_reference),
            case.tensors(), case.grads(), case.terms(),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogue(triton: str, dtype: torch.dtype) -> None:
    case = GOctConv(1, (6, 6), (3, 2), (2, 3))
    runs = case.run(ops.goctconv), case.run(ops.goctconv_reference)
    check_kernels(triton, dtype, *runs, sloped(case.tensors(), 5), [], case.terms())


def test_ties_send_the_gradient_to_the_first_maximum(triton: str) -> None:
    x = torch.zeros(1, 1, 8, 8, device=device_of(triton), requires_grad=True)
    with running(triton):
        coarse = ops.goctconv([x], torch.ones(2, 1, 1, 1, device=x.device), (0, 1, 1))
        (grad,) = torch.autograd.grad([coarse[1].sum(), coarse[2].sum()], x)
    expected = torch.zeros(8, 8)
    expected[::2, ::2] += 1
    expected[::4, ::4] += 1
    assert torch.equal(grad[0, 0].cpu(), expected)


def test_nan_reaches_exactly_what_depends_on_it(triton: str) -> None:
    weight = torch.rand(2, 2, 3, 3, device=device_of(triton))
    for scale, row, column in ((0, 0, 3), (1, 1, 1)):
        found = []
        for value in (None, 100.0, torch.nan):
            xs = [torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)]
            if value is not None:
                xs[scale][0, 0, row, column] = value
            with running(triton):
                ys = ops.goctconv([x.to(weight.device) for x in xs], weight, (1, 1))
            found.append([y.cpu() for y in ys])
        for before, moved, nan in zip(*found):
            assert torch.equal(nan.isnan(), moved != before)


Depthwise = test_goctconv_depthwise.Case
PER_CHANNEL = [
    Depthwise(2, (4, 6), (3, 2), layout="transposed"),
    Depthwise(1, (40, 36), (1, 0, 2), dilation=3, bias=False),
    Depthwise(1, (1, 5), (2,), dilation=70),
    Depthwise(0, (4, 4), (2, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PER_CHANNEL, ids=str)
def test_depthwise(triton: str, case: Depthwise, dtype: torch.dtype) -> None:
    runs = case.run(ops.goctconv_depthwise), case.run(ops.goctconv_depthwise_reference)
    check_kernels(triton, dtype, *runs, case.tensors(), case.grads(), case.terms())
    tensors = sloped(case.tensors(), sum(case.channels))
    check_kernels(triton, dtype, *runs, tensors, [], case.terms())


def test_dilation_without_end(triton: str) -> None:
    device = device_of(triton)
    x, weight = torch.rand(1, 2, 6, 5, device=device), torch.rand(2, 1, 3, 3, device=device)
    with running(triton):
        (y,) = ops.goctconv_depthwise([x], weight, 2**62)
        (z,) = ops.goctconv_dilated([x], [weight.expand(2, 2, 3, 3)], [2**62], [[2]])
    torch.testing.assert_close(y, x * weight[:, 0, 1, 1].view(-1, 1, 1))
    torch.testing.assert_close(z, x.sum(1) * weight[:, 0, 1, 1].view(1, -1, 1, 1))


Dilated = test_goctconv_dilated.Case
BANK = [
    Dilated(1, (4, 6), (2,), (2,), ((3,),)),
    Dilated(2, (4, 6), (2, 1), (1, 3), ((2, 1), (0, 1))),
    Dilated(1, (5, 4), (33,), (2,), ((18,),), bias=False),
    Dilated(0, (4, 4), (2, 1), (1, 2), ((1, 1), (0, 2))),
]


@pytest.mark.parametrize("case", BANK, ids=str)
def test_dilated(triton: str, case: Dilated) -> None:
    runs = case.run(ops.goctconv_dilated), case.reference()
    for dtype in DTYPES if case is BANK[0] else DTYPES[:1]:
        check_kernels(triton, dtype, *runs, case.tensors(), case.grads(), case.terms())
    tensors = sloped(case.tensors(), sum(case.totals))
    check_kernels(triton, torch.float32, *runs, tensors, [], case.terms())


NormAct = test_goctconv_norm_act.Case
NORMS = [
    NormAct(2, (4, 6), (2, 1), values=(3.0, 0.5)),
    NormAct(3, (40, 36), (1, 0, 2), slopes=(-2.0, -1.0), layout="sliced storage", given=True),
    NormAct(2, (4, 4), (1, 2), training=False),
    NormAct(0, (4, 4), (2, 1)),
]


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_norm_act(triton: str, case: NormAct) -> None:
    runs = case.run(ops.goctconv_norm_act), case.run(ops.goctconv_norm_act_reference)
    check_kernels(
        triton, torch.float32, *runs, case.tensors(), case.grads(), case.terms()
    )  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_norm_act_in_half_precision(triton: str, dtype: torch.dtype, training: bool) -> None:
    """Slopes of one: next to zero, float64 and half precision may take PReLU's other branch."""
    case = NormAct(2, (8, 12), (2, 1), training=training, slopes=(1.0, 1.0))
    runs = case.run(ops.goctconv_norm_act), case.run(ops.goctconv_norm_act_reference)
    tensors = case.tensors()
    tensors["slope"] = [torch.ones(3)]
    terms = {**case.terms(), "slope": 1e6}  # of which no z below zero is alike
    check_kernels(triton, dtype, *runs, tensors, case.grads(), terms)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_maps_in_half_precision_with_parameters_in_float32(triton: str, dtype: torch.dtype) -> None:
    """As under autocast: the raw op takes both, and the statistics keep their digits."""
    device = device_of(triton)
    x = (1.0 + 0.01 * torch.randn(2, 3, 16, 16)).to(dtype)
    ones = torch.ones(3, device=device)
    with running(triton):
        ys, mean, var, _ = torch.ops.sodfast.goctconv_norm_act(
            [x.to(device)], ones, ones, ones, ones, ones, True, 1e-5, None
        )
    assert ys[0].dtype == dtype and mean.dtype == var.dtype == torch.float32
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.cpu().double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.cpu().double(), exact_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_statistics_keep_their_digits_beside_a_large_mean(triton: str, offset: float) -> None:
    x = offset + torch.randn(2, 3, 63, 65, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(3, device=device_of(triton))
    with running(triton):
        _, mean, var, _ = ops.goctconv_norm_act(
            [x.to(ones.device)], ones, ones, ones, ones, ones, True
        )
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.cpu().double(), exact_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.cpu().double(), exact_var, rtol=1e-6, atol=0)


def test_update_of_the_statistics(triton: str) -> None:
    source, device = Source(5), device_of(triton)
    channels, counts = [3, 0, 300, 2], [7, 5, 1, 0]
    tensors = [source.uniform(305, low=0.1) for _ in range(4)]
    expected = [t.clone() for t in tensors]
    ops.goctconv_update_stats_reference_(*expected, channels, counts, 0.3)
    with running(triton):
        found = [t.to(device) for t in tensors]
        ops.goctconv_update_stats_(*found, channels, counts, 0.3)
    torch.testing.assert_close([t.cpu() for t in found], expected)


Decay = test_decay.Case
DECAYS = [
    Decay((5, 0, 70), factors=True),
    Decay((9, 1), samples=33, absolute=False, coupled=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DECAYS, ids=str)
def test_decay_and_adam(triton: str, case: Decay, dtype: torch.dtype) -> None:
    given, device = test_decay.copied(case.tensors(), dtype), device_of(triton)
    for run, function, reference in (
        (case.decay, ops.decay_, ops.decay_reference_),
        (case.adam, ops.adam_decay_, ops.adam_decay_reference_),
    ):
        exact = run(reference, test_decay.copied(given, torch.float64))
        eager = run(reference, test_decay.copied(given, dtype))
        with running(triton):
            moved = {n: [t.to(device, copy=True) for t in g] for n, g in given.items()}
            found = run(function, moved)
        for t, e, x in zip(found, eager, exact):
            assert t.dtype == dtype and t.shape == x.shape
            if x.numel():
                error, allowed = ((v.cpu().double() - x).abs().max().item() for v in (t, e))
                eps = torch.finfo(dtype).eps * max(1.0, x.abs().max().item())
                assert error <= 2 * allowed + 2 * eps, function.__name__


def test_decay_without_samples_is_nan(triton: str) -> None:
    weight = torch.ones(3, device=device_of(triton))
    with running(triton):
        ops.decay_([weight], [weight.new_empty(0, 3)], 0.5)
    assert weight.isnan().all()


Dkd = test_dkd.Case
DISTILLATIONS = [
    Dkd((2, 1, 7, 9), layout="every second column"),
    Dkd((3, 1, 37, 61), 1e4, temperature=1.0, kl_factor=1.0),
    Dkd((1, 1, 64, 129), 40.0, binary=False),
    Dkd((1, 1, 1, 1)),
    Dkd((0, 1, 4, 4)),
]


@pytest.mark.parametrize("case", DISTILLATIONS, ids=str)
def test_dynamic_distillation(triton: str, case: Dkd) -> None:
    tensors = case.tensors()
    for dtype in DTYPES if case is DISTILLATIONS[0] else DTYPES[:1]:
        runs = case.run_theta(ops.dkd_theta), case.run_theta(ops.dkd_theta_reference)
        check_kernels(triton, dtype, *runs, tensors, case.grads(), {})
        runs = case.run_loss(ops.dkd_loss), case.run_loss(ops.dkd_loss_reference)
        check_kernels(triton, dtype, *runs, tensors, case.grads(), {})


def test_small_errors_of_a_network_keep_their_digits(triton: str) -> None:
    test_dkd.check_small_errors(lambda: running(triton), device_of(triton))


def nonsense() -> Iterator[Call]:
    """What the raw ops refuse on the CPU, but for the half precision that these kernels take."""
    for module in (
        test_goctconv, test_goctconv_depthwise, test_goctconv_dilated, test_goctconv_norm_act,
        test_decay, test_dkd, test_scfm, test_boundary, test_structure_polishing,
    ):  # fmt: skip
        for name, arguments in module.nonsense():
            leaves = torch.utils._pytree.tree_leaves(arguments)
            if not any(isinstance(t, Tensor) and t.dtype == torch.float16 for t in leaves):
                yield name, arguments


def test_raw_ops_refuse_nonsense(triton: str) -> None:
    device, taken = device_of(triton), []
    with running(triton):
        for name, arguments in nonsense():
            leaves = torch.utils._pytree.tree_leaves(arguments)
            if device.type != "cpu" and not all(
                t.is_contiguous() for t in leaves if isinstance(t, Tensor)
            ):
                continue  # a copy on a GPU is contiguous: the nonsense would be gone
            moved = torch.utils._pytree.tree_map_only(
                Tensor, lambda t: t.to(device) if t.device.type == "cpu" else t, arguments
            )
            try:
                getattr(torch.ops.sodfast, name)(*moved)
            except RuntimeError:
                continue
            taken.append((name, [str(a)[:60] for a in arguments]))
    assert not taken


def test_every_op_of_the_kernels_is_served(triton: str) -> None:
    import sodfast.kernels

    assert set(sodfast.kernels.__all__) == _triton.OPS <= _backend._KERNELS["cpu"]


def test_use_backend_interprets_where_the_environment_says_so() -> None:
    """In a process of its own: forward, backward and the choice; the CPU's kernels stay."""
    if available()["triton-interpreted"]:
        pytest.skip(f"backend triton-interpreted: {available()['triton-interpreted']}")
    program = """
import sys, torch, sodfast
from sodfast import ops
from sodfast.ops._backend import choose
assert "triton" not in sys.modules
x = torch.randn(1, 3, 4, 4, requires_grad=True)
weight = torch.randn(3, 1, 3, 3)
found = []
for name in ("triton", "cpu", "triton"):
    with sodfast.use_backend(name):
        assert choose("goctconv_depthwise", x) == name
        (y,) = ops.goctconv_depthwise([x], weight)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), x)])
torch.testing.assert_close(found[0], found[1])
assert all(torch.equal(a, b) for a, b in zip(found[0], found[2]))
with sodfast.use_backend("triton"):
    traced = torch.compile(ops.goctconv_depthwise, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced([x], weight)[0].detach(), found[0][0])
print(sodfast.info())
sodfast.use_backend("triton")
ops.goctconv_depthwise([x.double()], weight.double())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1", "SODFAST_BACKEND": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "triton: kernels of all ops, interpreted" in done.stdout, done.stderr
    assert "'triton' was asked for, but the Triton kernels take" in done.stderr
    assert "Overriding" not in done.stderr


def test_environment_asks_for_triton() -> None:
    if available()["triton-interpreted"]:
        pytest.skip(f"backend triton-interpreted: {available()['triton-interpreted']}")
    program = (
        "import torch, sodfast\n"
        "torch.ops.sodfast.decay_([torch.ones(3)], [], [torch.ones(1, 3)], [], 0.5, True)\n"
        "import sys; print('triton' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1", "SODFAST_BACKEND": "triton"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("device", _triton.GPUS)
def test_gpus_without_compiled_kernels_get_triton(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    if not _triton.INSTALLED or _backend._KERNELS.get(device):
        pytest.skip("there are compiled kernels, or no Triton")
    monkeypatch.setattr(_backend, "_requested", None)
    monkeypatch.setattr(_backend, "_warned", set())
    with FakeTensorMode():  # tensors with a device, but without memory
        try:
            x, wide = (torch.empty(1, device=device, dtype=t) for t in (torch.half, torch.double))
        except AssertionError as error:  # a torch for another kind of GPU
            pytest.skip(str(error))
        assert _backend.choose("goctconv", x) == _backend.choose("decay_", x) == "triton"
        with pytest.warns(UserWarning, match="slower reference: the Triton kernels .*float64"):
            assert _backend.choose("goctconv", wide) == "reference"
    for op in _triton.OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sodfast::{op}", device.upper())


@pytest.mark.skipif(not _triton.INSTALLED, reason="Triton is not installed")
def test_the_refusals_name_their_reason() -> None:
    refusal = _triton.refusal
    assert refusal("goctconv", "cuda", torch.bfloat16) is None
    assert "no Triton kernel for run_plan" in str(refusal("run_plan", "cuda", torch.float32))
    assert "on mps, and Triton runs on GPUs" in str(refusal("decay_", "mps", torch.float32))
    assert "not torch.float64" in str(refusal("decay_", "cuda", torch.float64))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="'triton' was asked for, but torch finds no GPU"):
            sodfast.use_backend("triton")
