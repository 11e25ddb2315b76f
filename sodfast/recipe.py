"""Recipes: every number of a training run, in one short TOML file.

A recipe names the settings that differ from the defaults of :class:`Recipe`; the table
``[config]`` goes to `sodfast.create_model`. Unknown keys are refused: a misspelt setting that
is silently ignored costs a night.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

__all__ = ["Recipe", "list_recipes", "load_recipe"]


@dataclass(frozen=True)
class Recipe:
    """All settings of `sodfast.train.train`; see the comment of each.

    Raises ValueError, naming the setting and its value, where one is out of range.
    """

    paper: str = ""  # which paper and table this is, for the log
    # the network
    model: str = "csnet"  # name for sodfast.create_model
    config: dict[str, Any] = field(default_factory=dict)  # its other arguments
    size: int = 224  # side of the square that the network sees, pixels
    sizes: list[list[float]] = field(default_factory=list)  # [[done, side], …] while it trains:
    # from this part of the schedule on, this side; before the first, and when empty: size
    random_sizes: list[int] = field(default_factory=list)  # or one of these sides per step
    cache_size: int = 0  # side of the decoded squares that crops are taken from; 0: size
    # how long
    epochs: int = 300  # all, those of the fine-tuning included
    finetune_epochs: int = 20  # the last ones, after channels were eliminated
    max_minutes: float = 0.0  # 0: as long as it takes; else the schedule is compressed so that
    # it ends by then (what a step does then depends on the clock: not reproducible to the bit)
    # data
    batch_size: int = 24  # pictures per forward, all processes together
    accumulate: int = 1  # forwards per step of the optimizer
    crop: float = 15 / 224  # up to this part is cut from each side
    horizontal_flip: float = 0.5  # probabilities
    vertical_flip: float = 0.0
    blur: float = 0.0  # probability
    rotation: float = 0.0  # up to so many degrees either way
    brightness: float = 0.0  # up to this part darker or brighter, see data.augment.draw_colour
    disparity: bool = True  # depth maps, where the network takes any: near is bright; false: far is
    held_out: float = 0.05  # part of the training set that only validation sees
    seed: int = 1  # of initialisation, data order and augmentation
    # loss
    loss: str = "bce"  # bce, dice, sp (Dice of the map and of its boundary), sp+bce (their sum), or
    # dkd: dynamic distillation, which needs a teacher (sodfast distill)
    dkd: dict[str, Any] = field(default_factory=dict)  # arguments of
    # sodfast.nn.DynamicDistillationLoss; a threshold of 0: no noise elimination
    boundary: str = "paper"  # sp: thickness of the boundaries over the training, see
    # sodfast.nn.ProgressiveBoundary: its schedule paper or code, or always this number of pixels
    boundary_weight: float = 1.0  # sp: of the boundary's part
    # distillation (sodfast distill)
    teach: str = "online"  # the teacher sees the augmented batch; or offline: weak labels are
    # written once
    distill_loss: str = "dice"  # bce, dice, sp or sp+bce: of the unlabelled pictures
    distill_weight: float = 1.0  # of that loss, beside the labelled pictures' loss
    distill_threshold: float = 0.0  # the teacher's map is 1 above this, else 0; 0: it stays soft
    unlabelled_part: float = 0.5  # of a batch, where there are labelled pictures too
    # optimizer
    optimizer: str = "adam"  # adam, adamw or sgd
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])  # adam, adamw
    eps: float = 1e-8  # adam, adamw
    momentum: float = 0.9  # sgd
    weight_decay: float = 5e-3  # on everything but the γ under dynamic weight decay, if any are
    encoder_lr: float = 1.0  # of an encoder, as a part of lr
    encoder_norm_decay: bool = True  # whether weight_decay acts on the encoder's norms too
    bias_lr: float = 1.0  # of all biases, as a part of lr
    bias_decay: bool = True  # whether weight_decay acts on them too
    schedule: str = "steps"  # steps (÷ 10 at each milestone), cosine, poly ((1 - done)^poly_power),
    # or warmup_cosine (linear from final_lr to lr, then the cosine back to it; the others warm up
    # from 0)
    poly_power: float = 0.9
    milestones: list[int] = field(default_factory=lambda: [200, 250])  # epochs
    warmup_epochs: float = 0.0
    final_lr: float = 0.0  # cosine and poly end here, as a part of lr
    finetune_lr: float = 0.0  # the fine-tuning: cosine from here to 0; 0: the schedule goes on
    # dynamic weight decay and elimination
    lambda_d: float = 3.0  # 0: none, the γ get the standard decay
    lambda_steps: list[list[float]] = field(default_factory=list)  # [[done, lambda_d], …]: from
    # this part of the schedule on, this lambda_d; before the first 0; empty: lambda_d always
    decay_mode: str = "coupled"  # or decoupled
    prune: bool = True  # eliminate channels before the fine-tuning
    prune_criterion: str = "threshold"  # or ratio, norm, median: see sodfast.prune
    prune_threshold: float = 1e-20  # on |γ|
    prune_ratio: float = 0.5  # of the channels, for the other criteria
    prune_mode: str = "paper"  # or exact: see sodfast.prune
    # the run
    ema: float = 0.0  # decay per step of averaged weights, which are then validated and kept
    validate_every: int = 1  # epochs
    checkpoint_every: int = 500  # steps
    log_every: int = 50  # steps
    precision: str = "float32"  # or bfloat16, float16: autocast (needs accelerate)
    sync_bn: bool = False  # statistics over all processes' parts of a batch, summed exactly

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        for name, smallest in _SMALLEST.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {getattr(self, name)}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be from 0 to under 1, got {self.held_out}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be from 0 to under 1, got {self.ema}")
        if not 0 <= self.prune_ratio < 1:
            raise ValueError(f"prune_ratio must be from 0 to under 1, got {self.prune_ratio}")
        if self.finetune_epochs >= self.epochs + (not self.prune):
            raise ValueError(
                f"finetune_epochs must be {'below' if self.prune else 'at most'} epochs "
                f"({self.epochs}), got {self.finetune_epochs}"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to under 2**63, got {self.seed}")
        if 0 < self.cache_size < 16:
            raise ValueError(f"cache_size must be 0 or at least 16, got {self.cache_size}")
        if len(self.betas) != 2 or not all(_is_number(b) and 0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to under 1, got {self.betas}")
        if not all(_is_number(m) and m >= 0 for m in self.milestones):
            raise ValueError(f"milestones must be epochs, from 0, got {self.milestones}")
        for name in ("distill_threshold", "unlabelled_part"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to under 1, got {getattr(self, name)}")
        if self.boundary not in ("paper", "code") and self.boundary not in _THICKNESSES:
            raise ValueError(
                "boundary must be paper, code, or an odd number of pixels from 1 to 31, "
                f"got {self.boundary!r}"
            )
        if self.sizes and self.random_sizes:
            raise ValueError("sizes and random_sizes cannot both be given")
        for side in self.random_sizes:
            if type(side) is not int or side < 1:
                raise ValueError(f"random_sizes must be whole numbers above 0, got {side!r}")
        for entry in self.lambda_steps:
            if not _is_pair(entry) or entry[1] < 0:
                raise ValueError(
                    f"lambda_steps must be [[part of the schedule, lambda_d], …], got {entry}"
                )
        for entry in self.sizes:
            if not _is_pair(entry) or entry[1] < 1 or entry[1] % 1:
                raise ValueError(f"sizes must be [[part of the schedule, side], …], got {entry}")

    def as_dict(self) -> dict[str, Any]:
        """All settings, json-able."""
        return asdict(self)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pair(entry: Any) -> bool:
    """Whether it is [part of the schedule, number]."""
    return (
        isinstance(entry, (list, tuple))
        and len(entry) == 2
        and all(map(_is_number, entry))
        and 0 <= entry[0] <= 1
    )


_THICKNESSES = tuple(str(k) for k in range(1, 32, 2))
_SMALLEST = {
    "size": 16, "cache_size": 0, "epochs": 1, "finetune_epochs": 0, "max_minutes": 0,
    "batch_size": 1, "accumulate": 1, "eps": 0, "momentum": 0, "weight_decay": 0,
    "warmup_epochs": 0, "boundary_weight": 0, "distill_weight": 0, "encoder_lr": 0,
    "final_lr": 0, "finetune_lr": 0, "rotation": 0, "bias_lr": 0, "poly_power": 0,
    "lambda_d": 0, "prune_threshold": 0,
    "validate_every": 1, "checkpoint_every": 1, "log_every": 1,
}  # fmt: skip
_CHOICES = {
    "optimizer": ("adam", "adamw", "sgd"),
    "schedule": ("steps", "cosine", "poly", "warmup_cosine"),
    "loss": ("bce", "dice", "sp", "sp+bce", "dkd"),
    "distill_loss": ("bce", "dice", "sp", "sp+bce"),
    "teach": ("online", "offline"),
    "decay_mode": ("coupled", "decoupled"),
    "prune_criterion": ("threshold", "ratio", "norm", "median"),
    "prune_mode": ("paper", "exact"),
    "precision": ("float32", "bfloat16", "float16"),
}


def _folder() -> Any:
    """The recipes that ship, as package data (in a checkout a link to the top-level folder)."""
    return importlib.resources.files("sodfast") / "recipes"


def list_recipes() -> list[str]:
    """The names of the recipes that come with sodfast, sorted."""
    folder = _folder()
    if not folder.is_dir():
        return []
    return sorted(e.name.removesuffix(".toml") for e in folder.iterdir() if e.name[-5:] == ".toml")


def load_recipe(source: str | os.PathLike[str], settings: Iterable[str] = ()) -> Recipe:
    """A recipe by the name of one that ships, or from a TOML file, with settings changed.

    settings: "key=value" each, the value as TOML writes it ("lr=1e-3", "sizes=[[0, 64]]",
    "config.width=2.0"); a bare word is a string. Raises FileNotFoundError, or ValueError for
    what is no TOML, an unknown key (with the nearest known one) or a value out of range.
    """
    path = Path(source)
    if path.suffix == ".toml":
        if not path.is_file():
            raise FileNotFoundError(f"recipe not found: {path}")
        text = path.read_text(encoding="utf-8")
    elif str(source) in list_recipes():
        text = (_folder() / f"{source}.toml").read_text(encoding="utf-8")
    else:
        known = list_recipes()
        raise FileNotFoundError(
            f"no recipe {str(source)!r}: {', '.join(known)} come with sodfast, others are "
            f"given as a .toml file{_nearest(str(source), known)}"
        )
    values = _parse(text, str(source))
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"a setting must be key=value, got {setting!r}")
        place = values
        *tables, key = key.strip().split(".")
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise ValueError(f"{table!r} in {setting!r} is no table")
        place[key] = _value(value)
    return _checked(values, str(source))


def _parse(text: str, source: str) -> dict[str, Any]:
    # tomllib came with Python 3.11; tomli is the same for 3.10.
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        parser = importlib.import_module(name)
    except ImportError:
        raise ImportError("reading recipes on Python 3.10 needs: pip install tomli") from None
    try:
        return dict(parser.loads(text))
    except ValueError as error:  # TOMLDecodeError is one
        raise ValueError(f"{source}: not a TOML file: {error}") from error


def _value(text: str) -> Any:
    try:
        return _parse(f"value = {text}", "setting")["value"]
    except ValueError:
        return text.strip()


def _checked(values: Mapping[str, Any], source: str) -> Recipe:
    defaults = Recipe()
    known = [f.name for f in fields(Recipe)]
    ready = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{source}: unknown key {key!r}{_nearest(key, known)}")
        default = getattr(defaults, key)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise ValueError(
                f"{source}: {key} must be a {_KINDS[type(default)]}, "
                f"like {default!r}, got {value!r}"
            )
        ready[key] = value
    try:
        return Recipe(**ready)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


_KINDS = {
    bool: "truth value", int: "whole number", float: "number", str: "string", list: "list",
    dict: "table",
}  # fmt: skip


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
