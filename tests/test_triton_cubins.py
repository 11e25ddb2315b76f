"""Every Triton kernel compiles to machine code for two generations of GPUs, without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sodfast.ops import _triton

HERE = Path(__file__).parent
# Bytes of spilled registers a thread that ptxas may choose so that more threads fit.
FEW = 64
DTYPES = ("float32", "float16", "bfloat16")


@pytest.mark.skipif(not _triton.INSTALLED, reason="Triton is not installed")
def test_every_kernel_becomes_a_cubin_and_keeps_its_registers(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    runs = {
        capability: subprocess.Popen(
            [sys.executable, HERE / "triton_cubins.py", capability, *DTYPES],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for capability in ("80", "90")
    }  # fmt: skip
    written = {
        f"sodfast.kernels.{path.stem}.{name}"
        for path in (HERE.parent / "kernels").glob("*.py")
        for name in _launched(path.read_text(encoding="utf-8"))
    }
    assert len(written) > 15
    for capability, process in runs.items():
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output[-3000:]
        lines = [line.split() for line in output.splitlines()]
        for dtype in DTYPES:
            assert {name for name, d, *_ in lines if d == dtype} == written
        spilled = [line for line in lines if int(line[3]) > FEW]
        assert not spilled, f"sm_{capability}: {spilled}"


def _launched(source: str) -> list[str]:
    """The kernels of a file: functions of Triton that are started with a grid."""
    names = re.findall(r"^@triton\.jit\ndef (\w+)\(", source, re.MULTILINE)
    return [name for name in names if re.search(rf"(?<!\w){name}\[", source)]
