"""The ops of dynamic weight decay: values, Adam's step, registration, refusals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    Call,
    Source,
    assert_as_good_as_eager,
    assert_one_device,
    assert_refused,
    assert_registered,
    assert_survived,
    instruction_set,
    instruction_sets,
    seeds,
)
from torch import Tensor

import sodfast
from sodfast.ops import adam_decay_, adam_decay_reference_, decay_, decay_reference_

Tensors = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Case:
    channels: tuple[int, ...]
    samples: int = 2
    factors: bool = False
    absolute: bool = True
    coupled: bool = True
    step: int = 3
    seed: int = 0

    def tensors(self) -> Tensors:
        source = Source(self.seed)
        made = {
            "weights": [source.uniform(c) for c in self.channels],
            "grads": [source.uniform(c) for c in self.channels],
            "means": [source.uniform(self.samples, c) for c in self.channels],
            "exp_avgs": [source.uniform(c) for c in self.channels],
            # Not next to 0, where Adam's step is steep in v.
            "exp_avg_sqs": [source.uniform(c, low=0.1) for c in self.channels],
        }
        made["factors"] = (
            [source.uniform(c, low=0.5, high=4.0) for c in self.channels] if self.factors else []
        )
        return made

    def decay(self, function: Callable, t: Tensors) -> list[Tensor]:
        grads = t["grads"] if self.coupled else []
        function(t["weights"], t["means"], 1.7, grads, t["factors"], self.absolute)
        return t["weights"] + t["grads"]

    def adam(self, function: Callable, t: Tensors) -> list[Tensor]:
        function(
            t["weights"], t["grads"], t["exp_avgs"], t["exp_avg_sqs"], t["means"], 1.7, 0.01,
            self.step, (0.9, 0.99), 1e-8, t["factors"], self.absolute, not self.coupled,
        )  # fmt: skip
        return t["weights"] + t["grads"] + t["exp_avgs"] + t["exp_avg_sqs"]


def copied(tensors: Tensors, dtype: torch.dtype = torch.float32) -> Tensors:
    return {name: [t.to(dtype, copy=True) for t in group] for name, group in tensors.items()}


channel_lists = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 200)), max_size=5)
cases = st.builds(
    Case,
    channel_lists.map(tuple),
    samples=st.integers(1, 30),
    factors=st.booleans(),
    absolute=st.booleans(),
    coupled=st.booleans(),
    step=st.sampled_from([1, 2, 10, 100_000]),
    seed=seeds,
)


@pytest.mark.usefixtures("compiled")
@given(cases)
def test_values(case: Case) -> None:
    """Everything that the ops may touch, against the reference in float64."""
    given = case.tensors()
    for run, compiled, reference in (
        (case.decay, decay_, decay_reference_),
        (case.adam, adam_decay_, adam_decay_reference_),
    ):
        exact = run(reference, copied(given, torch.float64))
        eager = run(reference, copied(given))
        with sodfast.use_backend("cpu"):
            wide = run(compiled, copied(given, torch.float64))
            for isa in instruction_sets():
                with instruction_set(isa):
                    found = run(compiled, copied(given))
                assert_as_good_as_eager(f"{isa} {compiled.__name__}", found, eager, exact, 1)
        torch.testing.assert_close(wide, exact, rtol=1e-12, atol=1e-12)


def test_only_what_is_said_to_change_changes(backend: str, device: torch.device) -> None:
    for coupled in (True, False):
        case = Case((5, 70), factors=True, coupled=coupled)
        for run, function, changed in (
            (case.decay, decay_, {"grads"} if coupled else {"weights"}),
            (case.adam, adam_decay_, {"weights", "exp_avgs", "exp_avg_sqs"}),
        ):
            before = {n: [t.to(device) for t in ts] for n, ts in case.tensors().items()}
            after = copied(before)
            run(function, after)
            different = {
                name
                for name, group in after.items()
                if any(not torch.equal(a, b) for a, b in zip(group, before[name]))
            }
            assert different == changed


@pytest.mark.parametrize("decoupled", [False, True])
def test_many_steps_are_adams(backend: str, device: torch.device, decoupled: bool) -> None:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(c, device=device)) for c in (3, 65)]
    ours = [w.detach().clone() for w in weights]
    moments = [[torch.zeros_like(w) for w in ours] for _ in range(2)]
    optimizer = torch.optim.Adam(weights, lr=0.02, betas=(0.9, 0.99))
    for step in range(1, 11):
        grads = [torch.randn_like(w) for w in ours]
        means = [torch.randn(4, len(w), device=device) for w in ours]
        for weight, grad, mean in zip(weights, grads, means):
            decay = 0.3 * mean.abs().mean(0) * weight.detach()
            weight.grad = grad if decoupled else grad + decay
            weight.data -= decay if decoupled else 0
        optimizer.step()
        adam_decay_(
            ours, grads, *moments, means, 0.3, 0.02, step, (0.9, 0.99), decoupled=decoupled
        )  # fmt: skip
    torch.testing.assert_close(ours, [w.detach() for w in weights], rtol=1e-5, atol=1e-5)


def test_nan_and_nothing(backend: str, device: torch.device) -> None:
    """NaN stays in its channel; without samples the average is 0/0; empty lists are fine."""
    weight, grad = torch.ones(3, device=device), torch.zeros(3, device=device)
    means = torch.ones(2, 3, device=device)
    means[1, 1] = torch.nan
    decay_([weight], [means], 0.5, [grad])
    torch.testing.assert_close(grad.cpu(), torch.tensor([0.5, torch.nan, 0.5]), equal_nan=True)
    decay_([weight], [means[:0]], 0.5)
    assert weight.isnan().all()
    decay_([], [], 0.5)
    adam_decay_([], [], [], [], [], 0.5, 0.1, 1)


def sound_calls() -> Iterator[Call]:
    for factors in (True, False):
        t = Case((4, 0, 9), factors=factors).tensors()
        lists = t["means"], t["factors"]
        yield "decay_", (t["weights"], t["grads"], *lists, 0.5, True)
        yield "decay_", (t["weights"], [], *lists, 0.5, False)
        moments = t["exp_avgs"], t["exp_avg_sqs"]
        numbers = 0.5, True, False, 0.01, 0.9, 0.99, 1e-8, 2
        yield "adam_decay_", (t["weights"], t["grads"], *moments, *lists, *numbers)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("number", range(6))
def test_registration_and_mixed_devices(number: int) -> None:
    assert_one_device(*list(sound_calls())[number])
    assert_registered(*list(sound_calls())[number])


@pytest.mark.usefixtures("compiled")
def test_compiles_without_a_graph_break() -> None:
    case = Case((6, 3), factors=True)
    with sodfast.use_backend("cpu"):
        for run, function in ((case.decay, decay_), (case.adam, adam_decay_)):
            eager, traced = copied(case.tensors()), copied(case.tensors())
            run(function, eager)
            torch.compile(run, fullgraph=True, backend="aot_eager")(function, traced)
            assert all(torch.equal(a, b) for n in eager for a, b in zip(eager[n], traced[n]))


@pytest.mark.usefixtures("compiled")
def test_autograd_notices_the_change() -> None:
    weight = torch.ones(3)
    scale = torch.ones(3, requires_grad=True)
    product = (scale * weight).sum()
    with sodfast.use_backend("cpu"):
        decay_([weight], [torch.ones(1, 3)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


c3, c4, m3 = torch.ones(3), torch.ones(4), torch.ones(2, 3)
BAD = {
    "rank": (ValueError, r"weights\[0\].*\(channels,\).*\(2, 3\)", ([m3], [m3], 1.0)),
    "integers": (TypeError, r"weights\[0\].*int64", ([c3.long()], [m3], 1.0)),
    "no tensor": (TypeError, r"weights\[1\].*float", ([c3, 1.0], [m3, m3], 1.0)),
    "means": (ValueError, r"means\[0\].*\(samples, 4\), not \(2, 3\)", ([c4], [m3], 1.0)),
    "count": (ValueError, "means must hold 2.*not 1", ([c3, c3], [m3], 1.0)),
    "grads": (ValueError, r"grads\[0\].*\(3,\), not \(4,\)", ([c3], [m3], 1.0, [c4])),
    "factors": (ValueError, "factors must hold 1.*not 2", ([c3], [m3], 1.0, [], [c3, c3])),
    "dtypes": (TypeError, r"means\[0\].*float64", ([c3], [m3.double()], 1.0)),
    "devices": (ValueError, r"grads\[0\].*meta", ([c3], [m3], 1.0, [c3.to("meta")])),
    "strides": (ValueError, r"weights\[0\].*contiguous.*\(2,\)", ([m3.view(-1)[::2]], [m3], 1.0)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(backend: str, name: str) -> None:
    error, message, arguments = BAD[name]
    with pytest.raises(error, match=message):
        decay_(*arguments)


def test_bad_adam_is_refused(backend: str) -> None:
    lists = ([c3], [c3], [c3], [c3], [m3])
    with pytest.raises(ValueError, match="step must be at least 1, not 0"):
        adam_decay_(*lists, 1.0, 0.1, 0)
    with pytest.raises(ValueError, match=r"betas.*\(0.9, 1.0\)"):
        adam_decay_(*lists, 1.0, 0.1, 1, (0.9, 1.0))
    with pytest.raises(ValueError, match=r"exp_avgs\[0\].*\(3,\), not \(4,\)"):
        adam_decay_([c3], [c3], [c4], [c3], [m3], 1.0, 0.1, 1)


@pytest.mark.usefixtures("compiled")
def test_half_precision_runs_on_the_reference_or_not_at_all() -> None:
    weight, means = torch.ones(3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16)
    with sodfast.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu'.*bfloat16"):
        decay_([weight], [means], 0.5)
    with sodfast.use_backend("reference"):
        decay_([weight], [means], 0.5)
    assert (weight == 0.5).all()


def nonsense() -> Iterator[Call]:
    good = ([c3], [c3], [m3], [])
    for weights, grads, means, factors in (
        ([m3], *good[1:]),
        ([c4], *good[1:]),
        ([c3.long()], *good[1:]),
        ([c3.half()], [c3.half()], [m3.half()], []),
        ([c3.double()], *good[1:]),
        ([torch.ones(6)[::2]], *good[1:]),
        ([c3, c3], *good[1:]),
        ([c3], [c4], [m3], []),
        ([c3], [c3, c3], [m3], []),
        ([c3], [c3.double()], [m3], []),
        ([c3], [c3], [c3], []),
        ([c3], [c3], [m3.t()], []),
        ([c3], [c3], [], []),
        ([c3], [c3], [m3.to("meta")], []),
        ([c3], [c3], [m3], [c4]),
        ([c3], [c3], [m3], [c3, c3]),
    ):
        yield "decay_", (weights, grads, means, factors, 1.0, True)
        numbers = 1.0, True, False, 0.01, 0.9, 0.99, 1e-8, 2
        yield "adam_decay_", (weights, grads, weights, weights, means, factors, *numbers)
    yield "decay_", ([c3], [torch.ones(6)[::2]], [m3], [], 1.0, True)
    numbers = 1.0, True, False, 0.01, 0.9, 0.99, 1e-8
    for moments in (([], []), ([c4], [c3]), ([c3], [c4]), ([c3], [c3.double()])):
        yield "adam_decay_", ([c3], [c3], *moments, [m3], [], *numbers, 2)
    yield "adam_decay_", ([c3], [], [c3], [c3], [m3], [], *numbers, 2)
    for step in (0, -1):
        yield "adam_decay_", ([c3], [c3], [c3], [c3], [m3], [], *numbers, step)


@pytest.mark.usefixtures("compiled")
def test_raw_ops_refuse_nonsense() -> None:
    assert_refused("test_decay")


@pytest.mark.usefixtures("compiled")
def test_raw_ops_survive_random_changes(full: bool) -> None:
    assert_survived("test_decay", 20_000 if full else 1_000)
