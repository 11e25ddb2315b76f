"""The Makefile's tool check: what is missing is named with the package that brings it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECK = ROOT / "requirements" / "check_tools.sh"

pytestmark = pytest.mark.skipif(
    not CHECK.exists() or shutil.which("sh") is None, reason="not a source tree with a shell"
)


def check(folder: Path, python: str, compiler: str) -> subprocess.CompletedProcess[str]:
    """Run the check with nothing but `folder` on the PATH."""
    return subprocess.run(
        [shutil.which("sh") or "sh", str(CHECK), python, compiler],
        env={**os.environ, "PATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!{shutil.which('sh')}\n{script}\n")
    path.chmod(0o755)


def test_complete_machine_is_silent(tmp_path: Path) -> None:
    tool(tmp_path, "g++", "exit 0")
    tool(tmp_path, "python3", "exit 0")
    result = check(tmp_path, "python3", "g++")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_this_interpreter_passes() -> None:
    result = check(Path(os.environ["PATH"].split(":")[0]), sys.executable, sys.executable)
    assert result.returncode == 0, result.stderr


def test_missing_compiler(tmp_path: Path) -> None:
    tool(tmp_path, "python3", "exit 0")
    result = check(tmp_path, "python3", "g++")
    assert result.returncode == 1
    assert "sudo apt install g++\n" in result.stderr


def test_missing_python(tmp_path: Path) -> None:
    tool(tmp_path, "g++", "exit 0")
    result = check(tmp_path, "python3", "g++")
    assert result.returncode == 1
    assert "sudo apt install python3 python3-venv python3-dev\n" in result.stderr


def test_debian_without_venv_and_headers(tmp_path: Path) -> None:
    tool(tmp_path, "g++", "exit 0")
    # a plain Debian python: new enough, but no ensurepip and no headers
    tool(tmp_path, "python3.12", 'case "$2" in *version_info*) exit 0 ;; *) exit 1 ;; esac')
    result = check(tmp_path, "python3.12", "g++")
    assert result.returncode == 1
    assert "sudo apt install python3.12-venv python3.12-dev\n" in result.stderr


def test_old_python(tmp_path: Path) -> None:
    tool(tmp_path, "g++", "exit 0")
    tool(tmp_path, "python3", '[ "$1" = --version ] && echo "Python 3.9.2" || exit 1')
    result = check(tmp_path, "python3", "g++")
    assert result.returncode == 1
    assert "needs Python 3.10 or newer" in result.stderr
    assert "Python 3.9.2" in result.stderr
    assert "Traceback" not in result.stderr
