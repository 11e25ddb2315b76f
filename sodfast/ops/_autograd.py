"""Connects a compiled op with its gradient.

What torch.library.register_autograd does, without what that costs at each call: it flattens and
rebuilds lists of tensors as pytrees and looks defaults up in the schema, in Python. Of a training
step of CSNet ×0.5 on 16 pictures of 64×64 that was 8 of 73 ms. The ops of sodfast have no defaults,
and no lists but of tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_AFTER = torch._C._after_autograd_keyset


def differentiable(
    overload: Any, backward: Callable[..., Any], setup_context: Callable[..., Any] | None
) -> Callable[..., Any]:
    """The op with its gradient, to be registered for the key "Autograd", with the key set.

    backward(ctx, *grads) returns a gradient (or None) per argument of the op, and a list of them
    for a list; setup_context(ctx, inputs, output) saves what it needs. In both, arguments,
    results and ctx.needs_input_grad have the op's own structure, as torch.library has it.
    """

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: "_Call", *_: Tensor) -> tuple[Tensor, ...]:
            with torch._C._AutoDispatchBelowAutograd():
                output = overload.redispatch(call.keys, *call.args)
                if setup_context is not None:
                    setup_context(ctx, call.args, output)
            flat, call.results = _flatten(output if isinstance(output, tuple) else (output,))
            call.single = not isinstance(output, tuple)
            ctx.arguments, ctx.results = call.arguments, call.results
            # Once, not as the graph is walked, which several threads may do at the same time.
            needs = _rebuild(ctx.needs_input_grad[1:], call.arguments, False)
            ctx.needs_input_grad = tuple(needs)
            return tuple(flat)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple:
            found = backward(ctx, *_rebuild(grads, ctx.results))
            flat: list[Tensor | None] = [None]  # for `call`
            for grad, count in zip(found if isinstance(found, tuple) else (found,), ctx.arguments):
                if count == _ONE:
                    flat.append(grad)
                elif count >= 0:
                    flat.extend(grad if grad is not None else [None] * count)
            return tuple(flat)

    # What a profile and an anomaly's report call it.
    Node.__name__ = str(overload).replace(".", "_")
    Node._backward_cls.__name__ = Node.__name__ + "Backward"

    def run(keyset: Any, *args: Any) -> Any:
        keys = keyset & _AFTER
        if forward_ad._current_level >= 0:
            _refuse_tangents(overload, args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return overload.redispatch(keys, *args)
        flat, arguments = _flatten(args)
        call = _Call(keys, args, arguments)
        output = _rebuild(Node.apply(call, *flat), call.results)
        return output[0] if call.single else tuple(output)

    return run


def _refuse_tangents(overload: Any, args: tuple) -> None:
    """Below autograd a tangent would be lost, and its result be taken for 0."""
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in _flatten(args)[0]):
        raise NotImplementedError(
            f"{overload} has no forward-mode derivative (torch.func.jvp, forward_ad): use reverse "
            'mode, or sodfast.use_backend("reference")'
        )


class _Call:
    """One call of an op, on its way through autograd."""

    __slots__ = ("args", "arguments", "keys", "results", "single")

    def __init__(self, keys: Any, args: tuple, arguments: list[int]) -> None:
        self.keys, self.args, self.arguments = keys, args, arguments
        self.results: list[int] = []
        self.single = True


# What an argument or a result is: a tensor, nothing that has a gradient, or a list of so many.
_ONE, _NONE = -1, -2


def _flatten(items: Sequence[Any]) -> tuple[list[Tensor], list[int]]:
    """The tensors of a list of tensors, lists of tensors and others, and what each item is."""
    flat: list[Tensor] = []
    kinds = []
    for item in items:
        if isinstance(item, Tensor):
            flat.append(item)
            kinds.append(_ONE)
        elif isinstance(item, list) and item and isinstance(item[0], Tensor):
            flat.extend(item)
            kinds.append(len(item))
        else:
            kinds.append(_NONE)
    return flat, kinds


def _rebuild(flat: Sequence[Any], kinds: list[int], other: Any = None) -> list[Any]:
    """The structure that _flatten() took apart, with `other` for what has no tensors."""
    items, at = [], 0
    for kind in kinds:
        if kind == _ONE:
            items.append(flat[at])
            at += 1
        elif kind == _NONE:
            items.append(other)
        else:
            items.append(list(flat[at : at + kind]))
            at += kind
    return items
