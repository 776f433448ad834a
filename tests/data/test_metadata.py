"""metadata.jsonl: what lines say, which images they may name, lists, captions, every way to be wrong."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hostile_tars import png

from ldit.data.formats import metadata
from ldit.data.formats.metadata import MetadataImages, read_metadata
from ldit.data.formats.recognise import has_metadata, other_metadata
from ldit.data.images.decoding import Decoding
from ldit.errors import DataError


def write(root: Path, *lines: Any, end: str = "\n") -> Path:
    """metadata.jsonl of objects, or of lines as they are."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (root / "metadata.jsonl").write_bytes("".join(text + end for text in texts).encode("utf-8", "surrogatepass"))
    return root


def open_folder(root: Path, **settings: Any) -> MetadataImages:
    return MetadataImages(root, 4, Decoding(), **settings)


def wheres(data: MetadataImages) -> list[str]:
    return [data.where(i) for i in range(len(data))]


def refused(root: Path, *lines: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_folder(write(root, *lines))
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six images of grey 0, 10, …, 50: a.png and b.png, the others in folders."""
    for i, name in enumerate(("a.png", "b.png", "x/c.png", "x/y/d.png", "x/ü.png", "x/f.jpg.png")):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(10 * i))
    return tmp_path / "set"


def test_images_in_the_order_of_the_lines(root: Path) -> None:
    write(
        root,
        {"file_name": "x/y/d.png", "label": "two", "more": [1, {"a": None}]},
        {"file_name": "./a.png", "class": "one"},
        {"label": "two", "file_name": "x//./ü.png"},
    )
    data = open_folder(root)
    assert (len(data), data.num_before_cap, data.root, data.size, data.names) == (3, 3, root, 4, ("one", "two"))
    assert wheres(data) == ["x/y/d.png", "a.png", "x/ü.png"]
    assert [(int(data[i][0][0, 0, 0]), data[i][1]) for i in range(3)] == [(30, 1), (0, 0), (40, 1)]
    assert data[0][0].shape == (4, 4, 3)
    with pytest.raises(DataError, match=r"line 1: no caption"):
        data.captions()
    lines = ["x/y/d.png\0" + "1\n", "a.png\0" + "0\n", "x/ü.png\0" + "1\n"]
    assert data.fingerprint() == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_blank_lines_marks_and_line_ends(root: Path) -> None:
    write(root, "\ufeff", "", '{"file_name": "a.png"}', " \t", '{"file_name": "b.png"}', "", end="\r\n")
    assert wheres(open_folder(root)) == ["a.png", "b.png"]
    write(root, '\ufeff{"file_name": "b.png"}\n\n{"file_name": "a.png"}', end="")
    assert wheres(open_folder(root)) == ["b.png", "a.png"]
    assert "line 4:" in refused(root, "\ufeff", "", '{"file_name": "a.png"}', "{}")


def test_captions_go_with_their_images(root: Path) -> None:
    names = ["a.png", "b.png", "x/c.png", "x/ü.png"]
    texts: list[dict[str, Any]] = [
        {"text": "ein Bär"},
        {"caption": "b", "text": None},
        {},
        {"text": "u", "caption": "v"},
    ]
    write(root, *({"file_name": name} | text for name, text in zip(names, texts, strict=True)))
    with pytest.raises(DataError, match=r"metadata.jsonl, line 3: no caption \(text or caption\)"):
        open_folder(root).captions()
    texts[2] = {"text": ["b", "two"], "weights": [1, 3]}
    write(root, *({"file_name": name} | text for name, text in zip(names, texts, strict=True)))
    # The table is that of all lines, whatever a held-out list leaves.
    data = open_folder(root, exclude=["b.png"])
    captions = data.captions()
    assert [data.caption_row(i) for i in range(3)] == [0, 2, 3] and len(captions) == 4
    drawn = [captions.texts[captions.draw(2, u)] for u in (0.0, 0.2499, 0.25, 0.9999)]
    assert drawn == ["b", "b", "two", "two"] and captions.texts[captions.main(2)] == "two"
    assert [captions.texts[captions.main(i)] for i in (0, 1, 3)] == ["ein Bär", "b", "u"]


def test_lists_and_caps(root: Path) -> None:
    names = ["a.png", "b.png", "x/c.png", "x/y/d.png", "x/ü.png", "x/f.jpg.png"]
    write(root, *({"file_name": name, "label": i % 2} for i, name in enumerate(names)))
    index, listed = read_metadata(root), ["x/ü.png", "b.png", "a", "none.png"]
    train, heldout = open_folder(root, exclude=listed, index=index), open_folder(root, only=listed, index=index)
    assert wheres(heldout) == ["b.png", "x/ü.png"] and [heldout[i][1] for i in range(2)] == [1, 0]
    assert wheres(train) == ["a.png", "x/c.png", "x/y/d.png", "x/f.jpg.png"]
    capped = open_folder(root, max_per_class=1)
    assert (len(capped), capped.num_before_cap, {capped[i][1] for i in range(2)}) == (2, 6, {0, 1})
    with pytest.raises(DataError, match="no images left"):
        open_folder(root, exclude=names)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"file_name": "a.png"', "broken JSON"),
        ("a.png", "broken JSON"),
        ('["a.png"]', "not an object"),
        ("[" * 100_000, "broken JSON"),
        ('{"file_name": "a.png", "n": ' + "1" * 5000 + "}", "broken JSON"),
        ({"label": 1}, 'no "file_name"'),
        ({"file_name": 7}, '"file_name" is a int'),
        ({"file_name": ""}, "not a path below"),
        ({"file_name": "."}, "not a path below"),
        ({"file_name": "../a.png"}, "'../a.png' is not a path below"),
        ({"file_name": "x/../../set/a.png"}, "not a path below"),
        ({"file_name": "x/../a.png"}, "not a path below"),
        ({"file_name": "/etc/passwd"}, "'/etc/passwd' is not a path below"),
        ({"file_name": "a.png\0"}, "cannot be the name"),
        ('{"file_name": "\\ud800.png"}', "cannot be the name"),
        ({"file_name": "none.png"}, "'none.png' does not exist"),
        ({"file_name": "none/a.png"}, "'none/a.png' does not exist"),
        ({"file_name": "a.png/b.png"}, "'a.png/b.png' does not exist"),
        ({"file_name": "A.PNG"}, "'A.PNG' does not exist"),
        ({"file_name": "n" * 5000}, "does not exist"),
        ({"file_name": "x/y"}, "'x/y' is not a file"),
        ({"file_name": "b.png"}, "'b.png' is listed twice"),
        ({"file_name": ".//b.png"}, "'b.png' is listed twice"),
        ({"file_name": "a.png", "label": -1}, "its label -1 is not a class"),
        ("\udcff", "not UTF-8"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_line_that_is_wrong_is_named(root: Path, line: Any, said: str) -> None:
    message = refused(root, {"file_name": "b.png"}, "", line)
    assert f"{root}/metadata.jsonl, line 3: " in message and said in message


def test_links_stay_inside(root: Path) -> None:
    (root.parent / "secret.png").write_bytes(png())
    (root.parent / "other").mkdir()
    (root.parent / "other" / "a.png").write_bytes(png())
    (root.parent / "set-2").mkdir()
    (root.parent / "set-2" / "a.png").write_bytes(png())
    (root / "near.png").symlink_to("../set-2/a.png")
    (root / "out.png").symlink_to("../secret.png")
    (root / "way").symlink_to(root.parent / "other")
    (root / "loop.png").symlink_to("loop.png")
    (root / "gone.png").symlink_to("none.png")
    (root / "in.png").symlink_to("x/c.png")
    (root / "short").symlink_to("x/y")
    os.mkfifo(root / "pipe.png")
    for name, said in [
        ("out.png", "'out.png' is a link that leads out of the folder"),
        ("near.png", "'near.png' is a link that leads out of the folder"),
        ("way/a.png", "'way/a.png' is a link that leads out of the folder"),
        ("loop.png", "'loop.png' is not a file"),
        ("gone.png", "'gone.png' is not a file"),
        ("pipe.png", "'pipe.png' is not a file"),
    ]:
        assert said in refused(root, {"file_name": name})
    data = open_folder(write(root, {"file_name": "in.png"}, {"file_name": "short/d.png"}))
    assert [int(data[i][0][0, 0, 0]) for i in range(2)] == [20, 30]
    (root.parent / "door").symlink_to(root)  # the folder itself may be reached by a link
    assert len(open_folder(root.parent / "door")) == 2


def test_images_are_looked_up_by_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One scan a folder, however many lines, and one more for what is not listed."""
    for i in range(50):
        (root / "x" / f"{i}.png").write_bytes(b"")
    scanned, scan = [], os.scandir
    monkeypatch.setattr(metadata.os, "scandir", lambda path: scanned.append(str(path)) or scan(path))
    read_metadata(write(root, {"file_name": "a.png"}, *({"file_name": f"x/{i}.png"} for i in range(50))))
    assert scanned[:2] == [f"{root}/", f"{root}/x"] and len(scanned) <= 5  # the rest counts unlisted images


def test_a_image_that_cannot_be_read_is_named(root: Path) -> None:
    (root / "x" / "c.png").write_bytes(b"no picture")
    data = open_folder(write(root, {"file_name": "x/c.png"}, {"file_name": "a.png"}))
    with pytest.raises(DataError, match=rf"^cannot read image {root}/x/c\.png: \S"):
        data[0]
    (root / "a.png").unlink()
    with pytest.raises(DataError, match=rf"^cannot read image {root}/a\.png: \S"):
        data[1]


def test_other_metadata_is_said_not_to_be_read(root: Path) -> None:
    assert not has_metadata(root) and other_metadata(root) is None
    with pytest.raises(DataError, match=rf"no metadata\.jsonl in {root}$"):
        open_folder(root)
    (root / "metadata.csv").write_text("file_name,label\na.png,1\n")
    assert not has_metadata(root) and other_metadata(root) == "metadata.csv"
    with pytest.raises(DataError, match=r"no metadata\.jsonl in .*: of metadata\.csv nothing is read"):
        open_folder(root)
    assert has_metadata(write(root, {"file_name": "a.png"})) and len(open_folder(root)) == 1
    (root / "metadata.jsonl").unlink()
    os.mkfifo(root / "metadata.jsonl")
    with pytest.raises(DataError, match=r"metadata\.jsonl is not a file"):
        open_folder(root)
    (root / "metadata.jsonl").unlink()
    (root / "metadata.jsonl").mkdir()
    with pytest.raises(DataError, match=r"metadata\.jsonl"):
        open_folder(root)
