"""C7: truncated, emptied, missing and extra files, and formats of the future, are an error that names the file."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shards
import steps
from counts import count
from damage import sign
from models import weights_of

from ldit.checkpoint.layouts.original import write_original
from ldit.checkpoint.open import open_source
from ldit.errors import SourceError
from ldit.storage import manifest
from ldit.storage.atomic import committed

Change = Callable[[Path, random.Random], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good folder of each kind; cases damage copies."""
    parent = tmp_path_factory.mktemp("folders")
    step = steps.save(parent / "run", 1)
    with committed(parent / "sharded") as folder:
        shards.write_folder(folder, steps.SPEC, steps.content(1))
    shutil.copytree(parent / "sharded", parent / "bare")
    (parent / "bare" / manifest.NAME).unlink()
    (parent / "original").mkdir()
    weights = weights_of(shards.ORIGINAL.model)
    write_original(parent / "original", shards.ORIGINAL, weights.items(), weights.items(), None)
    return {"step": step, "sharded": parent / "sharded", "bare": parent / "bare", "original": parent / "original"}


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def truncated(folder: Path, rng: random.Random) -> Path:
    """At any length; a text that only lost its last newline is whole."""
    path = rng.choice(files_of(folder))
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data.rstrip(b"\n")))])
    return path


def emptied(folder: Path, rng: random.Random) -> Path:
    path = rng.choice(files_of(folder))
    path.write_bytes(b"")
    return path


def missing(folder: Path, rng: random.Random) -> Path:
    """Any but the manifest of an export, and the index of one without a manifest: those a folder may lack."""
    needed = [path for path in files_of(folder) if not may_be_absent(path)]
    path = rng.choice(needed)
    path.unlink()
    return path


def may_be_absent(path: Path) -> bool:
    if (path.parent / "state").is_dir():
        return False
    return path.name == manifest.NAME or (
        path.name.endswith(".index.json") and not (path.parent / manifest.NAME).is_file()
    )


def extra(folder: Path, rng: random.Random) -> Path:
    """A file that no manifest lists; without one there is nothing to compare with."""
    parent = rng.choice([folder, *(path for path in folder.iterdir() if path.is_dir())])
    path = parent / f"{rng.choice(['model', 'x', '.hidden', 'ema-00001-of-00002'])}.{rng.randrange(10**6)}"
    path.write_bytes(rng.randbytes(rng.randrange(100)))
    return path


def newer_manifest(folder: Path, rng: random.Random) -> Path:
    path = folder / manifest.NAME
    rewrite(path, lambda data: data | {"format": data["format"] + rng.randint(1, 10**6)}, True)
    return path


def newer_config(folder: Path, rng: random.Random) -> Path:
    """Of a later version, true to its manifest."""
    path = folder / "config.json"
    rewrite(path, lambda data: data | {"format": data["format"] + rng.randint(1, 10**6)}, False)
    if (folder / manifest.NAME).is_file():
        (folder / manifest.NAME).write_text(json.dumps(manifest.build(folder)))
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], signed: bool) -> None:
    data = change(json.loads(path.read_text()))
    if signed:
        data = sign({key: value for key, value in data.items() if key != "sha256"})
    path.write_text(json.dumps(data))


WAYS: dict[str, list[Change]] = {
    "step": [truncated, emptied, missing, extra, newer_manifest, newer_config],
    "sharded": [truncated, emptied, missing, extra, newer_manifest, newer_config],
    "bare": [truncated, emptied, missing, newer_config],
    "original": [truncated, emptied, missing],
}
CASES = [(kind, way) for kind, ways in WAYS.items() for way in ways]


def read_all(folder: Path) -> None:
    """Open the folder and read or verify every file of it."""
    source = open_source(folder)
    source.verify()
    for ema in (True, False):
        for _ in source.tensors(ema):
            pass


@pytest.mark.parametrize("case", range(count(100, 2000)))
def test_c7_a_broken_folder_is_named(folders: dict[str, Path], tmp_path: Path, case: int) -> None:
    rng = random.Random(case)
    kind, way = CASES[case % len(CASES)]
    folder = Path(shutil.copytree(folders[kind], tmp_path / kind))
    path = way(folder, rng)
    with pytest.raises(SourceError) as caught:
        read_all(folder)
    message = str(caught.value)
    assert path.name in message and str(folder) in message, f"{kind}, {way.__name__}, {path.name}: {message}"
    assert len(message.splitlines()) == 1
    if way in (newer_manifest, newer_config):
        assert "is newer than" in message


def test_c7_the_folders_are_whole_before_they_are_broken(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        read_all(folder)
