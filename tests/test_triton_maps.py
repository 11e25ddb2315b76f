"""The Triton kernels of SCFNet's ops on maps, on a GPU or interpreted (so slowly: small shapes)."""

import pytest
import test_boundary
import test_scfm
import test_structure_polishing
import torch
from op_cases import Source, results
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


@pytest.mark.parametrize("thin", list(test_boundary.THIN))
def test_ties_of_boundaries_go_where_max_pool2d_sends_them(triton: str, thin: str) -> None:
    """With few levels most maxima are tied; whole numbers make every sum exact."""
    case, draw = Boundary((1, 1, 34, 66), 5, thin), torch.Generator().manual_seed(1)
    z = torch.randint(3, case.size, generator=draw) / 16
    g = torch.randint(-8, 9, case.size, generator=draw).float()
    with sodfast.use_backend("reference"):
        exact = results(case.run(ops.boundary_reference), {"z": [z]}, [g])
    device = device_of(triton)
    with running(triton):
        found = results(case.run(ops.boundary), {"z": [z.to(device)]}, [g.to(device)])
    for name in ("ys", "z"):
        assert torch.equal(found[name][0].cpu(), exact[name][0]), name


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
    Polishing((0, 1, 4, 4), 3),
]


@pytest.mark.parametrize("case", POLISHINGS, ids=str)
def test_structure_polishing_sums(triton: str, case: Polishing) -> None:
    runs = (
        case.run(ops.structure_polishing_sums), case.run(ops.structure_polishing_sums_reference)
    )  # fmt: skip
    for dtype in DTYPES if case is POLISHINGS[0] else DTYPES[:1]:
        check_kernels(triton, dtype, *runs, case.tensors(), case.grads(), case.terms())
