"""Output that nobody takes: one line or none, and no complaint of the interpreter after it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "ldit", "info", "emoji64-class-xs"]


@pytest.fixture
def env() -> dict[str, str]:
    """Output that is kept back until the end, as it is by default."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_one_line(env: dict[str, str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(COMMAND, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "ldit: failed: [Errno 28] No space left on device\n")


def test_a_reader_that_left_is_told_nothing(env: dict[str, str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(COMMAND, env=env, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("arguments", [["info", "emoji64-class-xs"], ["--version"], ["--help"]])
def test_closed_output_is_no_fault(arguments: list[str], env: dict[str, str]) -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND[:3], *arguments]
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
