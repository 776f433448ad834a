"""Sets of images as streams: which of their images, what is said of them, what is refused."""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from shutil import copy, copytree
from typing import Any

import numpy as np
import pytest
from eval.evaluation import folder, noise
from pipeline.sets import described, exported, job, made

from ldit.errors import EvaluationError
from ldit.pipeline.sets.description import SetDescription
from ldit.pipeline.sets.stream import GeneratedStream, ImageStream, check_there, open_stream
from ldit.storage.npz import Images

NUM, CLASSES = 12, 4  # of the model's classes a set takes every one by turns
KINDS = ["set", "set.npz"]
DROPPED = {"format", "num", "complete", "labels", "class_names", "arr_0_crc32"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and sets of its images."""
    base = tmp_path_factory.mktemp("sets")
    exported(base / "model")
    with pytest.MonkeyPatch.context() as patch:
        for kind in KINDS:
            made(patch, job(base / "model", NUM), base / kind)
    return base


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    """Both sets, to be spoilt."""
    copytree(whole / "set", tmp_path / "set")
    for name in ("set.npz", "set.npz.json"):
        copy(whole / name, tmp_path / name)
    return tmp_path


def opened(source: Path | str, num: int | None = None, block: int = 5) -> ImageStream:
    return open_stream(str(source), num, None, block)


def images(stream: ImageStream, rank: int = 0, size: int = 1) -> np.ndarray:
    """(N, H, W, 3) of one process's share."""
    return np.concatenate([rows.permute(0, 2, 3, 1).numpy() for _, rows in stream.blocks(rank, size)])


def refused(work: Callable[[], Any], pattern: str) -> None:
    with pytest.raises(EvaluationError, match=pattern) as caught:
        work()
    assert "\n" not in str(caught.value)


def describe(out: Path, **changes: Any) -> None:
    """Change a description; None takes a key away."""
    path = out / "samples.json" if out.is_dir() else out.with_name(f"{out.name}.json")
    found = {**described(out), **changes}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


# ---- which images


@pytest.mark.parametrize("kind", KINDS)
def test_some_images_of_a_made_set_are_its_first(whole: Path, kind: str) -> None:
    """Every fourth would be of one class."""
    stream = opened(whole / kind, 3, block=2)
    assert stream.labels == (0, 1, 2) and stream.count == 3
    with np.load(whole / "set.npz") as found:
        assert np.array_equal(images(stream), found["arr_0"][:3])
        assert np.array_equal(images(opened(whole / kind)), found["arr_0"])


def test_some_images_of_other_folders_are_spread(tmp_path: Path) -> None:
    classed = opened(folder(tmp_path / "classed", noise(12, 0), ("p", "q", "r")), 3)
    assert classed.labels == (0, 1, 2)
    loose = opened(folder(tmp_path / "loose", noise(12, 0)), 3)
    assert loose.labels is None and np.array_equal(images(loose), noise(12, 0)[::4])


# ---- what is said of them


def test_classes_and_names_where_they_are_known(whole: Path, tmp_path: Path) -> None:
    names = tuple(described(whole / "set")["class_names"])
    assert len(names) == CLASSES
    np.savez(tmp_path / "x.npz", arr_0=noise(4, 0), arr_1=np.arange(4))
    for stream, classes, called in (
        (opened(whole / "set"), CLASSES, names),
        (opened(whole / "set.npz"), CLASSES, names),
        (GeneratedStream(job(whole / "model", NUM), NUM), CLASSES, names),
        (opened(folder(tmp_path / "classed", noise(6, 0), ("p", "q", "r"))), 3, ("p", "q", "r")),
        (opened(folder(tmp_path / "loose", noise(6, 0))), None, ()),
        (opened(tmp_path / "x.npz"), None, ()),
    ):
        assert (stream.classes, stream.names) == (classes, called), stream.about


def test_classes_are_those_of_the_model_whichever_were_asked_for(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = job(whole / "model", 4, class_labels=("1", "3"))
    made(monkeypatch, asked, tmp_path / "some")
    for stream in (opened(tmp_path / "some"), GeneratedStream(asked, 4)):
        assert (stream.classes, stream.labels, stream.about["classes"]) == (CLASSES, (1, 3, 1, 3), [1, 3])


def test_the_whole_description_is_what_figures_depend_on(whole: Path) -> None:
    """The same of images that are made now and of sets that were made before."""
    description = {key: value for key, value in described(whole / "set").items() if key not in DROPPED}
    for key in ("evaluations", "label_rule", "sampling", "guide", "int8", "compiled", "codec", "size", "classes",
                "weights", "dtype"):  # fmt: skip
        assert key in description
    assert GeneratedStream(job(whole / "model", NUM), NUM).about == {**description, "count": NUM}
    height, width = description["size"]
    own = {
        "pictures": str(whole / "set"),
        "count": 5,
        "crop": f"{min(height, width)}x{min(height, width)} (ADM's crop)",
    }
    assert opened(whole / "set", 5).about == {**description, **own}
    with zipfile.ZipFile(whole / "set.npz") as archive:
        crc = f"{archive.getinfo('arr_0.npy').CRC:08x}"
    own = {"pictures": str(whole / "set.npz"), "count": 5, "crop": "none", "crc32": crc}
    assert opened(whole / "set.npz", 5).about == {**description, **own}


def test_a_description_counts_for_the_archive_that_it_names(place: Path) -> None:
    """Of another file of that name it says nothing, damaged or not; labels of a file without any come from it."""
    path = place / "set.npz"
    with np.load(path) as found:
        arrays = dict(found)
    np.savez(path, arr_0=arrays["arr_0"])
    assert opened(path, 6).labels == (0, 1, 2, 3, 0, 1)
    np.savez(path, arr_0=arrays["arr_0"], arr_1=arrays["arr_1"][::-1])
    assert opened(path, 2).labels == (3, 2)
    np.savez(path, arr_0=arrays["arr_0"][::-1])
    describe(path, num="many")
    stream = opened(path)
    assert (stream.labels, stream.names, stream.classes) == (None, (), None)
    assert set(stream.about) == {"pictures", "count", "crop", "crc32"}


# ---- descriptions that are damaged


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2), ("num", "12"), ("num", True), ("num", -1), ("complete", "yes"), ("label_rule", ["random"]),
        ("evaluations", "3"), ("labels", [0, 1]), ("labels", ["0"] * NUM), ("labels", [-1] * NUM), ("labels", 5),
        ("labels", [CLASSES] * NUM), ("labels", [10**12] * NUM), ("labels", None), ("labels", [0.5] * NUM),
        ("class_names", 5), ("class_names", [1] * CLASSES), ("class_names", ["a"]), ("network", 5),
        ("network", {"num_classes": "4"}), ("network", {"num_classes": 10**12}),
    ],
)  # fmt: skip
def test_a_description_of_other_kinds(place: Path, kind: str, key: str, value: Any) -> None:
    describe(place / kind, **{key: value})
    refused(lambda: opened(place / kind), rf"(samples|set\.npz)\.json.*\b{key}\b")


