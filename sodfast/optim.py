"""Dynamic weight decay: an optimizer around any torch optimizer (CSNet, section 3.3)."""

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._decay import (
    Entry,
    Metric,
    Watch,
    average_over_ranks,
    decay_alone,
    decay_and_adam,
    decaying_norms,
    flops_weights,
    parameter_groups,
    per_channel,
)
from .nn import NormAct
from .ops._backend import choose

__all__ = ["DynamicWeightDecay", "decaying_norms", "flops_weights", "parameter_groups"]

MODES = ("coupled", "decoupled")
_ADAMS = (torch.optim.Adam, torch.optim.AdamW)  # exactly: a subclass may step otherwise
_NOT_IN_OUR_ADAM = (
    "weight_decay", "amsgrad", "maximize", "capturable", "differentiable", "fused",
)  # fmt: skip
_SETTINGS = ("lambda_d", "mode", "scale_by_lr", "absolute")
_STATE_KEY = "dynamic_weight_decay"


class DynamicWeightDecay(torch.optim.Optimizer):
    r"""Wraps an optimizer so that every registered γ decays by how strongly its channel answers.

    .. math:: R = \frac{1}{B} \sum_b \sum_c \tfrac12 f_c\, |S(x_{bc})|\, \gamma_c^2, \qquad
              \frac{\partial\,(\lambda_d R)}{\partial \gamma_c}
              = \lambda_d f_c\, \overline{|S(x_c)|}\, \gamma_c

    S is the global average of the channel's feature map after batch normalisation and
    activation (CSNet, Eq. 4). It is treated as a constant, and it costs nothing: the norm's
    forward has computed it already (``NormAct.channel_means``). There is no loss term and no
    graph.

    ``mode="coupled"`` (as the authors train) adds the derivative above to γ's gradient before
    the optimizer sees it. ``mode="decoupled"`` scales γ ← γ (1 − lr λ_d f S̄) before the
    optimizer's own update, as AdamW does with its decay; with ``scale_by_lr=False,
    absolute=False`` that is Eq. 3 to the letter, γ ← γ − ∇ − λ_d S̄ γ.

    Use it like the optimizer it wraps::

        optimizer = DynamicWeightDecay(torch.optim.Adam(parameter_groups(model), lr=1e-4), model)
        …
        optimizer.zero_grad(); loss.backward(); optimizer.step()

    Learning-rate schedulers, closures, GradScaler and DDP take it as they take any optimizer:
    ``param_groups``, ``state`` and ``defaults`` are the wrapped optimizer's own.

    **Gradient accumulation.** The means live and die with the gradients: each backward that
    reaches a γ adds the samples of the last forward to what that γ's decay averages over,
    ``step`` uses the average over all of them, and both ``step`` and ``zero_grad`` start
    anew. So k micro-batches count like one batch of their joint size (the decay is not
    multiplied by k), forwards without a backward (evaluation, re-estimating statistics) do
    not count, and neither does a batch whose gradients were thrown away. With several forwards
    before one backward, the last one counts.

    **Several processes.** When torch.distributed is initialised, S̄ is averaged over all ranks
    in one all-reduce per step, as DDP does with the gradients. Every rank must step.

    Args:
        optimizer: any torch optimizer that holds the γ to decay. Its own ``weight_decay``
            should be 0 for them: see :func:`parameter_groups`.
        model: every :class:`~sodfast.nn.NormAct` inside an :class:`~sodfast.nn.ILBlock` is
            registered, unless its γ is frozen (the fusion is left out, as in the paper). None,
            or a model without ILBlocks: use :meth:`register`.
        lambda_d: λ_d, at least 0. The papers: 3.
        mode: "coupled" or "decoupled".
        scale_by_lr: multiply the decay by the learning rate of γ's group. Coupled decay always
            is, as part of the gradient.
        absolute: average |S| over the batch instead of S (negative means would make γ grow).
        metric: S: takes a detached feature map (B, C, H, W), returns (B, C). None: the global
            average, for which no feature map is read again.
        flops_weights: f. None: 1 everywhere. A number: :func:`flops_weights` of the model with
            that factor. Or a mapping from a registered norm's name (as in
            ``model.named_modules()``) to a number or to one number per scale or channel; names
            that it lacks get 1.
        process_group: over which S̄ is averaged; None: all processes.

    Raises:
        TypeError: optimizer is no torch optimizer.
        ValueError: an unknown mode, a negative lambda_d, scale_by_lr=False with coupled decay,
            a γ that the optimizer does not hold, a name in flops_weights that is not
            registered.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None = None,
        lambda_d: float = 3.0,
        mode: str = "coupled",
        scale_by_lr: bool = True,
        absolute: bool = True,
        metric: Metric | None = None,
        flops_weights: float | Mapping[str, float | Sequence[float]] | None = None,
        process_group: Any = None,
    ) -> None:
        # Optimizer.__init__ is not called: parameters and state are the wrapped optimizer's.
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer, not {type(optimizer).__name__}")
        if mode not in MODES:
            raise ValueError(f"mode must be 'coupled' or 'decoupled', not {mode!r}")
        if not lambda_d >= 0:
            raise ValueError(f"lambda_d must not be negative: {lambda_d}")
        if mode == "coupled" and not scale_by_lr:
            raise ValueError("scale_by_lr=False has no meaning with mode='coupled'")
        self.optimizer = optimizer
        self.lambda_d, self.mode = lambda_d, mode
        self.scale_by_lr, self.absolute = scale_by_lr, absolute
        self.metric, self.process_group = metric, process_group
        self._entries: list[Entry] = []
        self._handles: list[Any] = []
        self._warned = False
        weakref.finalize(self, _remove, self._handles)
        if model is not None:
            self._register_blocks(model, flops_weights)

    def _register_blocks(
        self, model: nn.Module, weights: float | Mapping[str, float | Sequence[float]] | None
    ) -> None:
        factors: dict[str, float | Sequence[float]]
        if isinstance(weights, Mapping):
            factors = dict(weights)
        else:
            factors = {} if weights is None else dict(flops_weights(model, weights))
        for name, norm in decaying_norms(model):
            factor = factors.pop(name, 1.0)
            if not norm.weight.requires_grad:
                continue
            if not isinstance(factor, (int, float)):
                factor = per_channel(factor, norm.channels, name)
            self._register(norm.weight, norm, None, factor, name)
        if factors:
            raise ValueError(f"flops_weights names {next(iter(factors))!r}, no norm of an ILBlock")

    # ---- what decays -------------------------------------------------------------------------

    def register(
        self,
        weight: nn.Parameter,
        means: nn.Module | Callable[[], Tensor | None],
        activation: Callable[[Tensor], Tensor] | None = None,
        flops_weight: float | Sequence[float] = 1.0,
        name: str = "",
    ) -> None:
        """Put one more γ under dynamic weight decay: of any norm, in any network.

        Args:
            weight: γ, (C,), a parameter of the wrapped optimizer.
            means: where S comes from. A module: the metric of its output (B, C, H, W) in
                training (a :class:`~sodfast.nn.NormAct` has it already). A function: called
                after each backward that reached γ; returns (B, C), or None for "nothing yet".
            activation: applied to the module's output before it is averaged, for a norm whose
                activation is a function or a module used in several places.
            flops_weight: f, a number or one per channel.
            name: for messages.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, γ registered twice, frozen,
                not a vector, or not among the optimizer's parameters.
        """
        self._register(weight, means, activation, flops_weight, name)

    def _register(
        self,
        weight: nn.Parameter,
        means: nn.Module | Callable[[], Tensor | None],
        activation: Callable[[Tensor], Tensor] | None,
        factor: float | Sequence[float],
        name: str,
    ) -> None:
        label = name or f"registered weight {len(self._entries)}"
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
            raise TypeError(f"{label}: weight must be a parameter of shape (channels,)")
        if not weight.requires_grad:
            raise ValueError(f"{label}: weight is frozen (requires_grad is False)")
        if any(entry.weight is weight for entry in self._entries):
            raise ValueError(f"{label}: weight is registered already")
        if not callable(means):
            raise TypeError(f"{label}: means must be a module or a function")
        groups = [i for i, g in enumerate(self.param_groups) if _holds(g, weight)]
        if not groups:
            raise ValueError(f"{label}: weight is not among the optimizer's parameters")
        weight_decay = self.param_groups[groups[0]].get("weight_decay")
        if weight_decay:
            warnings.warn(
                f"{label}: the optimizer's weight_decay {weight_decay} acts besides "
                "dynamic weight decay, which is meant to replace it "
                "(see sodfast.optim.parameter_groups)",
                stacklevel=4,
            )
        factors = None
        if factor != 1.0:
            factors = torch.as_tensor(factor, dtype=weight.dtype, device=weight.device)
            factors = factors.expand(weight.shape).contiguous()
        source: Callable[[], Tensor | None]
        if isinstance(means, NormAct) and self.metric is None and activation is None:
            source = partial(getattr, means, "channel_means")
        elif isinstance(means, nn.Module):
            watch = Watch(self.metric, activation)
            self._handles.append(means.register_forward_hook(watch))
            source = partial(getattr, watch, "means")
        else:
            source = means
        entry = Entry(weight, source, factors, groups[0], label)
        self._handles.append(weight.register_post_accumulate_grad_hook(entry.collect))
        self._entries.append(entry)

    # ---- the optimizer's interface -----------------------------------------------------------

    # GradScaler then unscales the gradients itself, before the decay is added to them.
    _step_supports_amp_scaling = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Decay and one step of the wrapped optimizer; returns the closure's loss, or None.

        A γ without a gradient does not decay, just as the optimizer does not move it. Around
        plain Adam or AdamW both happen in one pass over all γ
        (:func:`sodfast.ops.adam_decay_`); their gradients then stay without the decay.

        Raises:
            RuntimeError: nothing is registered.
        """
        if not self._entries:
            raise RuntimeError(
                "nothing is under dynamic weight decay: the model has no ILBlock, and register() "
                "was not called"
            )
        if closure is None:
            return self._step()
        if type(self.optimizer) in _ADAMS:  # calls it once, so that it may be called before
            with torch.enable_grad():
                loss = closure()
            self._step()
            return loss

        def closure_with_decay() -> Any:
            loss = closure()
            self._decay(self._take())
            return loss

        return self.optimizer.step(closure_with_decay)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the means that go with them."""
        self.optimizer.zero_grad(set_to_none)
        for entry in self._entries:
            entry.means = None

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """R, without λ_d: a float64 scalar for logging, of this process's samples.

        Of the means collected since the last step, or else those of the last forward in
        training; 0 before the first.
        """
        total = torch.zeros((), dtype=torch.float64)
        for entry in self._entries:
            means = next(
                (m for m in (entry.means, entry.source(), entry.last) if m is not None), None
            )
            if means is None:
                continue
            strength = (means.abs() if self.absolute else means).double().mean(0)
            if entry.factors is not None:
                strength = strength * entry.factors
            total += (0.5 * strength * entry.weight.double().square()).sum().cpu()
        return total

    # ---- one step ------------------------------------------------------------------------------

    @torch.no_grad()
    def _step(self) -> Any:
        buckets = self._take()
        if not self._fuses_adam():
            self._decay(buckets)
            return self.optimizer.step()
        # The optimizer skips what has no gradient.
        hidden = [(entry.weight, entry.weight.grad) for bucket in buckets for entry in bucket]
        for weight, _ in hidden:
            weight.grad = None
        try:
            result = self.optimizer.step()
        finally:
            for weight, grad in hidden:
                weight.grad = grad
        for bucket in buckets:
            strength = self._strength(bucket[0].group)
            group, decoupled = self.param_groups[bucket[0].group], self.mode == "decoupled"
            decay_and_adam(bucket, strength, self.absolute, decoupled, group, self.state)
        return result

    def _decay(self, buckets: list[list[Entry]]) -> None:
        for bucket in buckets:
            strength = self._strength(bucket[0].group)
            decay_alone(bucket, strength, self.absolute, self.mode == "decoupled")

    def _take(self) -> list[list[Entry]]:
        """The entries to decay now, by what one call of an op can do; their means become last."""
        average_over_ranks(self._entries, self.absolute, self.process_group)
        buckets: dict[Any, list[Entry]] = {}
        for entry in self._entries:
            weight, entry.last, entry.means = entry.weight, entry.means, None
            if weight.grad is None:
                continue
            if entry.last is None:
                self._warn_without_means(entry)
                continue
            buckets.setdefault((entry.group, weight.device, weight.dtype), []).append(entry)
        return list(buckets.values())

    def _strength(self, group: int) -> float:
        scaled = self.mode == "decoupled" and self.scale_by_lr
        return self.lambda_d * (float(self.param_groups[group]["lr"]) if scaled else 1.0)

    def _fuses_adam(self) -> bool:
        """Whether the wrapped optimizer's step for the γ is Adam's, of which we have a kernel."""
        if type(self.optimizer) not in _ADAMS:
            return False
        for entry in self._entries:
            group = self.param_groups[entry.group]
            if any(group[name] for name in _NOT_IN_OUR_ADAM) or isinstance(group["lr"], Tensor):
                return False
            if choose("adam_decay_", entry.weight) == "reference":
                return False
        return True

    def _warn_without_means(self, entry: Entry) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{entry.name}: has a gradient but no means, so it does not decay (is its norm in "
                "eval mode?)",
                stacklevel=4,
            )

    # ---- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, plus "dynamic_weight_decay": settings and means."""
        state = self.optimizer.state_dict()
        state[_STATE_KEY] = {name: getattr(self, name) for name in _SETTINGS}
        state[_STATE_KEY]["means"] = [entry.means for entry in self._entries]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, settings included.

        The wrapped optimizer's own state does too: then the settings stay as they are.

        Raises:
            ValueError: the state is of another network.
        """
        state = dict(state_dict)
        ours = state.pop(_STATE_KEY, None)
        if ours is not None and len(ours["means"]) != len(self._entries):
            raise ValueError(
                f"the state holds {len(ours['means'])} weights under dynamic weight decay, here "
                f"are {len(self._entries)}"
            )
        self.optimizer.load_state_dict(state)
        if ours is None:
            return
        for name in _SETTINGS:
            setattr(self, name, ours[name])
        for entry, means in zip(self._entries, ours["means"]):
            entry.means = None if means is None else means.to(entry.weight.device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        # Hooks and flags that Optimizer.__init__ would have made (schedulers, profilers).
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in _SETTINGS)
        return f"DynamicWeightDecay({self.optimizer!r}, {settings}, {len(self._entries)} weights)"


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _holds(group: dict[str, Any], weight: Tensor) -> bool:
    return any(parameter is weight for parameter in group["params"])
