"""Files of an evaluation: what they may replace, and that each is written whatever becomes of the others."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval.evaluation import Inceptive, Stub, folder, found, job, noise
from PIL import Image
from runs import ALONE

from ldit.config.requests.evaluate import StatsRequest
from ldit.errors import RequestError, RunError
from ldit.eval import outputs as evaluation_outputs
from ldit.eval.evaluate import evaluate_with, save_statistics
from ldit.eval.extractors import extractor as extractor_room
from ldit.eval.reference import read_statistics
from ldit.storage import manifest
from ldit.storage.outputs import disk_error


@pytest.mark.parametrize("what", ["json", "figure", "stats"])
def test_nothing_is_written_into_what_a_manifest_seals(what: str, place: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.sealed({})))
    work = {
        "json": lambda: found(job(place / "a", place / "b", json=tmp_path / "r.json")),
        "figure": lambda: found(job(place / "a", place / "b", figure=tmp_path / "f.png")),
        "stats": lambda: save_statistics(StatsRequest(images=str(place / "b"), out=tmp_path / "s.npz", batch_size=4)),
    }[what]
    with pytest.raises(RequestError, match="sealed by its"):
        work()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"json": "no/where.json"}, "no folder .*/no to write where.json into"),
        ({"json": "folder"}, "folder is a folder, expected the name of a file"),
        ({"json": "a.npz"}, r"a\.npz is an input and would be overwritten; choose another name"),
        ({"json": "b.npz"}, r"b\.npz is an input"),
        ({"json": "words.json"}, r"words\.json exists and was not made by ldit evaluate; choose"),
        ({"json": "best.json"}, r"best\.json exists and was not made by ldit evaluate"),
        ({"figure": "photo.png"}, r"photo\.png exists and was not made by ldit evaluate"),
        ({"json": "x.png", "figure": "x.png"}, r"x\.png: the report and the figure need a file each"),
        ({"json": "folder/../x.png", "figure": "x.png"}, r"x\.png: the report and the figure need a file each"),
        ({"figure": "folder/x.png"}, r"x\.png is inside .*folder, whose images are read"),
        ({"figure": "linked/x.png"}, r"x\.png is inside .*folder, whose images are read"),
        ({"json": "folder/metadata.jsonl"}, r"metadata\.jsonl is inside .*folder, whose images are read"),
        ({"json": "folder/encode.json"}, r"encode\.json is inside .*folder, whose images are read"),
    ],
)
def test_nothing_is_replaced_that_is_no_report(tmp_path: Path, names: dict[str, str], words: str) -> None:
    """Known before any image is read."""
    folder(tmp_path / "folder", noise(5, 1))
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", noise(23, 0))
    (tmp_path / "linked").symlink_to(tmp_path / "folder")
    (tmp_path / "words.json").write_text("words")
    (tmp_path / "best.json").write_text('{"step": 1}')
    Image.fromarray(noise(1, 0)[0]).save(tmp_path / "photo.png")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    extractor, files = Stub(), {key: tmp_path / name for key, name in names.items()}
    reference = tmp_path / ("b.npz" if names == {"json": "b.npz"} else "folder")
    with pytest.raises(RequestError, match=words):
        found(job(tmp_path / "a.npz", reference, **files), extractor)
    assert not extractor.seen and before == {path: path.read_bytes() for path in tmp_path.glob("*.*")}


def test_a_report_replaces_a_report(place: Path, tmp_path: Path) -> None:
    files = {"json": tmp_path / "r.json", "figure": tmp_path / "f.png"}
    for file in files.values():
        file.touch()  # of mktemp, say
    for num in (22, 23):
        found(job(place / "a.npz", place / "b", num=num, metrics=("fd",), **files))
        assert json.loads((tmp_path / "r.json").read_text())["num_samples"] == num
        with Image.open(tmp_path / "f.png") as image:
            assert image.info["ldit evaluate"] == f"{place / 'a.npz'} against {place / 'b'}"
    odd = folder(tmp_path / os.fsdecode(b"caf\xe9"), noise(5, 1))  # no UTF-8, as old disks have
    found(job(place / "a.npz", odd, json=tmp_path / "o.json", figure=tmp_path / "o.png"))
    assert (tmp_path / "o.json").exists() and (tmp_path / "o.png").exists()


def test_statistics_replace_statistics_alone(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractor_room, "open_extractor", lambda name, weights, device, protocol=None: Inceptive())
    np.savez(tmp_path / "pictures.npz", noise(23, 0))
    before = (tmp_path / "pictures.npz").read_bytes()
    for source, words in ((tmp_path / "pictures.npz", "is an input"), (place / "b", "was not made by ldit stats")):
        with pytest.raises(RequestError, match=rf"pictures\.npz .*{words}"):
            save_statistics(StatsRequest(images=str(source), out=tmp_path / "pictures.npz", batch_size=4))
    assert (tmp_path / "pictures.npz").read_bytes() == before
    for name, count in (("a", 23), ("b", 31)):
        save_statistics(StatsRequest(images=str(place / name), out=tmp_path / "s.npz", batch_size=4))
        assert read_statistics(tmp_path / "s.npz").count == count
    with pytest.raises(RequestError, match=r"s\.npz is an input"):
        save_statistics(StatsRequest(images=str(tmp_path / "s.npz"), out=tmp_path / "s.npz", batch_size=4))


def test_a_table_that_cannot_be_said_costs_no_file(place: Path, tmp_path: Path) -> None:
    def closed(text: str) -> None:
        raise BrokenPipeError

    files = {"json": tmp_path / "r.json", "figure": tmp_path / "f.png"}
    with pytest.raises(BrokenPipeError):
        evaluate_with(job(place / "a", place / "b", **files), Stub(), ALONE, closed)
    assert json.loads((tmp_path / "r.json").read_text())["num_samples"] == 23 and (tmp_path / "f.png").exists()


def test_figures_are_said_where_they_cannot_be_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = evaluation_outputs.put

    def full(path: Path, data: Any) -> None:
        if path.suffix == ".json":
            raise disk_error(OSError(errno.ENOSPC, "No space left on device"), path, path.parent)
        put(path, data)

    monkeypatch.setattr(evaluation_outputs, "put", full)
    said: list[str] = []
    files = {"json": tmp_path / "r.json", "figure": tmp_path / "f.png"}
    with pytest.raises(RunError, match=r"r\.json was not written: No space left on device: [\d,]+ bytes are free$"):
        evaluate_with(job(place / "a", place / "b", **files), Stub(), ALONE, said.append)
    assert len(said) == 1 and "fd_stub" in said[0] and (tmp_path / "f.png").exists()
    with pytest.raises(RunError, match=r"r\.json was not written"):  # and nothing can be said
        evaluate_with(job(place / "a", place / "b", **files), Stub(), ALONE, lambda text: print(1 / 0))
