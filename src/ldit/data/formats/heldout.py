"""Held-out lists: which images of a set are kept from training, one path a line, in any spelling of `path_key`."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ldit.data.formats.names import path_key
from ldit.data.images.image_set import ImageSet
from ldit.errors import DataError
from ldit.log import logger
from ldit.rng import generator

HELDOUT = "heldout.txt"
Pair = tuple[ImageSet, ImageSet | None]
"""(training, held-out or None)."""
Make = Callable[[Sequence[str], Sequence[str] | None, int], ImageSet]
"""(exclude, only, max_per_class) -> a set without the images of `exclude`, or with those of `only` alone."""


def share_of(heldout: str | None) -> float | None:
    """The share that `data.heldout` states; None for the name of a list."""
    try:
        share = float(heldout or "")
    except ValueError:
        return None
    return share if 0 < share < 1 else None


def choose_share(images: ImageSet, share: float) -> list[str]:
    """Names of a share of each class's images, at least one of a class of two and never all; chosen by the names alone,
    so that other images change nothing."""
    by_class: dict[int, list[str]] = {}
    for index in range(len(images)):
        by_class.setdefault(images.label(index), []).append(images.where(index))
    chosen: list[str] = []
    for names in by_class.values():
        count = min(max(round(share * len(names)), 1), len(names) - 1)
        chosen += sorted(names, key=lambda name: generator(0, "heldout", 0, path_key(name)).initial_seed())[:count]
    return chosen


def with_heldout(make: Make, folder: Path, name: str, max_per_class: int) -> Pair:
    """(training, held-out) of a set, split by the list `name` of `folder` or by a share; "" = all images are for
    training. DataError when the list is missing or empty, or leaves a class without images for training."""
    if not name:
        return make((), None, max_per_class), None
    if (share := share_of(name)) is not None and not (folder / name).exists():
        listed = choose_share(make((), None, 0), share)
        if not listed:
            raise DataError(f"data.heldout: {folder} has one image a class at most: no share of it can be held out")
        return make(listed, None, max_per_class), make((), listed, 0)
    path = folder / name
    listed = read_list(path)
    if not listed:
        raise DataError(f'{path} lists no images (data.heldout "" = none)')
    train, kept = make(listed, None, max_per_class), make((), listed, 0)
    _refuse_emptied(path, train)
    unmatched = unmatched_entries(listed, (alias for index in range(len(kept)) for alias in kept.aliases(index)))
    if unmatched:
        logger.warning(
            "%s: %d of %d entries match no image, the first is %r",
            path, len(unmatched), len(set(listed)), unmatched[0],
        )  # fmt: skip
    return train, kept


def unmatched_entries(listed: Sequence[str], names: Iterable[str]) -> list[str]:
    """The entries of a held-out list that match none of the images' names, each once: the images that they mean are in
    the training set."""
    present = set(map(path_key, names))
    return [entry for entry in dict.fromkeys(listed) if path_key(entry) not in present]


def default_list(folder: Path) -> str:
    """The name of the list that is used where none is given; "" where there is none."""
    return HELDOUT if (folder / HELDOUT).is_file() else ""


def read_list(path: Path) -> list[str]:
    """Relative paths, one a line, in UTF-8; a byte order mark, blank lines and lines that start with # are ignored.
    DataError when the file is missing, unreadable or in another encoding: its names would match no image."""
    try:
        if not path.is_file():
            raise DataError(f"no held-out list {path}")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"held-out list {path}, line {line}: not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"cannot read held-out list {path}: {error.strerror}") from None
    lines = (line.strip() for line in text.split("\n"))  # splitlines would also cut names at U+0085 and the like
    return [line for line in lines if line and not line.startswith("#")]


def _refuse_emptied(path: Path, train: ImageSet) -> None:
    """DataError when a held-out list takes all images of a class: the model would have a class that it never sees. (A
    cap leaves at least one image of each.)"""
    present = {train.label(index) for index in range(len(train))}
    if train.names and len(present) < len(train.names):
        absent = next(name for label, name in enumerate(train.names) if label not in present)
        raise DataError(f"{path} lists every image of class {absent!r}: none is left for training")
