"""One process or many: the few places where a training loop has to know.

A plain `python` or `sodfast train` is one process and needs nothing. Under `torchrun` or
`accelerate launch`, and for mixed precision, Hugging Face accelerate does the work; the
resume state stays ours.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .sync import synchronise

__all__ = ["Launch"]


class Launch:
    """The process group, the device and the precision of a run.

    precision: float32, bfloat16 or float16 (autocast). device: None takes a GPU where there
    is one. Raises ImportError with the command to install it where accelerate is needed and
    missing, and ValueError for a device that is not there.
    """

    def __init__(self, precision: str = "float32", device: str | None = None) -> None:
        self.accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or precision != "float32":
            self.accelerator = _accelerator(precision, device)
            self.device = self.accelerator.device
            self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        else:
            self.device = _device(device)
            if self.device.type == "cuda" and not torch.cuda.is_available():
                raise ValueError(f"device {device!r} was asked for, but torch sees no GPU")
            self.rank, self.world = 0, 1
        self.is_main = self.rank == 0

    def wrap(self, model: nn.Module, sync_bn: bool) -> nn.Module:
        """The module to call: gradients are averaged over all processes."""
        if sync_bn:
            synchronise(model)
        if self.accelerator is None:
            return model
        wrapped: nn.Module = self.accelerator.prepare_model(model)
        return wrapped

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.accelerator is None:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def backward(self, loss: Tensor) -> None:
        if self.accelerator is None:
            loss.backward()
        else:
            self.accelerator.backward(loss)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step; under float16 the gradients are unscaled first, and bad steps left out."""
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is None:
            optimizer.step()
        else:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()

    def agree(self, value: float) -> float:
        """The largest value of all processes: they must take every decision together."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        return float(shared)

    def mean(self, value: float) -> float:
        """The mean of all processes' values."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(shared)
        return float(shared) / self.world

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The body runs in process 0 first, then in the others."""
        if self.accelerator is None:
            yield
            return
        with self.accelerator.main_process_first():
            yield

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def scaler_state(self) -> dict[str, Any] | None:
        scaler = getattr(self.accelerator, "scaler", None)
        return None if scaler is None else dict(scaler.state_dict())

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and state is not None:
            scaler.load_state_dict(state)


def _accelerator(precision: str, device: str | None) -> Any:
    try:
        accelerate = importlib.import_module("accelerate")
    except ImportError:
        raise ImportError(
            "several processes and mixed precision need: pip install 'sodfast[train]', or pip "
            "install accelerate"
        ) from None
    names = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    return accelerate.Accelerator(mixed_precision=names[precision], cpu=device == "cpu")


def _device(name: str | None) -> torch.device:
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from error
