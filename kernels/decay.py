"""Dynamic weight decay of all γ of a network in one launch, alone or with Adam's step.

    s = λ f · mean_b |means[b]|
    coupled:    gradient += s γ, then the optimizer;     decoupled:   γ -= s γ, then the optimizer

The kernel finds the tensors of each γ through a table of addresses, one row per γ: a program takes
a block of channels of one row. Per γ it reads `samples` means, and reads and writes one number
(decay_) or three (adam_decay_). A whole CSNet has some 2,000 γ, 200 KB at batch 24: the aim is the
time of a launch, a few microseconds.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPERANDS, check, check_like, check_shape

# The columns of the table: addresses, then the numbers of channels and of samples.
_MEANS, _FACTORS, _WEIGHT, _GRAD = map(tl.constexpr, range(4))
_EXP_AVG, _EXP_AVG_SQ, _CHANNELS, _SAMPLES = map(tl.constexpr, range(4, 8))
_COLUMNS = tl.constexpr(8)
_BLOCK = 64


@triton.jit
def _pointer(row, COLUMN: tl.constexpr, ELEMENT: tl.constexpr):
    return tl.load(row + COLUMN).to(tl.pointer_type(ELEMENT))


@triton.jit
def _read(row, COLUMN: tl.constexpr, at, known, ELEMENT: tl.constexpr):
    pointer = _pointer(row, COLUMN, ELEMENT)
    return tl.load(pointer + at, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _write(row, COLUMN: tl.constexpr, c, known, value, ELEMENT: tl.constexpr):
    tl.store(_pointer(row, COLUMN, ELEMENT) + c, value.to(ELEMENT), mask=known)


@triton.jit
def _decayed(row, c, known, weight, strength, FACTORS: tl.constexpr, ABSOLUTE: tl.constexpr,
             ELEMENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """s γ of a block of channels; without samples NaN, as 0/0."""
    channels, samples = tl.load(row + _CHANNELS), tl.load(row + _SAMPLES).to(tl.int32)
    total = tl.zeros((16, BLOCK), tl.float32)
    for start in range(0, samples, 16):
        b = start + tl.arange(0, 16)[:, None]
        means = _read(row, _MEANS, b * channels + c, (b < samples) & known, ELEMENT)
        total += tl.abs(means) if ABSOLUTE else means
    average = tl.sum(total, axis=0)[None, :] / samples.to(tl.float32)
    if FACTORS:
        average *= _read(row, _FACTORS, c, known, ELEMENT)
    return strength * average * weight


@triton.jit
def _decay(table, strength, COUPLED: tl.constexpr, FACTORS: tl.constexpr, ABSOLUTE: tl.constexpr,
           ELEMENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = table + tl.program_id(0) * _COLUMNS
    c = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    known = c < tl.load(row + _CHANNELS)
    weight = _read(row, _WEIGHT, c, known, ELEMENT)
    decayed = _decayed(row, c, known, weight, strength, FACTORS, ABSOLUTE, ELEMENT, BLOCK)
    if COUPLED:
        grad = _read(row, _GRAD, c, known, ELEMENT)
        _write(row, _GRAD, c, known, grad + decayed, ELEMENT)
    else:
        _write(row, _WEIGHT, c, known, weight - decayed, ELEMENT)


@triton.jit
def _adam(table, strength, new1, old2, new2, rate, root, eps, COUPLED: tl.constexpr,
          FACTORS: tl.constexpr, ABSOLUTE: tl.constexpr, ELEMENT: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """m += new1 (g - m), v = old2 v + new2 g², γ -= rate m / (√v / root + eps)."""
    row = table + tl.program_id(0) * _COLUMNS
    c = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    known = c < tl.load(row + _CHANNELS)
    weight = _read(row, _WEIGHT, c, known, ELEMENT)
    grad = _read(row, _GRAD, c, known, ELEMENT)
    decayed = _decayed(row, c, known, weight, strength, FACTORS, ABSOLUTE, ELEMENT, BLOCK)
    if COUPLED:
        grad += decayed
    else:
        weight -= decayed
    average = _read(row, _EXP_AVG, c, known, ELEMENT)
    square = _read(row, _EXP_AVG_SQ, c, known, ELEMENT)
    average += new1 * (grad - average)
    square = old2 * square + new2 * grad * grad
    weight -= rate * (average / (tl.sqrt_rn(square) / root + eps))
    _write(row, _EXP_AVG, c, known, average, ELEMENT)
    _write(row, _EXP_AVG_SQ, c, known, square, ELEMENT)
    _write(row, _WEIGHT, c, known, weight, ELEMENT)


# A captured copy of a table reads its host memory on every replay: kept for the process.
_captured: list[Tensor] = []


def _table(columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """The addresses of the tensors of each γ and its sizes, on their device; absent ones are 0.

    columns are means, factors, weights, grads, exp_avgs, exp_avg_sqs.
    """
    means, weights = columns[0], columns[2]
    rows = [
        [column[n].data_ptr() if column else 0 for column in columns]
        + [weights[n].numel(), means[n].shape[0]]
        for n in range(len(weights))
    ]
    cuda = weights[0].is_cuda
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=cuda)
    if cuda and torch.cuda.is_current_stream_capturing():
        _captured.append(table)
    return table.to(weights[0].device, non_blocking=True)


def _checked(
    op: str, weights: Sequence[Tensor], means: Sequence[Tensor], **others: Sequence[Tensor]
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The means and the other lists, contiguous; everything of one dtype and shape."""
    check(len(means) == len(weights), op, f"{len(weights)} weights, but {len(means)} means")
    for n, (weight, mean) in enumerate(zip(weights, means)):
        check_like(op, f"weights[{n}]", weight, weights[0])
        check(weight.dim() == 1, op, f"weights[{n}] must be (channels,), got {weight.shape}")
        check_like(op, f"means[{n}]", mean, weights[0])
        sound = mean.dim() == 2 and mean.shape[1] == weight.shape[0]
        check(sound, op, f"means[{n}] must be (samples, {weight.shape[0]}), got {mean.shape}")
    lists = {}
    for name, tensors in others.items():
        check(len(tensors) in (0, len(weights)), op, f"{name} holds {len(tensors)} tensors")
        lists[name] = [
            check_shape(op, f"{name}[{n}]", t, weights[n].shape, weights[0])
            for n, t in enumerate(tensors)
        ]
    dtypes = {t.dtype for group in (weights, means, *lists.values()) for t in group}
    check(len(dtypes) <= 1, op, f"all tensors must have one dtype, got {dtypes}")
    return [mean.contiguous() for mean in means], lists


