"""Follows `ldit train tiny-cpu --train.steps 1` of a checkout up to its first step, and prints JSON.

    python tools/first_step.py [--root DIR] [--processes N]

N processes (gloo, CPU) train together in a temporary folder; the report is that of rank 0's main thread:

imported    `ldit.…` in sys.modules when the command ends.
files       of the package, in which a named function is called before `train_step`.
functions   named functions of the package that are called before it. Lambdas, comprehensions, class bodies and
            generated `__init__`s are not counted.
exchanges   calls of functions of the package that call a collective of torch.distributed before it, themselves: two
            collectives in one call (lengths, then texts) are one exchange. Not counted: what belongs to sharded tensors
            (parallel/exchange.py, tensor.py, plan.py; collectives of FSDP), making the process groups, and alarms
            through the store.
agreements  places in the code outside of parallel/ that called into it and so led to exchanges, one entry a call. One
            agreement may need several exchanges.
nested      agreements within the work of another, apart: building a sharded network may need some.
"""

import argparse
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ["train", "tiny-cpu", "--train.steps", "1"]
LIMIT = 300  # seconds
COLLECTIVES = re.compile(
    r"(all_gather|all_reduce|all_to_all|broadcast|gather|reduce|scatter|barrier|monitored_barrier)"
)
COLLECTIVES_HOME = ("distributed_c10d.py", "c10d_logger.py")
TENSORS = {f"parallel/{name}.py" for name in ("exchange", "tensor", "plan")}
NAMED_FUNCTION = 0x1  # inspect.CO_OPTIMIZED: neither a module nor a class body


@dataclass
class Agreement:
    """`own` are the functions of parallel/ that lie between the caller and the collective, `around` those that were
    running already when the caller's came."""

    place: str
    own: set[CodeType]
    around: set[CodeType]


@dataclass
class Walk:
    """A profiler (sys.setprofile) that writes down which way a run takes until it calls `train_step`."""

    package: str
    """The package's folder, with a slash at its end."""
    entered: set[CodeType] = field(default_factory=set)
    ended: bool = False
    exchanges: int = 0
    agreements: list[Agreement] = field(default_factory=list)
    # The frames of the last exchange and agreement. They are kept, so that no other takes their identity.
    _exchange: tuple[FrameType | None, int] = (None, 0)
    _agreement: tuple[FrameType | None, int] = (None, 0)

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code.co_filename.startswith(self.package):
            if code.co_name == "train_step":
                self.ended = True
                sys.setprofile(None)
            else:
                self.entered.add(code)
        elif code.co_filename.endswith(COLLECTIVES_HOME[0]) and COLLECTIVES.match(code.co_name):
            self.collective(frame)

    def collective(self, frame: FrameType) -> None:
        """A collective begins: find out whose it is."""
        caller: FrameType | None = frame
        while caller is not None and caller.f_code.co_filename.endswith(COLLECTIVES_HOME):
            caller = caller.f_back
        if caller is None or not caller.f_code.co_filename.startswith(self.package):
            return  # a library's own
        if self.path(caller) in TENSORS:
            return
        # The frames of the package, from the collective outwards. The first ones are those of the exchange's room.
        stack = [caller]
        while caller := caller.f_back:
            stack += [caller] if caller.f_code.co_filename.startswith(self.package) else []
        inside = [self.path(f).startswith("parallel/") for f in stack]
        depth = inside.index(False)
        # Called from elsewhere, without help of that room, each line is an exchange and an agreement of its own.
        line = 0 if depth else stack[0].f_lineno
        exchange, agreement = (stack[0], line), (stack[max(depth - 1, 0)], line)
        if exchange != self._exchange:
            self.exchanges += 1
        if agreement != self._agreement:
            place = f"{self.path(stack[depth])}:{stack[depth].f_lineno}"
            around = {f.f_code for f, there in zip(stack[depth:], inside[depth:], strict=True) if there}
            self.agreements.append(Agreement(place, {f.f_code for f in stack[:depth]}, around))
        self._exchange, self._agreement = exchange, agreement

    def path(self, frame: FrameType) -> str:
        return frame.f_code.co_filename.removeprefix(self.package)

    def report(self) -> dict[str, Any]:
        named = [code for code in self.entered if code.co_flags & NAMED_FUNCTION and not code.co_name.startswith("<")]
        # A function around an agreement makes it a nested one only if it agrees on something itself.
        agreeing = {code for agreement in self.agreements for code in agreement.own}
        return {
            "imported": sorted(name for name in sys.modules if name.startswith("ldit.")),
            "ended": self.ended,
            "functions": len(named),
            "files": sorted({code.co_filename.removeprefix(self.package) for code in named}),
            "exchanges": self.exchanges,
            "agreements": [a.place for a in self.agreements if not a.around & agreeing],
            "nested": [a.place for a in self.agreements if a.around & agreeing],
        }


def probe(report: Path, package: str, arguments: list[str]) -> None:
    """`ldit` with these arguments, in this process; what it did goes into `report`."""
    walk = Walk(package)
    sys.argv = ["ldit", *arguments]
    sys.setprofile(walk)
    try:
        runpy.run_module("ldit", run_name="__main__")
    finally:
        sys.setprofile(None)
        report.write_text(json.dumps(walk.report()))


def watched(root: Path, processes: int, command: list[str]) -> dict[str, Any]:
    """The report of rank 0 of so many processes that run this command of `ldit` together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder, f"{rank}.json") for rank in range(processes)]
        jobs = []
        for rank, report in enumerate(reports):
            group = {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
            group |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {**os.environ, **shared, **(group if processes > 1 else {})}
            # -P: nothing beside this file can be imported by the run.
            words = [sys.executable, "-P", __file__, "--probe", str(report), f"{root}/src/ldit/", *command]
            jobs.append(
                subprocess.Popen([*words, "--out", f"{folder}/run"], env=env, stderr=subprocess.PIPE, text=True)
            )
        try:
            told = [job.communicate(timeout=LIMIT)[1] for job in jobs]
        finally:
            for job in jobs:
                job.kill()
        if any(job.returncode for job in jobs) or not (result := json.loads(reports[0].read_text()))["ended"]:
            raise SystemExit(f"ldit {' '.join(command)} did not come to its first step:\n{''.join(told)[-4000:]}")
    return dict(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    print(json.dumps(watched(arguments.root.resolve(), arguments.processes, COMMAND)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probe"]:
        probe(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
