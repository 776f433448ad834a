"""Real `ldit train` processes under a test's hands: started, watched, killed; and two runs compared bit by bit."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ldit.checkpoint.run import committed_steps, step_folder
from ldit.storage import manifest
from ldit.storage.shards import read_set

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS = 40
SMALL = 1 << 17  # bytes a file: the sets of two or more processes go into several files
PATIENCE = 120.0  # seconds until a process that should end by itself is given up; the machine may be shared
TINY = ["train", "tiny-cpu", "--train.sample-every", "0", "--train.attention-every", "0", "--heldout.every", "0",
        "--train.batch-size", "12", "--train.log-every", "1"]  # fmt: skip
RUN = [*TINY, "--train.steps", str(STEPS), "--train.checkpoint-every", "5"]


class Server:
    """The fork server, see there."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT / "src"), str(HERE)])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "forkserver.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@dataclass
class One:
    """A process of a run. `code` is None while it lives."""

    server: Server
    pid: int
    said_in: Path
    code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.server.ask({"wait": self.pid})["code"]
        return self.code

    def send(self, number: int) -> bool:
        """Whether it was there to get the signal: until `poll` has seen its end its number is nobody else's."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)
        return True

    def wait(self, seconds: float = PATIENCE) -> int:
        until(lambda: self.poll() is not None, seconds, lambda: f"process {self.pid} runs on: {self.said()[-2000:]}")
        assert self.code is not None
        return self.code

    def said(self) -> str:
        return self.said_in.read_text() if self.said_in.exists() else ""


@dataclass
class Job:
    """All processes of one run, as a launcher would start them; on the way out the living are killed."""

    server: Server
    argv: Sequence[str]
    folder: Path
    """For what the processes say."""
    size: int = 1
    faults: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Rank -> fault that it starts with."""
    file_bytes: int = 1 << 30
    """Size over which checkpoints are split into files."""

    def __enter__(self) -> "Job":
        self.folder.mkdir(parents=True, exist_ok=True)
        serial, port = time.monotonic_ns(), str(free_port())
        self.ranks = []
        for rank in range(self.size):
            env = {"OMP_NUM_THREADS": "1"}
            if self.size > 1:
                env |= {"RANK": str(rank), "WORLD_SIZE": str(self.size), "LOCAL_RANK": str(rank),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            said = self.folder / f"said-{serial}-{rank}.txt"
            faults = [("files", self.file_bytes), *([self.faults[rank]] if rank in self.faults else [])]
            order = {"argv": list(self.argv), "env": env, "said": str(said), "faults": faults}
            self.ranks.append(One(self.server, self.server.ask(order)["pid"], said))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self.ranks:
            one.send(signal.SIGKILL)
            one.wait()

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Exit codes, once all have ended."""
        return [one.wait(seconds) for one in self.ranks]

    def alive(self) -> bool:
        return any(one.poll() is None for one in self.ranks)

    def said(self) -> str:
        return "\n".join(one.said() for one in self.ranks)


def finished(server: Server, argv: Sequence[str], folder: Path, size: int = 1) -> str:
    """Run to the end, which must be a good one; returns what was said."""
    with Job(server, argv, folder, size, file_bytes=SMALL) as job:
        codes = job.wait()
        assert codes == [0] * size, job.said()[-4000:]
        return job.said()


def until(done: Callable[[], bool], seconds: float, told: Callable[[], str]) -> None:
    """Wait until `done()`; AssertionError with `told()` when it takes longer than `seconds`."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, told()
        time.sleep(0.005)


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# ---- what a run has come to


def logged(out: Path) -> int:
    """The last step in the loss log."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return len(lines)


def saving(out: Path) -> bool:
    """Whether a checkpoint is half written now."""
    return any((out / "checkpoints").glob("step-*.tmp-*")) if (out / "checkpoints").exists() else False


def verify(out: Path) -> list[int]:
    """Compare every file of every committed step with its manifest; the steps, newest first."""
    steps = committed_steps(out)
    for _, folder in steps:
        manifest.verify(folder)
    return [step for step, _ in steps]


def tensors(out: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Everything in a committed step: weights, averages, optimiser state."""
    folder = step_folder(out, step)
    stems = ("model", "ema", "state/optimizer")
    return {f"{stem}:{name}": tensor for stem in stems for name, tensor in read_set(folder, stem)}


def losses(out: Path) -> list[tuple[int, float]]:
    """The loss log line by line, so that a step logged twice would show."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


def assert_same(undisturbed: Path, other: Path) -> None:
    """Weights, averages, optimiser state, trainer.json and the loss log, bit for bit; no leftovers."""
    left, right = tensors(undisturbed), tensors(other)
    assert left.keys() == right.keys() and len(left) > 100
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    trainers = [(step_folder(run, STEPS) / "state/trainer.json").read_bytes() for run in (undisturbed, other)]
    assert trainers[0] == trainers[1]
    assert losses(undisturbed) == losses(other) and [step for step, _ in losses(other)] == [*range(1, STEPS + 1)]
    assert [step for step, _ in committed_steps(other)] == [step for step, _ in committed_steps(undisturbed)]
    assert not list(other.rglob("*.tmp-*")) and not list(other.rglob("*.damaged")) and not list(other.rglob("*.old-*"))
