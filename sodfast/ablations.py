"""The papers' ablations as data: what `sodfast ablate NAME` runs.

An ablation is a list of runs. Each has a series (a line in the plot), a point (its place in the
series) and the settings in which it differs from the base recipe; everything else is the recipe's
and the command's. To add one, add an entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ABLATIONS", "Ablation"]


@dataclass(frozen=True)
class Ablation:
    """One question to training.

    title: of table and plot. paper: the figures and tables where the papers answer it. runs:
    (series, point, settings of :class:`sodfast.recipe.Recipe` as `--set` names them). by_epoch:
    plot validation scores over epochs instead of the closing scores over the network's cost.
    recipe: what all runs share, where nobody says otherwise. taught: the runs are not listed
    here but one per teacher that is given; each distils it into the recipe's network. dynamic: the
    runs whose loss is dkd learn from the one teacher that is given, and pictures show what the
    weight of the distillation does (`sodfast.ablate_pictures`).
    """

    title: str
    paper: str
    runs: tuple[tuple[str, str, dict[str, Any]], ...]
    by_epoch: bool = False
    recipe: str = "csnet-fast"
    taught: bool = False
    dynamic: bool = False

    @property
    def varied(self) -> set[str]:
        """The settings that all runs set."""
        each = [set(settings) for _, _, settings in self.runs]
        return set.intersection(*each) if each else set()


# Without λ_d the γ decay as everything else does; with it as the recipe says.
_DECAYS: tuple[tuple[str, dict[str, Any]], ...] = (("standard", {"lambda_d": 0.0}), ("dynamic", {}))
_FIXED = {"lambda_d": 0.0, "prune": False}  # channels
_AS_PAPERS = {"prune_mode": "paper"}  # the criterion alone decides
_LOSSES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("BCE", {"loss": "bce", "boundary": "1"}),  # without SP the boundary is not looked at
    ("Dice", {"loss": "dice", "boundary": "1"}),
    *((f"SP, k {k}", {"loss": "sp", "boundary": str(k)}) for k in (13, 5, 1)),
    ("SP, progressive", {"loss": "sp", "boundary": "paper"}),
)
_WEIGHTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    *(("fixed", f"s {s:g}", {"loss": "dkd", "dkd.fixed_weight": s}) for s in (0.3, 0.5, 0.7)),
    ("dynamic", "", {"loss": "dkd", "dkd.threshold": 0.0}),
)

ABLATIONS = {
    "lambda": Ablation(
        "λ of the weight decay, γ under standard and under dynamic decay",
        "ECCV fig. 6a, TPAMI fig. 13",
        tuple(
            (decay, f"λ {value:g}", {**settings, "weight_decay": value})
            for decay, settings in _DECAYS
            for value in (1e-3, 2e-3, 5e-3, 1e-2)
        ),
    ),
    "epochs": Ablation(
        "Validation by epoch, γ under standard and under dynamic decay",
        "ECCV fig. 6b, TPAMI fig. 14",
        tuple((decay, "", {**settings, "prune": False}) for decay, settings in _DECAYS),
        by_epoch=True,
    ),
    "width": Ablation(
        "Width before learning, channels fixed and learned",
        "ECCV table 4, TPAMI table 11",
        tuple(
            (series, f"×{width:g}", {**settings, "config.width": width})
            for series, settings in (("fixed", _FIXED), ("learned", {"prune": True}))
            for width in (1.0, 1.2, 1.5, 1.8, 2.0)
        ),
    ),
    "criterion": Ablation(
        "Pruning criterion, γ under standard and under dynamic decay",
        "ECCV table 3, TPAMI table 9",
        tuple(
            (
                decay,
                point,
                # The ratio leaves about the papers' 227K of 789K parameters, at width 2.
                {**settings, "prune_criterion": criterion, "prune_ratio": 0.46, **_AS_PAPERS},
            )
            for decay, settings in _DECAYS
            for criterion, point in (("norm", "filter norm"), ("median", "geometric median"))
        ),
    ),
    "threshold": Ablation(
        "Channels by a ratio of all |γ| and by a threshold",
        "TPAMI table 10",
        tuple(
            (
                criterion,
                f"{value:g}",
                {"prune_criterion": criterion, f"prune_{criterion}": value, **_AS_PAPERS},
            )
            for criterion, values in (
                ("threshold", (1e-2, 1e-3, 1e-5, 1e-10, 1e-20)),
                ("ratio", (0.38, 0.51)),
            )
            for value in values
        ),
    ),
    "split": Ablation(
        "Channels at high : low resolution, all the network and its extractor alone",
        "ECCV table 1, TPAMI table 6",
        tuple(
            (model, f"{high}:{low}", {**_FIXED, "model": model, "config.split": [high, low]})
            for model in ("csnet", "extractor")
            for high, low in ((1, 0), (3, 1), (1, 1), (1, 3), (0, 1))
        ),
    ),
    "loss": Ablation(
        "Loss and boundary thickness, with and without cross-scale fusion",
        "KD-SCFNet table 3",
        tuple(
            (series, point, {"model": model, **settings})
            for series, model in (("base", "scfnet-base"), ("SCFNet", "scfnet"))
            for point, settings in _LOSSES
        ),
        recipe="fs-scfnet",
    ),
    "rgbd": Ablation(
        "RGB and RGB-D, fixed and dynamic distillation, noise elimination",
        "Dynamic KD table 3, figs. 2, 5, 7 and 8",
        (
            ("RGB", "", {"loss": "bce", "config.in_channels": 3}),
            ("RGB-D", "", {"loss": "bce"}),
            *_WEIGHTS,
            ("dynamic", "and threshold", {"loss": "dkd"}),
        ),
        recipe="rgbd-dkd-ne",
        dynamic=True,
    ),
    "rgb-dkd": Ablation(
        "Fixed and dynamic distillation on RGB alone, T = 10",
        "Dynamic KD table 5",
        tuple(
            (series, point, {**settings, "config.in_channels": 3, "dkd.temperature": 10.0})
            for series, point, settings in _WEIGHTS
        ),
        recipe="rgbd-dkd",
        dynamic=True,
    ),
    "teacher": Ablation(
        "One student, several teachers", "KD-SCFNet fig. 6", (), recipe="kd-scfnet", taught=True
    ),
}
