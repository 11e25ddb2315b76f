"""A fused network as CUDA graphs: captured on the first call of a kind, replayed from then on."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .ops import _backend

MOST_GRAPHS = 16  # per network; the one that was used least recently goes first
WARM_UP = 3  # calls before a capture: kernels are loaded, libraries choose theirs


class GraphedNetwork(nn.Module):
    """A network for inference that runs on a GPU as one CUDA graph per kind of input.

    Made by :func:`sodfast.fuse` with ``cuda_graph=True``. The first call with a shape, dtype,
    autocast and backend runs the network a few times and captures it; later ones copy the input,
    replay the graph and copy the result, so that the host starts one graph in place of
    dozens of kernels. Up to 16 graphs are kept, which share one pool of memory. Several threads and
    streams may call it: the replays follow each other. Inside torch.compile, and where the
    caller is capturing a graph itself, the network runs as it is.

    The graphs read the parameters where they are: what is copied into them counts; moving the
    module (``to``, ``half``) drops the graphs.

    Shape: as of the network. Tensors are on a CUDA device; results are the caller's.

    Attributes:
        network: what is captured.

    Raises:
        ValueError: a tensor that is not on a CUDA device.
        RuntimeError: an input that requires a gradient, with gradients enabled.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._pool: _Pool | None = None
        self._lock = threading.Lock()
        self.train(network.training)

    def forward(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.network(*inputs)
        leaves, structure = tree_flatten(inputs)
        device = _device_of(leaves)
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in leaves
        ):
            raise RuntimeError("a network in a CUDA graph has no gradient: it is for inference")
        if _is_capturing():
            return self.network(*inputs)
        key = (
            str(structure),
            tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves),
            device,
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
            _backend._requested,
        )
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                self._pool = self._pool or _Pool()
                run = lambda given: self.network(*tree_unflatten(given, structure))  # noqa: E731
                graph = _Graph(run, leaves, device, self._pool)
                self._graphs[key] = graph
                if len(self._graphs) > MOST_GRAPHS:
                    self._pool.free.synchronize()  # nothing runs that is about to be freed
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            return graph.replay(leaves)

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> GraphedNetwork:
        with self._lock:
            if self._pool is not None:
                self._pool.free.synchronize()
            self._graphs.clear()
            self._pool = None
        return super()._apply(fn, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:  # neither a copy nor a file has graphs
        return GraphedNetwork, (self.network,)


class _Pool:
    """The memory of a network's graphs, and when the last replay has left it."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.free = torch.cuda.Event()


class _Graph:
    """One graph with the tensors that it reads and writes.

    Another graph of the pool may use this one's memory for what lies between its layers: a
    replay waits until the one before has been copied out, whatever its stream.
    """

    def __init__(
        self, run: Callable[[list[Any]], Any], leaves: Sequence[Any], device: torch.device,
        pool: _Pool,
    ) -> None:  # fmt: skip
        self.device, self.pool = device, pool
        # Tensors made in inference mode could not be written to outside it.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
            self.inputs = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    run(self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads may go on with what a capture forbids this one.
            with torch.cuda.graph(self.graph, pool=pool.handle, capture_error_mode="thread_local"):
                self.outputs = run(self.inputs)

    def replay(self, leaves: Sequence[Any]) -> Any:
        with torch.no_grad(), torch.cuda.device(self.device):
            torch.cuda.current_stream().wait_event(self.pool.free)
            for held, x in zip(self.inputs, leaves):
                if isinstance(held, Tensor):
                    held.copy_(x)
            self.graph.replay()
            results = tree_map_only(Tensor, torch.clone, self.outputs)
            self.pool.free.record()
            return results


def check_cuda() -> None:
    """Raise a RuntimeError where nothing can be captured."""
    if not torch.cuda.is_available():
        raise RuntimeError("cuda_graph=True was asked for, but torch finds no CUDA device here")


def _device_of(leaves: Sequence[Any]) -> torch.device:
    """The device of the first tensor, after a check of all."""
    devices = [x.device for x in leaves if isinstance(x, Tensor)]
    for device in devices:
        if device.type != "cuda":
            raise ValueError(
                f"a network in a CUDA graph takes tensors on a CUDA device, not on {device} "
                "(its attribute network runs anywhere)"
            )
    if not devices:
        raise ValueError("a network in a CUDA graph takes a tensor")
    return devices[0]


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()
