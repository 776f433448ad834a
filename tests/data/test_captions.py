"""Captions of every kind of data set: which image has which, and one line for what is no caption."""

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldit.data.captions import CaptionTable, checked, read_captions
from ldit.data.images.image_set import ImageSet
from ldit.data.samples import Captioned
from ldit.data.source import open_data
from ldit.data.user_set import open_user_set
from ldit.errors import DataError


def save_image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, 0, 0)).save(path)


def captions_of(data: ImageSet | None) -> dict[str, list[str]]:
    """Image -> its captions."""
    assert data is not None
    captions = data.captions()
    rows = [data.caption_row(index) for index in range(len(data))]
    ends = [(int(captions.starts[row]), int(captions.starts[row + 1])) for row in rows]
    texts = [[captions.texts[number] for number in captions.numbers[a:b]] for a, b in ends]
    return {data.where(index): own for index, own in enumerate(texts)}


def refused(path: Path, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        open_data(str(path), 4, "")[0].captions()
    assert "\n" not in str(caught.value)


def test_text_files_beside_images(tmp_path: Path) -> None:
    for name in ("b/x.png", "a/y.png", "a/x.png"):
        save_image(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"of {name}\n")
    (tmp_path / "a/y.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n two \n")
    (tmp_path / "heldout.txt").write_text("a/x.png\n")
    train, heldout = open_data(str(tmp_path), 4)
    assert captions_of(train) == {"a/y.png": ["one", "two"], "b/x.png": ["of b/x.png"]}
    assert captions_of(heldout) == {"a/x.png": ["of a/x.png"]}
    assert heldout is not None and train.captions() is heldout.captions()  # one table for both
    for content, said in (
        (b"", r"y\.txt: it is empty"),
        (b"\n \n", r"y\.txt: it is empty"),
        (b"a\0b", r"y\.txt: .*no text"),
        (b"\xff", r"y\.txt: not UTF-8"),
        (b"x" * (10 << 20), r"y\.txt: it has more than 262,144 bytes"),
        (b"x" * 70_000, r"y\.txt: .*70,000 characters"),
    ):
        (tmp_path / "a/y.txt").write_bytes(content)
        refused(tmp_path, said)
    (tmp_path / "a/y.txt").unlink()
    refused(tmp_path, r"a/y\.png has no caption: there is no y\.txt or y\.caption beside it")
    (tmp_path / "a/y.caption").write_text("three")
    assert captions_of(open_data(str(tmp_path), 4)[0])["a/y.png"] == ["three"]
    # Class models do not care.
    (tmp_path / "a/y.caption").write_bytes(b"\xff")
    assert len(open_data(str(tmp_path), 4)[0]) == 2


def write_tar(path: Path, files: dict[str, bytes | str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_captions_in_tars(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    png = image.getvalue()
    (tmp_path / "s").mkdir()
    write_tar(tmp_path / "s/0.tar", {"a.png": png, "a.json": '{"caption": null}', "a.txt": "one\ntwo", "b.png": png,
                                     "stats.json": "{}", "README.txt": "",
                                     "b.json": json.dumps({"caption": ["x", "y"], "weights": [1, 3]})})  # fmt: skip
    write_tar(tmp_path / "s/1.tar", {"a.png": png, "a.txt": "another"})
    data, _ = open_data(str(tmp_path / "s"), 4)
    found = {"0.tar/a.png": ["one", "two"], "0.tar/b.png": ["x", "y"], "1.tar/a.png": ["another"]}
    assert captions_of(data) == found
    assert data.captions().texts[data.captions().main(data.caption_row(1))] == "y"
    for files, said in (
        ({"a.png": png}, r"a\.png has no caption"),
        ({"a.png": png, "a.json": "{}"}, r"caption of a\.png cannot be used: no caption \(text or caption\)"),
        ({"a.png": png, "a.txt": b"\xff"}, r"caption of a\.png cannot be used: not UTF-8"),
        ({"a.png": png, "a.json": '{"text": 3}'}, r"cannot be used: its caption is a int, not a text"),
    ):
        write_tar(tmp_path / "one.tar", files)
        refused(tmp_path / "one.tar", said)


def test_the_originals_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"i/{k}.png" for k in range(10)]
    for k, name in enumerate(names):
        save_image(tmp_path / name, k)
    first = [{"path": name, "prompt": f"p {name}"} for name in names]
    second = [{"image": f"{k}.png", "conversations": [{}, {"value": f"c {k}"}]} for k in range(3)]
    third = "\n".join(json.dumps({"path": name, "prompt": [name, "more"]}) for name in names[8:])
    (tmp_path / "first.json").write_text(json.dumps(first))
    (tmp_path / "second.json").write_text(json.dumps(second))
    (tmp_path / "third.jsonl").write_text(third + "\n\n")
    text = """META:
  - {path: second.json, root: i, type: b}
  - {path: first.json, ratio: 0.5, type: a}
  - {path: third.jsonl, type: b}
"""
    (tmp_path / "set.yaml").write_text(text)
    data, _ = open_data(str(tmp_path / "set.yaml"), 4)
    random.seed(0)  # as the original chooses
    chosen = random.sample(first, 5)
    expected = [f"i/{k}.png" for k in range(3)] + names[8:] + [row["path"] for row in chosen]  # by type
    assert [data.where(index) for index in range(len(data))] == expected
    captions = data.captions()
    texts = [captions.texts[captions.main(data.caption_row(index))] for index in range(len(data))]
    assert texts == ["c 0", "c 1", "c 2", *names[8:], *(row["prompt"] for row in chosen)]
    assert [int(data[index][0][0, 0, 0]) for index in range(3)] == [0, 1, 2]
    # One list is a data path too, and relative paths are those of the working directory first.
    monkeypatch.chdir(tmp_path)
    assert len(open_data("first.json", 4)[0]) == 10 and len(open_data("third.jsonl", 4)[0]) == 2
    # A missing image is a bad image, not a bad set.
    (tmp_path / "i/1.png").unlink()
    with pytest.raises(DataError, match=r"cannot read image .*i/1\.png"):
        open_data("set.yaml", 4)[0][1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x: 1", "expected META"),
        ("META: []", "expected META"),
        ("META: [{path: 3}]", r"META\[0\]: path is a int"),
        ("META: [{root: x}]", r"META\[0\] has no path"),
        ("META: [{path: x.json, wrong: 1}]", "unknown key 'wrong'"),
        ("META: [{path: x.json, ratio: 2}]", "ratio must be above 0"),
        ("META: [{path: nowhere.json}]", r"cannot read .*nowhere\.json"),
        ("META: !!python/object/apply:os.system [ls]", "cannot read"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nMETA: *c", r"META\[0\] has no path"),
        ("[" * 3000, "cannot read"),
        ("# " + "x" * (2 << 20), "more than 1,048,576 bytes"),
    ],
)
def test_what_is_no_yaml_of_lists(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "set.yaml").write_text(content)
    refused(tmp_path / "set.yaml", said)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ([1], "entry 1: is a int"),
        ([{"path": "a.png"}], "entry 1: its caption is a NoneType"),
        ([{"path": "a.png", "prompt": " "}], "entry 1: its caption is empty"),
        ([{"path": "a.png", "prompt": "x"}, {"path": "", "prompt": "x"}], "entry 2: path: '' is not the path"),
        ([{"image": "a.png", "conversations": [{"value": "x"}]}], "expected 2 turns, got 1"),
        ([{"image": "a.png", "conversations": [{}, {}, {}]}], "expected 2 turns, got 3"),
        ([], "lists no images"),
        ({}, "expected a list of images"),
    ],
)
def test_what_is_no_list(entry: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(entry))
    refused(tmp_path / "list.json", said)


def test_captions_of_an_object() -> None:
    class Samples:
        names = ()
        captions: Any = ("a", ["b", "c"])

        def __len__(self) -> int:
            return 2

        def fingerprint(self) -> str:
            return "x"

        def read(self, index: int) -> tuple[np.ndarray, None]:
            return np.zeros((4, 4, 3), np.uint8), None

    assert captions_of(open_user_set(Samples(), 4)) == {"sample 0": ["a"], "sample 1": ["b", "c"]}

    class Labels(Samples):
        captions = None

        def read(self, index: int) -> tuple[np.ndarray, Any]:  # type: ignore[override]
            return np.zeros((4, 4, 3), np.uint8), ["x", ["y", "z"]][index]

    assert captions_of(open_user_set(Labels(), 4)) == {"sample 0": ["x"], "sample 1": ["y", "z"]}
    for wrong, said in ((["a"], "has 1 captions for 2 samples"), (["a", 3], "sample 1: its caption is a int")):
        Samples.captions = wrong
        with pytest.raises(DataError, match=said):
            open_user_set(Samples(), 4).captions()


def test_saved_captions_and_fingerprints(tmp_path: Path) -> None:
    def table(*rows: Any) -> Any:
        made = CaptionTable()
        for row in rows:
            made.add(checked(*row))
        return made.finish()

    captions = table((["a", "ü"], [1, 2]), ("b",), ("a",))
    captions.save(tmp_path / "c.safetensors")
    again = read_captions(tmp_path / "c.safetensors")
    assert again.fingerprint() == captions.fingerprint() and list(again.texts) == ["a", "ü", "b"]
    others = (
        table((["a", "ü"], [1, 3]), ("b",), ("a",)), table((["ü", "a"], [2, 1]), ("b",), ("a",)),
        table((["a", "ü"], [1, 2]), ("b",), ("b",)), table((["a", "ü"], [1, 2]), ("b",)), table(("aüb",)),
    )  # fmt: skip
    assert len({captions.fingerprint(), *(other.fingerprint() for other in others)}) == 6
    data = bytearray((tmp_path / "c.safetensors").read_bytes())
    (tmp_path / "c.safetensors").write_bytes(data[:-3])
    with pytest.raises(DataError, match="damaged"):
        read_captions(tmp_path / "c.safetensors")

    # The set of a text model differs where its captions do.
    class Fixed:
        root, names, shape, num_before_cap, cache = tmp_path, (), (3, 4, 4), 3, None

        def __init__(self, captions: Any) -> None:
            self.captions = lambda: captions

        def fingerprint(self) -> str:
            return "same"

    prints = {Captioned(Fixed(one)).fingerprint() for one in (captions, *others)}  # type: ignore[arg-type]
    assert len(prints) == 6
