"""Starts `ldit` processes fast: torch is imported once, each process is a fork of this one that calls the command
line's main. Forks are real processes: killed, stalled and locked out like any other.

One JSON object a line on stdin: {"argv": […], "env": {…}, "said": FILE, "faults": [[NAME, number], …]} -> {"pid": n};
{"wait": pid} -> {"code": n or null}, null while it runs, -s after signal s. At the end of stdin all children die.
"""

import json
import os
import signal
import sys
from typing import Any

import torch
from stalls import FAULTS

import ldit.cli.train
import ldit.commands.train  # noqa: F401 (all that a run imports)
from ldit.cli.main import main


def serve() -> dict[str, Any] | None:
    """Take orders until stdin ends; in a fork, returns the order that it is to carry out."""
    children: set[int] = set()
    try:
        for line in sys.stdin:
            order = json.loads(line)
            if "wait" in order:
                pid, status = os.waitpid(order["wait"], os.WNOHANG)
                children.discard(pid)
                answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
            else:
                pid = os.fork()
                if pid == 0:
                    children.clear()
                    return order
                children.add(pid)
                answer = {"pid": pid}
            print(json.dumps(answer), flush=True)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
    return None


def carry_out(order: dict[str, Any]) -> int:
    """What the fork does: stderr and stdout into a file, an environment of its own."""
    os.setsid()
    out = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, out), (2, out)):
        os.dup2(source, target)
    os.environ.update(order["env"])
    for name, argument in order["faults"]:
        FAULTS[name](argument)
    return main(order["argv"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    mine = serve()
    # A fork ends as any interpreter does: waiting for its threads.
    sys.exit(0 if mine is None else carry_out(mine))
