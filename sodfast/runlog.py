"""What a training run leaves behind: JSON lines, TensorBoard where it is installed, curves.

log.jsonl holds one object per line, "event" says what: start, step, validation, eliminate,
resume, stop, end. After a resume, steps that were done twice stand there twice; the later
line counts (`read_log`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .data.batches import Batches
    from .distill import Mixture
    from .nn import DynamicDistillation

__all__ = [
    "Losses",
    "NotFinite",
    "RunLog",
    "TeachingLog",
    "draw_curves",
    "environment",
    "read_log",
    "read_teaching",
]


def environment() -> dict[str, Any]:
    """What a run's numbers depend on besides its recipe: versions, git state, machine, backend."""
    import numpy

    from . import __version__
    from .ops._backend import info

    return {
        "sodfast": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git": _git(),
        "backends": info(),
        "command": sys.argv,
    }


def _git() -> dict[str, Any] | None:
    """The commit of the checkout that sodfast runs from and whether it was changed, or None."""

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
            timeout=20,
        ).stdout.strip()  # fmt: skip

    try:
        # An installed package may lie inside somebody else's repository.
        if Path(ask("rev-parse", "--show-toplevel")) != Path(__file__).resolve().parents[1]:
            return None
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


class RunLog:
    """Appends to RUN/log.jsonl, and to RUN/tensorboard where TensorBoard is installed.

    active: False makes every call do nothing (ranks other than 0).
    """

    def __init__(self, folder: Path, active: bool = True) -> None:
        self._file = None
        self._board: Any = None
        if not active:
            return
        path = folder / "log.jsonl"
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by close)
        _end_last_line(self._file)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, event: str, **values: Any) -> None:
        """One line, on the disk's side of Python's buffers when this returns."""
        if self._file is None:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values})
        self._file.write(line.encode(errors="backslashreplace") + b"\n")
        self._file.flush()
        if self._board is not None and "step" in values:
            for name, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{event}/{name}", value, values["step"])
            self._board.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _end_last_line(file: Any) -> None:
    """A killed process may have left half a line."""
    end = file.seek(0, os.SEEK_END)
    if end:
        file.seek(end - 1)
        if file.read(1) != b"\n":
            file.write(b"\n")


class NotFinite(ArithmeticError):
    """A loss that is no number: which batch it was of, and what it is."""

    def __init__(self, number: int, value: float) -> None:
        super().__init__(f"the loss of batch {number} is {value}")
        self.number, self.value = number, value


class Losses:
    """Losses that stay on the device until `every` of them are read at once."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._pending: list[tuple[int, Tensor]] = []

    def add(self, number: int, loss: Tensor) -> None:
        """The loss of batch `number`."""
        self._pending.append((number, loss.detach()))

    @property
    def due(self) -> bool:
        """Whether it is time to read."""
        return len(self._pending) >= self.every

    def read(self, mean: float) -> float:
        """The running mean, from what it was (0 at first). Raises NotFinite."""
        for number, loss in self._pending:
            value = float(loss)
            if not math.isfinite(value):
                raise NotFinite(number, value)
            mean = value if mean == 0 else 0.98 * mean + 0.02 * value
        self._pending.clear()
        return mean


class TeachingLog:
    """RUN/teaching.jsonl of dynamic distillation: a line per batch with its number, the names of
    its pictures and their θ, α and β. After a resume the later line of a batch counts
    (`read_teaching`). Other processes than the first write teaching-rankN.jsonl.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._path = folder / (f"teaching-rank{rank}.jsonl" if rank else "teaching.jsonl")
        self._file: Any = None
        self._pending: list[tuple[int, list[str], DynamicDistillation]] = []
        self.means: dict[str, float] = {}  # of θ, α and β in the last batch that was written

    def add(
        self, number: int, batches: Batches | Mixture, found: DynamicDistillation | None
    ) -> None:
        """Batch `number`; its values stay on the device until `flush`. None is passed over."""
        if found is not None:
            self._pending.append((number, batches.labelled_names(number), found))

    def flush(self) -> None:
        """Writes what was added. Raises OSError when the disk is full."""
        if not self._pending:
            return
        if self._file is None:
            self._file = open(self._path, "a+b")  # noqa: SIM115 (closed by close)
            _end_last_line(self._file)
        for number, names, found in self._pending:
            values = {
                name: [round(v, 5) for v in getattr(found, name).tolist()] for name in _TEACHING
            }
            self._file.write(
                json.dumps({"batch": number, "names": names, **values}).encode() + b"\n"
            )
            self.means = {name: sum(v) / max(len(v), 1) for name, v in values.items()}
        self._pending.clear()
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


_TEACHING = ("theta", "alpha", "beta")


def read_teaching(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of RUN/teaching.jsonl and those of the other processes, by batch."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for path in sorted(Path(folder).glob("teaching*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # half a line
                entry = json.loads(line)
                found[entry["batch"], path.name] = entry
    return [found[key] for key in sorted(found)]


def read_log(folder: str | os.PathLike[str], event: str) -> list[dict[str, Any]]:
    """The lines of one kind in RUN/log.jsonl, by step; of several at a step, the last."""
    found: dict[int, dict[str, Any]] = {}
    path = Path(folder) / "log.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # half a line
        if entry.get("event") == event:
            found[entry.get("step", -1)] = entry
    return [found[step] for step in sorted(found)]


def draw_curves(folder: str | os.PathLike[str]) -> Path | None:
    """RUN/curves.png: loss and learning rate, validation, and |γ|. None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    from .weights import atomic_write

    steps, scores = read_log(folder, "step"), read_log(folder, "validation")
    cut = [entry["step"] for entry in read_log(folder, "eliminate")]
    figure = Figure(figsize=(11, 7), layout="constrained")
    loss, rate, score, gamma = figure.subplots(2, 2).flat
    for axes, name, label in ((loss, "loss", "training loss"), (rate, "lr", "learning rate")):
        axes.plot([e["step"] for e in steps], [e[name] for e in steps])
        axes.set(xlabel="step", ylabel=label)
    for name, label in (("max_f", "max-F (SalMetric)"), ("mae", "MAE")):
        score.plot([e["step"] for e in scores], [e[name] for e in scores], ".-", label=label)
    score.set(xlabel="step", ylabel="validation", ylim=(0, 1))
    score.legend()
    dynamic = [e for e in scores if e.get("gamma")]
    for row, label in enumerate(("minimum", "10 %", "25 %", "median", "75 %", "90 %", "maximum")):
        gamma.plot(
            [e["step"] for e in dynamic],
            [max(e["gamma"][row], 1e-45) for e in dynamic],
            label=label,
        )
    gamma.set(xlabel="step", ylabel="|γ| under dynamic weight decay", yscale="log")
    if dynamic:
        gamma.legend(fontsize=7)
    for axes in (loss, rate, score, gamma):
        axes.grid(alpha=0.3)
        for step in cut:
            axes.axvline(step, color="black", linestyle=":", linewidth=1)
    path = Path(folder) / "curves.png"
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return path
