"""`ldit data check`: what it counts, what it prints, its exit codes."""

import gzip
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands.encoding import KEPT, TRAIN, encode, job, write_images
from PIL import Image

from ldit.cli.main import dispatch
from ldit.data.images.decoding import Decoding
from ldit.data.scan import Reading, scan_folder
from ldit.errors import DataError, LditError, RequestError


def image(path: Path, size: tuple[int, int], grey: int, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; a pair of equal files within a class and one across."""
    root = tmp_path / "set"
    for i in range(3):
        image(root / "cat" / f"{i}.png", (40, 20 + i), i)
    shutil.copy(root / "cat" / "1.png", root / "cat" / "copy.png")
    image(root / "dog" / "a.jpg", (64, 64), 7)
    shutil.copy(root / "cat" / "2.png", root / "dog" / "z.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    image(root / "dog" / "t.jpg", (100, 50), 8, exif=turned)
    frames = [Image.new("L", (8, 8), grey) for grey in (1, 200)]
    frames[0].save(root / "dog" / "m.gif", save_all=True, append_images=frames[1:])
    image(root / "dog" / "y.png", (16, 16), 9)
    (root / "notes.txt").write_text("no image")
    return root


def report(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    assert dispatch("data", ["check", *map(str, arguments), "--json"]) == code
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said["sound"] is (code == 0)
    return said


def lines(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> list[str]:
    assert dispatch("data", ["check", *map(str, arguments)]) == code
    said = capsys.readouterr().out.splitlines()
    assert len(said) <= 40
    return said


def test_what_a_folder_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = report(capsys, folder, "--image-size", 21)
    assert (said["kind"], said["total"], said["bad"], said["problems"]) == ("class folders", 9, [], [])
    assert said["classes"] == {"cat": 4, "dog": 5}
    assert said["formats"] == {"PNG": 6, "JPEG": 2, "GIF": 1} and sum(said["modes"].values()) == 9
    assert said["short_sides"] == {"8": 1, "16": 6, "32": 1, "64": 1}
    assert said["smallest"] == {"width": 8, "height": 8, "name": "dog/m.gif"}
    assert said["largest"] == {"width": 100, "height": 50, "name": "dog/t.jpg"}
    assert (said["enlarged"], said["exif_oriented"], said["animated"]) == (3, 1, 1)
    assert said["duplicates"] == [
        {"files": ["cat/1.png", "cat/copy.png"], "across_classes": False},
        {"files": ["cat/2.png", "dog/z.png"], "across_classes": True},
    ]
    text = lines(capsys, folder, "--image-size", 21)
    assert "duplicates  2 in 2 groups of equal files, 1 of them across classes" in text
    assert text[text.index("  cat/2.png, dog/z.png") + 1] == "  cat/1.png, cat/copy.png"  # those across stand first
    assert text[-1] == "verdict     sound" and "classes     2, 4 to 5 images: dog 5, cat 4" in text


def test_bad_images_and_problems(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cat" / "0.png").write_bytes(b"")
    for i in range(30):
        (folder / "dog" / f"bad{i:02d}\n.png").write_text("text")
    (folder / "Cat").mkdir()
    (folder / "empty").mkdir()
    said = report(capsys, folder, code=1)
    assert said["bad"][0] == {"file": "cat/0.png", "reason": "the file is empty"} and len(said["bad"]) == 31
    assert said["problems"] == [
        f"{folder}: the classes 'Cat' and 'cat' differ in case alone",
        *(f"class folder {folder / name} holds no images" for name in ("Cat", "empty")),
    ]
    (folder / "Cat").rmdir()
    assert report(capsys, folder, code=1)["problems"] == [f"class folder {folder / 'empty'} holds no images"]
    text = lines(capsys, folder, code=1)
    assert "bad         31" in text and "  … and 23 more" in text and text[-1] == "verdict     not sound"
    assert "  dog/bad00\\n.png: not a JPEG, PNG, WebP, BMP, PPM, TIFF or GIF image" in text
    assert report(capsys, folder, "--max-pixels", 800, code=1)["bad"][1]["file"] == "cat/1.png"


def test_problems_alone_are_not_sound(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty").mkdir()
    assert report(capsys, folder, code=1)["bad"] == []


def test_threads_change_nothing(folder: Path) -> None:
    """More images than are handed to the threads at once."""
    for i in range(1200):
        (folder / "dog" / f"{i:04d}.png").write_bytes(b"%d" % i)
    one, four = (scan_folder(folder, Decoding(), 21, Reading(workers)) for workers in (1, 4))
    assert one == four and one.total == 1209 and len(one.bad) == 1200 and list(one.digests) == list(four.digests)
    assert [name for name, _ in one.bad] == [f"dog/{i:04d}.png" for i in range(1200)]
    seen: list[int] = []
    scan_folder(folder, Decoding(), reading=Reading(4, seen=seen.append))
    assert sum(seen) == 1209


def test_linked_class_folders_are_checked(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As training reads them: a class may be a link, a folder below one may not; dots are passed over."""
    (folder / "dog").rename(tmp_path / "elsewhere")
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(folder / "cat")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "1.png").write_text("no image")
    (tmp_path / "elsewhere" / "bad.png").write_text("no image")
    said = report(capsys, folder, code=1)
    assert said["classes"] == {"cat": 4, "dog": 6} and [bad["file"] for bad in said["bad"]] == ["dog/bad.png"]
    assert said["total"] == 10


