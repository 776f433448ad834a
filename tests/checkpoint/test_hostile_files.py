"""S1: hostile checkpoint files run no code, end in a typed error or a sound result, in bounded time and memory."""

import contextlib
import gc
import json
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_files
import pytest
import shards
import steps
import torch
from calls import in_child
from counts import count
from golden import FOLDER
from models import weights_of
from pickles import Guard
from safetensors.torch import load_file

from ldit.checkpoint.layouts.original import write_original
from ldit.checkpoint.open import open_source
from ldit.errors import LditError
from ldit.pipeline.load import load_model
from ldit.storage.shards import PartReader

BATCH = 25  # cases of one child
SECONDS = 20  # of one case
SLACK = 64 << 20


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound checkpoint of each kind, to be made hostile."""
    parent = tmp_path_factory.mktemp("good")
    for name in ("export", "original"):
        (parent / name).mkdir()
    shards.write_folder(parent / "export", steps.SPEC, steps.content(1))
    weights = weights_of(shards.ORIGINAL.model)
    write_original(parent / "original", shards.ORIGINAL, weights.items(), weights.items(), 3)
    torch.save(load_file(FOLDER / "dit_tiny.weights.safetensors"), parent / "model.pt")
    return {"export": parent / "export", "original": parent / "original", "pt": parent / "model.pt"}


def size_of(path: Path) -> int:
    return sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())


def uses(path: Path) -> list[Callable[[], Any]]:
    """What a reader may do with a checkpoint; each must end in a result or in an LditError."""

    def shapes(ema: bool) -> None:
        open_source(path, heads=4).shapes(ema)

    def weights(ema: bool) -> None:
        limit = size_of(path)
        for _, tensor in open_source(path, heads=4).tensors(ema):
            assert tensor.nbytes <= limit, "more numbers than the file has"
            tensor.sum()

    def parts() -> None:
        if path.is_dir():
            reader = PartReader(path, "ema")
            for name in reader.names():
                with contextlib.suppress(LditError):
                    reader.read(name, (4,), (slice(1, 3),))
                reader.read(name, tuple(reader._open[reader._where[name]].get_slice(name).get_shape()), ())

    return [
        lambda: open_source(path, heads=4).verify(),
        *(lambda ema=ema: shapes(ema) for ema in (True, False)),  # type: ignore[misc]
        *(lambda ema=ema: weights(ema) for ema in (True, False)),  # type: ignore[misc]
        lambda: load_model(open_source(path, heads=4)),
        parts,
    ]


def memory(word: str) -> int:
    """Bytes, from the kernel's own account of this process."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{word}:")[1].split()[0])


def verdict(path: Path, guard: Guard, sentinel: Path) -> dict[str, Any]:
    """What came of every use of a checkpoint: errors of other types, events heard, memory above what was held."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before, wrong, refused = memory("VmRSS"), [], 0
    signal.alarm(SECONDS)
    for number, use in enumerate(uses(path)):
        try:
            with guard:
                use()
        except LditError as error:
            refused += 1
            if len(str(error).splitlines()) != 1:
                wrong.append(f"use {number}: {str(error)!r}")
        except Exception as error:
            wrong.append(f"use {number}: {type(error).__name__}: {str(error)[:300]}")
        if guard.heard or sentinel.exists():
            wrong.append(f"use {number} acted: {guard.heard}")
    signal.alarm(0)
    return {"wrong": wrong, "refused": refused, "peak": memory("VmHWM") - before}


def work(cases: range, good: dict[str, Path], folder: Path, guard: Guard) -> int:
    """In a child: one line of JSON a case, before and after it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    gc.collect()
    gc.freeze()  # what the parent left to be collected is not the hostile file's doing either
    sentinel = folder / "sentinel"
    with (folder / "said").open("w", buffering=1) as said:
        for path in good.values():  # code that is read from the disk at its first use is not the hostile file's doing
            wrong = verdict(path, guard, sentinel)["wrong"]
            assert not wrong, wrong
        for case in cases:
            parent = folder / "case"
            parent.mkdir()
            path = hostile_files.make(case, good, parent, sentinel)
            print(json.dumps({"case": case}), file=said)
            print(json.dumps({"case": case, "size": size_of(path), **verdict(path, guard, sentinel)}), file=said)
            shutil.rmtree(parent)
    return 0


@pytest.mark.parametrize("start", range(0, count(200, 5000), BATCH))
def test_s1_hostile_files(good: dict[str, Path], tmp_path: Path, guard: Guard, start: int) -> None:
    """A line of the child's for each case; where the last one is missing, that case killed or stopped it."""
    status = in_child(lambda: work(range(start, start + BATCH), good, tmp_path, guard))
    said = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert status == 0, f"case {said[-1]['case'] if said else 'none'}: the reader ended with {status}"
    results = [line for line in said if "peak" in line]
    assert [line["case"] for line in results] == list(range(start, start + BATCH))
    for line in results:
        assert not line["wrong"], f"case {line['case']}: {line['wrong']}"
        assert line["peak"] < 2 * line["size"] + SLACK, f"case {line['case']}: {line['peak']:,} bytes"
    assert sum(line["refused"] > 0 for line in results) > BATCH // 2, "most of these files are not sound"


def test_s1_cases_are_the_same_every_time(good: dict[str, Path], tmp_path: Path) -> None:
    """Case i of the few is case i of the many."""
    for case in range(10):
        made = []
        for name in ("one", "two"):
            (tmp_path / name / str(case)).mkdir(parents=True)
            path = hostile_files.make(case, good, tmp_path / name / str(case), Path("/nowhere"))
            made.append(
                {p.name: p.read_bytes() for p in [path, *path.rglob("*")] if p.suffix not in (".pt", ".pth", "")}
            )
        assert made[0] == made[1]
