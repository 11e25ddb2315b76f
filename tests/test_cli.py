"""The command line as a whole: help, wrong commands, the small subcommands."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from command_line import command, environment, run

import sodfast


def test_models_prints_the_papers_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "models")
    assert status == 0
    for width, parameters in (
        ("1.0", "210,985"),
        ("1.2", "298,633"),
        ("1.5", "455,631"),
        ("1.8", "645,565"),
        ("2.0", "788,631"),
    ):
        assert re.search(rf"csnet +width {width} +{parameters} +[\d.]+ G +[\d.]+ G", out)


def test_info_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info")
    assert status == 0 and out.strip() == sodfast.info()
    status, out, _ = run(capsys, "--version")
    assert status == 0 and out.strip() == f"sodfast {sodfast.__version__}"


def test_wrong_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([], "COMMAND"),
        (["predikt"], "predikt"),
        (["models", "--colour"], "--colour"),
    ):
        status, out, err = run(capsys, *arguments)
        assert status == 2 and out == ""
        assert "sodfast: error:" in err and words in err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "predict", "--help")
    assert status == 0
    for option in """INPUT --output --weights --size --type --format --batch --threads
                     --skip-existing --max-pixels --video""".split():
        assert option in out


def test_as_a_module_and_into_a_closed_pipe() -> None:
    process = subprocess.run(
        command("info"), capture_output=True, text=True, env=environment(), timeout=120
    )
    assert process.returncode == 0 and "sodfast" in process.stdout
    read, write = os.pipe()
    os.close(read)  # the reader has gone before anything is printed
    try:
        process = subprocess.run(
            command("models"),
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            timeout=120,
        )
    finally:
        os.close(write)
    assert process.stderr == ""
