"""The CUDA kernels, on a GPU or run on the host: values and gradients of every op and dtype."""

from collections.abc import Callable, Iterator
from dataclasses import replace

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
from gpu_kernels import HALVES, available, check_kernels, device_of, dtypes_of, running
from hypothesis import given, settings
from op_cases import Source, Tensors, assert_one_device, assert_registered, lay_out
from torch import Tensor
from torch.utils._pytree import tree_map_only

import sodfast
from sodfast.ops import (
    adam_decay_,
    adam_decay_reference_,
    decay_,
    decay_reference_,
    dkd_loss,
    dkd_loss_reference,
    dkd_theta,
    dkd_theta_reference,
    goctconv,
    goctconv_depthwise,
    goctconv_depthwise_reference,
    goctconv_dilated,
    goctconv_measured,
    goctconv_measured_reference,
    goctconv_norm_act,
    goctconv_norm_act_reference,
    goctconv_reference,
    goctconv_update_stats_,
    goctconv_update_stats_reference_,
)
from sodfast.ops.goctconv import plane_moments
from sodfast.optim import DynamicWeightDecay, parameter_groups

pytestmark = pytest.mark.usefixtures("compiled")
needs_gpu = pytest.mark.skipif(bool(available()["cuda"]), reason=available()["cuda"])
EXAMPLES = 12  # a thread on the host costs as much as hundreds on a GPU


def with_slope(case: test_goctconv.Case, channels: int) -> dict[str, list[Tensor]]:
    slope = Source(case.seed).uniform(channels, low=-0.5, high=0.5)
    return {**case.tensors(), "slope": [lay_out(slope, case.layout)]}


@settings(max_examples=EXAMPLES)
@given(test_goctconv.cases())
def test_goctconv_drawn(gpu: str, case: test_goctconv.Case) -> None:
    runs = case.run(goctconv), case.run(goctconv_reference)
    check_kernels(gpu, *runs, case.tensors(), case.grads(), case.terms())
    check_kernels(gpu, *runs, with_slope(case, sum(case.out_channels)), [], case.terms())


@pytest.mark.parametrize(
    "case",
    [
        # Several tiles and channel blocks, odd sizes, every scale, both kernels.
        test_goctconv.Case(1, (34, 50), (9, 5), (35, 3), kernel=3),
        test_goctconv.Case(2, (40, 24), (3, 2, 1, 1), (2, 3, 2, 9), kernel=3),
        test_goctconv.Case(1, (64, 32), (11, 0, 3), (1, 41), kernel=1),
        test_goctconv.Case(1, (37, 43), (5,), (6,), kernel=3, stride=2),
        test_goctconv.Case(2, (64, 48), (4, 3), (3, 2, 1), kernel=1, stride=2),
        # Rows of whole quads and not, more channels than a patch has rows or columns.
        test_goctconv.Case(1, (16, 24), (50, 9), (6, 35), kernel=1),
        test_goctconv.Case(2, (12, 20), (9, 5), (13, 3), kernel=1),
        test_goctconv.Case(1, (40, 48), (5, 7), (9, 5), kernel=3, stride=2),
        # More slices than one pass adds.
        test_goctconv.Case(2, (64, 96), (3,), (2,), kernel=1),
        # Aligned rows of which the last few are half a pack; several chunks of channels.
        test_goctconv.Case(1, (40, 24), (3, 9, 2, 5), (2, 3, 9, 4), kernel=1),
        test_goctconv.Case(1, (32, 48), (19, 33), (8, 9), kernel=1),
        test_goctconv.Case(2, (64, 48), (4, 3), (3, 2, 1), kernel=3, stride=2),
        # A coarser source with rows of whole pairs, but not of whole fours.
        test_goctconv.Case(2, (20, 28), (4, 9), (5, 3), kernel=1),
    ],
    ids=str,
)
def test_goctconv_larger(gpu: str, case: test_goctconv.Case) -> None:
    check_kernels(
        gpu, case.run(goctconv), case.run(goctconv_reference), case.tensors(), case.grads(),
        case.terms(),
    )  # fmt: skip


