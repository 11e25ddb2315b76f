"""What all tests share: the data beside the checkout, the backends, the long forms, the skips.

SODFAST_REQUIRE=cpu,cuda-on-host,… names backends that must be there: without one of them the
session fails at once, where it would otherwise skip that backend's tests. --full runs the long
forms.
"""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import gpu_kernels
import hypothesis
import pytest
import torch
import triton_kernels

import sodfast
from sodfast.ops import _backend

SHARED = Path(__file__).parents[2] / "shared"

# With several processes (pytest -n) a core each; else two threads, so that both are tried.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# A shell that starts the tests in the background has Ctrl-C ignored, and what they start would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Hypothesis: generated shapes per test, and no deadline, as a first call may load or compile.
common = {
    "deadline": None,
    "derandomize": True,  # a failure of the suite must come again
    "suppress_health_check": [
        hypothesis.HealthCheck.too_slow,
        # The backend fixture is the same for all examples.
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
}
hypothesis.settings.register_profile("normal", max_examples=200, **common)
hypothesis.settings.register_profile("full", max_examples=10_000, **common)
# For --hypothesis-profile: on a GPU that is rented by the minute a failure is reported as it was
# drawn. Making it smaller takes up to five minutes per test.
unshrunk = [phase for phase in hypothesis.Phase if phase.name not in ("shrink", "explain")]
hypothesis.settings.register_profile("unshrunk", max_examples=200, phases=unshrunk, **common)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the long forms of the tests")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("full" if config.getoption("--full") else "normal")


def pytest_sessionstart(session: pytest.Session) -> None:
    reasons = _backend.available() | gpu_kernels.available() | triton_kernels.available()
    for name in os.environ.get("SODFAST_REQUIRE", "").replace(",", " ").split():
        reason = reasons.get(name, f"known backends are {', '.join(reasons)}")
        if reason:
            pytest.exit(f"SODFAST_REQUIRE asks for {name!r}, but {reason}", returncode=1)


def pytest_report_header() -> list[str]:
    return sodfast.info().splitlines()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    terminalreporter.section("skipped tests by reason")
    for reason, number in reasons.most_common():
        terminalreporter.line(f"{number:5d}  {reason}")
    if not reasons:
        terminalreporter.line("none")


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Whether the long forms were asked for."""
    return pytestconfig.getoption("--full")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the checkout: golden values, checkpoints, data sets."""
    if not SHARED.is_dir():
        pytest.skip("the folder of shared data is not beside this checkout")
    return SHARED


def marked(names: Iterable[str]) -> list[Any]:
    """The names as parameters; those of backends that need a GPU have the mark gpu."""
    return [
        pytest.param(name, marks=pytest.mark.gpu) if name in ("cuda", "triton") else name
        for name in names
    ]


@pytest.fixture(params=marked(_backend.BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per backend, which is asked for by name; skips what is not there."""
    name = request.param
    reason = _backend.available()[name]
    if reason:
        pytest.skip(f"backend {name}: {reason}")
    with sodfast.use_backend(name):
        yield name


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the backend's tensors live."""
    return torch.device("cuda" if backend in ("cuda", "triton") else "cpu")


@pytest.fixture
def compiled() -> None:
    """Skips the test where the compiled cpu kernels are missing."""
    reason = _backend.available()["cpu"]
    if reason:
        pytest.skip(f"backend cpu: {reason}")


@pytest.fixture
def small_channels() -> dict[str, Any]:
    """A small CSNet: a block per stage and one more where a scale ends; some scales absent."""
    return {
        "stages": [[[3, 2]], [[2, 2]], [[3, 0], [4]], [[3, 2], [3]], [[0, 3], [3]]],
        "fuse": [2, 0, 3],
        "bank": [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1]],
        "merge": 4,
    }


@pytest.fixture(name="settle")
def settle_fixture() -> Callable[..., torch.nn.Module]:
    return settle


@pytest.fixture
def small_csnet(small_channels: dict[str, Any]) -> Callable[..., torch.nn.Module]:
    """Builds that CSNet with plausible statistics, in eval mode; the same one for a seed."""

    def build(seed: int = 0, **config: Any) -> torch.nn.Module:
        torch.manual_seed(seed)
        model = sodfast.create_model("csnet", channels=small_channels, **config)
        return settle(model, torch.randn(4, 3, 64, 64))

    return build


def settle(model: torch.nn.Module, inputs: Any) -> torch.nn.Module:
    """Give a fresh model what training leaves: γ, β and slopes of any sign, statistics to fit."""
    norms = [m for m in model.modules() if isinstance(m, sodfast.nn.NormAct)]
    for norm in norms:
        for parameter, spread in ((norm.weight, 0.1), (norm.bias, 0.02), (norm.slope, 0.3)):
            torch.nn.init.normal_(parameter, std=spread)
        norm.momentum = 1.0
    with torch.no_grad(), sodfast.use_backend("reference"):
        model.train()(inputs)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@pytest.fixture(params=marked(gpu_kernels.BACKENDS))
def gpu(request: pytest.FixtureRequest) -> str:
    """A way to run the CUDA kernels that is there."""
    reason = gpu_kernels.available()[request.param]
    if reason:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(params=marked(("cpu", *gpu_kernels.BACKENDS)))
def kernels(request: pytest.FixtureRequest) -> str:
    """The CPU's compiled kernels, or a way to run the CUDA kernels that is there."""
    reason = (_backend.available() | gpu_kernels.available())[request.param]
    if reason:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(params=marked(triton_kernels.BACKENDS))
def triton(request: pytest.FixtureRequest) -> str:
    """A way to run the Triton kernels that is there."""
    reason = triton_kernels.available()[request.param]
    if reason:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param
