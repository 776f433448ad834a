"""The first minutes on a GPU: what runs, what is right, how fast it is. `benchmarks/gpu_first.sh` runs it.

Each row is a process of its own with a time limit, and its result is a JSON line that is written at once: a run that is
cut off keeps the rows before. The most valuable rows come first. `--list` names them, `--row NAME` runs one here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from gpu_rows import ROWS, Result

ROOT = Path(__file__).resolve().parents[1]


def run_row(name: str) -> Result:
    """The row's result, run here."""
    if os.environ.get("NULL_LIB"):  # a simulated device: what lies in host memory is never touched
        from ldit.training import ema

        ema._average = lambda piece, averages: None
    else:  # memory segments that grow, as in training
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    began = time.perf_counter()
    result = ROWS[name][1]()
    return {"row": name, "seconds": round(time.perf_counter() - began, 1), "result": result}


def run_apart(name: str, limit: float, out: Path) -> None:
    """Run a row in a process of its own, killed after `limit` seconds; append its line to `out`."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, __file__, "--row", name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        try:
            printed, _ = process.communicate(timeout=limit)
            line = json.loads(printed.splitlines()[-1]) if process.returncode == 0 and printed else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            line = {"row": name, "failed": f"more than {limit:.0f} s"}
        except ValueError:
            line = None
        if line is None:
            log.seek(0)
            line = {"row": name, "failed": f"exit {process.returncode}", "log": log.read()[-1500:]}
    line["wall"] = round(time.perf_counter() - began, 1)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line)[:400], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, help="run one row here and print its line")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="run only these")
    parser.add_argument("--list", action="store_true", help="name the rows and their limits")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no row after this time")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies the rows' limits")
    parser.add_argument("--out", type=Path, help="folder for the result")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:16}{limit:4d} s" for name, (limit, _) in ROWS.items()))
        return
    if arguments.row:
        print(json.dumps(run_row(arguments.row)))
        return
    folder = arguments.out or ROOT / "benchmarks" / "results"
    out = folder / f"{datetime.now(UTC).date().isoformat()}_gpu-first.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + 60 * arguments.minutes
    for name in arguments.rows or ROWS:
        limit = ROWS[name][0] * arguments.patience
        left = end - time.perf_counter()
        if left < 10:
            print(f"no time for {name}", flush=True)
            continue
        run_apart(name, min(limit, left), out)


if __name__ == "__main__":
    main()