def _check_modified(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    check(all(t.is_contiguous() for t in tensors), op, f"{name} must be contiguous")


def _blocks(weights: Sequence[Tensor]) -> int:
    return triton.cdiv(max(weight.numel() for weight in weights), _BLOCK)


def decay_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    factors: Sequence[Tensor],
    strength: float,
    absolute: bool,
) -> None:
    """See :func:`sodfast.ops.decay_`."""
    op = "decay_"
    means, lists = _checked(op, weights, means, factors=factors, grads=grads)
    _check_modified(op, "weights", weights)
    _check_modified(op, "grads", grads)
    if not weights or _blocks(weights) == 0:
        return
    table = _table([means, lists["factors"], weights, grads, [], []])
    _decay[(len(weights), _blocks(weights))](
        table, strength, COUPLED=bool(grads), FACTORS=bool(factors), ABSOLUTE=absolute,
        ELEMENT=OPERANDS[weights[0].dtype], BLOCK=_BLOCK,
    )  # fmt: skip


def adam_decay_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    means: Sequence[Tensor],
    factors: Sequence[Tensor],
    strength: float,
    absolute: bool,
    decoupled: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    """See :func:`sodfast.ops.adam_decay_`."""
    op = "adam_decay_"
    check(step >= 1, op, f"step must be at least 1, got {step}")
    moments = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    means, lists = _checked(op, weights, means, factors=factors, grads=grads, **moments)
    for name, tensors in {"grads": grads, **moments}.items():
        check(len(tensors) == len(weights), op, f"{len(weights)} weights, {len(tensors)} {name}")
    for name, tensors in {"weights": weights, **moments}.items():
        _check_modified(op, name, tensors)
    if not weights or _blocks(weights) == 0:
        return
    table = _table([means, lists["factors"], weights, lists["grads"], exp_avgs, exp_avg_sqs])
    rate, root = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    _adam[(len(weights), _blocks(weights))](
        table, strength, 1 - beta1, beta2, 1 - beta2, rate, root, eps, COUPLED=not decoupled,
        FACTORS=bool(factors), ABSOLUTE=absolute, ELEMENT=OPERANDS[weights[0].dtype],
        BLOCK=_BLOCK,
    )  # fmt: skip
