"""What a data path is taken for: one file, mixtures, what lies beside, caches that are damaged or not whole."""

import gzip
import json
import logging
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from commands.encoding import encode, job, write_images
from PIL import Image

from ldit.cli.main import dispatch
from ldit.config.sections import DataConfig
from ldit.data.formats import table
from ldit.data.formats.image_folder import ImageFolder, LooseImages
from ldit.data.formats.tars import TarImages
from ldit.data.source import data_root, open_data, open_run_data
from ldit.errors import DataError, EvaluationError


@pytest.fixture(autouse=True)
def _heard() -> None:
    logging.getLogger("ldit").propagate = True


def make(root: Path, *names: str) -> Path:
    """Small images, archives of two of them, and empty files of other names."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(".png"):
            Image.new("RGB", (8, 8)).save(path)
        elif name.lower().endswith(".tar"):
            Image.new("RGB", (8, 8)).save(root.parent / "member.png")
            with tarfile.open(path, "w") as archive:
                for key in "12":
                    archive.add(root.parent / "member.png", f"{key}.png")
        else:
            path.touch()
    return root


def refused(root: Path, said: str) -> None:
    with pytest.raises(DataError, match=said):
        open_data(str(root), 8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


def test_one_file(root: Path) -> None:
    """Archives of any spelling reach what reads them, or says why not; other files are no data."""
    make(root, "a.tar", "note.txt", "Y.TAR")
    packed = root / "x.tar.gz"
    packed.write_bytes(gzip.compress((root / "a.tar").read_bytes()))
    assert len(open_data(str(root / "a.tar"), 8, "")[0]) == len(open_data(str(root / "Y.TAR"), 8, "")[0]) == 2
    refused(packed, r"x\.tar\.gz is packed: random access needs a plain tar")
    refused(root / "note.txt", r"data\.path: .*note\.txt' is a file, neither a tar archive nor a list")
    refused(root / "gone.tar", r"data\.path: no folder .*gone\.tar")


def test_homes_and_folders_that_nobody_may_enter(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data\.path: cannot look at '~nobodyxyz/x': "):
        data_root("~nobodyxyz/x")
    make(root, "a/1.png")

    def refuse(path: object, *arguments: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_dir", refuse)
        with pytest.raises(DataError, match=r"data\.path: cannot look at .*: Permission denied"):
            data_root(str(root))
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(DataError, match=r"cannot list folder .*set: Permission denied"):
            open_data(str(root), 8)
    with monkeypatch.context() as patch:
        patch.setattr(table, "has_idx", refuse)
        with pytest.raises(DataError, match=r"cannot look into folder .*set: Permission denied"):
            open_data(str(root), 8)


def test_archives_beside_images_are_refused(root: Path, tmp_path: Path) -> None:
    """Either half would be missing without a word; with nothing to read in the folders, the archives are the set."""
    said = "holds the archive old.tar and the image {}: which are the training images"
    refused(make(root, "cat/1.png", "old.tar"), said.format("cat/1.png"))
    with pytest.raises(DataError, match=said.format("cat/1.png")):
        dispatch("data", ["check", str(root)])
    refused(make(tmp_path / "loose", "1.png", "old.tar"), said.format("1.png"))
    data, _ = open_data(str(make(tmp_path / "logs", "logs/run.txt", ".cache/1.png", "old.tar")), 8)
    assert isinstance(data, TarImages) and len(data) == 2


@pytest.mark.parametrize("name", ["backup.tar.gz", "metadata.csv"])
def test_what_lies_beside_class_folders_is_named(root: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    data, _ = open_data(str(make(root, "cat/1.png", "dog/1.png", name)), 8)
    assert isinstance(data, ImageFolder) and data.names == ("cat", "dog")
    (message,) = caplog.messages
    assert message.startswith(f"{root / name} is not read: ")


def test_the_same_alone_or_beside_loose_images(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A csv beside loose images would be their labels: without it they were trained on as one class."""
    refused(make(root, "1.png", "metadata.csv"), "of metadata.csv nothing is read")
    refused(make(tmp_path / "packed", "backup.tar.gz"), "backup.tar.gz is packed")
    data, _ = open_data(str(make(tmp_path / "loose", "1.png", "backup.tar.gz")), 8)
    assert isinstance(data, LooseImages) and [message.split()[-1] for message in caplog.messages] == ["images", "1"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("0.png", "old/1.png"), "the image old/1.png and the image 0.png"),
        (("0.png", "old/1.png", "new/1.png", "empty/note.txt"), "the image new/1.png and the image 0.png"),
        (("0.png", "old/deep/1.png"), "the image old/deep/1.png and the image 0.png"),
        (("train-images-idx3-ubyte", "0.png"), "a set of IDX files and the image 0.png"),
        (("train-images-idx3-ubyte", "a/0.png"), "a set of IDX files and the image a/0.png"),
        (("train-images-idx3-ubyte", "old.tar"), "a set of IDX files and the archive old.tar"),
        (("encode.json", "a/0.png"), "a latent cache and the image a/0.png"),
    ],
)  # fmt: skip
def test_images_of_two_kinds_are_refused(root: Path, names: tuple[str, ...], said: str) -> None:
    """Either half would be missing without a word, whatever reads the folder."""
    make(root, *names)
    refused(root, re.escape(f"{root} holds {said}: which are the training images? Move the others elsewhere"))
    for command in (
        ["data", "check", str(root)],
        ["stats", str(root), "--out", f"{root}.npz", "--extractor", "efficientnet-lite0"],
    ):
        with pytest.raises((DataError, EvaluationError), match=re.escape(said)):
            dispatch(command[0], command[1:])


