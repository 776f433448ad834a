"""Image folders: what is refused at the start, names, order and fingerprint."""

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldit.data.formats.image_folder import ImageFolder, LooseImages
from ldit.data.images.decoding import Decoding
from ldit.data.source import open_data
from ldit.errors import DataError


def make(root: Path, *names: str, size: tuple[int, int] = (4, 4)) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i, i, i)).save(root / name)
    return root


@pytest.mark.parametrize(("first", "second"), [("Cat", "cat"), ("STRASSE", "straße"), ("É", "é")])
def test_classes_that_differ_in_case_alone_are_refused(tmp_path: Path, first: str, second: str) -> None:
    make(tmp_path, f"{first}/1.png", f"{second}/1.png", "dog/1.png")
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("this disk does not tell them apart")
    with pytest.raises(DataError) as caught:
        ImageFolder(tmp_path, 4)
    assert str(caught.value) == f"{tmp_path}: the classes {first!r} and {second!r} differ in case alone"


@pytest.mark.parametrize(("first", "second"), [("e\u0301", "\u00e9"), ("E\u0301", "\u00e9")])
def test_classes_that_differ_in_unicode_form_alone(tmp_path: Path, first: str, second: str) -> None:
    """macOS takes them for one folder."""
    make(tmp_path, f"{first}/1.png", f"{second}/1.png")
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this disk does not tell them apart")
    with pytest.raises(DataError) as caught:
        ImageFolder(tmp_path, 4)
    assert f"differ in case or the Unicode form of accents alone: {first!a}, {second!a}" in str(caught.value)


def test_names_order_and_fingerprint(tmp_path: Path) -> None:
    """Byte order of the paths, subfolders among them; the fingerprint is that of the names alone."""
    names = ["B/2.png", "a/A.PNG", "a/b/1.jpeg", "a/b.png", "a/ä.gif"]
    make(tmp_path, *reversed(names))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "x.png").mkdir()  # a folder, whatever its name
    data = ImageFolder(tmp_path, 4)
    assert [data.where(i) for i in range(len(data))] == ["B/2.png", "a/A.PNG", "a/b.png", "a/b/1.jpeg", "a/ä.gif"]
    assert data.paths == [tmp_path / data.where(i) for i in range(5)] and data.labels == [0, 1, 1, 1, 1]
    wanted = b"B/2.png\na/A.PNG\na/b.png\na/b/1.jpeg\na/" + "ä".encode() + b".gif"
    assert data.fingerprint() == hashlib.sha256(wanted).hexdigest()
    loose = LooseImages(tmp_path / "a" / "b", 4)
    assert loose.where(0) == "1.jpeg" and loose.fingerprint() == hashlib.sha256(b"1.jpeg").hexdigest()


def test_linked_folders(tmp_path: Path) -> None:
    """A class may be a link; below it links to folders are passed over, in circles or not. Links to files count."""
    make(tmp_path / "elsewhere", "1.png", "deep/2.png")
    root = tmp_path / "data"
    root.mkdir()
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(".")
    (tmp_path / "elsewhere" / "3.png").symlink_to("1.png")
    data = ImageFolder(root, 4)
    assert [data.where(i) for i in range(len(data))] == ["a/1.png", "a/3.png", "a/deep/2.png"]
    assert np.array_equal(data[0][0], data[1][0])