@settings(max_examples=EXAMPLES)
@given(test_goctconv.cases())
def test_goctconv_measured_drawn(gpu: str, case: test_goctconv.Case) -> None:
    case = replace(case, bias=False)

    def run(function: Callable) -> Callable[[Tensors], list[Tensor]]:
        return lambda t: list(function(t["xs"], t["weight"][0], case.out_channels, case.stride)[0])

    runs = run(goctconv_measured), run(goctconv_measured_reference)
    check_kernels(gpu, *runs, case.tensors(), case.grads(), case.terms())


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 1e2])
def test_moments_of_goctconv_are_those_of_what_it_wrote(
    gpu: str, kernel: int, offset: float
) -> None:
    """Several tiles with cut edges, several channel blocks; also beside a large mean."""
    case = test_goctconv.Case(2, (36, 52), (3, 2), (35, 0, 4), kernel, bias=False)
    tensors, device = case.tensors(), device_of(gpu)
    for dtype in dtypes_of(gpu):
        xs = [(offset + x).to(device, dtype) for x in tensors["xs"]]
        with running(gpu):
            ys, moments = goctconv_measured(
                xs, tensors["weight"][0].to(device, dtype), case.out_channels
            )
        assert moments.dtype == torch.float64
        torch.testing.assert_close(moments, plane_moments(ys), rtol=2e-5, atol=1e-7 * (1 + offset))


@settings(max_examples=EXAMPLES)
@given(test_goctconv_depthwise.cases())
def test_depthwise_drawn(gpu: str, case: test_goctconv_depthwise.Case) -> None:
    case = replace(case, dilation=min(case.dilation, 99))  # the reference pads by so much
    runs = case.run(goctconv_depthwise), case.run(goctconv_depthwise_reference)
    check_kernels(gpu, *runs, case.tensors(), case.grads(), case.terms())


@settings(max_examples=EXAMPLES)
@given(test_goctconv_dilated.cases())
def test_dilated_drawn(gpu: str, case: test_goctconv_dilated.Case) -> None:
    runs = case.run(goctconv_dilated), case.reference()
    check_kernels(gpu, *runs, case.tensors(), case.grads(), case.terms())
    check_kernels(gpu, *runs, with_slope(case, sum(case.totals)), [], case.terms())


@pytest.mark.parametrize(
    "case",
    [
        # Shifts by whole quads and by parts of one, more channels than a patch has.
        test_goctconv_dilated.Case(
            2, (24, 40), (35, 3), (1, 2, 4, 8), ((2, 5, 6, 1), (0, 1, 7, 0))
        ),
        test_goctconv_dilated.Case(1, (19, 37), (9,), (1, 16, 64), ((6, 1, 2),)),
    ],
    ids=str,
)
def test_dilated_larger(gpu: str, case: test_goctconv_dilated.Case) -> None:
    runs = case.run(goctconv_dilated), case.reference()
    check_kernels(gpu, *runs, case.tensors(), case.grads(), case.terms())


@settings(max_examples=EXAMPLES)
@given(test_goctconv_norm_act.cases())
def test_norm_act_drawn(gpu: str, case: test_goctconv_norm_act.Case) -> None:
    tensors, grads = case.tensors(), case.grads()
    if case.batch * case.size[0] * case.size[1] < 4096:  # in half precision z may change its sign
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gpu_kernels.dtypes_of", lambda backend: (torch.float32,))
            check_kernels(
                gpu, case.run(goctconv_norm_act), case.run(goctconv_norm_act_reference), tensors,
                grads, case.terms(),
            )  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_norm_act_of_half_precision_maps_keeps_its_parameters(
    gpu: str, dtype: torch.dtype, training: bool
) -> None:
    """As under autocast: maps in half precision, everything per channel in float32."""
    case = test_goctconv_norm_act.Case(3, (48, 64), (3, 2), training=training, slopes=(0.3, 0.9))
    tensors = case.tensors()
    xs = [x.to(dtype) for x in tensors["xs"]]
    vectors = [tensors[name][0] for name in ("weight", "bias", "slope")]
    grads = [Source(7).uniform(*x.shape).to(dtype) for x in xs]
    found = {}
    for name, function, wide in (
        ("exact", goctconv_norm_act_reference, torch.float64),
        ("found", goctconv_norm_act, None),
    ):
        device = torch.device("cpu") if wide else device_of(gpu)
        leaves = [t.to(device, wide).requires_grad_() for t in [*xs, *vectors]]
        running_statistics = [r.to(device, wide) for r in case.running]
        with running(gpu) if wide is None else sodfast.use_backend("reference"):
            if wide is None:  # the public function asks for one dtype outside autocast
                function = torch.ops.sodfast.goctconv_norm_act
            ys, *statistics = function(
                leaves[:2], *leaves[2:], *running_statistics, training, case.eps, None
            )
            gradients = torch.autograd.grad(ys, leaves, [g.to(device, wide) for g in grads])
        found[name] = [t.detach().cpu() for t in [*ys, *statistics, *gradients]]
    for i, (t, x) in enumerate(zip(found["found"], found["exact"])):
        halves = i < 2 or 5 <= i < 7  # results and their gradients
        assert t.dtype == (dtype if halves else torch.float32)
        eps = torch.finfo(dtype).eps if halves else 1e-5
        if i >= 5 and not halves:
            eps = 2e-2  # sums over all pixels, some of which change sides of zero
        atol = 2 * eps * max(x.abs().max().item(), 1e-2)  # a mean next to 0 is a sum that cancels
        torch.testing.assert_close(t.double(), x, rtol=2 * eps, atol=atol)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_statistics_keep_their_digits_beside_a_large_mean(gpu: str, offset: float) -> None:
    x = torch.randn(3, 2, 65, 67, generator=torch.Generator().manual_seed(1)) * 1e-2 + offset
    ones = torch.ones(2)
    with running(gpu):
        device = device_of(gpu)
        vectors = [v.to(device) for v in (ones, ones, ones, ones, ones)]
        _, mean, var, _ = goctconv_norm_act([x.to(device)], *vectors, True, 1e-5)
    wide = x.double()
    torch.testing.assert_close(mean.double().cpu(), wide.mean((0, 2, 3)), rtol=1e-6, atol=0)
    exact = wide.var((0, 2, 3), correction=0)
    torch.testing.assert_close(var.double().cpu(), exact, rtol=1e-5, atol=0)