@pytest.mark.parametrize("name", ["set/samples.json", "set.npz.json"])
def test_a_description_that_is_none(place: Path, name: str) -> None:
    for content in (b"[]", b"5", b"null", b"{", b"\xff", b"[" * 100_000, b""):
        (place / name).write_bytes(content)
        refused(
            lambda: opened(place / name.removesuffix("/samples.json").removesuffix(".json")), f"{name} is damaged: "
        )


def test_a_description_of_more_images_than_the_archive_has(place: Path) -> None:
    describe(place / "set.npz", num=NUM + 1, labels=[0] * (NUM + 1))
    refused(lambda: opened(place / "set.npz"), r"set\.npz\.json is damaged: num is 13, set\.npz holds 12 images")


@pytest.mark.parametrize("labels", [
    np.array([0, 10**12]), np.array([2**31, 0]), np.array([0, 2**63], np.uint64), np.array([0, -1]),
])  # fmt: skip
def test_labels_that_are_none(tmp_path: Path, labels: np.ndarray) -> None:
    np.savez(tmp_path / "x.npz", arr_0=noise(2, 0), arr_1=labels)
    refused(lambda: opened(tmp_path / "x.npz"), r"x\.npz: arr_1 holds the label (-1|\d{10,})$")


def test_labels_that_are_large(tmp_path: Path) -> None:
    for kind in (np.int64, np.uint64, np.int32):
        np.savez(tmp_path / "x.npz", arr_0=noise(2, 0), arr_1=np.array([2**31 - 1, 0], kind))
        assert opened(tmp_path / "x.npz").labels == (2**31 - 1, 0)


# ---- sets that are not whole, or not alone


def test_a_made_set_of_fewer_images(place: Path) -> None:
    root = place / "set"
    goes_on = "; rerun the same ldit sample command to finish it"
    (root / "000007.png").unlink()
    refused(lambda: opened(root), f"set: the set is not complete, it has 11 of 12 images{goes_on}$")
    for path in root.glob("*.png"):
        path.unlink()
    (root / "notes.txt").write_text("none")
    refused(lambda: opened(root), f"set: the set is not complete, it has 0 of 12 images{goes_on}$")


def test_a_made_set_in_the_making(place: Path) -> None:
    describe(place / "set", complete=False)
    refused(lambda: opened(place / "set"), "not complete, it has 12 of 12 images")


