"""Reads the description of a set made by `ldit sample --num`: samples.json in a folder, or FILE.npz.json."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldit.errors import EvaluationError
from ldit.pipeline.sets.folder import CRC, JOB, is_image_of
from ldit.pipeline.sets.job import FORMAT

MOST_CLASSES = 1 << 31
_NO_CONDITIONS = ("format", "num", "complete", "labels", "class_names", CRC)  # reported elsewhere, or not relevant


@dataclass(frozen=True)
class SetDescription:
    """`about`: everything that the images depend on. `labels`: one for each image, known of complete sets of a model
    with classes. `classes`: the number of the model's classes, None without."""

    num: int
    complete: bool
    about: dict[str, Any]
    labels: tuple[int, ...] | None
    names: tuple[str, ...]
    classes: int | None

    def is_own(self, name: str) -> bool:
        """Whether a file of the folder has the name of an image of the set."""
        return is_image_of(name, self.num)


def conditions(description: dict[str, Any]) -> dict[str, Any]:
    """The keys of a description on which its images depend."""
    return {key: value for key, value in description.items() if key not in _NO_CONDITIONS}


def describe_folder(root: Path) -> SetDescription | None:
    """The description of a folder; None if it is not a set made by ldit. EvaluationError names what is damaged."""
    path = root / JOB
    return _of(path, _read(path)) if path.is_file() else None


def describe_array(path: Path, crc: int, count: int) -> SetDescription | None:
    """The description of an .npz of `count` images with checksum `crc`; None if there is none of these images.
    EvaluationError names what is damaged."""
    file = path.with_name(f"{path.name}.json")
    if not file.is_file():
        return None
    content = _read(file)
    if content.get(CRC) != f"{crc:08x}":
        return None  # of another archive that had this name
    description = _of(file, content)
    if description.num != count:
        raise EvaluationError(f"{file} is damaged: num is {description.num}, {path.name} holds {count} images")
    return description


def is_in_the_making(path: Path) -> bool:
    """Whether an .npz does not exist yet, but its parts do."""
    return not path.exists() and path.with_name(f"{path.name}.parts").is_dir()


def _read(path: Path) -> dict[str, Any]:
    """The content of a description file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise EvaluationError(f"{path} is damaged: it holds no description of a set")
    return content


def _of(path: Path, content: dict[str, Any]) -> SetDescription:
    """The description with this content, read from `path`; every key that is used is checked."""
    num, complete, labels = content.get("num"), content.get("complete"), None
    names, network, rule = content.get("class_names"), content.get("network"), content.get("label_rule")

    # Format, then key by key.
    def check(key: str, valid: bool) -> None:
        if not valid:
            raise EvaluationError(f"{path} is damaged: {key} is not what ldit sample writes")

    if content.get("format") != FORMAT:
        raise EvaluationError(f"{path}: format {content.get('format')!r}; this version reads {FORMAT}")
    check("num", type(num) is int and num > 0)
    check("complete", type(complete) is bool)
    check("label_rule", rule is None or rule in ("balanced", "random"))
    check("evaluations", type(content.get("evaluations", "")) in (int, type(None)))
    check("network", isinstance(network, dict))
    assert isinstance(num, int) and isinstance(network, dict)
    # Classes of the network, their names, and the labels, which are there in the end.
    classes = network.get("num_classes") or None
    if network.get("kind") == "text" and isinstance(names, list):
        classes = len(names)  # its prompts
    check("network", classes is None or (type(classes) is int and 0 < classes < MOST_CLASSES))
    check("class_names", names is None or (isinstance(names, list) and all(type(name) is str for name in names)))
    check("class_names", names is None or classes in (None, len(names)))
    if complete and rule is not None:
        listed: Any = content.get("labels")
        check("labels", isinstance(listed, list) and len(listed) == num)
        check("labels", all(type(label) is int and 0 <= label < (classes or 0) for label in listed))
        labels = tuple(listed)
    return SetDescription(num, bool(complete), conditions(content), labels, tuple(names or ()), classes)
