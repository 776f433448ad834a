"""A tiny model on the disk, and sets of its images made by the processes of a test."""

import json
from pathlib import Path
from typing import Any

import pytest
from pipeline.models import tiny_flow

from ldit.checkpoint.export import write_export
from ldit.config.requests.sampling import SampleRequest
from ldit.pipeline.load import Pipeline
from ldit.pipeline.sets.make import make_set

NUM, BATCH = 22, 4
BLOCKS = -(-NUM // BATCH)
KINDS = ["set", "set.npz"]
OPTIONS = {"steps": "3", "seed": 5}


def exported(folder: Path, pipe: Pipeline | None = None) -> Path:
    pipe = pipe or tiny_flow()
    folder.mkdir()
    write_export(folder, pipe.spec, pipe.model.state_dict().items())
    return folder


def job(source: Path, num: int = NUM, options: dict[str, Any] = OPTIONS, **changes: Any) -> SampleRequest:
    images = {"batch_size": BATCH, "device": "cpu", **options, **changes}
    return SampleRequest(source=str(source), num=num, **images)


def made(monkeypatch: pytest.MonkeyPatch, one: SampleRequest, out: Path, rank: int = 0, world: int = 1) -> bool:
    """One process's part."""
    with monkeypatch.context() as patch:
        if world > 1:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(world))
        assert one.num is not None
        return make_set(one, one.num, out)


def contents(out: Path) -> dict[str, bytes]:
    """What a set left on the disk: its files and folders by name, those beside an array too."""
    found = [out, *out.rglob("*")] if out.is_dir() else sorted(out.parent.glob(f"{out.name}*"))
    found += [path for one in found if one.is_dir() and one != out for path in one.rglob("*")]
    names = [str(path.relative_to(out.parent)).removeprefix(out.name) for path in found]
    return {name: path.read_bytes() if path.is_file() else b"" for name, path in zip(names, found, strict=True)}


def described(out: Path) -> dict[str, Any]:
    path = out / "samples.json" if out.is_dir() else out.with_name(f"{out.name}.json")
    return json.loads(path.read_text())