@pytest.mark.parametrize("name", ["grid.png", "000012.png", "0000001.png", "000003.jpg", "00000x.png"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_made_set_with_another_image(place: Path, name: str, gone: bool) -> None:
    """Nor is it taken for one that is gone."""
    copy(place / "set/000000.png", place / "set" / name)
    if gone:
        (place / "set/000005.png").unlink()
    refused(lambda: opened(place / "set"), f"set: holds {name} beside the 12 images of its samples.json$")


def test_what_images_of_a_set_are_called() -> None:
    """More than a million take more digits."""
    few, many = (SetDescription(num, True, {}, None, (), None) for num in (12, 10**6 + 1))
    assert few.is_own("000011.png") and not few.is_own("000011") and not few.is_own("0000011.png")
    assert many.is_own("0000011.png") and many.is_own("1000000.png") and not many.is_own("000011.png")


def test_an_array_in_the_making(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npz"
    line = r"x\.npz: the set is not complete; rerun the same ldit sample command to finish it$"
    assert not made(monkeypatch, job(whole / "model", NUM), path, 0, 2) and path.with_name("x.npz.parts").is_dir()
    refused(lambda: opened(path), line)
    refused(lambda: check_there(str(path)), line)
    assert made(monkeypatch, job(whole / "model", NUM), path, 1, 2)
    assert opened(path).count == NUM


# ---- checksums


@pytest.mark.parametrize("saver", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("size", "num"), [(1, None), (2, None), (1, 4), (2, 4)])
def test_a_turned_byte_in_a_late_image(tmp_path: Path, saver: Callable[..., None], size: int, num: int | None) -> None:
    """By the process that reports, whoever reads that image, and where nobody does. The first 16 KiB are read as the
    file is opened."""
    path, arrays = tmp_path / "x.npz", noise(200, 0)
    saver(path, arr_0=arrays)
    assert np.array_equal(images(opened(path, num, 3), 0, size)[:3], arrays[:3])
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("arr_0.npy").compress_size - 200
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    stream = opened(path, num, 3)
    refused(lambda: images(stream, 0, size), r"x\.npz is damaged")


def test_a_file_is_not_read_twice_for_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a process passes over all of it anyway, and by others than the first."""
    np.savez(tmp_path / "stored.npz", arr_0=noise(10, 0))
    np.savez_compressed(tmp_path / "packed.npz", arr_0=noise(10, 0))
    asked: list[str] = []
    monkeypatch.setattr(Images, "verify", lambda self: asked.append(self.member.path.stem))
    for num, size, checks in (
        (None, 1, []), (None, 2, ["stored"]), (6, 1, ["stored", "packed"]), (6, 2, ["stored", "packed"]),
    ):  # fmt: skip
        asked.clear()
        for name in ("stored", "packed"):
            shares = [images(opened(tmp_path / f"{name}.npz", num, 3), rank, size) for rank in range(size)]
            assert sum(map(len, shares)) == (num or 10)
        assert asked == checks


# ---- what is no set of images


def test_places_without_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "notes", noise(1, 0))
    (tmp_path / "notes/0000.png").rename(tmp_path / "notes/.hidden.png")
    (tmp_path / "notes/readme.txt").write_text("none")
    np.savez(tmp_path / "none.npz", arr_0=np.empty((0, 8, 8, 3), np.uint8))
    for name in ("empty", "notes", "none.npz"):
        for side in (None, 8):
            refused(lambda: open_stream(str(tmp_path / name), None, side, 4), f"{name}: holds no images$")  # noqa: B023


@pytest.mark.parametrize("name", ["nowhere", "nowhere.npz", "nowhere@heldout", "~nobody-at-all/x", "a/b"])
def test_places_that_are_not_there(tmp_path: Path, name: str) -> None:
    source = name if name.startswith("~") else str(tmp_path / name)
    for work in (opened, check_there):
        refused(lambda: work(source), f"^{re.escape(source)}: no such file or folder$")  # noqa: B023


def test_places_that_are_there(whole: Path) -> None:
    for source in ("emoji64", "emoji64@heldout", str(whole / "set"), str(whole / "set.npz"), f"{whole / 'set'}@train"):
        check_there(source)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_none(whole: Path, kind: str) -> None:
    for name, numbers in (("num", (0, 8, 4)), ("image_size", (2, 0, 4)), ("batch_size", (2, 8, -1))):
        refused(lambda: open_stream(str(whole / kind), *numbers), f"^{name}: must be at least 1, got (0|-1)$")  # noqa: B023
    refused(lambda: opened(whole / kind, NUM + 1), "holds 12 images, 13 are asked for")
