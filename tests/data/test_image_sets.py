"""Sets without classes, and how a set meets a model's number of classes."""

import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldit.config.sections import DataConfig
from ldit.data.formats.image_folder import ImageFolder, LooseImages
from ldit.data.images.image_set import ImageSet
from ldit.data.loader import Loader
from ldit.data.samples import Samples, Unlabelled, fit_classes
from ldit.data.source import open_data, open_run_data
from ldit.errors import DataError


@pytest.fixture
def loose(tmp_path: Path) -> Path:
    """Six images of distinct grey, and files that are none."""
    for i, name in enumerate(("b.png", "a.jpg", "C.PNG", "d.webp", "e.bmp", "ä.png")):
        Image.new("RGB", (10, 20), (40 * i,) * 3).save(tmp_path / name, quality=100, lossless=True)
    (tmp_path / "notes.md").write_text("not an image")
    return tmp_path


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for i, name in enumerate(("x/1.png", "y/1.png", "y/2.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (40 * i,) * 3).save(tmp_path / name)
    return tmp_path


def label(data: Samples, index: int) -> int:
    return data.read(index, False, np.empty(data.shape, np.float32))


def names(data: ImageSet) -> list[str]:
    assert isinstance(data, LooseImages)
    return [path.name for path in data.paths]


def test_loose_images_have_no_classes(loose: Path) -> None:
    data, heldout = open_data(str(loose), 8)
    assert heldout is None and data.names == () and (len(data), data.num_before_cap, data.size) == (6, 6, 8)
    assert names(data) == ["C.PNG", "a.jpg", "b.png", "d.webp", "e.bmp", "ä.png"]  # byte order
    assert [data[i][1] for i in range(6)] == [0] * 6
    assert [int(data[i][0][0, 0, 0]) for i in (0, 2, 3, 5)] == [80, 0, 120, 200]
    (batch,) = Loader(data, 6, 0, flip=False).from_step(0, 1)
    assert batch.labels.tolist() == [0] * 6


def test_loose_images_keep_lists_and_caps(loose: Path) -> None:
    (loose / "heldout.txt").write_text("d.webp\nä.png\n")
    train, heldout = open_data(str(loose), 8)
    assert heldout is not None and names(heldout) == ["d.webp", "ä.png"]
    assert names(train) == ["C.PNG", "a.jpg", "b.png", "e.bmp"]
    assert len(open_data(str(loose), 8, "")[0]) == 6
    capped, _ = open_data(str(loose), 8, max_per_class=2)
    assert len(capped) == 2 and capped.num_before_cap == 4 and set(names(capped)) < set(names(train))
    assert capped.fingerprint() == open_data(str(loose), 8, max_per_class=2)[0].fingerprint() != train.fingerprint()
    (loose / "heldout.txt").write_text("\n".join(p.name for p in loose.iterdir()))
    with pytest.raises(DataError, match="no images left"):
        open_data(str(loose), 8)


def test_entries_of_a_list_that_match_nothing_are_told(loose: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ldit").propagate = True
    (loose / "heldout.txt").write_text("d.webp\nd.webp\nä.png\n")
    open_data(str(loose), 8)
    assert not caplog.messages
    (loose / "heldout.txt").write_text("d.webp\nD.webp\ngone.png\n")
    _, heldout = open_data(str(loose), 8)
    assert heldout is not None and names(heldout) == ["d.webp"]
    said = f"{loose / 'heldout.txt'}: 2 of 3 entries match no image, the first is 'D.webp'"
    assert caplog.messages == [said]


def test_a_key_of_many_images_hides_no_lost_entry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A bare key holds in every archive: entries are counted, not images."""
    logging.getLogger("ldit").propagate = True
    for shard in "abc":
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for key in ("1", "2"):
                Image.new("RGB", (8, 8)).save(tmp_path / "picture", "png")
                archive.add(tmp_path / "picture", f"{key}.png")
    (tmp_path / "heldout.txt").write_text("1\nb.tar/1.png\n3\n")
    train, heldout = open_data(str(tmp_path), 8)
    assert heldout is not None and (len(train), len(heldout)) == (3, 3)
    said = f"{tmp_path / 'heldout.txt'}: 1 of 3 entries match no image, the first is '3'"
    assert caplog.messages == [said]


def test_lists_as_editors_write_them(classes: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A byte order mark and Windows' line ends change nothing; a name may hold what splits lines elsewhere."""
    logging.getLogger("ldit").propagate = True
    strange = "y/a\u2028b\x85.png"
    Image.new("RGB", (8, 8)).save(classes / strange)
    (classes / "heldout.txt").write_bytes(f"\ufeffy/1.png\r\n{strange}\r\n".encode())
    train, heldout = open_data(str(classes), 8)
    assert heldout is not None and [heldout.where(i) for i in range(len(heldout))] == ["y/1.png", strange]
    assert [train.where(i) for i in range(len(train))] == ["x/1.png", "y/2.png"] and not caplog.messages


def test_lists_that_cannot_be_used(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = classes / "heldout.txt"
    path.write_bytes("y/1.png\ny/ü.png\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"held-out list .*heldout\.txt, line 2: not UTF-8 text"):
        open_data(str(classes), 8)
    path.write_text("# all of it is for training\n")
    with pytest.raises(DataError, match=r"heldout\.txt lists no images"):
        open_data(str(classes), 8)
    assert len(open_data(str(classes), 8, "")[0]) == 3

    def refuse(*arguments: object, **named: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(DataError, match=r"cannot read held-out list .*heldout\.txt: Permission denied"):
        open_data(str(classes), 8)


def test_a_list_takes_no_whole_class(classes: Path) -> None:
    (classes / "heldout.txt").write_text("x/1.png\n")
    with pytest.raises(DataError, match=r"heldout\.txt lists every image of class 'x': none is left for training"):
        open_data(str(classes), 8)
    (classes / "heldout.txt").write_text("y/1.png\n")
    train, heldout = open_data(str(classes), 8, max_per_class=1)
    assert heldout is not None and (len(train), len(heldout)) == (2, 1)


def test_damaged_loose_images_are_named(loose: Path) -> None:
    (loose / "C.PNG").write_bytes(b"no")
    with pytest.raises(DataError, match=r"C\.PNG"):
        open_data(str(loose), 8)[0][0]
    (loose / "none").mkdir()
    with pytest.raises(DataError, match="no images in"):
        LooseImages(loose / "none", 8)


def test_labels_can_be_taken_away(classes: Path) -> None:
    whole = ImageFolder(classes, 8)
    plain = Unlabelled(whole)
    assert plain.names == () and (len(plain), plain.num_before_cap, plain.root, plain.shape) == (
        3,
        3,
        classes,
        (3, 8, 8),
    )
    assert [label(whole, i) for i in range(3)] == [0, 1, 1] and [label(plain, i) for i in range(3)] == [0, 0, 0]
    ours, theirs = (np.empty((3, 8, 8), np.float32) for _ in range(2))
    for i in range(3):
        for flip in (False, True):
            whole.read(i, flip, ours)
            plain.read(i, flip, theirs)
            assert (ours == theirs).all() and plain.where(i) == whole.where(i)
    assert plain.fingerprint() == whole.fingerprint()


def test_names_in_other_spellings(classes: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Accents as macOS takes them apart, Windows' backslashes, "./" in front: in folders, and in lists either way."""
    logging.getLogger("ldit").propagate = True
    apart, composed = "cafe\u0301", "caf\u00e9"
    (classes / "x").rename(classes / apart)
    Image.new("RGB", (8, 8)).save(classes / apart / f"{composed}.png")
    for entry in (f"{composed}/1.png", f"{apart}\\1.png", f".\\{composed}\\1.png", f"./{apart}/1.png"):
        (classes / "heldout.txt").write_text(f"{entry}\ny\\1.png\n", encoding="utf-8")
        train, heldout = open_data(str(classes), 8)
        assert heldout is not None and [heldout.where(i) for i in range(2)] == [f"{apart}/1.png", "y/1.png"], entry
        assert [train.where(i) for i in range(2)] == [f"{apart}/{composed}.png", "y/2.png"] and not caplog.messages


def test_a_list_of_other_images_says_so(classes: Path) -> None:
    (classes / "heldout.txt").write_text("z/1.png\nz/2.png\n")
    with pytest.raises(DataError, match=r"none of the 2 images of the held-out list is there, the first is 'z/1.png'"):
        open_data(str(classes), 8)


def test_a_set_meets_the_models_classes(classes: Path) -> None:
    (classes / "heldout.txt").write_text("y/2.png\n")
    config = DataConfig(str(classes), 8)
    train, heldout = open_run_data(config, 2)
    assert heldout is not None and train.names == heldout.names == ("x", "y") and label(heldout, 0) == 1
    train, heldout = open_run_data(config, 0)
    assert heldout is not None and train.names == heldout.names == () and label(heldout, 0) == 0
    for count in (1, 3):
        with pytest.raises(DataError, match=f"has 2 classes, the model has num_classes {count}"):
            open_run_data(config, count)


def test_a_model_with_classes_needs_labels(loose: Path) -> None:
    data, _ = open_run_data(DataConfig(str(loose), 8), 0)
    assert isinstance(data, LooseImages) and fit_classes(data, 0) is data
    with pytest.raises(DataError, match=r"without classes.*num_classes 1 .*num_classes 0"):
        fit_classes(data, 1)
