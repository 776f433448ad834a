"""What a set of images that `ldit sample --num` made says of itself: samples.json in a folder, FILE.npz.json."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldit.errors import EvaluationError
from ldit.pipeline.sets.folder import CRC, JOB, is_image_of
from ldit.pipeline.sets.job import FORMAT

MOST_CLASSES = 1 << 31
_ASIDE = ("format", "num", "complete", "labels", "class_names", CRC)  # said elsewhere, or of no figure


@dataclass(frozen=True)
class SetDescription:
    """`about` is all that the images depend on; `labels` are known of complete sets of a model with classes; of
    `classes` classes, None for a model without."""

    num: int
    complete: bool
    about: dict[str, Any]
    labels: tuple[int, ...] | None
    names: tuple[str, ...]
    classes: int | None

    def is_own(self, name: str) -> bool:
        """Whether an image of a folder is called as one of the set."""
        return is_image_of(name, self.num)


def conditions(description: dict[str, Any]) -> dict[str, Any]:
    """Of a description, what its images depend on."""
    return {key: value for key, value in description.items() if key not in _ASIDE}


def describe_folder(root: Path) -> SetDescription | None:
    """Of a folder; None where it is no set of ours. EvaluationError names what is damaged."""
    path = root / JOB
    return _of(path, _read(path)) if path.is_file() else None


def describe_array(path: Path, crc: int, count: int) -> SetDescription | None:
    """Of an .npz of `count` images with that checksum; None where nothing is said of those. EvaluationError names
    what is damaged."""
    described = path.with_name(f"{path.name}.json")
    if not described.is_file():
        return None
    found = _read(described)
    if found.get(CRC) != f"{crc:08x}":
        return None  # of another file that had this name
    made = _of(described, found)
    if made.num != count:
        raise EvaluationError(f"{described} is damaged: num is {made.num}, {path.name} holds {count} images")
    return made


def is_in_the_making(path: Path) -> bool:
    """Whether an .npz is not there yet and the blocks of it are."""
    return not path.exists() and path.with_name(f"{path.name}.parts").is_dir()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise EvaluationError(f"{path} is damaged: it holds no description of a set")
    return found


def _of(path: Path, found: dict[str, Any]) -> SetDescription:
    num, complete, labels = found.get("num"), found.get("complete"), None
    names, network, rule = found.get("class_names"), found.get("network"), found.get("label_rule")

    def check(key: str, sound: bool) -> None:
        if not sound:
            raise EvaluationError(f"{path} is damaged: {key} is not what ldit sample writes")

    if found.get("format") != FORMAT:
        raise EvaluationError(f"{path}: says format {found.get('format')!r}; this version reads {FORMAT}")
    check("num", type(num) is int and num > 0)
    check("complete", type(complete) is bool)
    check("label_rule", rule is None or rule in ("balanced", "random"))
    check("evaluations", type(found.get("evaluations")) is int)
    check("network", isinstance(network, dict))
    assert isinstance(num, int) and isinstance(network, dict)
    classes = network.get("num_classes") or None
    check("network", classes is None or (type(classes) is int and 0 < classes < MOST_CLASSES))
    check("class_names", names is None or (isinstance(names, list) and all(type(name) is str for name in names)))
    check("class_names", names is None or classes in (None, len(names)))
    if complete and rule is not None:
        listed: Any = found.get("labels")
        check("labels", isinstance(listed, list) and len(listed) == num)
        check("labels", all(type(label) is int and 0 <= label < (classes or 0) for label in listed))
        labels = tuple(listed)
    return SetDescription(num, bool(complete), conditions(found), labels, tuple(names or ()), classes)
