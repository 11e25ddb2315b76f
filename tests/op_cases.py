"""Generated inputs for the ops, and the comparison with the float64 reference.

:func:`check_against_reference` is what the generated tests of every op call; it says exactly
what is compared. The strategies draw sizes, channels and memory layouts, biased towards small
ones and limited in work, so that thousands of examples take minutes.
"""

import contextlib
import math
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import sodfast
from sodfast.ops._backend import _C

Tensors = dict[str, list[Tensor]]  # by argument, for example {"xs": [...], "weight": [w]}
Run = Callable[[Tensors], list[Tensor]]

LAYOUTS = (
    "contiguous",
    "channels_last",
    "every second column",
    "sliced storage",
    "transposed",
    "expanded",
)

# ---- calls --------------------------------------------------------------------------------------


class CallCounter(TorchDispatchMode):
    """Counts the compiled ops that run inside, those of the backward included, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sodfast":
            name = func.overloadpacket.__name__
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def instruction_sets() -> list[str]:
    """Every instruction set that this machine and this build have; none without the module."""
    return _C.cpu_isas() if _C is not None else []


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Runs the float32 kernels of one instruction set."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(name)
    try:
        yield
    finally:
        _C.set_cpu_isa(before)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Runs with this many of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- what is drawn ------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
layouts = st.sampled_from(LAYOUTS)
coarsest_sizes = st.one_of(st.integers(1, 6), st.integers(1, 67))
channel_counts = st.one_of(st.integers(0, 4), st.integers(0, 33))
scale_counts = st.sampled_from([1, 2, 2, 3, 4])
batches = st.sampled_from([0, 1, 1, 2, 3])
slope_ranges = st.sampled_from([(-0.5, 0.5), (0.25, 0.25), (-2.0, -1.0), (0.0, 0.0), (1.0, 3.0)])


@st.composite
def sizes_and_channels(
    draw: st.DrawFn, scales: int, numbers: int, work: Callable[[float, list[int]], float]
) -> tuple[int, tuple[int, int], list[int]]:
    """Batch, the size of scale 0 when there are `scales`, and `numbers` channel counts.

    `work(values, channels)` estimates the multiply-adds, values being those of one channel at
    scale 0. Where they are too many the batch becomes 1, and then the longer side and the
    largest channel count are halved in turn.
    """
    batch, height, width = draw(batches), draw(coarsest_sizes), draw(coarsest_sizes)
    channels = draw(st.lists(channel_counts, min_size=numbers, max_size=numbers))
    fewer_channels = draw(st.booleans())
    finest = 1 << (scales - 1)
    while work(batch * height * width * finest**2, channels) > 2e6:
        if batch > 1:
            batch = 1
        elif height * width == 1 or (fewer_channels and max(channels) > 1):
            channels[channels.index(max(channels))] //= 2
        elif height >= width:
            height //= 2
        else:
            width //= 2
        fewer_channels = not fewer_channels
    return batch, (height * finest, width * finest), channels


# ---- tensors ------------------------------------------------------------------------------------


class Source:
    """Random float32 tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def grid(self, *shape: int) -> Tensor:
        """Values in (-1, 1) of which 2x2 averages are exact, in float32 and in float64.

        So both agree on where a maximum is; equal values are rare, and of those every
        implementation takes the first. The gradient through a max-pool is then comparable.
        """
        levels = 1 << 16
        drawn = torch.randint(levels, shape, generator=self.generator)
        return ((2 * drawn + 1) / levels - 1).float()


def lay_out(x: Tensor, layout: str, expand_dims: Sequence[int] = (0,)) -> Tensor:
    """The same values with other strides; "expanded" repeats the first of every given dim."""
    if layout == "expanded":
        first = x
        for dim in expand_dims:
            first = first.narrow(dim, 0, min(1, x.shape[dim]))
        return first.expand(x.shape)
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    gap = math.nan if x.is_floating_point() else 0  # a value read from there would show
    if layout == "every second column":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), gap)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "sliced storage":  # neither the start nor the rows are aligned
        wide = x.new_full([size + 1 for size in x.shape], gap)
        inner = wide[tuple(slice(1, None) for _ in x.shape)]
        inner.copy_(x)
        return inner
    return x.contiguous()