def test_folders_without_images_beside_loose_ones(root: Path) -> None:
    data, _ = open_data(str(make(root, "0.png", "captions/0.txt", "deep/er/note.md")), 8)
    assert isinstance(data, LooseImages) and len(data) == 1


def test_images_that_a_list_leaves_out_are_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(root, "1.png", "a/2.png", "b/3.png", "b/c/4.png", "all.tar")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "a/2.png"}))
    assert len(open_data(str(root), 8)[0]) == 1
    (message,) = caplog.messages
    head = f"{root / 'metadata.jsonl'} lists 1 images and leaves out 4 other files of the folder: "
    assert message.startswith(head) and message.endswith(", … and 1 more")


@pytest.mark.parametrize("apart", [True, False])
def test_lists_that_spell_names_in_another_way(root: Path, apart: bool) -> None:
    """The disk composes accents and the list does not, or the other way; Windows' separators."""
    there, typed = ("cafe\u0301", "caf\u00e9") if apart else ("caf\u00e9", "cafe\u0301")
    make(root, f"{there}/{there}.png", "a/1.png")
    rows = [{"file_name": f"{typed}\\{typed}.png"}, {"file_name": ".\\a\\1.png"}]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data, _ = open_data(str(root), 8)
    assert [data.where(i) for i in range(2)] == [f"{there}/{there}.png", "a/1.png"]
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "a\\..\\..\\1.png"}))
    refused(root, "is not a path below the folder")


def test_names_led_by_a_dot_make_no_classes(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, _ = open_data(str(make(root, "1.png", ".thumbnails/1.png", "._2.png", "._a.tar", ".old.tar.gz")), 8)
    assert isinstance(data, LooseImages) and len(data) == 1 and not caplog.messages
    data, _ = open_data(str(make(root.parent / "classes", "cat/1.png", ".cache/1.png")), 8)
    assert data.names == ("cat",)


def test_caches_that_are_not_whole_or_damaged(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are called caches, not folders without classes; `ldit data check` says the same."""
    cache, begun = tmp_path / "cache", tmp_path / "begun"
    write_images(root)
    assert encode(monkeypatch, job(root, cache)) and not encode(monkeypatch, job(root, begun), world=2)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(begun / "encode.json", bare)  # before its first shard
    faults = dict.fromkeys((begun, bare), "is a latent cache that is not finished: run ldit encode again")
    for number, text in enumerate((None, "{", "[]", '{"files": {}}')):
        damaged = tmp_path / str(number)
        shutil.copytree(cache, damaged)
        (damaged / "manifest.json").unlink()
        if text is not None:
            (damaged / "manifest.json").write_text(text)
        faults[damaged] = "is a latent cache that is damaged: no manifest of one in "
    capsys.readouterr()
    for folder, said in faults.items():
        with pytest.raises(DataError, match=f"{folder} {said}"):
            open_run_data(DataConfig(str(folder), 8))
        with pytest.raises(DataError, match=f"{folder} is a latent cache, images are needed here"):
            open_data(str(folder), 8)
        assert dispatch("data", ["check", str(folder), "--json"]) == 1
        report = json.loads(capsys.readouterr().out)
        assert report["kind"] == "a latent cache" and f"{folder} {said}" in report["problems"][0]


def test_the_index_of_archives_goes_when_a_cache_is_finished(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept beside the job of an unfinished cache only."""
    make(root, "a.tar")
    options = {"image_size": 8, "shard_size": 1}
    assert not encode(monkeypatch, job(root, tmp_path / "cache", **options), world=2)
    assert [name for name in os.listdir(tmp_path / "cache") if name.startswith("tar-index-")]
    assert encode(monkeypatch, job(root, tmp_path / "cache", **options))
    assert sorted(os.listdir(tmp_path / "cache")) == [
        "manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"
    ]  # fmt: skip
