"""Labels of all kinds, by both sets that bring them: numbers, names, none, mixtures, and what is no label."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hostile_tars import END, PNG, member

from ldit.data.byte_strings import ByteStrings
from ldit.data.formats.labels import class_names, json_object, label_of_text
from ldit.data.formats.listed import ListedImages
from ldit.data.formats.metadata import MetadataImages
from ldit.data.formats.tars import TarImages
from ldit.data.images.decoding import Decoding
from ldit.errors import DataError

NONE = object()
Make = Callable[[Path, list[Any]], ListedImages]


def by_objects(root: Path, labels: list[Any]) -> ListedImages:
    """Sample i of an archive is i.png; its .json holds labels[i]."""
    parts = []
    for i, label in enumerate(labels):
        parts += [
            member(b"%d.png" % i),
            member(b"%d.json" % i, json.dumps({} if label is NONE else {"label": label}).encode()),
        ]
    (root / "a.tar").write_bytes(b"".join(parts) + END)
    return TarImages(root, 4, Decoding())


def by_texts(root: Path, labels: list[Any]) -> ListedImages:
    """… its .cls holds it."""
    parts = []
    for i, label in enumerate(labels):
        parts += [member(b"%d.png" % i)] + ([] if label is NONE else [member(b"%d.cls" % i, f"{label}\n".encode())])
    (root / "a.tar").write_bytes(b"".join(parts) + END)
    return TarImages(root, 4, Decoding())


def by_lines(root: Path, labels: list[Any]) -> ListedImages:
    """… line i of metadata.jsonl names it."""
    lines = []
    for i, label in enumerate(labels):
        (root / f"{i}.png").write_bytes(PNG)
        lines.append(json.dumps({"file_name": f"{i}.png"} | ({} if label is NONE else {"label": label})))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return MetadataImages(root, 4, Decoding())


ways = pytest.mark.parametrize("make", [by_objects, by_texts, by_lines])
typed = pytest.mark.parametrize("make", [by_objects, by_lines])


def labels(data: ListedImages) -> list[int]:
    return [data[i][1] for i in range(len(data))]


@ways
def test_numbers_are_classes(make: Make, tmp_path: Path) -> None:
    data = make(tmp_path, [2, 0, 1, 2, 10, *range(3, 10)])
    assert data.names == tuple(map(str, range(11))) and labels(data) == [2, 0, 1, 2, 10, *range(3, 10)]


@ways
def test_numbers_take_names_from_a_file(make: Make, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("not\nread\nwhere the other is\n")
    (tmp_path / "classes.txt").write_text("\ufeffzebra\n\n  ape of two words \r\n", encoding="utf-8")
    data = make(tmp_path, [1, 0, 1])
    assert data.names == ("zebra", "ape of two words") and labels(data) == [1, 0, 1]
    with pytest.raises(DataError, match=r"classes\.txt names 2 classes, the labels of .* make 3"):
        make(tmp_path, [0, 1, 2])
    (tmp_path / "classes.txt").write_text("same\nsame\n")
    with pytest.raises(DataError, match=r"classes\.txt: class name 'same' occurs twice"):
        make(tmp_path, [0, 1])


@ways
def test_every_class_must_occur(make: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labels go to 4, which makes 5 classes, but 3 occur; class 1 has no image"):
        make(tmp_path, [4, 0, 2, 2])
    with pytest.raises(
        DataError, match="labels go to 2147483647, which makes 2147483648 classes, but 1 occur; class 0"
    ):
        make(tmp_path, [2**31 - 1])
    with pytest.raises(DataError, match="labels go to 2, which makes 3 classes, but 2 occur; class 0 has no image"):
        make(tmp_path, [1, 2])  # counted from 1


@ways
def test_names_are_classes_in_byte_order(make: Make, tmp_path: Path) -> None:
    """Upper case before lower, and code points by their UTF-8: U+FF5E (EF…) before U+1F600 (F0…)."""
    data = make(tmp_path, ["b", "\U0001f600", "\uff5e", "a c", "Z", "b"])
    assert data.names == ("Z", "a c", "b", "\uff5e", "\U0001f600") and labels(data) == [2, 4, 3, 1, 0, 2]


@ways
def test_names_that_differ_in_case_alone(make: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'Cat' and 'cat' differ in case alone"):
        make(tmp_path, ["dog", "cat", "Cat"])
    with pytest.raises(DataError, match="differ in case or the Unicode form of accents alone") as caught:
        make(tmp_path, ["dog", "caf\u00e9", "cafe\u0301"])
    assert "'cafe\\u0301', 'caf\\xe9'" in str(caught.value)


@ways
def test_none_at_all(make: Make, tmp_path: Path) -> None:
    data = make(tmp_path, [NONE] * 3)
    assert data.names == () and labels(data) == [0, 0, 0]


@ways
@pytest.mark.parametrize("label", [0, "cat"])
def test_some_without_a_label(make: Make, tmp_path: Path, label: Any) -> None:
    with pytest.raises(DataError, match=r"[: /]2\.png has no label, (a\.tar/)?0\.png has one"):
        make(tmp_path, [label, label, NONE, NONE])
    with pytest.raises(DataError, match=r"[: /]0\.png has no label, (a\.tar/)?1\.png has one"):
        make(tmp_path, [NONE, label])


@ways
def test_numbers_among_names(make: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"label of (a\.tar/)?0\.png is a name, that of (a\.tar/)?2\.png a number"):
        make(tmp_path, ["cat", "dog", 1])


@typed
def test_a_text_of_digits_is_a_name_in_json(make: Make, tmp_path: Path) -> None:
    data = make(tmp_path, ["10", "9", "07"])
    assert data.names == ("07", "10", "9") and labels(data) == [1, 2, 0]


@typed
@pytest.mark.parametrize(
    "label",
    [-1, 2**31, 10**4000, 1.0, True, [], {}, "", "  ", "a\nb", "a\0", "\ud800", "x" * 1001],
    ids=lambda x: repr(x)[:9],
)
def test_what_is_no_label(make: Make, tmp_path: Path, label: Any) -> None:
    with pytest.raises(DataError, match=r"(1\.json' cannot be used|line 2): its label") as caught:
        make(tmp_path, [0, label])
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


@typed
def test_null_is_no_label(make: Make, tmp_path: Path) -> None:
    assert make(tmp_path, [None, NONE]).names == ()


def test_the_first_key_counts(tmp_path: Path) -> None:
    lines = ['{"file_name": "0.png", "cls": 1, "class": 0}', '{"file_name": "1.png", "label": 1, "class": 0}']
    by_lines(tmp_path, [0, 0])
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert labels(MetadataImages(tmp_path, 4, Decoding())) == [0, 1]


TEXTS: list[tuple[bytes, int | str]] = [
    (b"7", 7),
    (b" 007\r\n", 7),
    (b"-0", 0),
    (b"\xef\xbb\xbf3", 3),
    (b"2147483647", 2**31 - 1),
    (b"0" * 50 + b"1", 1),
    (b"two words", "two words"),
    (b"1_0", "1_0"),
    (b"+1", "+1"),
    (b"1.5", "1.5"),
    (b"n01440764", "n01440764"),
    ("٣".encode(), "٣"),
]


@pytest.mark.parametrize(("text", "label"), TEXTS)
def test_texts(text: bytes, label: int | str) -> None:
    assert label_of_text(text) == label


def test_texts_that_are_no_label() -> None:
    for text in (b"2147483648", b"99999999999", b"-1", b"9" * 4000):
        with pytest.raises(ValueError, match=r"its label \S{2,20} is not a class: those are 0 to 2147483647"):
            label_of_text(text)
    with pytest.raises(ValueError, match="digits"):  # Python's own limit
        label_of_text(b"9" * 10_000)


def test_json_of_other_kinds() -> None:
    for text, reason in [
        (b"[]", "a list"),
        (b"{", "char 1"),
        (b"[" * 10**5, "broken JSON"),
        (b"\xff", "UTF-8"),
    ]:
        with pytest.raises(ValueError, match=reason):
            json_object(text)
    with pytest.raises(ValueError, match="broken JSON"):
        json_object(b'{"a": ' + b"9" * 5000 + b"}")


def test_names_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert class_names(tmp_path) is None
    path = tmp_path / "labels.txt"
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"cannot read .*labels\.txt"):
        class_names(tmp_path)


def test_byte_strings() -> None:
    rng = np.random.default_rng(0)
    strings = [rng.bytes(int(rng.integers(0, 9))) for _ in range(50)]
    kept = ByteStrings(strings)
    assert len(kept) == 50 and [kept[i] for i in range(50)] == strings
