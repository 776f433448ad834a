"""Three ways to damage a file of a folder, each of which the manifest must show, and how one signs a false manifest."""

import hashlib
import json
from pathlib import Path
from typing import Any


def missing(folder: Path, name: str) -> None:
    (folder / name).unlink()


def truncated(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])


def bit(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 4
    (folder / name).write_bytes(data)


WAYS = [missing, truncated, bit]


def sign(body: dict[str, Any]) -> dict[str, Any]:
    """A body with the checksum the contract asks for, computed without the module under test."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return {**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}
