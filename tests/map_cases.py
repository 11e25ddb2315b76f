"""Generated single maps for the ops of SCFNet, and what their tests have in common."""

import importlib
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import strategies as st
from op_cases import CallCounter, batches
from torch import Tensor

import sodfast

# Lengths around whole vectors of every instruction set, and small ones.
lengths = st.one_of(st.integers(1, 9), st.integers(1, 70))
windows = st.one_of(st.sampled_from([1, 3, 5, 13]), st.integers(0, 15).map(lambda r: 2 * r + 1))


@st.composite
def map_sizes(draw: st.DrawFn, most: int = 6000) -> tuple[int, int, int, int]:
    """(batch, channels, height, width) of at most so many values."""
    batch, channels = draw(batches), draw(st.sampled_from([1, 1, 2, 3, 5]))
    height, width = draw(lengths), draw(lengths)
    while batch * channels * height * width > most:
        batch, channels = max(1, batch // 2), max(1, channels // 2)
        if batch * channels == 1:
            break
    return batch, channels, height, width


def poison(monkeypatch: pytest.MonkeyPatch, module: str, names: Sequence[str]) -> None:
    """From here on no reference of a module can be called, under any of its names."""

    def poisoned(*_: object, **__: object) -> None:
        raise AssertionError("the reference was called")

    for name in names:
        monkeypatch.setattr(importlib.import_module(f"sodfast.ops.{module}"), name, poisoned)
        monkeypatch.setattr(sodfast.ops, name, poisoned)


def check_gradcheck(function: Callable, arguments: list[Tensor], ops: Sequence[str]) -> None:
    """torch's gradcheck in float64, and that it was the compiled ops that it checked."""
    leaves = [x.double().requires_grad_() for x in arguments]
    with sodfast.use_backend("cpu"), CallCounter() as calls:
        assert torch.autograd.gradcheck(function, leaves)
    forward, backward = ops
    assert calls.counts[forward] >= 2 * sum(x.numel() for x in leaves)
    assert calls.counts[backward] > 0


def check_compiles_and_exports(function: Callable, arguments: list[Tensor], op: str) -> None:
    """torch.compile without a graph break and torch.export keep the op, values and gradients."""

    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return function(*args)

    def run(module: Callable) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in arguments]
        y = module(*leaves)
        trained = [x for x in leaves if x.requires_grad]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), trained)]

    with sodfast.use_backend("cpu"):
        expected = run(function)
        found = run(torch.compile(Module(), fullgraph=True, backend="aot_eager"))
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)
        program = torch.export.export(Module(), tuple(x.detach() for x in arguments))
        assert any(f"sodfast.{op}" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(*arguments).detach(), expected[0])


def check_autocast(function: Callable, arguments: list[Tensor]) -> None:
    """Under autocast the compiled op computes in float32 whatever it gets."""
    with sodfast.use_backend("cpu"), torch.autocast("cpu", torch.bfloat16):
        y = function(*[x.bfloat16() for x in arguments])
    assert y.dtype == torch.float32
    with sodfast.use_backend("cpu"):
        expected = function(*[x.bfloat16().float() for x in arguments])
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def check_second_derivative_is_refused(function: Callable, arguments: list[Tensor]) -> None:
    leaves = [x.detach().requires_grad_() for x in arguments]
    with sodfast.use_backend("cpu"):
        (gradient, *_) = torch.autograd.grad(
            function(*leaves).square().sum(), leaves, create_graph=True
        )
        with pytest.raises(RuntimeError, match="_backward has no gradient: .* once"):
            torch.autograd.grad(gradient.sum(), leaves)
