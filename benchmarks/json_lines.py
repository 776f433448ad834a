"""Results that grow by a line: written so that a kill loses at most the line that was being written."""

import json
import os
from pathlib import Path
from typing import Any


def append_line(file: Path, row: dict[str, Any]) -> None:
    """Add a line, in one write that is on the disk before it returns; a line that was cut short before stays alone."""
    is_cut = file.exists() and file.stat().st_size > 0 and not file.read_bytes().endswith(b"\n")
    with open(file, "ab", buffering=0) as out:
        out.write(b"\n" * is_cut + json.dumps(row).encode() + b"\n")
        os.fsync(out.fileno())


def read_lines(file: Path) -> list[dict[str, Any]]:
    """All whole lines; one that was cut short is passed over. No file is an empty one."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