# ---- the comparison -----------------------------------------------------------------------------


def doubled(tensors: Tensors) -> Tensors:
    return {name: [t.double() for t in group] for name, group in tensors.items()}


def results(run: Run, tensors: Tensors, grads: Sequence[Tensor]) -> Tensors:
    """The outputs of `run`, under "ys", and the gradients to its arguments, by their names.

    `grads` are those to the first outputs; what no output depends on has a zero gradient.
    """
    leaves = {name: [t.detach().requires_grad_() for t in ts] for name, ts in tensors.items()}
    ys = run(leaves)
    flat = [leaf for group in leaves.values() for leaf in group]
    used = [(y, grad) for y, grad in zip(ys, grads) if y.requires_grad]
    gradients: Sequence[Tensor | None] = [None] * len(flat)
    if used:
        outputs, incoming = zip(*used)
        gradients = torch.autograd.grad(outputs, flat, incoming, allow_unused=True)
    dense = iter([x.new_zeros(x.shape) if g is None else g for x, g in zip(flat, gradients)])
    found = {name: [next(dense) for _ in group] for name, group in leaves.items()}
    return {"ys": [y.detach() for y in ys], **found}


def assert_as_good_as_eager(
    name: str, tensors: list[Tensor], eager: list[Tensor], exact: list[Tensor], terms: float
) -> None:
    """Compares a result in float32 with eager's in float32, both against float64.

    All three are first divided by sqrt(terms), the number of products that each value sums up,
    so that a sum of random products is of order one whatever its length. Then, per tensor,

        error(t) = max |t - exact| / max(1, max |exact|)

    must be at most 2 error(eager) + 1e-6. Rounding has no direction, so what many values have
    in common must be smaller. With d = (t - exact) / max(1, max |exact|), over all n values of
    all tensors, of which N are different (equal ones are rounded alike), both of

        bias(d) = |mean(d)|      and      gain(d) = |<d, exact>| / (sqrt(n) |exact|)

    must be at most 2 times eager's + 1e-6 / sqrt(N) + 1e-7; and the cosine of t and exact must
    be at least 1 - 1e-6, where exact is not next to nothing. NaN must be where exact has it.
    """
    assert [t.shape for t in tensors] == [x.shape for x in exact], name
    unit = math.sqrt(max(terms, 1))
    rounded, theirs, right = (
        [(t.double() / unit).flatten() for t in group] for group in (tensors, eager, exact)
    )
    for i, (t, e, x) in enumerate(zip(rounded, theirs, right)):
        assert torch.equal(t.isnan(), x.isnan()), f"{name}[{i}]: NaN in other places"
        for values in (t, e, x):
            values.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
        if x.numel():
            magnitude = max(1.0, x.abs().max().item())
            error, allowed = ((v - x).abs().max().item() / magnitude for v in (t, e))
            assert error <= 2 * allowed + 1e-6, f"{name}[{i}]: {error:.2e}, eager {allowed:.2e}"
    t, e, x = (torch.cat(group) if group else torch.empty(0) for group in (rounded, theirs, right))
    if not x.any():
        return
    magnitude, root, length = max(1.0, x.abs().max().item()), math.sqrt(x.numel()), x.norm().item()
    slack = 1e-6 / math.sqrt(x.unique().numel()) + 1e-7
    bias, allowed = ((v - x).mean().abs().item() / magnitude for v in (t, e))
    assert bias <= 2 * allowed + slack, f"{name}: signed mean {bias:.2e}, eager {allowed:.2e}"
    gain, allowed = (((v - x) @ x).abs().item() / magnitude / root / length for v in (t, e))
    assert gain <= 2 * allowed + slack, f"{name}: gain {gain:.2e}, eager {allowed:.2e}"
    if length > 1e-2 * root:
        cosine = (t @ x).item() / (length * t.norm().item())
        assert cosine >= 1 - 1e-6, f"{name}: cosine {cosine}"


