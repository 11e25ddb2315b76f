"""Training: algorithm 1 of the CSNet papers in one loop.

    train with dynamic weight decay → eliminate channels → fine-tune → evaluate

Everything that a step does follows from the recipe and the step's number, so the state of a
run is the parameters, the optimizer, the averages and a few numbers: a run that was killed
and resumed ends with the same bits as one that was not (on one CPU).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint
from .launch import Launch
from .models import count, input_channels
from .objective import Objective
from .optim import DynamicWeightDecay, parameter_groups
from .prune import estimate_statistics, prune
from .recipe import Recipe
from .resume import Found, State, begin, capture, network_of, restore
from .runlog import Losses, NotFinite, RunLog, TeachingLog, draw_curves, environment
from .schedule import (
    check_sizes,
    decay_strength,
    image_size,
    learning_rate,
    make_optimizer,
    split_biases,
)
from .sources import Sources, open_sources
from .validation import gamma_quantiles, results, validate
from .weights import atomic_write, save

__all__ = ["TrainingError", "train"]

_STATISTICS_BATCHES = 16  # where a network's norms have no statistics that fit


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why, and what of it is safe."""


def train(
    recipe: Recipe,
    data: str | os.PathLike[str] | None,
    run: str | os.PathLike[str],
    val: str | os.PathLike[str] | None = None,
    resume: bool = False,
    init: str | os.PathLike[str] | None = None,
    device: str | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
    progress: bool = True,
    teacher: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Trains one network and returns the table of results (also RUN/results.json).

    recipe: from `sodfast.recipe.load_recipe`. data: a folder of images and masks, see
    `sodfast.data.folders`. run: a folder for everything that the run writes: log.jsonl,
    checkpoints, curves.png, trained.safetensors (before the elimination) and
    weights.safetensors (the result). val: validate and select on this folder (never a test
    set) instead of a held-out part of `data`. resume: go on from the last checkpoint in
    `run`. init: start from these weights, in their configuration. device: None takes a GPU
    where there is one. cache_folder, skip_bad: see `sodfast.data.cache.build_cache`.
    teacher, images: see `sodfast.distill.distill`; data may then be None. A network with four
    input channels (`config.in_channels`, the default of fpn-rgbd) learns from depth maps too, which
    `data` must hold.

    Raises ValueError and FileNotFoundError for what is wrong with the arguments or the data,
    TrainingError for a loss that is not finite or a full disk.
    """
    run = Path(run)
    trainer = Trainer(recipe, run, device, progress)
    with checkpoint.lock(run) if trainer.launch.is_main else contextlib.nullcontext():
        if trainer.launch.is_main:
            if not resume and checkpoint.list_checkpoints(run):
                raise ValueError(f"{run} holds a run already: --resume goes on with it")
            checkpoint.clean(run)
        found = checkpoint.latest(run) if resume else None
        sources = open_sources(
            recipe, trainer.launch, data, val, images, teacher, cache_folder, skip_bad, progress,
            input_channels(*network_of(recipe, found, init)),
        )  # fmt: skip
        trainer.start(sources, found, init)
        try:
            trainer.loop()
            return trainer.finish()
        except OSError as error:
            raise TrainingError(
                f"{error.filename or run}: {error.strerror or error}; {checkpoint.advice(run)}"
            ) from error
        finally:
            trainer.close()


class Trainer:
    """One run: what `train` does, in the order of the methods below."""

    def __init__(self, recipe: Recipe, run: Path, device: str | None, progress: bool) -> None:
        self.recipe, self.run, self.progress = recipe, run, progress
        self.launch = Launch(recipe.precision, device)
        self.device = self.launch.device
        self.state = State()
        self.objective = Objective(recipe)
        self.log = RunLog(run, active=False)
        self.drawn = time.monotonic()
        # Reading a loss makes a GPU wait, so there it is done for several at once.
        self.losses = Losses(1 if self.device.type == "cpu" else 16)

    # ---- beginning and resuming ----------------------------------------------------------------

    def start(
        self, sources: Sources, found: Found | None, init: str | os.PathLike[str] | None
    ) -> None:
        """Everything before the first step."""
        recipe = self.recipe
        rows, self.held = sources.split(recipe.held_out)
        names = sources.identity(rows)
        torch.manual_seed(recipe.seed)
        model = begin(recipe, found, init, names)
        if found is not None:
            path, saved, complaints = found
            self.state = State(**saved["state"])
        check_sizes(recipe, getattr(model, "size_multiple", 16))
        self.names = names
        pre: dict[str, Any] = model.preprocessing  # type: ignore[assignment]
        pre["size"] = [recipe.size, recipe.size]  # travels with the weights
        self.batches = sources.batches(rows, recipe, pre, self.device, self.launch)
        self.teacher = sources.teacher if recipe.loss == "dkd" else None
        self.steps_per_epoch = self.batches.per_epoch // recipe.accumulate
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"accumulate is {recipe.accumulate}, but an epoch has {self.batches.per_epoch} "
                "batches only"
            )
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.adopt(model)
        if found is not None:
            restore(saved, self.model, self.average, self.optimizer, self.launch)
            self.averaged = True

        self.log = RunLog(self.run, active=self.launch.is_main)
        self.teaching = TeachingLog(self.run, self.launch.rank)
        self.log.write(
            "start", recipe=recipe.as_dict(), environment=environment(), device=str(self.device),
            processes=self.launch.world, seed=recipe.seed, training=len(rows), step=self.state.step,
            validation=len(self.held[1]), bad=sources.bad, steps=self.total_steps,
            params=count(self.model)["params"], taught=len(sources.unlabelled or ()),
            teacher=None if sources.teacher is None else sources.teacher.identity,
        )  # fmt: skip
        if found is not None:
            self.log.write("resume", step=self.state.step, checkpoint=path.name, damaged=complaints)
        self.clock = time.monotonic() - self.state.seconds

    def adopt(self, model: nn.Module) -> None:
        """Makes `model` the one that is trained, with a fresh optimizer."""
        recipe = self.recipe
        self.model = model.to(self.device).train()
        expected: dict[str, Any] = model.preprocessing  # type: ignore[assignment]
        self.channels = len(expected["mean"])  # a batch may hold depth for a teacher alone
        groups = parameter_groups(
            self.model, recipe.weight_decay, recipe.encoder_lr, recipe.encoder_norm_decay
        )
        # Standard decay: the γ are parameters like all others.
        if not recipe.lambda_d and len(groups) == 2:
            every = list(self.model.parameters())
            groups = [{"params": every, "weight_decay": recipe.weight_decay}]
        inner = make_optimizer(recipe, split_biases(recipe, self.model, groups))
        self.decay = None
        # Once channels are eliminated the rest is fine-tuned: nothing more shall vanish.
        if recipe.lambda_d > 0 and self.state.eliminated_at < 0:
            self.decay = DynamicWeightDecay(inner, self.model, recipe.lambda_d, recipe.decay_mode)
        self.optimizer = inner if self.decay is None else self.decay
        self.average = copy.deepcopy(self.model).eval() if recipe.ema else None
        self.averaged = False  # until then it is a copy, and its statistics fit
        self.parallel = self.launch.wrap(self.model, recipe.sync_bn)

    # ---- the loop --------------------------------------------------------------------------------

    def loop(self) -> None:
        """Algorithm 1. `done` runs from 0 to 1 over the whole schedule."""
        recipe, state = self.recipe, self.state
        bar = tqdm(
            total=self.total_steps, initial=state.step, unit="step", desc="train",
            disable=None if self.progress and self.launch.is_main else True,
        )  # fmt: skip
        while (done := self.done()) < 1:
            if self.must_eliminate(done):
                self.eliminate(done)
            rate = learning_rate(recipe, done, state.eliminated_at, self.steps_per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            if self.decay is not None:
                self.decay.lambda_d = decay_strength(recipe, done)
            size = image_size(recipe, done, state.step)
            self.optimizer.zero_grad()
            for part in range(recipe.accumulate):
                number = state.step * recipe.accumulate + part
                x, truth = self.batches.get(number, size)
                with self.launch.autocast():
                    output = self.parallel(x[:, : self.channels])
                loss = self.objective(output, truth, self.batches.labelled, done, self.taught(x))
                self.teaching.add(number, self.batches, self.objective.weights())
                self.losses.add(number, loss)
                if self.losses.due:
                    self.read_losses(size)
                self.launch.backward(loss / recipe.accumulate)
            self.launch.step(self.optimizer)
            self.update_average()
            state.step += 1

            save_now = state.step % recipe.checkpoint_every == 0
            if state.step % recipe.log_every == 0 or save_now:
                self.read_losses(size)
            if state.step % recipe.log_every == 0:
                self.log.write(
                    "step", step=state.step, epoch=state.step / self.steps_per_epoch, done=done,
                    loss=self.launch.mean(state.loss), lr=rate, size=size,
                    boundary=self.objective.boundary(done),
                    seconds=round(self.seconds(), 2),
                    penalty=None if self.decay is None else float(self.decay.penalty()),
                    **self.teaching.means,
                )  # fmt: skip
            bar.update()
            bar.set_postfix(loss=f"{state.loss:.3f}", size=size, refresh=False)
            if state.step % (recipe.validate_every * self.steps_per_epoch) == 0:
                self.read_losses(size)
                self.validate_now()
                save_now = True
            if save_now:
                self.save_checkpoint()
        self.read_losses(recipe.size)
        if self.must_eliminate(1.0):  # no fine-tuning was asked for
            self.eliminate(1.0)
        bar.close()

    def taught(self, x: Tensor) -> Tensor | None:
        """The teacher's logits of a batch's labelled pictures, for dynamic distillation."""
        if self.teacher is None:
            return None
        pre = {"mean": self.batches.mean, "std": self.batches.std}
        return self.teacher.logits_of_student(x[: self.batches.labelled], pre)

    def done(self) -> float:
        """How much of the schedule is behind us: of the steps, or of the time if that is more."""
        part = self.state.step / self.total_steps
        if self.recipe.max_minutes:
            part = max(part, self.launch.agree(self.seconds() / 60 / self.recipe.max_minutes))
        return part

    def seconds(self) -> float:
        """Spent on this run, in all sessions."""
        return time.monotonic() - self.clock

    def must_eliminate(self, done: float) -> bool:
        recipe = self.recipe
        if not recipe.prune or self.state.eliminated_at >= 0:
            return False
        return done >= 1 - recipe.finetune_epochs / recipe.epochs

    def eliminate(self, done: float) -> None:
        """Removes the channels whose γ vanished; the rest gets a fresh optimizer."""
        recipe = self.recipe
        before = self.validate_now("before elimination")
        self.save_weights("trained.safetensors")
        if before is not None and self.average is not None:  # which is not what loses channels
            before = self.scores(self.model)
            self.model.train()
        smaller, report = prune(
            self.model, recipe.prune_criterion, recipe.prune_mode, recipe.prune_threshold,
            recipe.prune_ratio,
        )  # fmt: skip
        if recipe.prune_mode == "paper":  # which has reset them
            self.estimate_statistics(smaller.to(self.device), done)
        self.state.eliminated_at = done
        self.state.best = -1.0  # from now on the smaller network's scores count
        pre = self.model.preprocessing
        self.adopt(smaller)
        self.model.preprocessing = pre
        after = self.validate_now("after elimination", keep=False)
        size = (self.recipe.size, self.recipe.size)
        if self.launch.is_main:
            with atomic_write(self.run / "elimination.txt") as file:
                file.write(report.table(size).encode() + b"\n")
        self.log.write(
            "eliminate", step=self.state.step, removed=report.removed, total=report.total,
            costs=report.costs(size), before=before, after=after, config=self.model.config,
        )  # fmt: skip
        self.save_checkpoint()

    def estimate_statistics(self, network: nn.Module, done: float) -> None:
        """Gives a network's norms the statistics of the batches that come next."""
        first = self.state.step * self.recipe.accumulate
        numbers = range(first, first + _STATISTICS_BATCHES)
        side = image_size(self.recipe, done, self.state.step)
        estimate_statistics(
            network, (self.batches.get(number, side)[0][:, : self.channels] for number in numbers)
        )

    def update_average(self) -> None:
        """Exponential moving average of the parameters; its statistics are estimated when it is
        looked at."""
        if self.average is None:
            return
        self.averaged = True
        with torch.no_grad():
            for ours, theirs in zip(self.model.parameters(), self.average.parameters()):
                theirs.lerp_(ours, 1 - self.recipe.ema)
            for now, then in zip(self.model.buffers(), self.average.buffers()):
                then.copy_(now)

    def read_losses(self, size: int) -> None:
        """Reads what was not read yet; stops the run at the first loss that is no number."""
        self.teaching.flush()
        try:
            self.state.loss = self.losses.read(self.state.loss)
        except NotFinite as found:
            self.stop_at(found.number, found.value, size)

    def stop_at(self, number: int, value: float, size: int) -> None:
        """Writes what is needed to see what happened, and ends the run."""
        names = self.batches.names(number)
        step = number // self.recipe.accumulate + 1
        x, truth = self.batches.get(number, size)
        dump = self.run / f"not-finite-rank{self.launch.rank}.pt"
        where = f"batch and weights are in {dump}"
        try:
            with atomic_write(dump) as file:
                torch.save(
                    {"step": step, "names": names, "x": x.cpu(), "truth": truth.cpu(),
                     "model": {k: v.cpu() for k, v in self.model.state_dict().items()}}, file
                )  # fmt: skip
            self.log.write("stop", reason=f"loss {value}", step=step, names=names)
        except OSError as error:  # must not hide what is really wrong
            where = f"batch and weights could not be written: {error}"
        raise TrainingError(
            f"the loss is {value} at step {step}; pictures: {', '.join(names)}; {where}; "
            f"{checkpoint.advice(self.run)}"
        )

    # ---- validation and files --------------------------------------------------------------------

    def scores(self, model: nn.Module) -> dict[str, float]:
        """Of a network on the held-out pairs. Raises TrainingError where its maps hold NaN."""
        try:
            return validate(model, *self.held, self.recipe.size, self.device)
        except ValueError as error:
            self.log.write("stop", reason=str(error), step=self.state.step)
            raise TrainingError(
                f"{error} on held-out pictures after step {self.state.step}; "
                f"{checkpoint.advice(self.run)}"
            ) from error

    def validate_now(self, label: str = "", keep: bool = True) -> dict[str, float] | None:
        """Scores the network (its average, where there is one) on the held-out pairs; keeps it
        as weights.safetensors where it is the best of its phase so far."""
        model = self.model
        if self.average is not None:
            model = self.average
            if self.averaged:
                self.estimate_statistics(model, self.done())
        scores = self.scores(model) if len(self.held[1]) else None
        self.model.train()
        if not self.launch.is_main:
            return scores
        gammas = gamma_quantiles(self.model)
        if scores is not None:
            self.log.write(
                "validation", step=self.state.step, label=label, gamma=gammas, **scores
            )  # fmt: skip
        if keep and (scores is None or scores["max_f"] > self.state.best):
            self.state.best = -1.0 if scores is None else scores["max_f"]
            self.save_weights("weights.safetensors")
        if time.monotonic() - self.drawn > 60:  # drawing costs as much as some steps
            draw_curves(self.run)
            self.drawn = time.monotonic()
        return scores

    def save_weights(self, name: str) -> None:
        if self.launch.is_main:
            save(self.average if self.average is not None else self.model, self.run / name)

    def save_checkpoint(self) -> None:
        self.state.seconds = self.seconds()
        if not self.launch.is_main:
            return
        saved = capture(
            self.recipe, self.names, self.state, self.model, self.average, self.optimizer,
            self.launch,
        )  # fmt: skip
        checkpoint.save(self.run, self.state.step, saved)

    def finish(self) -> dict[str, Any]:
        """The table: each network of the run with its size, its work and its held-out scores."""
        self.validate_now("end")
        self.save_checkpoint()
        self.launch.wait()
        if not self.launch.is_main:
            return {}
        cache, rows = self.held
        table = results(self.run, cache, rows, self.recipe.size, self.device)
        with atomic_write(self.run / "results.json") as file:
            file.write(json.dumps(table, indent=1).encode())
        curves = "drawn" if draw_curves(self.run) else "not drawn: matplotlib is not installed"
        self.log.write(
            "end", step=self.state.step, results=table, seconds=self.seconds(), curves=curves
        )
        return table

    def close(self) -> None:
        self.batches.close()
        self.teaching.close()
        self.log.close()