@settings(max_examples=EXAMPLES)
@given(test_decay.cases)
def test_decay_drawn(gpu: str, case: test_decay.Case) -> None:
    given, device = case.tensors(), device_of(gpu)
    for run, compiled, reference in (
        (case.decay, decay_, decay_reference_),
        (case.adam, adam_decay_, adam_decay_reference_),
    ):
        for dtype in dtypes_of(gpu):
            rounded = test_decay.copied(given, dtype)
            exact = run(reference, test_decay.copied(rounded, torch.float64))
            eager = run(reference, test_decay.copied(rounded, dtype))
            with running(gpu):
                found = run(
                    compiled, {n: [t.to(device, copy=True) for t in g] for n, g in rounded.items()}
                )
            for t, e, x in zip(found, eager, exact):
                error, allowed = (
                    (v.double().cpu() - x).abs().max().item() if v.numel() else 0.0 for v in (t, e)
                )
                eps = torch.finfo(dtype).eps * max(1.0, x.abs().max().item() if x.numel() else 0)
                assert error <= 2 * allowed + 8 * eps, f"{compiled.__name__} {dtype}"


def test_all_layers_of_a_large_network_decay(gpu: str) -> None:
    """More layers than one launch takes."""
    source, device = Source(3), device_of(gpu)
    weights = [source.uniform(1 + i % 7) for i in range(600)]
    means = [source.uniform(2, len(w)) for w in weights]
    expected = [w.clone() for w in weights]
    decay_reference_(expected, means, 0.1)
    with running(gpu):
        found = [w.to(device) for w in weights]
        decay_(found, [m.to(device) for m in means], 0.1)
    torch.testing.assert_close([w.cpu() for w in found], expected)


def check_dkd(gpu: str, case: test_dkd.Case) -> None:
    tensors = case.tensors()
    runs = case.run_theta(dkd_theta), case.run_theta(dkd_theta_reference)
    check_kernels(gpu, *runs, tensors, case.grads(), {})
    runs = case.run_loss(dkd_loss), case.run_loss(dkd_loss_reference)
    check_kernels(gpu, *runs, tensors, case.grads(), {})


@settings(max_examples=EXAMPLES)
@given(test_dkd.cases)
def test_dkd_drawn(gpu: str, case: test_dkd.Case) -> None:
    check_dkd(gpu, case)


def test_dkd_of_several_slices(gpu: str) -> None:
    check_dkd(gpu, test_dkd.Case((2, 1, 97, 131), layout="channels_last"))


def test_small_errors_of_a_network_keep_their_digits(gpu: str) -> None:
    test_dkd.check_small_errors(lambda: running(gpu), device_of(gpu))


