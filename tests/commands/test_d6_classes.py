"""Row D6 of the reliability table: sets and classes without images, counts that disagree, twins by case, classes that
changed between runs. Each is refused at the start, in one line, before anything is written."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import make_folder, make_idx, over
from PIL import Image

from ldit.commands.train import run as train
from ldit.errors import ConfigError, DataError

Make = Callable[[Path], Any]
"""Builds a set at a path; returns None, or changes of the configuration that go with it."""

CASES: dict[str, tuple[Make, str]] = {}
"""name -> how the set is made, what the message must say ({root} is the set's path)."""


def case(said: str) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        CASES[make.__name__] = (make, said)
        return make

    return add


def listed(root: Path, *labels: Any, key: str = "label") -> None:
    """A metadata.jsonl folder with an image for each label; no label for None."""
    root.mkdir()
    with (root / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for i, label in enumerate(labels):
            Image.new("RGB", (8, 8), (i, i, i)).save(root / f"{i}.png")
            line = {"file_name": f"{i}.png"} | ({} if label is None else {key: label})
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def packed(root: Path, *labels: Any) -> None:
    """The same as an archive, labels in .cls files; the set is the folder that holds it."""
    listed(root, *(None for _ in labels))
    for i, label in enumerate(labels):
        if label is not None:
            (root / f"{i}.cls").write_text(str(label), encoding="utf-8")
    files = sorted(path for path in root.iterdir() if path.name != "metadata.jsonl")
    with tarfile.open(root / "shard-0.tar", "w") as archive:
        for path in files:
            archive.add(path, path.name)
    for path in (*files, root / "metadata.jsonl"):
        path.unlink()


# No images ---------------------------------------------------------------------------------------------------------
@case("no folder '{root}'")
def nothing_there(root: Path) -> None:
    pass


@case("no class folders in {root}")
def an_empty_folder(root: Path) -> None:
    root.mkdir()


@case("no class folders in {root}")
def texts_alone(root: Path) -> None:
    root.mkdir()
    (root / "a.txt").write_text("no image")


@case("no images left in {root} after the held-out list")
def all_held_out(root: Path) -> None:
    make_folder(root)
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.png")]
    (root / "heldout.txt").write_text("\n".join(names))


@case("no images in {root}")
def a_list_of_nothing(root: Path) -> None:
    listed(root)


@case("no images in {root}")
def an_archive_of_nothing(root: Path) -> None:
    packed(root)


# Empty classes -------------------------------------------------------------------------------------------------------
@case("class folder {root}/b holds no images")
def an_empty_class(root: Path) -> None:
    make_folder(root, ("a", "c"))
    (root / "b").mkdir()


@case("class folder {root}/b holds no images")
def a_class_of_texts(root: Path) -> None:
    make_folder(root, ("a", "c"))
    (root / "b").mkdir()
    (root / "b" / "1.txt").write_text("no image")


@case("labels go to 3, which makes 4 classes, but 3 occur; class 2 has no image")
def a_number_left_out(root: Path) -> None:
    listed(root, 0, 1, 3, 0)


@case("labels go to 3, which makes 4 classes, but 3 occur; class 0 has no image")
def numbers_from_one(root: Path) -> None:
    packed(root, 1, 2, 3)


@case("{root}/heldout.txt lists every image of class 'b': none is left for training")
def a_class_held_out(root: Path) -> None:
    make_folder(root)
    names = [path.relative_to(root).as_posix() for path in (root / "b").iterdir()]
    (root / "heldout.txt").write_text("\n".join(names))


@case("{root}/heldout.txt lists every image of class 'dog': none is left for training")
def a_class_of_a_list_held_out(root: Path) -> None:
    listed(root, "cat", "dog", "ape", "dog")
    (root / "heldout.txt").write_text("1.png\n3.png\n")


@case("{root}/heldout.txt lists every image of class '1': none is left for training")
def a_class_of_an_archive_held_out(root: Path) -> None:
    packed(root, 0, 1, 2, 0)
    (root / "heldout.txt").write_text("1\n3\n")


# Counts that disagree ------------------------------------------------------------------------------------------------
@case("{root} has 2 classes, the model has num_classes 3 (--model.num_classes 2)")
def fewer_folders(root: Path) -> None:
    make_folder(root, ("a", "b"))


@case("{root} has 4 classes, the model has num_classes 3 (--model.num_classes 4)")
def more_folders(root: Path) -> None:
    make_folder(root, tuple("abcd"))


@case("{root} holds images without classes, the model has num_classes 3")
def loose_images(root: Path) -> None:
    root.mkdir()
    Image.new("RGB", (8, 8)).save(root / "1.png")


@case("{root} has 10 classes, the model has num_classes 3")
def ten_digits(root: Path) -> None:
    make_idx(root)


@case("{root} has 2 classes, the model has num_classes 3")
def fewer_listed(root: Path) -> None:
    listed(root, "a", "b", "a")


@case("{root} has 4 classes, the model has num_classes 3")
def more_in_an_archive(root: Path) -> None:
    packed(root, 0, 1, 2, 3)


@case("{root}/classes.txt names 2 classes, the labels of {root}/metadata.jsonl make 3")
def names_for_two(root: Path) -> None:
    listed(root, 0, 1, 2)
    (root / "classes.txt").write_text("cat\ndog\n")


@case("{root}/metadata.jsonl: 1.png has no label, 0.png has one")
def some_without_a_label(root: Path) -> None:
    listed(root, "a", None, "b", "c")


@case("{root}/metadata.jsonl: the label of 2.png is a name, that of 0.png a number")
def names_among_numbers(root: Path) -> None:
    listed(root, 0, 1, "dog")


# Twins ---------------------------------------------------------------------------------------------------------------
@case("{root}: the classes 'Cat' and 'cat' differ in case alone")
def twin_folders(root: Path) -> None:
    make_folder(root, ("Cat", "cat", "dog"))


@case("differ in case or the Unicode form of accents alone: 'cafe\\u0301', 'caf\\xe9'")
def twin_folders_of_two_forms(root: Path) -> None:
    make_folder(root, ("caf\u00e9", "cafe\u0301", "dog"))


@case("{root}/metadata.jsonl: the classes 'CAT' and 'cat' differ in case alone")
def twins_in_a_list(root: Path) -> None:
    listed(root, "cat", "CAT", "dog", key="class")


@case("{root}: the classes 'STRASSE' and 'straße' differ in case alone")
def twins_in_an_archive(root: Path) -> None:
    packed(root, "straße", "STRASSE", "dog")


@case("{root}/classes.txt: class name 'dog' occurs twice")
def the_same_name_twice(root: Path) -> None:
    packed(root, 0, 1, 2)
    (root / "classes.txt").write_text("cat\ndog\ndog\n")


@case("{root}/classes.txt: the classes 'Cat' and 'cat' differ in case alone")
def twins_in_the_names(root: Path) -> None:
    listed(root, 0, 1, 2)
    (root / "classes.txt").write_text("Cat\ndog\ncat\n")


@pytest.mark.parametrize("name", CASES)
def test_d6_refused_at_the_start(name: str, tmp_path: Path) -> None:
    make, said = CASES[name]
    root, out = tmp_path / "set", tmp_path / "run"
    make(root)
    if name.startswith("twin_folders") and len(list(root.iterdir())) < 3:
        pytest.skip("this disk does not tell them apart")
    with pytest.raises(DataError) as error:
        train(over(root), out)
    assert said.format(root=root) in str(error.value) and "\n" not in str(error.value)
    assert not out.exists()


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a class renamed": (lambda root: (root / "c").rename(root / "z"), "class names differ"),
    "another order": (lambda root: (root / "a").rename(root / "d"), "class names differ"),
    "a class more": (
        lambda root: shutil.copytree(root / "a", root / "d"),
        "has 4 classes, the model has num_classes 3",
    ),
    "a class less": (lambda root: shutil.rmtree(root / "c"), "has 2 classes, the model has num_classes 3"),
    "an image more": (lambda root: shutil.copy(root / "a/0.png", root / "a/9.png"), "12 there, 13 now"),
    "an image less": (lambda root: (root / "a/0.png").unlink(), "12 there, 11 now"),
    "an image renamed": (lambda root: (root / "a/0.png").rename(root / "a/9.png"), "12 there, 12 now, or other names"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_d6_changed_between_runs(name: str, tmp_path: Path) -> None:
    """The class map is kept with every step; what the run wrote stays as it is."""
    change, said = CHANGES[name]
    root, out = make_folder(tmp_path / "set"), tmp_path / "run"
    assert train(over(root), out) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    change(root)
    with pytest.raises((DataError, ConfigError), match=said):
        train(over(root, {"train.steps": 3}), out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_d6_cases() -> None:
    assert len(CASES) + len(CHANGES) >= 25
