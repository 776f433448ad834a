"""Who a process is, from what torchrun and srun say; and who the watchdog blames."""

import os
import subprocess
from dataclasses import replace
from typing import Any

import pytest
from runs import ALONE

from ldit.errors import ConfigError, RequestError
from ldit.parallel.watchdog import Watchdog
from ldit.parallel.world import Launch, launched, let_segments_grow, report_once

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID",
         "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID", "SLURM_STEP_NODELIST",
         "SLURM_JOB_NODELIST")  # fmt: skip
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2"}


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without launcher, which may be filled."""
    plain = {name: value for name, value in os.environ.items() if name not in NAMES}
    monkeypatch.setattr(os, "environ", plain)
    return plain


@pytest.mark.parametrize(
    ("said", "launch"),
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "1"}, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch(0, 1, 0, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Launch(5, 8, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Launch(1, 2, 0, 1)),
        ({"SLURM_PROCID": "0"}, Launch()),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Launch()),
        (SRUN, Launch(5, 8, 1, 2)),
        ({**SRUN, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Launch(1, 2, 1, 1)),
    ],
)
def test_launchers(said: dict[str, str], launch: Launch, env: dict[str, str]) -> None:
    """torchrun's variables go before srun's; a process that nobody launched is alone."""
    env.update(said)
    assert launched() == launch


def test_srun_fills_in_what_torch_asks_for(env: dict[str, str]) -> None:
    env.update({**SRUN, "SLURM_JOB_ID": "1234567", "SLURM_STEP_NODELIST": "node7"})
    launched()
    expected = ("5", "8", "node7", str(20000 + 1234567 % 20000))
    assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_ADDR"], env["MASTER_PORT"]) == expected


def test_what_is_set_by_hand_stays(env: dict[str, str]) -> None:
    env.update({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99", "SLURM_STEP_NODELIST": "node7"})
    launched()
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.1", "99")


def test_lists_of_hosts_are_asked_of_slurm(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "gpu03\ngpu04\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    env.update({**SRUN, "SLURM_JOB_NODELIST": "gpu[03-04]"})
    launched()
    assert env["MASTER_ADDR"] == "gpu03" and asked == [["scontrol", "show", "hostnames", "gpu[03-04]"]]


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK.*'x'"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE.*''"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1.5"}, "LOCAL_RANK.*'1.5'"),
        ({"SLURM_PROCID": "q", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID.*'q'"),
        ({**SRUN, "SLURM_STEP_NODELIST": "a[1-2]", "PATH": "/nowhere"}, "MASTER_ADDR"),
    ],
)
def test_broken_environments_are_one_line(said: dict[str, str], named: str, env: dict[str, str]) -> None:
    env.update(said)
    with pytest.raises(ConfigError, match=named) as error:
        launched()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the watchdog's verdict

Entry = list[Any]  # marks, what comes next, place, waits for others, beat


def verdict(before: dict[int, Entry], now: dict[int, Entry], size: int = 3) -> str:
    said: str = Watchdog(replace(ALONE, size=size), 60.0)._verdict(before, now)
    return said


def entry(marks: int, waits: bool, beat: int, what: str = "step 5") -> Entry:
    return [marks, what, f"file.py:{marks} (f)", waits, beat]


def test_the_silent_one_is_named() -> None:
    """Frozen: its watchdog does not beat any more; where it stands nobody knows."""
    before = {0: entry(7, True, 10), 1: entry(7, True, 10), 2: entry(7, True, 10)}
    now = {0: entry(7, True, 13), 1: entry(7, True, 10), 2: entry(7, True, 13)}
    assert verdict(before, now) == "process 1 stalls and does not answer"
    now[2] = before[2]
    assert verdict(before, now) == "process 1, 2 stalls and does not answer"


def test_one_that_was_never_heard_of_is_silent() -> None:
    alive = {0: entry(7, True, 10), 2: entry(7, True, 10)}
    later = {0: entry(7, True, 13), 2: entry(7, True, 13)}
    assert verdict(alive, later) == "process 1 stalls and does not answer"


def test_the_one_with_fewest_marks_is_behind() -> None:
    before = {0: entry(7, True, 1), 1: entry(7, True, 1), 2: entry(6, True, 1, "save")}
    now = {rank: entry(9, False, 4, "the end") for rank in range(3)}  # by now all begin to end
    assert verdict(before, now) == "process 2 stalls in 'save' at file.py:6 (f)"


def test_of_equals_the_one_that_waits_for_nobody() -> None:
    before = {0: entry(7, True, 1), 1: entry(7, False, 1), 2: entry(7, True, 1)}
    now = {rank: entry(7, True, 4) for rank in range(3)}
    assert verdict(before, now) == "process 1 stalls in 'step 5' at file.py:7 (f)"


@pytest.mark.parametrize("waits", [True, False])
def test_of_equals_all_are_named_when_nothing_tells_them_apart(waits: bool) -> None:
    before = {rank: entry(7, waits, 1) for rank in range(3)}
    now = {rank: entry(7, waits, 4) for rank in range(3)}
    said = verdict(before, now)
    assert [part.partition(" stalls")[0] for part in said.split("; ")] == ["process 0", "process 1", "process 2"]


def test_a_busy_one_ahead_is_not_to_blame() -> None:
    """Work that waits for nobody is guilty among those behind only."""
    before = {0: entry(8, False, 1), 1: entry(7, True, 1), 2: entry(8, True, 1)}
    now = {rank: entry(9, True, 4) for rank in range(3)}
    assert verdict(before, now).startswith("process 1 stalls in")


def test_one_process_is_not_watched() -> None:
    import threading

    before = threading.active_count()
    watchdog = Watchdog(ALONE, 0.001)
    with watchdog.watching():
        watchdog.mark("anything")
        assert threading.active_count() == before


def test_what_all_find_the_first_says(env: dict[str, str]) -> None:
    for rank, kind, silent in (("0", RequestError, False), ("1", RequestError, True), ("1", ConfigError, False)):
        env |= {"RANK": rank, "WORLD_SIZE": "2"}
        with pytest.raises(kind, match="mistake") as caught, report_once(RequestError):
            raise kind("mistake")
        assert caught.value.said_elsewhere is silent


def test_memory_segments_grow_unless_the_user_has_set_something() -> None:
    for given in ({}, {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}):
        environment = dict(given)
        let_segments_grow(environment)
        assert environment == (given or {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
