"""sodfast.fuse(model, cuda_graph=True): on a GPU the same results; without one its bookkeeping."""

import copy
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sodfast
from sodfast import cuda_graph
from sodfast.cuda_graph import MOST_GRAPHS, GraphedNetwork
from sodfast.plan import Plan

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA device here"
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_cuda_it_is_refused(small_csnet: Callable) -> None:
    with pytest.raises(RuntimeError, match="cuda_graph=True .* no CUDA device"):
        sodfast.fuse(small_csnet(), cuda_graph=True)


def test_a_tensor_on_the_cpu_is_refused(small_csnet: Callable) -> None:
    graphed = GraphedNetwork(sodfast.fuse(small_csnet()))
    with pytest.raises(ValueError, match="CUDA device, not on cpu"):
        graphed(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="takes a tensor"):
        graphed()


# ---- without a GPU: what is captured when, with a stand-in for graphs ----------------------------


class StandIn:
    made: list["StandIn"]

    def __init__(self, run: Callable, leaves: list[Any], device: torch.device, pool: Any) -> None:
        self.run, self.pool, self.replays, self.alone = run, pool, 0, threading.Lock()
        self.shapes = [x.shape for x in leaves if isinstance(x, Tensor)]
        StandIn.made.append(self)

    def replay(self, leaves: list[Any]) -> Any:
        assert self.alone.acquire(blocking=False), "two replays at once"
        assert self.shapes == [x.shape for x in leaves if isinstance(x, Tensor)]
        self.replays += 1
        result = self.run(leaves)
        self.alone.release()
        return result


class StandInPool:
    def __init__(self) -> None:
        self.free, self.waits = self, 0

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StandIn]]:
    StandIn.made = []
    monkeypatch.setattr(cuda_graph, "_Graph", StandIn)
    monkeypatch.setattr(cuda_graph, "_Pool", StandInPool)
    monkeypatch.setattr(cuda_graph, "_is_capturing", lambda: False)
    monkeypatch.setattr(cuda_graph, "_device_of", lambda leaves: leaves[0].device)
    yield StandIn.made


def test_one_graph_for_each_kind_of_call(made: list[StandIn]) -> None:
    graphed = GraphedNetwork(nn.Hardtanh().eval())
    x = torch.randn(2, 3, 4)
    for _ in range(3):
        assert torch.equal(graphed(x), x.clamp(-1, 1))
    assert [graph.replays for graph in made] == [3]
    graphed(x[:1])
    graphed(x.double())
    torch.set_autocast_enabled("cuda", True)  # torch.autocast does nothing without a GPU
    graphed(x)
    torch.set_autocast_enabled("cuda", False)
    with sodfast.use_backend("reference"):
        graphed(x)
    assert [graph.replays for graph in made] == [3, 1, 1, 1, 1]
    graphed(x)
    assert made[0].replays == 4 and len({graph.pool for graph in made}) == 1


def test_lists_of_scales_and_other_arguments(made: list[StandIn]) -> None:
    block = sodfast.fuse(sodfast.nn.ILBlock((3, 2), (1, 4)).eval())
    xs = [torch.randn(1, 3, 8, 8), torch.randn(1, 2, 4, 4)]
    graphed = GraphedNetwork(block)
    assert all(torch.equal(a, b) for a, b in zip(graphed(xs), block(xs)))
    assert len(made) == 1

    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: int) -> Tensor:
            return factor * x

    graphed = GraphedNetwork(Scaled().eval())
    assert torch.equal(graphed(xs[0], 2), 2 * xs[0])
    assert torch.equal(graphed(xs[0], 3), 3 * xs[0])
    assert len(made) == 3


def test_the_graph_least_recently_used_goes_first(made: list[StandIn]) -> None:
    graphed = GraphedNetwork(nn.Identity().eval())
    xs = [torch.zeros(n + 1) for n in range(MOST_GRAPHS + 1)]
    for x in xs[:-1]:
        graphed(x)
    graphed(xs[0])  # used again: the second is now the oldest
    graphed(xs[-1])
    assert len(made) == MOST_GRAPHS + 1 and made[0].pool.waits == 1
    graphed(xs[0])
    assert len(made) == MOST_GRAPHS + 1
    graphed(xs[1])
    assert len(made) == MOST_GRAPHS + 2


def test_moving_the_network_drops_its_graphs(made: list[StandIn]) -> None:
    graphed = GraphedNetwork(nn.Linear(3, 3).eval())
    x = torch.zeros(1, 3)
    with torch.no_grad():
        graphed(x)
        graphed.double().float()
        graphed(x)
    assert len(made) == 2 and made[0].pool is not made[1].pool and made[0].pool.waits == 1


def test_a_gradient_is_refused(made: list[StandIn]) -> None:
    graphed = GraphedNetwork(nn.Identity().eval())
    x = torch.zeros(1, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient"):
        graphed(x)
    with torch.no_grad():
        graphed(x)
    assert len(made) == 1


def test_copies_and_files_have_no_graphs(made: list[StandIn], small_csnet: Callable) -> None:
    graphed = GraphedNetwork(sodfast.fuse(small_csnet()))
    x = torch.randn(1, 3, 32, 32)
    expected = graphed(x)
    file = io.BytesIO()
    torch.save(graphed, file)
    file.seek(0)
    for other in (copy.deepcopy(graphed), torch.load(file, weights_only=False)):
        assert isinstance(other.network, Plan) and not other.training
        assert torch.equal(other(x), expected)
    assert len(made) == 3


def test_threads_replay_one_after_the_other(made: list[StandIn]) -> None:
    graphed = GraphedNetwork(nn.Hardtanh().eval())
    xs, wrong = [torch.randn(n + 1, 64) for n in range(3)], []

    def work(first: int) -> None:
        for step in range(60):
            x = xs[(first + step) % 3]
            try:
                if not torch.equal(graphed(x), x.clamp(-1, 1)):
                    wrong.append(step)
            except AssertionError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(made) == 3


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@torch.inference_mode()
def test_results_are_those_of_the_network(small_csnet: Callable) -> None:
    graphed = sodfast.fuse(small_csnet(), cuda_graph=True).cuda()
    kept = []
    for size in (64, 96, 64, 96):
        x = torch.randn(2, 3, size, 64, device="cuda")
        kept.append((graphed(x), graphed.network(x)))
    for found, expected in kept:  # a later replay must not have written to an earlier result
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with torch.no_grad(), torch.inference_mode(False):  # what was made inside serves outside
        graphed(x)


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_streams_wait_for_each_other(small_csnet: Callable) -> None:
    graphed = sodfast.fuse(small_csnet(), cuda_graph=True).cuda()
    xs = [torch.randn(4, 3, 128, 128 - 32 * (i % 2), device="cuda") for i in range(8)]
    expected = [graphed.network(x) for x in xs]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found = []
    for i, x in enumerate(xs):
        with torch.cuda.stream(streams[i % 3]):
            found.append(graphed(x))
    torch.cuda.synchronize()
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_it_can_be_part_of_a_capture_and_of_a_compiled_function(small_csnet: Callable) -> None:
    graphed = sodfast.fuse(small_csnet(), cuda_graph=True).cuda()
    x = torch.randn(1, 3, 64, 64, device="cuda")
    expected = graphed(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = graphed(x)
    graph.replay()
    assert torch.equal(y, expected)
    compiled = torch.compile(graphed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