def test_names_led_by_a_dot_are_passed_over(tmp_path: Path) -> None:
    """Folders that programs keep beside the classes or below them, and macOS's ._ files."""
    make(tmp_path, ".cache/1.png", "a/.thumbnails/1.png", "a/._1.png", "a/1.png", ".2.png")
    data = ImageFolder(tmp_path, 4)
    assert data.names == ("a",) and [data.where(i) for i in range(len(data))] == ["a/1.png"]


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPE"])
def test_other_names_of_a_jpeg(tmp_path: Path, suffix: str) -> None:
    make(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "1.jpg").rename(tmp_path / "a" / f"1.{suffix}")
    assert ImageFolder(tmp_path, 4)[0][0].shape == (4, 4, 3)


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", ".thumbnails", "$RECYCLE.BIN", "#recycle", "lost+found"])
def test_folders_that_machines_make_are_passed_over(tmp_path: Path, name: str) -> None:
    """Beside the classes, below them, and beside loose images."""
    make(tmp_path, f"{name}/1.png", f"a/{name}/1.png", "a/1.png")
    data = ImageFolder(tmp_path, 4)
    assert data.names == ("a",) and [data.where(i) for i in range(len(data))] == ["a/1.png"]
    loose, _ = open_data(str(make(tmp_path / "loose", "1.png", f"{name}/1.png")), 4)
    assert isinstance(loose, LooseImages) and len(loose) == 1


@pytest.mark.parametrize("name", ["x\ny", "x\ty", "x\u2028y", "x\x1b[31my"])
def test_class_folders_whose_name_is_no_line_of_text(tmp_path: Path, name: str) -> None:
    make(tmp_path, f"{name}/1.png", "z/1.png")
    with pytest.raises(DataError, match="is not one line of text") as caught:
        ImageFolder(tmp_path, 4)
    assert ascii(name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (("train/a/1.png", "train/b/1.png", "val/a/1.png"), "train, val"),
        (("train/1.png", "Test/1.png"), "Test, train"),
        (("validation/a/1.png",), "validation"),
    ],
)
def test_the_root_of_a_set_in_parts(tmp_path: Path, files: tuple[str, ...], named: str) -> None:
    make(tmp_path, *files)
    part = next((name for name in ("train",) if (tmp_path / name).exists()), "validation")
    with pytest.raises(DataError) as caught:
        ImageFolder(tmp_path, 4)
    assert str(caught.value) == (
        f"{tmp_path} holds {named}: parts of a set, not classes; train on one of them (data.path {tmp_path / part})"
    )


def test_folders_named_as_parts_that_are_classes(tmp_path: Path) -> None:
    assert ImageFolder(make(tmp_path / "vehicles", "train/1.png", "tram/1.png"), 4).names == ("train", "tram")
    assert ImageFolder(make(tmp_path / "one", "train/1.png"), 4).names == ("train",)


def test_files_that_are_not_read_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once for the set and its held-out part; text beside images, hidden files and machines' own are not meant."""
    logging.getLogger("ldit").propagate = True
    make(tmp_path, "a/1.png", "a/2.png", "a/@eaDir/1.png")
    for name in ("a/1.avif", "a/2.HEIC", "a/b/3.avif", "a/4", "a/1.txt", "a/.5.avif", "a/Thumbs.db", "a/@eaDir/x.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "heldout.txt").write_text("a/1.png")
    open_data(str(tmp_path), 4)
    assert caplog.messages == [f"{tmp_path}: 4 files are not read as images: .avif 2, .heic 1, no suffix 1"]


def test_folders_that_cannot_be_listed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their images would be missing unseen, and another run might see them."""
    make(tmp_path, "a/1.png", "a/deep/2.png")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if path.endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"cannot list folder .*deep: Permission denied"):
        ImageFolder(tmp_path, 4)


def test_decoding_reaches_the_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "a" / "1.png")
    assert (ImageFolder(tmp_path, 4)[0][0] == 255).all()
    painted = Decoding(background=(1, 2, 3))
    assert (ImageFolder(tmp_path, 4, decoding=painted)[0][0] == (1, 2, 3)).all()
    assert (LooseImages(tmp_path / "a", 4, decoding=painted)[0][0] == (1, 2, 3)).all()
    with pytest.raises(DataError, match=r"cannot read image .*1\.png: 4 x 4 = 16 pixels, more than max_pixels 15"):
        ImageFolder(tmp_path, 4, decoding=Decoding(max_pixels=15))[0]


def test_small_sets_are_kept_in_memory(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png")
    data = ImageFolder(tmp_path, 4)
    first = data[0][0]
    (tmp_path / "a" / "1.png").unlink()
    assert data[0][0] is first
