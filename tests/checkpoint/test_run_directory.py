"""A run's directory: who may write, and what is swept."""

import fcntl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ldit.checkpoint.run import clean, committed_steps, run_lock

Save = Callable[..., Path]

HOLDER = (
    "import fcntl, sys\nfile = open(sys.argv[1], 'a')\n"
    "try:\n    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept OSError:\n    sys.exit(3)\n"
    "print('held', flush=True)\nsys.stdin.read()\n"
)


def numbers(run: Path) -> list[int]:
    return [step for step, _ in committed_steps(run)]


def test_the_lock_refuses_a_second_holder(run: Path, fault: Callable[..., str]) -> None:
    """Within the process too: each opening is a holder of its own."""

    def second() -> None:
        with run_lock(run):
            pytest.fail("two holders")

    with run_lock(run):
        assert str(run) in fault(second)
        child = subprocess.run([sys.executable, "-c", HOLDER, run / ".lock"], stdin=subprocess.DEVNULL, check=False)
        assert child.returncode == 3
    with run_lock(run):
        pass


def test_the_lock_is_freed_by_an_exception(run: Path) -> None:
    with pytest.raises(ValueError, match="inside"), run_lock(run):
        raise ValueError("inside")
    with run_lock(run):
        pass


def test_the_lock_outlives_no_holder(run: Path, fault: Callable[..., str]) -> None:
    """Refused while another process holds it, given once that one is killed; a stale file is no lock."""
    run.mkdir()

    def take() -> str:
        with run_lock(run):
            return (run / ".lock").read_text()

    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, run / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        (run / ".lock").write_text("12345\n")
        assert str(run) in fault(take)
        assert (run / ".lock").read_text() == "12345\n", "the refused one must not overwrite the holder's number"
    finally:
        child.kill()
        child.communicate()
    assert take().strip().isdigit() and "12345" not in take()


def test_two_directories_do_not_lock_each_other(tmp_path: Path) -> None:
    with run_lock(tmp_path / "one"), run_lock(tmp_path / "two"):
        for name in ("one", "two"):
            with (tmp_path / name / ".lock").open("a") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_clean_sweeps_the_run_its_checkpoints_and_snapshots(save: Save, run: Path) -> None:
    save(1)
    (run / "config.json.tmp-01234567").write_text("half")
    for folder in ("checkpoints", "snapshots"):
        (run / folder / "step-00000002.tmp-01234567" / "state").mkdir(parents=True)
    clean(run)
    assert {p.name for p in run.iterdir()} == {"checkpoints", "snapshots"}
    assert numbers(run) == [1] and len(list((run / "checkpoints").iterdir())) == 1
    assert list((run / "snapshots").iterdir()) == []
    clean(run / "never made")