def test_files_that_no_run_reads_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat/1.avif", "cat/2.HEIC", "cat/3.avif", "cat/4", "dog/.hidden.avif"):
        (folder / name).write_bytes(b"x")
    said = report(capsys, folder)
    assert said["other_files"] == {".avif": 2, ".heic": 1, "": 1, ".txt": 1}
    (row,) = (line for line in lines(capsys, folder) if line.startswith("beside"))
    assert row.startswith("beside      no run reads 5 files that are not named as images: .avif 2, ")
    assert "no suffix 1" in row


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    cases: list[tuple[list[object], type[LditError], str]] = [
        ([folder, "--workers", 0], RequestError, "--workers"),
        ([folder, "--timeout", 0], RequestError, "--timeout"),
        ([folder, "--timeout", "nan"], RequestError, "--timeout"),
        ([folder, "--image-size", 0], RequestError, "--image-size"),
        ([folder, "--max-pixels", 0], RequestError, "--max-pixels"),
        ([folder, "--background", 0, 0, 256], RequestError, "--background"),
        ([tmp_path / "none"], DataError, "no images in"),
        ([tmp_path / "gone"], DataError, "no folder"),
    ]
    for arguments, kind, part in cases:
        with pytest.raises(kind, match=part) as caught:
            dispatch("data", ["check", *map(str, arguments)])
        assert caught.value.code == 2
    for arguments in ([], ["other", "x"], ["check"], ["check", "a", "--colour"]):
        with pytest.raises(LditError):
            dispatch("data", arguments)


