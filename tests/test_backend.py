"""Which code an op runs on: the choice, the refusals, and that compiled means compiled."""

import contextlib
import importlib
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sodfast
from sodfast import ops
from sodfast.nn import DilatedBank, GOctConvBNAct, ILBlock
from sodfast.ops import _backend
from sodfast.ops._backend import choose
from sodfast.ops.goctconv import plane_moments

REFERENCES = {
    "goctconv": ["goctconv_reference"],
    "goctconv_depthwise": ["goctconv_depthwise_reference"],
    "goctconv_dilated": ["goctconv_dilated_reference"],
    "goctconv_norm_act": ["goctconv_norm_act_reference", "goctconv_update_stats_reference_"],
    "goctconv_norm_depthwise": ["goctconv_norm_depthwise_reference"],
}


class Calls(TorchDispatchMode):
    """The names of sodfast's ops that ran inside, backward included."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sodfast":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def poisoned_csnet(small_csnet, monkeypatch):
    """A CSNet in training, and from here on every reference raises."""
    model = small_csnet().train()

    def poison(*_, **__):
        raise AssertionError("the reference was called")

    for module, names in REFERENCES.items():
        for name in names:
            monkeypatch.setattr(importlib.import_module(f"sodfast.ops.{module}"), name, poison)
    return model


def test_training_step_runs_on_compiled_kernels_alone(compiled, poisoned_csnet):
    model = poisoned_csnet
    # A learning rate that certainly changes float32 weights.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with sodfast.use_backend("cpu"), Calls() as calls:
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    changed = [not torch.equal(p, b) for p, b in zip(model.parameters(), before)]
    assert sum(changed) > 0.8 * len(changed)  # absent scales have parameters without numbers
    for name in ("goctconv", "goctconv_dilated"):
        assert {name, f"{name}_grad_input", f"{name}_grad_weight"} <= set(calls.names)
    for name in ("goctconv_norm_act", "goctconv_norm_depthwise"):
        assert {name, f"{name}_backward"} <= set(calls.names)
    assert "goctconv_update_stats_" in calls.names
    with pytest.raises(AssertionError, match="the reference was called"):
        with sodfast.use_backend("reference"):
            model(torch.randn(2, 3, 32, 32))


def test_backward_computes_only_what_is_asked_for(compiled):
    xs = [torch.randn(1, 2, 8, 8), torch.randn(1, 3, 4, 4)]
    weight = torch.randn(4, 5, 1, 1)
    dense = [torch.randn(1, 2, 3, 3), torch.randn(1, 3, 3, 3)]
    depthwise = torch.randn(5, 1, 3, 3)
    bias = {n: torch.randn(n) for n in (2, 4, 5)}

    def names(call, *leaves):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with sodfast.use_backend("cpu"), Calls() as calls:
            ys = call(*leaves)
            torch.autograd.grad([y.sum() for y in ys], leaves)
        return [name.split("_", 1)[-1] for name in calls.names[1:]]

    assert names(lambda w: ops.goctconv(xs, w, [2, 2]), weight) == ["grad_weight"]
    assert names(lambda x: ops.goctconv([xs[0], x], weight, [2, 2]), xs[1]) == ["grad_input"]
    assert names(lambda b: ops.goctconv(xs, weight, [2, 2], bias=b), bias[4]) == []
    for call, leaf, op in (
        (lambda w: ops.goctconv_depthwise(xs, w), depthwise, "depthwise_grad_weight"),
        (lambda x: ops.goctconv_depthwise([x, xs[1]], depthwise), xs[0], "depthwise_grad_input"),
        (
            lambda w: ops.goctconv_dilated(xs, [dense[0], w], [1], [[1], [1]]),
            dense[1],
            "dilated_grad_weight",
        ),
        (
            lambda x: ops.goctconv_dilated([xs[0], x], dense, [1], [[1], [1]]),
            xs[1],
            "dilated_grad_input",
        ),
    ):
        assert names(call, leaf) == [op]
    assert names(lambda b: ops.goctconv_depthwise(xs, depthwise, bias=b), bias[5]) == []
    assert names(lambda b: ops.goctconv_dilated(xs, dense, [1], [[1], [1]], b), bias[2]) == []


def test_statistics_are_not_differentiable(backend, device):
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    ones = torch.ones(3, device=device)
    ys, *statistics = ops.goctconv_norm_act([x], ones, ones, ones, ones, ones, True)
    assert ys[0].requires_grad
    assert not any(s.requires_grad for s in statistics)


def test_slope_is_for_inference(compiled):
    x, slope = torch.randn(1, 2, 4, 4, requires_grad=True), torch.ones(2)
    depthwise, dense = torch.randn(2, 1, 3, 3), torch.randn(2, 2, 3, 3)
    with sodfast.use_backend("cpu"):
        for name, ys in (
            ("goctconv", ops.goctconv([x], dense, [2], slope=slope)),
            ("goctconv_depthwise", ops.goctconv_depthwise([x], depthwise, slope=slope)),
            ("goctconv_dilated", ops.goctconv_dilated([x], [dense], [1], [[2]], slope=slope)),
        ):
            with pytest.raises(RuntimeError, match=f"sodfast::{name}: slope is an inference"):
                ys[0].sum().backward()


def test_second_derivative_is_refused(compiled):
    x, weight = leaf(1, 3, 4, 4), leaf(2, 3, 1, 1)
    for name in ("reference", "cpu"):
        with sodfast.use_backend(name):
            (y,) = ops.goctconv([x], weight, [2])
            (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        if name == "reference":
            assert torch.autograd.grad(gradient.sum(), weight)[0].abs().max() > 0
            continue
        with pytest.raises(RuntimeError, match="goctconv_grad_input has no gradient: .* once"):
            torch.autograd.grad(gradient.sum(), weight)


def test_autocast_on_the_cpu_runs_in_float32(compiled, small_csnet):
    model = small_csnet().train()
    x = torch.randn(2, 3, 32, 32)
    dtypes = []

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "sodfast":
                dtypes.append(args[0][0].dtype)
            return func(*args, **(kwargs or {}))

    with sodfast.use_backend("cpu"), torch.autocast("cpu", torch.bfloat16), Dtypes():
        loss = model(x.bfloat16()).float().square().mean()
    loss.backward()
    assert set(dtypes) == {torch.float32}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    weight, doubles = torch.randn(2, 3, 1, 1).double(), torch.randn(1, 3, 2, 2).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.goctconv([doubles], weight, [2])[0].dtype == torch.float64


def test_half_precision_takes_the_reference_and_says_so_once(compiled, monkeypatch):
    monkeypatch.setattr(_backend, "_requested", None)
    monkeypatch.setattr(_backend, "_warned", set())
    x, weight = torch.randn(1, 3, 4, 4).bfloat16(), torch.randn(2, 3, 1, 1).bfloat16()
    with pytest.warns(UserWarning, match="slower reference: the cpu kernels .* torch.bfloat16"):
        ops.goctconv([x], weight, [2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.goctconv([x], weight, [2])[0].dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="'cpu' was asked for, but .* not torch.bfloat16"):
        with sodfast.use_backend("cpu"):
            ops.goctconv([x], weight, [2])


def test_request_holds_until_taken_back(monkeypatch):
    monkeypatch.setattr(_backend, "_requested", None)
    x = torch.zeros(1)
    automatic = choose("goctconv", x)
    sodfast.use_backend("reference")
    assert choose("goctconv", x) == "reference"
    with sodfast.use_backend(None):
        assert choose("goctconv", x) == automatic
    assert choose("goctconv", x) == "reference"
    with contextlib.suppress(KeyError), sodfast.use_backend(None):
        raise KeyError  # an exception ends the block too
    assert choose("goctconv", x) == "reference"
    sodfast.use_backend(None)
    assert choose("goctconv", x) == automatic


def test_backends_that_cannot_run_are_refused_with_the_reason(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'gpu'; known are cpu, cuda"):
        sodfast.use_backend("gpu")
    monkeypatch.setattr(_backend, "_requested", "cuda")
    with pytest.raises(RuntimeError, match="'cuda' was asked for, but goctconv got .* on cpu"):
        choose("goctconv", torch.zeros(1))


def test_every_backend_is_chosen_by_name(backend, device):
    assert choose("goctconv", torch.zeros(1, device=device)) == backend
    assert f"The backend {backend!r} was asked for." in sodfast.info()


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_environment_variable_sets_the_first_value():
    program = "import sodfast, torch\nfrom sodfast.ops._backend import choose\n"
    result = run(program + "print(choose('goctconv', torch.zeros(1)))", SODFAST_BACKEND="reference")
    assert result.stdout.strip() == "reference", result.stderr
    result = run(program + "choose('goctconv', torch.zeros(1))", SODFAST_BACKEND="fast")
    assert "ValueError: unknown backend 'fast'; known are" in result.stderr


def test_without_the_compiled_module_everything_runs_on_the_reference():
    result = run(
        "import sys; sys.modules['sodfast._C'] = None\n"  # as if it had not been built
        "import sodfast, torch, warnings\n"
        "print(sodfast.info())\n"
        "model = sodfast.create_model('csnet', width=0.2)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    model(torch.zeros(2, 3, 32, 32)).sum().backward()\n"
        "print(*[w.message for w in caught], sep='\\n')\n"
        "try: sodfast.use_backend('cpu')\n"
        "except RuntimeError as error: print(error)\n",
        SODFAST_BACKEND="",
    )
    assert result.returncode == 0, result.stderr
    reason = "the compiled module sodfast._C is not there"
    assert f"cpu: not available, because {reason}" in result.stdout
    assert result.stdout.count(f"sodfast runs on the slower reference: {reason}") == 1
    assert f"the backend 'cpu' was asked for, but {reason}" in result.stdout


@pytest.mark.parametrize("name", ["triton", "gpu"])
def test_session_fails_when_a_required_backend_is_missing(name):
    result = run(
        f"import pytest; raise SystemExit(pytest.main([{__file__!r}, '-q', '-k', 'meta_tensors']))",
        SODFAST_REQUIRE=f"reference,{name}",
    )
    assert result.returncode == 1, result.stdout
    assert f"SODFAST_REQUIRE asks for {name!r}, but " in result.stdout + result.stderr


def test_import_is_lean():
    result = run(
        "import sys, torch; before = set(sys.modules); import sodfast\n"
        "print(torch.cuda.is_initialized(), *(set(sys.modules) - before))"
    )
    initialised, *modules = result.stdout.split()
    assert initialised == "False", result.stderr
    assert "sodfast.nn" in modules
    assert not {"PIL", "tqdm", "triton", "torch._dynamo", "torch._inductor"} & set(modules)


def test_info_says_what_runs():
    lines = sodfast.info().splitlines()
    assert lines[0].startswith(f"sodfast {sodfast.__version__} with torch {torch.__version__}")
    for name in _backend.BACKENDS:
        assert any(line.startswith(f"{name}: ") and line.endswith(".") for line in lines)


def test_info_says_the_instruction_set_of_plans(compiled):
    module = _backend._C
    before = module.cpu_isa()
    try:
        for isa in module.cpu_isas():
            module.set_cpu_isa(isa)
            assert f"plans run as {isa} " in sodfast.info()
    finally:
        module.set_cpu_isa(before)


def test_meta_tensors_have_shapes():
    x, weight = torch.empty(1, 3, 8, 8, device="meta"), torch.empty(4, 3, 1, 1, device="meta")
    ys = ops.goctconv([x], weight, [2, 2])
    assert [y.shape for y in ys] == [(1, 2, 8, 8), (1, 2, 4, 4)]


def test_training_step_compiles_without_a_graph_break(backend, device):
    def build():
        torch.manual_seed(0)
        block = ILBlock(3, (3, 2), kernel_size=3, stride=2, weight_gain=10.0)
        bank = DilatedBank((3, 2), [[1, 0, 2], [0, 1, 1]], dilations=(1, 2, 4))
        return torch.nn.Sequential(block, bank, GOctConvBNAct((3, 2), (0, 4))).to(device)

    x = torch.randn(2, 3, 16, 16, device=device)
    eager, model = build(), build()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    for net in (eager, fast):
        sum(y.square().sum() for y in net([x])).backward()
    for (name, p), q in zip(eager.named_parameters(), model.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=name)
    for (name, p), q in zip(eager.named_buffers(), model.buffers()):
        torch.testing.assert_close(p, q, msg=name)
    torch.testing.assert_close(model[2].norm.channel_means, eager[2].norm.channel_means)


@torch.no_grad()
def test_compiled_model_follows_a_change_of_backend(compiled, small_csnet):
    graphs = []

    def keep(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    fast = torch.compile(small_csnet().stages[0], fullgraph=True, backend=keep)
    x = [torch.randn(1, 3, 16, 16)]
    for name in ("cpu", "reference", "cpu"):
        with sodfast.use_backend(name):
            fast(x)
    ours = [any(target.startswith("sodfast.goctconv") for target in graph) for graph in graphs]
    assert ours == [True, False]  # and the third call took the first graph again


@torch.no_grad()
def test_export_with_dynamic_batch_and_size(backend, device, small_csnet):
    model = small_csnet().to(device)
    dim = torch.export.Dim
    sizes = {0: dim("b", max=64), 2: 16 * dim("h", max=64), 3: 16 * dim("w", max=64)}
    x = torch.randn(2, 3, 32, 48, device=device)
    program = torch.export.export(model, (x,), dynamic_shapes={"image": sizes})
    y = torch.randn(3, 3, 64, 32, device=device)
    torch.testing.assert_close(program.module()(y), model(y))
    called = {str(n.target) for n in program.graph.nodes if str(n.target).startswith("sodfast")}
    assert bool(called) is (backend != "reference")


def leaf(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def samples():
    """One call per op and feature: (name, arguments), on the raw ops."""
    xs = [leaf(2, 3, 8, 8), leaf(2, 2, 4, 4)]
    absent = [xs[0], leaf(2, 0, 4, 4)]
    empty = [leaf(0, 3, 8, 8), leaf(0, 2, 4, 4)]
    branches = ([1, 2, 4], [2, 1, 1, 0, 1, 2])
    dense = [leaf(4, 3, 3, 3), leaf(3, 2, 3, 3)]
    c5 = [leaf(5, seed=i) for i in range(3)]
    mean, var = torch.zeros(5).double(), torch.ones(5).double()
    yield "goctconv", (xs, leaf(6, 5, 3, 3), leaf(6), None, [2, 1, 3], 1)
    yield "goctconv", (xs, leaf(6, 5, 1, 1), None, None, [6, 0], 2)
    yield "goctconv", (absent, leaf(6, 3, 1, 1), leaf(6), None, [3, 0, 3], 1)
    yield "goctconv", (empty, leaf(2, 5, 3, 3), leaf(2), None, [2], 1)
    yield "goctconv_depthwise", (xs, leaf(5, 1, 3, 3), leaf(5), None, 2)
    yield "goctconv_depthwise", (absent, leaf(3, 1, 3, 3), None, None, 1)
    yield "goctconv_dilated", (xs, dense, leaf(7), None, *branches)
    yield "goctconv_dilated", (absent, [dense[0], leaf(3, 0, 3, 3)], None, None, *branches)
    yield "goctconv_norm_act", (xs, *c5, mean, var, True, 1e-5, None)
    yield "goctconv_norm_act", (xs, *c5, mean, var, True, 1e-5, plane_moments(xs))
    yield "goctconv_norm_act", (xs, *c5, mean, var, False, 1e-5, None)
    norms = (xs, *c5, mean, var, leaf(5, 1, 3, 3))
    yield "goctconv_norm_depthwise", (*norms, None, True, 1e-5)
    yield "goctconv_norm_depthwise", (*norms, plane_moments(xs), True, 1e-5)
    yield "goctconv_norm_depthwise", (*norms, None, False, 1e-5)
    yield "goctconv_update_stats_", (mean, var, mean + 1, var + 1, [3, 2], [128, 32], 0.1)
    ys = [leaf(2, 2, 8, 8).detach(), leaf(2, 1, 4, 4).detach()]
    ins = [x.detach() for x in xs]
    weight, kernels = leaf(3, 5, 3, 3).detach(), leaf(5, 1, 3, 3).detach()
    wide = [leaf(2, 4, 8, 8).detach(), leaf(2, 3, 4, 4).detach()]
    plain = [w.detach() for w in dense]
    yield "goctconv_grad_input", (ys, ins, weight, 1)
    yield "goctconv_grad_weight", (ys, ins, weight, 1)
    yield "goctconv_depthwise_grad_input", (ins, kernels, 3)
    yield "goctconv_depthwise_grad_weight", (ins, ins, kernels, 3)
    yield "goctconv_dilated_grad_input", (wide, plain, *branches)
    yield "goctconv_dilated_grad_weight", (wide, ins, plain, *branches)
    vectors = [c.detach() for c in c5]
    yield "goctconv_norm_act_backward", (ins, ins, *vectors, mean, var, True, 1e-5)
    yield "goctconv_norm_depthwise_backward", (
        ins, ins, *vectors, mean, var, kernels, True, 1e-5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments"), [pytest.param(*s, id=f"{i}-{s[0]}") for i, s in enumerate(samples())]
)
def test_registration(compiled, name, arguments):
    torch.library.opcheck(getattr(torch.ops.sodfast, name).default, arguments)


def test_every_op_has_a_sample(compiled):
    ours = {name for name in _backend._KERNELS["cpu"] if name.startswith("goctconv")}
    assert {name for name, _ in samples()} == ours
