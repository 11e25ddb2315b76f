"""The CUDA sources compile, each alone, and keep their numbers in registers."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_alone_without_spilling_registers(source: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["nvcc", "-std=c++17", "-O3", "-arch=sm_90", "-cubin", "-Xptxas", "-v", "-I", "csrc",
         str(source), "-o", str(tmp_path / "kernels.cubin")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", done.stderr)
    assert found, done.stderr
    assert all(number == "0" for pair in found for number in pair), done.stderr


def test_every_source_is_built() -> None:
    """A source that CMakeLists.txt forgot would be missing only where it is needed."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    (names,) = re.findall(r"set\(CUDA_KERNELS ([^)]*)\)", text)
    assert sorted(names.split()) == [path.stem for path in SOURCES]


def test_the_module_registers_every_op() -> None:
    """Where it was built; it must load beside a torch without CUDA too."""
    code = (
        "import torch, sodfast\n"
        "import sodfast._C_cuda as module\n"
        "print(module.build_info())\n"
        "from gpu_kernels import OPS\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "missing = [op for op in OPS if not has(f'sodfast::{op}', 'CUDA')]\n"
        "assert not missing, missing\n"
    )
    if not list((ROOT / "sodfast").glob("_C_cuda*.so")):
        pytest.skip("sodfast._C_cuda was not built")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "sm_90" in done.stdout
