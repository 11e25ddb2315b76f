"""The CUDA kernels of SCFNet's ops on maps, on a GPU or run on the host, in every dtype."""

import pytest
import test_boundary
import test_scfm
import test_structure_polishing
import torch
from gpu_kernels import check_kernels, device_of, running
from hypothesis import given, settings
from op_cases import Source, lay_out, results

import sodfast
from sodfast.ops import (
    boundary,
    boundary_reference,
    scfm,
    scfm_reference,
    structure_polishing_sums,
    structure_polishing_sums_reference,
)

pytestmark = pytest.mark.usefixtures("compiled")
EXAMPLES = 12  # a thread on the host costs as much as hundreds on a GPU


def check_scfm(gpu: str, case: test_scfm.Case) -> None:
    runs = case.run(scfm), case.run(scfm_reference)
    tensors, layout = case.tensors(), case.memory_format()
    check_kernels(gpu, *runs, tensors, case.grads(), case.terms(), layout)


@settings(max_examples=EXAMPLES)
@given(test_scfm.cases())
def test_scfm_drawn(gpu: str, case: test_scfm.Case) -> None:
    check_scfm(gpu, case)


@pytest.mark.parametrize(
    "case",
    [
        # Whole packs and broken ones, several tiles, pieces and ratios.
        test_scfm.Case((2, 3, 88, 88), (44, 44)),
        test_scfm.Case((1, 2, 64, 160), (8, 20), multiply=False),
        test_scfm.Case((1, 1, 70, 300), (1, 1)),
        test_scfm.Case((1, 2, 50, 61), (97, 131)),
        test_scfm.Case((2, 1, 90, 43), (37, 41)),
        test_scfm.Case((2, 16, 44, 48), (22, 24), layout="channels_last"),
        test_scfm.Case((1, 21, 30, 33), (7, 50), multiply=False, layout="channels_last"),
    ],
    ids=str,
)
def test_scfm_larger(gpu: str, case: test_scfm.Case) -> None:
    check_scfm(gpu, case)


def test_scfm_of_maps_that_are_not_aligned(gpu: str) -> None:
    device = device_of(gpu)
    x, y = (Source(1).uniform(1 + n).to(device)[1:] for n in (2 * 8 * 16, 2 * 4 * 8))
    x, y = x.view(1, 2, 8, 16), y.view(1, 2, 4, 8)
    with running(gpu):
        found = scfm(x, y)
    torch.testing.assert_close(found, scfm_reference(x, y))


@settings(max_examples=EXAMPLES)
@given(test_boundary.cases)
def test_boundary_drawn(gpu: str, case: test_boundary.Case) -> None:
    runs = case.run(boundary), case.run(boundary_reference)
    check_kernels(gpu, *runs, case.tensors(), case.grads(), case.terms())


@pytest.mark.parametrize("levels", [1, 3, 17])
@pytest.mark.parametrize(
    "case",
    [
        # Several tiles; windows smaller and larger than a thread makes at once, and than a map.
        test_boundary.Case((1, 2, 70, 136), 13),
        test_boundary.Case((2, 1, 97, 131), 31, "both"),
        test_boundary.Case((1, 1, 130, 19), 7, "outer", "channels_last"),
        test_boundary.Case((1, 1, 65, 65), 1, "both"),
        test_boundary.Case((1, 1, 5, 300), 9, layout="sliced storage"),
    ],
    ids=str,
)
def test_ties_go_where_max_pool2d_sends_them(
    gpu: str, case: test_boundary.Case, levels: int
) -> None:
    """With few levels most maxima are tied; whole numbers make every sum exact."""
    draw, device = torch.Generator().manual_seed(levels), device_of(gpu)
    z = lay_out(torch.randint(levels, case.size, generator=draw) / 16, case.layout)
    g = torch.randint(-8, 9, case.size, generator=draw).float()
    with sodfast.use_backend("reference"):
        exact = results(case.run(boundary_reference), {"z": [z]}, [g])
    with running(gpu):
        found = results(case.run(boundary), {"z": [z.to(device)]}, [g.to(device)])
    for name in ("ys", "z"):
        assert torch.equal(found[name][0].cpu(), exact[name][0]), name


@pytest.mark.parametrize("k", [1, 5, 11])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_in_boundaries(gpu: str, k: int, value: float) -> None:
    z = Source(0).uniform(1, 1, 23, 40)
    for row, column in ((0, 0), (11, 17), (22, 39)):
        z[0, 0, row, column] = value
    for thin in test_boundary.THIN:
        leaf = z.to(device_of(gpu)).requires_grad_()
        expected = boundary_reference(z, k, thin)
        with running(gpu):
            y = boundary(leaf, k, thin)
            (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=0, equal_nan=True)
        # What one end of a difference gets, the other loses.
        assert gradient.any() and gradient.sum() == 0


@settings(max_examples=EXAMPLES)
@given(test_structure_polishing.cases)
def test_structure_polishing_drawn(gpu: str, case: test_structure_polishing.Case) -> None:
    check_structure_polishing(gpu, case)


@pytest.mark.parametrize("size, k", [((2, 1, 97, 131), 31), ((1, 1, 70, 136), 5)])
def test_structure_polishing_larger(gpu: str, size: tuple[int, ...], k: int) -> None:
    check_structure_polishing(gpu, test_structure_polishing.Case(size, k))


def check_structure_polishing(gpu: str, case: test_structure_polishing.Case) -> None:
    check_kernels(
        gpu, case.run(structure_polishing_sums), case.run(structure_polishing_sums_reference),
        case.tensors(), case.grads(), case.terms(),
    )  # fmt: skip


def test_maps_and_their_gradients_are_the_same_on_every_run(gpu: str) -> None:
    source, device = Source(2), device_of(gpu)
    x, z = (source.uniform(2, 1, 75, 90).to(device).requires_grad_() for _ in range(2))
    y = source.uniform(2, 1, 31, 17).to(device).requires_grad_()
    truth, first = z.detach().sigmoid(), None
    with running(gpu):
        for _ in range(3):
            ys = scfm(x, y), boundary(z, 9), structure_polishing_sums(z, truth, 9)
            again = [*ys, *torch.autograd.grad([v.sum() for v in ys], (x, y, z))]
            first = first or again
            assert all(torch.equal(a, b) for a, b in zip(first, again))
