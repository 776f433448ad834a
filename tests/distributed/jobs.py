"""Starts the worker of `variants.py` in one process or in several, and reads what it found."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT = 480  # seconds; a job of four processes needs under a minute on two quiet cores
STEPS = int(os.environ.get("LDIT_JOB_STEPS", "50"))


def job(processes: int, folder: Path, *names: str) -> dict[str, Any]:
    """Results of the variants and checks `names`, made one after another in one process group of torchrun, or in a
    single process without one."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests", ROOT / "tests/training"))),
    }
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += [str(HERE / "variants.py"), str(STEPS), str(folder), *names]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    try:
        said, complaints = process.communicate(timeout=LIMIT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # torchrun's own sessions too: workers stay in its group
    assert process.returncode == 0, complaints[-6000:]
    return json.loads(next(line for line in said.splitlines() if line.startswith("RESULT "))[7:])


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