def test_update_of_the_statistics(gpu: str) -> None:
    source, device = Source(5), device_of(gpu)
    channels, counts = [3, 0, 300, 2], [7, 5, 1, 0]
    tensors = [source.uniform(305, low=0.1) for _ in range(4)]
    expected = [t.clone() for t in tensors]
    goctconv_update_stats_reference_(*expected, channels, counts, 0.3)
    with running(gpu):
        found = [t.to(device) for t in tensors]
        goctconv_update_stats_(*found, channels, counts, 0.3)
    torch.testing.assert_close([t.cpu() for t in found], expected)


def test_results_are_the_same_on_every_run(gpu: str) -> None:
    case = test_goctconv.Case(2, (32, 48), (5, 4), (6, 3), kernel=3)
    device = device_of(gpu)
    xs = [x.to(device).requires_grad_() for x in case.tensors()["xs"]]
    weight = case.tensors()["weight"][0].to(device).requires_grad_()
    grads = [g.to(device) for g in case.grads()]
    first = None
    with running(gpu):
        for _ in range(3):
            ys = goctconv(xs, weight, case.out_channels)
            again = [*ys, *torch.autograd.grad(ys, [*xs, weight], grads)]
            first = first or again
            assert all(torch.equal(a, b) for a, b in zip(first, again))


SOUND = [
    *test_goctconv.sound_calls(), *test_goctconv_depthwise.sound_calls(),
    *test_goctconv_dilated.sound_calls(), *test_goctconv_norm_act.sound_calls(),
    *test_dkd.sound_calls(), *test_scfm.sound_calls(), *test_boundary.sound_calls(),
    *test_structure_polishing.sound_calls(),
]  # fmt: skip


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("number", range(len(SOUND)))
def test_registration_on_a_gpu(number: int) -> None:
    name, arguments = SOUND[number]
    moved = tree_map_only(Tensor, lambda t: t.cuda(), arguments)
    assert_one_device(name, moved)
    assert_registered(name, moved)


def test_a_training_step_trains_as_the_cpu_does(gpu: str, small_csnet) -> None:
    """A whole network: the loss and every gradient, by these kernels and by the reference."""
    device = device_of(gpu)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for where in ("reference", gpu):
        model = small_csnet().train()
        with sodfast.use_backend("reference") if where == "reference" else running(gpu):
            place = torch.device("cpu") if where == "reference" else device
            model.to(place)
            model(x.to(place)).square().mean().backward()
        # The reference does not reach what an absent scale would need.
        found.append(
            [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        )
    assert sum(a.any() for a in found[0]) > 20
    for a, b in zip(*found):
        b = b.cpu()
        largest = a.abs().max().item() if a.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4 * max(largest, 1e-6))


@pytest.mark.gpu
@needs_gpu
def test_a_cuda_graph_of_the_fused_network_replays_it(small_csnet) -> None:
    model = sodfast.fuse(small_csnet()).cuda()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with sodfast.use_backend("cuda"), torch.no_grad():
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, model(x))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@needs_gpu
def test_a_cuda_graph_of_the_training_step_trains(small_csnet, deterministic: None) -> None:
    """Forward, backward, dynamic weight decay and Adam in one graph, as step by step.

    The network's last upsampling is torch's, whose backward adds with atomics unless told not to;
    what that changes in a gradient of nearly zero Adam makes as large as any other step.
    """
    batches = torch.randn(4, 2, 3, 64, 64, device="cuda")
    weights = []
    for captured in (False, True):
        model = small_csnet().cuda().train()
        adam = torch.optim.Adam(parameter_groups(model), lr=1e-3, capturable=True)
        optimizer = DynamicWeightDecay(adam, model, lambda_d=0.1)
        x = torch.empty_like(batches[0])

        def step(model=model, optimizer=optimizer, x=x) -> None:
            optimizer.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            optimizer.step()

        with sodfast.use_backend("cuda"):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for batch in batches[:2]:
                    x.copy_(batch)
                    step()
            stream.synchronize()
            if captured:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
                step = graph.replay
            for batch in batches[2:]:
                x.copy_(batch)
                step()
        weights.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*weights)


@pytest.mark.gpu
@needs_gpu
def test_autocast_runs_the_convolutions_in_half_precision(small_csnet) -> None:
    model = small_csnet().cuda().train()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with sodfast.use_backend("cuda"), torch.autocast("cuda", torch.bfloat16):
        ys = model.stages[0]([x] if isinstance(x, Tensor) else x)
    assert {y.dtype for y in ys} == {torch.bfloat16}
    sum(y.float().sum() for y in ys).backward()
    for parameter in model.stages[0].parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
