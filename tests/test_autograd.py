"""How the compiled ops are connected with their gradients."""

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from sodfast import use_backend
from sodfast.nn import GOctConv, ILBlock, NormAct, SimplifiedGOctConv
from sodfast.ops import goctconv, scfm

pytestmark = pytest.mark.usefixtures("compiled")


def convolution() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 32, 32, generator=generator, requires_grad=True)
    weight = torch.randn(16, 16, 3, 3, generator=generator, requires_grad=True)
    return x, weight, goctconv([x], weight, [16])[0].sum()


def test_several_threads_walk_one_graph() -> None:
    x, weight, loss = convolution()
    once = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    found: list[tuple[Tensor, ...]] = []

    def walk() -> None:
        for _ in range(5):
            found.append(torch.autograd.grad(loss, (x, weight), retain_graph=True))

    threads = [threading.Thread(target=walk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for gradients in found:
        assert all(torch.equal(a, b) for a, b in zip(gradients, once))


def test_nodes_are_named_after_their_ops() -> None:
    x, _, _ = convolution()
    y = torch.rand(2, 16, 8, 8)
    assert "goctconv" in type(convolution()[2].grad_fn.next_functions[0][0]).__name__
    assert "scfm" in type(scfm(x, y).grad_fn).__name__


def test_only_what_is_asked_for_is_computed() -> None:
    x, weight, _ = convolution()
    (only_x,) = torch.autograd.grad(goctconv([x], weight.detach(), [16])[0].sum(), x)
    (only_weight,) = torch.autograd.grad(goctconv([x.detach()], weight, [16])[0].sum(), weight)
    both = torch.autograd.grad(goctconv([x], weight, [16])[0].sum(), (x, weight))
    assert torch.equal(only_x, both[0]) and torch.equal(only_weight, both[1])


def test_a_dropped_graph_keeps_nothing() -> None:
    kept: list[weakref.ref] = []

    def pack(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        kept.append(weakref.ref(copy))
        return copy

    gc.collect()
    gc.disable()  # what only the collector frees would pile up between its runs
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            _, _, loss = convolution()
        assert kept and all(ref() is not None for ref in kept)
        del loss
        assert all(ref() is None for ref in kept)
        kept.clear()
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            _, _, loss = convolution()
        loss.backward()
        assert kept and all(ref() is None for ref in kept)
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in func.jvp
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused(grad: bool) -> None:
    """Below autograd a tangent would be lost without a word, and the derivative be 0."""
    x, tangent = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for layer in (GOctConv(4, 3), SimplifiedGOctConv(4), NormAct(4), ILBlock(4, 3)):
        layer.eval().requires_grad_(grad)

        def run(x: Tensor, layer: nn.Module = layer) -> Tensor:
            return layer([x])[0]

        with pytest.raises(NotImplementedError, match=r"sodfast\.goctconv.* no forward-mode"):
            torch.func.jvp(run, (x,), (tangent,))
        with torch.no_grad(), forward_ad.dual_level(), pytest.raises(NotImplementedError):
            run(forward_ad.make_dual(x, tangent))
        assert run(x).abs().max() > 0
        with use_backend("reference"):
            value, slope = torch.func.jvp(run, (x,), (tangent,))
        torch.testing.assert_close(value, run(x))
        assert slope.abs().max() > 0