def check_against_reference(
    run: Run, reference: Run, tensors: Tensors, grads: Sequence[Tensor], terms: dict[str, float],
    memory_format: torch.memory_format = torch.contiguous_format,
) -> None:  # fmt: skip
    """Compares the compiled op, outputs and gradients, with its reference.

    float32 kernels of every instruction set: as :func:`assert_as_good_as_eager` says, eager
    being the reference in float32 and exact the reference in float64, both on the same tensors
    in the same layouts. float64 kernels: within 1e-11 of the largest magnitude of the result.

    Args:
        run: calls the compiled op on tensors by name.
        reference: calls the reference.
        tensors: the arguments that have gradients, by name, in float32.
        grads: the gradients of the outputs.
        terms: how many products a value of "ys" or of the gradient to a name sums up; 1 where
            nothing is said.
        memory_format: what the results must have.
    """
    wide, wide_grads = doubled(tensors), [grad.double() for grad in grads]
    # One thread: small shapes are faster so, above all on a busy machine.
    with threads(1), sodfast.use_backend("cpu"):
        exact = results(reference, wide, wide_grads)
        eager = results(reference, tensors, grads)
        for isa in instruction_sets():
            with instruction_set(isa):
                found = results(run, tensors, grads)
            for name, group in found.items():
                assert all(t.is_contiguous(memory_format=memory_format) for t in group)
                assert all(t.dtype == torch.float32 for t in group)
                assert_as_good_as_eager(
                    f"{isa} {name}", group, eager[name], exact[name], terms.get(name, 1)
                )
        for name, group in results(run, wide, wide_grads).items():
            for t, x in zip(group, exact[name]):
                assert t.dtype == torch.float64
                magnitude = max(1.0, x.nan_to_num().abs().max().item() if x.numel() else 0.0)
                torch.testing.assert_close(
                    t, x, rtol=0, atol=1e-11 * magnitude, equal_nan=True,
                    msg=lambda text, name=name: f"float64 {name}: {text}",
                )  # fmt: skip


def assert_deterministic(run: Run, tensors: Tensors, grads: Sequence[Tensor]) -> None:
    """Results are the same bit for bit for any number of threads and on every run."""
    with sodfast.use_backend("cpu"):
        for isa in instruction_sets():
            with instruction_set(isa):
                first = results(run, tensors, grads)
                for number in (1, 1, 2, 3):
                    with threads(number):
                        again = results(run, tensors, grads)
                    for name, group in first.items():
                        same = [torch.equal(a, b) for a, b in zip(group, again[name])]
                        assert all(same), f"{isa}, {number} threads: {name} differs"


def opcheck(op: Any, arguments: tuple) -> None:
    """torch.library.opcheck; skips the test where that lacks what it imports."""
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    torch.library.opcheck(op, arguments)


def assert_registered(name: str, arguments: tuple) -> None:
    """Schema, fake, autograd and tracing of an op are right on these arguments.

    They get gradients where the op has a formula: a forward op without its epilogue's slope.
    """
    op = getattr(torch.ops.sodfast, name)
    trained = (
        name in ("goctconv", "goctconv_depthwise", "goctconv_dilated") and arguments[3] is None
    )
    if name in ("structure_polishing_sums", "dkd_loss"):  # only their first argument has one
        arguments = (arguments[0].detach().requires_grad_(), *arguments[1:])
    elif trained or name in ("goctconv_norm_act", "scfm", "boundary"):
        arguments = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), arguments)
    opcheck(op.default, arguments)


