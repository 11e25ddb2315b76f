"""The compiled boundary of soft maps: values, gradients, ties, borders, refusals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from map_cases import (
    check_autocast,
    check_compiles_and_exports,
    check_gradcheck,
    check_second_derivative_is_refused,
    map_sizes,
    poison,
    windows,
)
from op_cases import (
    Call,
    Source,
    Tensors,
    assert_deterministic,
    assert_one_device,
    assert_refused,
    assert_registered,
    assert_survived,
    check_against_reference,
    instruction_set,
    instruction_sets,
    lay_out,
    layouts,
    results,
    seeds,
)

import sodfast
from sodfast.ops import boundary, boundary_reference
from sodfast.ops.boundary import THIN

pytestmark = pytest.mark.usefixtures("compiled")


@dataclass(frozen=True)
class Case:
    size: tuple[int, int, int, int]
    k: int = 1
    thin: str = "inner"
    layout: str = "contiguous"
    seed: int = 0

    def tensors(self) -> Tensors:
        """Values whose differences are exact, so that all precisions agree on a maximum."""
        return {"z": [lay_out(Source(self.seed).grid(*self.size), self.layout)]}

    def grads(self) -> list[torch.Tensor]:
        return [lay_out(Source(self.seed + 1).uniform(*self.size), self.layout, (2, 3))]

    def terms(self) -> dict[str, float]:
        return {"z": min(self.k**2, self.size[2] * self.size[3])}

    def run(self, function: Callable) -> Callable[[Tensors], list[torch.Tensor]]:
        return lambda t: [function(t["z"][0], self.k, self.thin)]


cases = st.builds(Case, map_sizes(), windows, st.sampled_from(list(THIN)), layouts, seeds)


@given(cases)
def test_values_and_gradients(case: Case) -> None:
    check_against_reference(
        case.run(boundary), case.run(boundary_reference), case.tensors(), case.grads(), case.terms()
    )


@given(cases, st.sampled_from([1, 2, 3, 17]))
def test_ties_go_where_max_pool2d_sends_them(case: Case, levels: int) -> None:
    """With few levels most maxima are tied; whole numbers make every sum exact."""
    draw = torch.Generator().manual_seed(case.seed)
    z = torch.randint(levels, case.size, generator=draw).float() / 16
    g = torch.randint(-8, 9, case.size, generator=draw).float()
    with sodfast.use_backend("cpu"):
        for dtype in (torch.float64, torch.float32):
            tensors, grads = {"z": [z.to(dtype)]}, [g.to(dtype)]
            exact = results(case.run(boundary_reference), tensors, grads)
            for isa in instruction_sets():
                with instruction_set(isa):
                    found = results(case.run(boundary), tensors, grads)
                assert torch.equal(found["ys"][0], exact["ys"][0]), isa
                assert torch.equal(found["z"][0], exact["z"][0]), isa


LARGE = [
    Case((2, 1, 352, 352), 13),
    Case((1, 3, 97, 131), 31, "both"),
    Case((1, 1, 700, 19), 3, "outer", "channels_last"),
    Case((3, 1, 5, 1000), 17, layout="sliced storage"),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    compiled, reference = case.run(boundary), case.run(boundary_reference)
    check_against_reference(compiled, reference, case.tensors(), case.grads(), case.terms())
    assert_deterministic(compiled, case.tensors(), case.grads())


@pytest.mark.parametrize("thin", list(THIN))
@pytest.mark.parametrize("size, k", [((2, 1, 4, 5), 1), ((1, 2, 5, 7), 3), ((1, 1, 3, 2), 31)])
def test_gradcheck_of_the_compiled_op(size: tuple[int, ...], k: int, thin: str) -> None:
    # All values differ, and so do their differences: no step of gradcheck changes a maximum.
    z = torch.rand(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ops = ("boundary", "boundary_backward")
    check_gradcheck(lambda x: boundary(x, k, thin), [z], ops)


@pytest.mark.parametrize("thin", list(THIN))
def test_nothing_in_the_batch(thin: str) -> None:
    z = torch.zeros(0, 1, 8, 9, requires_grad=True)
    with sodfast.use_backend("cpu"):
        y = boundary(z, 3, thin)
        (gradient,) = torch.autograd.grad(y.sum(), z)
    assert y.shape == gradient.shape == z.shape


# ---- other people's conventions ----------------------------------------------------------------


def soft_maps() -> Iterator[np.ndarray]:
    for size in ((40, 57), (1, 9), (8, 1), (64, 64)):
        yield Source(sum(size)).uniform(*size, low=0.0).numpy()


def parts(low: np.ndarray, z: np.ndarray, high: np.ndarray, thin: str) -> np.ndarray:
    return {"inner": z - low, "outer": high - z, "both": high - low}[thin]


@pytest.mark.parametrize("k", [1, 3, 13, 31])
@pytest.mark.parametrize("thin", list(THIN))
def test_equals_scipy(backend: str, device: torch.device, thin: str, k: int) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    for z in soft_maps():
        low = ndimage.grey_erosion(z, size=(3, 3), mode="constant", cval=np.inf)
        high = ndimage.grey_dilation(z, size=(3, 3), mode="constant", cval=-np.inf)
        thick = parts(low, z, high, thin)
        expected = ndimage.grey_dilation(thick, size=(k, k), mode="constant", cval=-np.inf)
        found = boundary(torch.from_numpy(z)[None, None].to(device), k, thin)
        assert np.array_equal(found[0, 0].cpu().numpy(), expected)


@pytest.mark.parametrize("k", [1, 3, 13, 31])
@pytest.mark.parametrize("thin", list(THIN))
def test_equals_opencv(backend: str, device: torch.device, thin: str, k: int) -> None:
    cv2 = pytest.importorskip("cv2")
    small, large = np.ones((3, 3), np.uint8), np.ones((k, k), np.uint8)
    for z in soft_maps():
        thick = parts(cv2.erode(z, small), z, cv2.dilate(z, small), thin)
        found = boundary(torch.from_numpy(z)[None, None].to(device), k, thin)
        assert np.array_equal(found[0, 0].cpu().numpy(), cv2.dilate(thick, large))


def test_the_border_of_the_image_is_no_boundary(backend: str, device: torch.device) -> None:
    z = torch.zeros(1, 1, 6, 9, device=device)
    z[..., :3] = 1  # an object that touches three sides of the image
    columns = {"inner": [2], "outer": [3], "both": [2, 3]}
    for thin, where in columns.items():
        expected = torch.zeros_like(z)
        expected[..., where] = 1
        assert torch.equal(boundary(z, 1, thin), expected)
        assert not boundary(torch.ones_like(z), 5, thin).any()


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity(isa: str, k: int, value: float) -> None:
    """A NaN makes all that sees it NaN; infinity less infinity is NaN, too, as in the reference."""
    z = Source(0).uniform(1, 1, 23, 40)
    for row, column in ((0, 0), (11, 17), (22, 39)):
        z[0, 0, row, column] = value
    with sodfast.use_backend("cpu"), instruction_set(isa):
        for thin in THIN:
            for x in (z, z.double()):
                leaf = x.clone().requires_grad_()
                y, expected = boundary(leaf, k, thin), boundary_reference(x, k, thin)
                assert not expected.isfinite().all() and expected.isfinite().any()
                torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
                # What one end of a difference gets, the other loses.
                (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
                assert gradient.any() and gradient.sum() == 0


def test_zeros_of_both_signs_are_equal() -> None:
    z = torch.zeros(1, 1, 9, 33)
    z[..., ::3] = -0.0
    results_of = []
    for backend in ("cpu", "reference"):
        leaf = z.clone().requires_grad_()
        with sodfast.use_backend(backend):
            y = boundary(leaf, 3, "both")
            results_of.append([y.detach(), *torch.autograd.grad(y.sum(), leaf)])
    assert all(torch.equal(a, b) for a, b in zip(*results_of))


# ---- torch --------------------------------------------------------------------------------------


def test_the_reference_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, "boundary", ["boundary_reference"])
    z = torch.rand(1, 1, 8, 8, requires_grad=True)
    with sodfast.use_backend("cpu"):
        boundary(z, 5).sum().backward()
    assert z.grad is not None
    with sodfast.use_backend("reference"), pytest.raises(AssertionError, match="was called"):
        boundary(z, 5)


def test_compile_export_autocast_and_second_derivative() -> None:
    z = torch.rand(1, 2, 12, 17, requires_grad=True)
    check_compiles_and_exports(lambda x: boundary(x, 5, "both"), [z], "boundary")
    check_autocast(lambda x: boundary(x, 3), [z.detach()])
    check_second_derivative_is_refused(lambda x: boundary(x, 3), [z])


z8 = torch.zeros(2, 1, 8, 8)
BAD = {
    "rank": (ValueError, r"z must be \(B, C, H, W\), not \(1, 8, 8\)", (z8[0],)),
    "size": (ValueError, "z has an empty size: 0x8", (z8[:, :, :0],)),
    "even k": (ValueError, "k must be odd and from 1 to 31, not 4", (z8, 4)),
    "k": (ValueError, "not 0", (z8, 0)),
    "negative k": (ValueError, "not -3", (z8, -3)),
    "large k": (ValueError, "not 33", (z8, 33)),
    "thin": (ValueError, "thin must be one of inner, outer, both, not 'thick'", (z8, 3, "thick")),
    "integers": (TypeError, "z must be floating point, not torch.int64", (z8.long(),)),
    "half": (RuntimeError, "'cpu' was asked for.*float16", (z8.half(),)),
    "no tensor": (TypeError, "z must be a tensor, not list", (z8.tolist(),)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    error, message, arguments = BAD[name]
    with sodfast.use_backend("cpu"), pytest.raises(error, match=message):
        boundary(*arguments)


def sound_calls() -> Iterator[Call]:
    case = Case((2, 3, 9, 18), layout="sliced storage")
    (z,), (g,) = case.tensors()["z"], case.grads()
    yield "boundary", (z, 5, 1)
    yield "boundary", (z, 1, 3)
    yield "boundary_backward", (g, z, 5, 2)


@pytest.mark.parametrize("number", range(len(list(sound_calls()))))
def test_registration(number: int) -> None:
    assert_registered(*list(sound_calls())[number])


def test_raw_backward_refuses_mixed_devices() -> None:
    assert_one_device(*list(sound_calls())[-1])


def nonsense() -> Iterator[Call]:
    for z, k, thin in (
        (z8[0], 3, 1),
        (z8[None], 3, 1),
        (z8[:, :, :0], 3, 1),
        (z8[:, :, :, :0], 3, 1),
        (z8.long(), 3, 1),
        (z8.half(), 3, 1),
        (z8, 0, 1),
        (z8, 2, 1),
        (z8, 33, 1),
        (z8, -1, 1),
        (z8, 2**62 + 1, 1),
        (z8, 3, 0),
        (z8, 3, 4),
        (z8, 3, -1),
    ):
        yield "boundary", (z, k, thin)
        yield "boundary_backward", (z, z, k, thin)
    for grad in (z8[0], z8[:1], z8.double(), torch.zeros(2, 1, 8, 9), torch.zeros(2, 2, 8, 4)):
        yield "boundary_backward", (grad, z8, 3, 1)


def test_raw_ops_refuse_nonsense() -> None:
    assert_refused(__name__)


def test_raw_ops_survive_random_changes(full: bool) -> None:
    assert_survived(__name__, 20_000 if full else 1_000)
