"""Runs the reliability table row by row with its large counts, and appends one line a row to soak.log.

    python tools/soak.py [--rows C1 C2 …] [--again]

Hours. Stopped and started again it goes on with the rows that have not passed with this code; `--again` runs all.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "soak.log"
# Row of the table -> cases of its soak run; a test of row C1 is called test_c1_….
ROWS = {
    "C1": "200", "C2": "50", "C3": "all n", "C5": "60", "C6": "1,000", "C7": "2,000", "C9": "100", "C10": "20",
    "R1": "24 x 5", "R2": "12 pairs", "R3": "30", "R4": "3 x 50", "N1": "100", "N2": "5", "N3": "5", "H1": "3",
    "S1": "5,000", "S2": "10,000", "D1": "400 files", "D4": "500", "D5": "10", "D6": "31", "D7": "34 x 3 kills",
    "E1": "24",
}  # fmt: skip
REAL = (
    "C1",
    "C2",
    "C9",
    "C10",
    "R2",
    "H1",
    "D1",
    "D7",
    "E1",
)  # rows of real processes, which need both cores for themselves
CODE = ("src", "tests", "pyproject.toml", "constraints.txt")
PER_TEST = 4 * 3600  # seconds; a test may set less


class Result(NamedTuple):
    """What pytest counted in a row."""

    passed: int
    failed: int
    skipped: int

    @property
    def sound(self) -> bool:
        return self.passed > 0 and self.failed == 0 and self.skipped == 0


def version() -> str:
    """Names what is tested: a digest of the committed sources, tests and pins, with a + where files differ from those.
    Other commits, such as one of this log, leave it alone."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", *CODE)
    trees = git("rev-parse", *(f"HEAD:{name}" for name in CODE))
    return hashlib.sha256(trees.encode()).hexdigest()[:12] + ("+" if changed else "")


def done(name: str) -> set[str]:
    """Rows that passed at version `name`; of changed code none did."""
    if name.endswith("+") or not LOG.exists():
        return set()
    lines = [line.split("\t") for line in LOG.read_text(encoding="utf-8").splitlines()]
    return {line[1] for line in lines if len(line) == 7 and line[3] == "passed" and line[6] == name}


def run(row: str) -> Result:
    """The tests of a row, with LDIT_SOAK=1."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-k", f"test_{row.lower()}_", "-m", "not slow and not gpu"]
        command += ["-n", "0" if row in REAL else "2", "--timeout", str(PER_TEST), "--junit-xml", str(report)]
        # Threads of two processes beside each other would fight for the cores.
        subprocess.run(command, cwd=ROOT, env={**os.environ, "LDIT_SOAK": "1", "OMP_NUM_THREADS": "1"}, check=False)
        return count(report)


def count(report: Path) -> Result:
    """The numbers of a junit report; without one nothing passed."""
    if not report.exists():
        return Result(0, 1, 0)
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    tests, failures, errors, skipped = (
        sum(int(suite.get(key, "0")) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    return Result(tests - failures - errors - skipped, failures + errors, skipped)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--again", action="store_true", help="also rows that passed with this code")
    arguments = parser.parse_args()
    bad = []
    for row in arguments.rows:
        name = version()
        if not arguments.again and row in done(name):
            print(f"{row}: passed at {name} already", flush=True)
            continue
        began = time.monotonic()
        result = run(row)
        word = "passed" if result.sound else "failed" if result.failed else "skipped" if result.skipped else "no tests"
        tests = f"{result.passed} passed, {result.failed} failed, {result.skipped} skipped"
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        line = [now, row, f"cases {ROWS[row]}", word, tests, f"{time.monotonic() - began:.0f} s", name]
        with LOG.open("a", encoding="utf-8") as file:
            file.write("\t".join(line) + "\n")
        print("  ".join(line), flush=True)
        bad += [] if result.sound else [row]
    if bad:
        print(f"not passed: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