def test_loose_images_and_background(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGBA", (4, 4)).save(tmp_path / "a.png")
    said = report(capsys, tmp_path, "--exif", "--background", 0, 0, 0)
    assert (said["kind"], said["classes"], said["modes"]) == ("loose images", {}, {"RGBA": 1})


def idx(path: Path, axes: tuple[int, ...], data: bytes) -> None:
    header = bytes((0, 0, 8, len(axes))) + b"".join(n.to_bytes(4, "big") for n in axes)
    path.write_bytes(gzip.compress(header + data))


def test_idx_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, count in (("train", 5), ("t10k", 3)):
        idx(tmp_path / f"{part}-images-idx3-ubyte.gz", (count, 4, 4), bytes(16 * count))
        idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", (count,), bytes(i % 2 for i in range(count)))
    said = report(capsys, tmp_path)
    assert (said["kind"], said["total"], said["classes"]) == ("a set of IDX files", 8, {"0": 5, "1": 3})


def test_tars(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as archive:
        for i in range(3):
            (tmp_path / f"{i}.cls").write_text(str(i % 2))
            archive.add(folder / "cat" / f"{i}.png", f"{i}.png")
            archive.add(tmp_path / f"{i}.cls", f"{i}.cls")
    said = report(capsys, tmp_path / "shards")
    assert (said["kind"], said["total"], said["classes"]) == ("tar shards", 3, {"0": 2, "1": 1})
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with tarfile.open(tmp_path / "shards" / "0.tar", "a") as archive:
        archive.add(tmp_path / "bad.png", "3.png")
        archive.add(tmp_path / "1.cls", "3.cls")
    said = report(capsys, tmp_path / "shards", code=1)
    assert said["bad"] == [{"file": "0.tar/3.png", "reason": "not a JPEG, PNG, WebP, BMP, PPM, TIFF or GIF image"}]
    assert said["classes"] == {"0": 2, "1": 1}


def test_tars_and_lists_are_looked_at_like_folders(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Modes, sizes and duplicates; the class of an image is its label."""
    names = ["cat/1.png", "cat/copy.png", "cat/2.png", "dog/z.png", "dog/t.jpg"]
    entries = [{"file_name": name, "label": "k" if name == "dog/z.png" else "l"} for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as archive:
        for entry in entries:
            (tmp_path / "cls").write_text(entry["label"])
            archive.add(folder / entry["file_name"], entry["file_name"])
            archive.add(tmp_path / "cls", str(Path(entry["file_name"]).with_suffix(".cls")))
    for root, prefix in ((folder, ""), (tmp_path / "shards", "0.tar/")):
        said = report(capsys, root, "--image-size", 23)
        assert (said["total"], said["formats"], said["modes"]) == (5, {"PNG": 4, "JPEG": 1}, {"RGB": 5})
        assert said["classes"] == {"l": 4, "k": 1} and (said["enlarged"], said["exif_oriented"]) == (4, 1)
        assert said["largest"] == {"width": 100, "height": 50, "name": f"{prefix}dog/t.jpg"}
        assert said["duplicates"] == [
            {"files": [f"{prefix}cat/1.png", f"{prefix}cat/copy.png"], "across_classes": False},
            {"files": [f"{prefix}cat/2.png", f"{prefix}dog/z.png"], "across_classes": True},
        ]


def test_sets_that_do_not_open_are_not_sound(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What would stop a run at its start is a finding, with exit code 1, not a fault of the command."""
    (folder / "metadata.jsonl").write_text("{")
    said = report(capsys, folder, code=1)
    assert said["kind"] == "a folder with metadata.jsonl" and "line 1: broken JSON" in said["problems"][0]
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").write_bytes(b"x" * 1000)
    said = report(capsys, tmp_path / "shards", code=1)
    assert said["kind"] == "tar shards" and "0.tar: no tar header" in said["problems"][0]
    assert lines(capsys, tmp_path / "shards", code=1)[-1] == "verdict     not sound"


def test_a_folder_that_is_sealed_and_no_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A manifest of another kind does not hide the images."""
    (folder / "manifest.json").write_text(json.dumps({"name": "an app"}))
    assert report(capsys, folder)["total"] == 9
    assert np.asarray(Image.open(folder / "cat" / "0.png")).shape == (20, 40, 3)


def test_latent_caches(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "set")
    encode(monkeypatch, job(tmp_path / "set", tmp_path / "cache"))
    capsys.readouterr()
    said = report(capsys, tmp_path / "cache")
    assert (said["kind"], said["total"], said["problems"]) == ("a latent cache", TRAIN + KEPT, [])
    shard = tmp_path / "cache" / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (problem,) = report(capsys, tmp_path / "cache", code=1)["problems"]
    assert str(shard) in problem and "damaged" in problem
    (tmp_path / "cache" / "manifest.json").write_text("{")
    said = report(capsys, tmp_path / "cache", code=1)
    assert said["kind"] == "a latent cache" and "is a latent cache that is damaged" in said["problems"][0]
