"""Output that nobody takes: one line or none, and no complaint of the interpreter after it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

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


SAMPLE = ["sample", "--ckpt", "emoji64-class-xs", "--class-labels", "0", "--steps", "1", "--image-save-path"]


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-"])
def test_stderr_is_no_reason_to_fail(closed: str, tmp_path: Path, env: dict[str, str]) -> None:
    """Closed or full, it loses what is written to it. A file that is written does not take its number."""
    if "full" in closed and not Path("/dev/full").exists():
        pytest.skip("a device of Linux")
    data = tmp_path / "data"
    for name in ("a", "b"):
        (data / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(data / name / "1.png")
    for arguments in ([*SAMPLE, str(tmp_path / "x.png")], ["data", "check", str(data)]):
        command = ["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND[:3], *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    assert Image.open(tmp_path / "x.png").size[0] >= 64


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_few_characters(encoding: str, env: dict[str, str]) -> None:
    """It shows "?" where it lacks a character."""
    env = {**env, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for arguments in (["evaluate", "--help"], ["train", "--help"], ["sample", "--ckpt", "émoji…"]):
        done = subprocess.run([*COMMAND[:3], *arguments], env=env, capture_output=True)
        assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
        assert b"Traceback" not in done.stderr and (b"?" in done.stdout) == ("--help" in arguments)


def test_a_narrow_terminal(env: dict[str, str]) -> None:
    """Folding into fewer columns than the indent has never ended."""
    for columns in ("0", "1", "5", "22", "-3", "many"):
        command = [*COMMAND[:3], "sample", "--help"]
        done = subprocess.run(command, env={**env, "COLUMNS": columns}, capture_output=True, timeout=20)
        assert done.returncode == 0 and max(map(len, done.stdout.decode().splitlines())) <= 120
    mistake = [*COMMAND[:3], "sample", "--stepz", "1"]
    done = subprocess.run(mistake, env={**env, "COLUMNS": "5"}, capture_output=True, timeout=20)
    assert done.returncode == 2 and b"did you mean --steps" in done.stderr


@pytest.mark.parametrize("arguments", [["info", "emoji64-class-xs"], ["--version"], ["--help"]])
def test_closed_output_is_no_fault(arguments: list[str], env: dict[str, str]) -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND[:3], *arguments]
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
