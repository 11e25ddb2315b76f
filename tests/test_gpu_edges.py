"""The kernels at the edges, above all those of CUDA: NaN, infinities, odd addresses."""

import math

import pytest
import test_goctconv
import torch
from gpu_kernels import HALVES, device_of, dtypes_of, running
from op_cases import Source
from torch import Tensor

from sodfast.ops import (
    goctconv,
    goctconv_depthwise,
    goctconv_norm_depthwise,
    goctconv_reference,
)

pytestmark = pytest.mark.usefixtures("compiled")


def test_maps_that_begin_between_two_accesses(gpu: str) -> None:
    """A view of a larger buffer is contiguous, but 16 bytes at a time would be misaligned."""
    source, device = Source(1), device_of(gpu)

    def run(xs: list[Tensor], weight: Tensor, vectors: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (*xs, weight)]
        ys = goctconv(leaves[:2], leaves[2], (5, 4))
        grads = torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])
        kernel = leaves[2].flatten()[:72].view(8, 1, 3, 3)
        maps, *_ = goctconv_norm_depthwise(xs, *vectors, kernel, None, True)
        return [*ys, *grads, *maps]

    for dtype in dtypes_of(gpu):
        shapes = (2, 3, 24, 32), (2, 5, 12, 16), (9, 8, 1, 1)
        flat = [source.uniform(math.prod(shape) + 3).to(device, dtype) for shape in shapes]
        vectors = [0.5 + source.uniform(8).abs().to(device, dtype) for _ in range(5)]
        with running(gpu):
            expected = None
            for begin in (0, 1, 2, 3):  # from the start of a buffer, all holding the same numbers
                *xs, weight = (
                    torch.cat((x.new_zeros(begin), x))[begin:][: math.prod(shape)].view(shape)
                    for x, shape in zip(flat, shapes)
                )
                found = run(xs, weight, vectors)
                expected = expected or found
                for one, other in zip(found, expected):
                    torch.testing.assert_close(
                        one, other, rtol=4 * torch.finfo(dtype).eps, atol=1e-5
                    )


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4028e38])
def test_what_float32_cannot_split_is_multiplied_as_it_is(
    gpu: str, kernel: int, value: float
) -> None:
    """Tensor cores multiply float32 in two parts, and these have but one."""
    source, device = Source(kernel), device_of(gpu)
    x, weight = source.uniform(1, 3, 9, 12), source.uniform(5, 3, kernel, kernel) / 8
    x[0, 1, 4, 5] = value
    weight[1, 1], weight[2, 1] = (
        0.25,
        0.0,
    )  # nothing is left of the one, nothing is there of the other
    (exact,) = goctconv_reference([x], weight, (5,))
    with running(gpu):
        (found,) = goctconv([x.to(device)], weight.to(device), (5,))
    assert not exact[0, 0, 4, 5].isfinite() or abs(value) < torch.inf
    torch.testing.assert_close(found.cpu(), exact, rtol=1e-3, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_nan_stays_in_its_sample(gpu: str, kernel: int, dtype: torch.dtype) -> None:
    """Tensor cores take eight channels at once, also where three are."""
    source, device = Source(kernel), device_of(gpu)
    sizes = (3, 3, 16, 16), (3, 5, 8, 8)
    xs = [source.uniform(*size).to(device, dtype).requires_grad_() for size in sizes]
    weight = source.uniform(11, 8, kernel, kernel).to(device, dtype).requires_grad_()
    broken = [x.detach().clone() for x in xs]
    for x in broken:
        x[:2] = torch.nan
    with running(gpu):
        for y in goctconv(broken, weight.detach(), (4, 7)):
            assert y[:2].isnan().all() and y[2].isfinite().all()
        ys = goctconv(xs, weight, (4, 7))
        grads = [torch.ones_like(y) for y in ys]
        for grad in grads:
            grad[:2] = torch.nan
        for grad in torch.autograd.grad(ys, xs, grads):
            assert grad[2].isfinite().all() and not grad[:2].isfinite().any()


def test_nan_reaches_exactly_what_depends_on_it(gpu: str) -> None:
    case = test_goctconv.Case(1, (16, 24), (2, 2, 2), (2, 2, 2), kernel=3, bias=False)
    tensors, device = case.tensors(), device_of(gpu)
    weight = tensors["weight"][0].abs_().to(device)
    with running(gpu):
        for scale in range(3):
            for row, column in [(2, 3), (5, 7), (0, 23), (15, 0)]:
                found = []
                for value in (None, 100.0, torch.nan):
                    xs = [x.clone() for x in tensors["xs"]]
                    if value is not None:
                        xs[scale][0, 1, row >> scale, column >> scale] = value
                    ys = goctconv([x.to(device) for x in xs], weight, case.out_channels)
                    found.append([y.cpu() for y in ys])
                for before, moved, nan in zip(*found):
                    assert torch.equal(nan.isnan(), moved != before)


@pytest.mark.parametrize("op", ["goctconv", "depthwise", "norm_depthwise"])
@pytest.mark.parametrize("size", [(5, 6), (1, 1), (40, 33)])
def test_nan_in_a_corner_reaches_only_the_taps_that_meet_it(
    kernels: str, op: str, size: tuple[int, int]
) -> None:
    """Beyond the corner no pixel has a gradient; a zero in its place would spread the NaN."""
    x = torch.ones(1, 1, *size, device=device_of(kernels))
    x[0, 0, -1, -1] = torch.nan
    weight = torch.ones(1, 1, 3, 3, device=x.device, requires_grad=True)
    one = torch.ones(1, device=x.device)
    with running(kernels):
        if op == "goctconv":
            (y,) = goctconv([x], weight, (1,))
        elif op == "depthwise":
            (y,) = goctconv_depthwise([x], weight)
        else:
            (y,), *_ = goctconv_norm_depthwise([x], *[one] * 5, weight)
        (found,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    expected = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 1]], dtype=torch.bool)
    if size == (1, 1):
        expected = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    reached = found[0, 0].isnan().cpu()
    if op == "norm_depthwise" and kernels != "cpu":
        # It sums over pixels of y and meets the zeros around the gradient: no tap less, maybe more.
        assert reached[expected].all()
    else:
        assert torch.equal(reached, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_slope_that_nobody_takes_is_not_seen(kernels: str, value: float) -> None:
    """PReLU's slope does not count where its input is positive, nor beyond the map's border."""
    source, device = Source(2), device_of(kernels)
    x = source.uniform(2, 3, 7, 8).to(device)
    vectors = [torch.ones(3), torch.full((3,), 9.0), torch.full((3,), value), torch.zeros(3),
               torch.ones(3)]  # fmt: skip
    vectors = [vector.to(device) for vector in vectors]
    kernel = source.uniform(3, 1, 3, 3).to(device)
    with running(kernels):
        (y,), _, _, means, _ = goctconv_norm_depthwise([x], *vectors, kernel, None, True)
    assert y.isfinite().all() and means.isfinite().all()
