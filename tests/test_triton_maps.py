"""The Triton kernels of SCFNet's ops on maps, on a GPU or interpreted (so slowly: small shapes)."""

import pytest
import test_boundary
import test_scfm
import test_structure_polishing
import torch
from op_cases import Source, results
from torch import Tensor
from triton_kernels import HALVES, check_kernels, device_of, running

import sodfast
from sodfast import ops

DTYPES = (torch.float32, *HALVES)

Scfm = test_scfm.Case
FUSIONS = [
    Scfm((2, 1, 6, 8), (3, 4), layout="every second column"),
    Scfm((1, 1, 7, 9), (3, 4), multiply=False),
    Scfm((1, 2, 5, 3), (9, 8)),
    Scfm((1, 1, 3, 9), (1, 1)),
    Scfm((1, 1, 40, 50), (20, 25)),
    Scfm((0, 2, 4, 4), (2, 2)),
    Scfm((1, 3, 5, 4), (3, 2), layout="channels_last"),
]


@pytest.mark.parametrize("case", FUSIONS, ids=str)
def test_fusions(triton: str, case: Scfm) -> None:
    runs = case.run(ops.scfm), case.run(ops.scfm_reference)
    for dtype in DTYPES if case is FUSIONS[0] else DTYPES[:1]:
        check_kernels(
            triton, dtype, *runs, case.tensors(), case.grads(), case.terms(), case.memory_format()
        )


Boundary = test_boundary.Case
BOUNDARIES = [
    Boundary((2, 1, 9, 13), 3, layout="every second column"),
    Boundary((1, 2, 40, 70), 7, "outer"),
    Boundary((1, 1, 5, 67), 31, "both"),
    Boundary((1, 1, 1, 1), 5),
    Boundary((0, 1, 4, 4), 3),
]


@pytest.mark.parametrize("case", BOUNDARIES, ids=str)
def test_boundaries(triton: str, case: Boundary) -> None:
    runs = case.run(ops.boundary), case.run(ops.boundary_reference)
    for dtype in DTYPES if case is BOUNDARIES[0] else DTYPES[:1]:
        check_kernels(triton, dtype, *runs, case.tensors(), case.grads(), case.terms())


def draw(case: Boundary, levels: int, nans: int = 0) -> Tensor:
    """A map of so few levels that most maxima are tied."""
    generator = torch.Generator().manual_seed(case.seed)
    z = torch.randint(levels, case.size, generator=generator) / 16
    z.view(-1)[torch.randint(z.numel(), (nans,), generator=generator)] = torch.nan
    return z


def check_exactly(triton: str, case: Boundary, z: Tensor) -> None:
    """Whole numbers make every sum exact."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    g = torch.randint(-8, 9, case.size, generator=generator).float()
    with sodfast.use_backend("reference"):
        exact = results(case.run(ops.boundary_reference), {"z": [z]}, [g])
    device = device_of(triton)
    with running(triton):
        found = results(case.run(ops.boundary), {"z": [z.to(device)]}, [g.to(device)])
    for name in ("ys", "z"):
        torch.testing.assert_close(
            found[name][0].cpu(), exact[name][0], rtol=0, atol=0, equal_nan=True,
            msg=lambda message, name=name: f"{case}: {name}: {message}",
        )  # fmt: skip


@pytest.mark.parametrize("thin", list(test_boundary.THIN))
def test_ties_of_boundaries_go_where_max_pool2d_sends_them(triton: str, thin: str) -> None:
    case = Boundary((1, 1, 34, 66), 5, thin)
    check_exactly(triton, case, draw(case, 3))


@pytest.mark.parametrize("k", range(1, 32, 2))
def test_windows_of_every_size(triton: str, k: int) -> None:
    """Flat maps and ties, and a NaN; from 15 on some windows are larger than the map."""
    thin = list(test_boundary.THIN)[k // 2 % 3]
    for size, levels, nans in (((1, 1, 15, 29), 1 + k // 2 % 2, 0), ((1, 1, 5, 19), 9, 1)):
        case = Boundary(size, k, thin, seed=k)
        check_exactly(triton, case, draw(case, levels, nans))


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("k", [3, 31])
def test_windows_over_several_tiles(triton: str, k: int, columns: bool) -> None:
    """The steeper the map, the larger t: a window that saw a position too many would choose it."""
    falling = torch.arange(139.0, 0, -1).square().expand(1, 1, 1, 139)
    for z in (falling, falling.flip(3)):
        z = z.mT if columns else z
        check_exactly(triton, Boundary(tuple(z.shape), k), z)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_nan_and_infinity_in_boundaries(triton: str, value: float) -> None:
    z = Source(0).uniform(1, 1, 9, 20)
    z[0, 0, 0, 0] = z[0, 0, 5, 17] = value
    leaf = z.to(device_of(triton)).requires_grad_()
    with running(triton):
        y = ops.boundary(leaf, 5, "both")
        (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    expected = ops.boundary_reference(z, 5, "both")
    torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert gradient.any() and gradient.sum() == 0


Polishing = test_structure_polishing.Case
POLISHINGS = [
    Polishing((2, 1, 9, 13), 3, layout="every second column"),
    Polishing((1, 1, 37, 67), 7),
    Polishing((1, 1, 6, 5), 1),
    Polishing((1, 1, 3, 75), 31),
    Polishing((0, 1, 4, 4), 3),
]


@pytest.mark.parametrize("case", POLISHINGS, ids=str)
def test_structure_polishing_sums(triton: str, case: Polishing) -> None:
    runs = (
        case.run(ops.structure_polishing_sums), case.run(ops.structure_polishing_sums_reference)
    )  # fmt: skip
    for dtype in DTYPES if case is POLISHINGS[0] else DTYPES[:1]:
        check_kernels(triton, dtype, *runs, case.tensors(), case.grads(), case.terms())


def test_maps_of_more_tiles_than_a_gpu_starts_are_refused_in_words() -> None:
    """Nothing is read or written: the tensors have no memory."""
    pytest.importorskip("triton")
    from sodfast import kernels

    x = torch.empty(1, 1, 2**14, 2**14, device="meta")
    for op, arguments in (
        (kernels.boundary, (x, 3, 1)),
        (kernels.scfm, (x, x[:, :, ::2, ::2], True)),
        (kernels.dkd_loss_backward, (x.new_empty(1), x)),
    ):
        with pytest.raises(RuntimeError, match=r"too large: \d+ tiles each, a GPU starts 65535"):
            op(*arguments)