def assert_one_device(name: str, arguments: tuple) -> None:
    """The op raises when any one of its tensors is on another device than the rest."""
    leaves, structure = tree_flatten(arguments)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            mixed = tree_unflatten([*leaves[:i], leaf.to("meta"), *leaves[i + 1 :]], structure)
            with pytest.raises(RuntimeError):
                getattr(torch.ops.sodfast, name)(*mixed)


# ---- nonsense -----------------------------------------------------------------------------------

NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 5, 2**31, 2**62, 2**63 - 1)
Call = tuple[str, tuple]  # the name of an op of torch.ops.sodfast, and its arguments


def assert_refused(module: str) -> None:
    """Every call of `module.nonsense()` must raise RuntimeError.

    They are made in a process of its own: a crash fails the test and names the call.
    """
    _play_apart(f"import op_cases, {module} as m; op_cases.play(m.nonsense(), refused=True)")


def assert_survived(module: str, changes: int) -> None:
    """None of so many random changes to the calls of `module.sound_calls()` may crash."""
    _play_apart(f"import op_cases, {module} as m; op_cases.fuzz(list(m.sound_calls()), {changes})")


def _play_apart(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    last = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
    assert done.returncode == 0, f"exit status {done.returncode} at\n{last}"


def play(calls: Iterable[Call], refused: bool) -> None:
    """Makes the calls, naming each before; with `refused` each must raise RuntimeError."""
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # an absurd size must not swap
    torch.set_num_threads(1)
    taken = []
    for name, arguments in calls:
        call = f"{name}({', '.join(map(outline, arguments))})"
        print(call, flush=True)
        try:
            result = getattr(torch.ops.sodfast, name)(*arguments)
        except (RuntimeError, MemoryError):
            continue
        except (TypeError, ValueError, OverflowError):  # torch's, before the op is reached
            if refused:
                raise
            continue
        taken.append(call)
        for t in tree_leaves(result):  # all of it can be read
            if isinstance(t, Tensor) and t.device.type == "cpu":
                float(t.sum())
    if refused and taken:
        sys.exit("\n".join(["taken without an error:", *taken]))


def fuzz(sound: list[Call], changes: int) -> None:
    """Plays sound calls with one or two arguments changed at random."""
    choose = random.Random(0)

    def changed() -> Iterator[Call]:
        for _ in range(changes):
            name, arguments = choose.choice(sound)
            mutable = list(arguments)
            for _ in range(choose.choice((1, 1, 2))):
                i = choose.randrange(len(mutable))
                mutable[i] = altered(mutable[i], choose)
            yield name, tuple(mutable)

    play(changed(), refused=False)


def altered(value: Any, choose: random.Random) -> Any:
    """Something near `value` that probably does not fit any more."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return choose.choice(NUMBERS)
    if isinstance(value, float):
        return choose.choice((math.nan, math.inf, -1.0, 0.0, 1e300))
    if isinstance(value, list):
        items = list(value)
        what = choose.randrange(5)
        if what == 0 or not items:
            return items * 2
        if what == 1:
            return []
        i = choose.randrange(len(items))
        if what == 2:
            del items[i]
        else:
            items[i] = altered(items[i], choose)
        return items
    if isinstance(value, Tensor) and value.layout == torch.strided and value.dim():
        shape = list(value.shape)
        i = choose.randrange(len(shape))
        shape[i] = choose.choice((0, 1, shape[i] + 1, max(shape[i] - 1, 0), 2 * shape[i], 9))
        return choose.choice(
            (
                value.double(),
                value.half(),
                value.long(),
                value.to(torch.complex64),
                value.flatten(),
                value[None],
                value.transpose(0, -1),
                lay_out(value, "every second column"),
                value[:1].expand(value.shape) if value.shape[0] else value,
                torch.full(shape, math.nan),
                torch.ones(shape),
                value.to_sparse(),
            )
        )
    return torch.ones(3)


def outline(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)} on {value.device}".removeprefix("torch.")
    if isinstance(value, list):
        return "[" + ", ".join(map(outline, value)) + "]"
    return str(value)
