"""Captions beside images: NAME.txt or NAME.caption beside NAME.png, and KEY.txt or KEY.json in tar archives.

In a text file each line that is not blank is a caption, all of equal weight. A JSON object has its caption, or a list
of captions, under "text" or "caption", and may have "weights".
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ldit.data.captions import MOST_CHARACTERS, Caption, Captions, CaptionTable, checked
from ldit.data.formats.labels import json_object
from ldit.data.formats.tar_index import TarIndex, shown, split_name
from ldit.data.formats.tar_members import Archive, members
from ldit.data.images.limits import no_file
from ldit.errors import DataError, RunError

KEYS = ("text", "caption")
ENDINGS = (".txt", ".caption")
MOST_BYTES = 4 * MOST_CHARACTERS
"""Largest caption file."""


def captions_of_object(data: dict[str, Any]) -> tuple[Caption, ...]:
    """The captions of a JSON object; ValueError says what is wrong with them."""
    for key in KEYS:
        if (text := data.get(key)) is not None:
            return checked(text, data.get("weights"))
    raise ValueError(f"no caption ({' or '.join(KEYS)})")


def captions_of_text(data: bytes) -> tuple[Caption, ...]:
    """The captions of a text file; ValueError says what is wrong with them."""
    try:
        lines = [line for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    if not lines:
        raise ValueError("it is empty")
    return checked(lines)


def captions_beside(root: Path, images: Iterable[str]) -> Captions:
    """The captions of image files, from the files beside them. DataError names an image without one."""
    table = CaptionTable()
    for image in images:
        stem = image.rpartition(".")[0]
        table.add(_beside(root, image, [root / f"{stem}{ending}" for ending in ENDINGS]))
    return table.finish()


def _beside(root: Path, image: str, files: Sequence[Path]) -> tuple[Caption, ...]:
    for file in files:
        try:
            with file.open("rb") as opened:
                data = opened.read(MOST_BYTES + 1)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                continue
            raise (DataError if no_file(error) else RunError)(f"cannot read {file}: {error.strerror}") from None
        try:
            if len(data) > MOST_BYTES:
                raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
            return captions_of_text(data)
        except ValueError as error:
            raise DataError(f"caption {file}: {error}") from None
    raise DataError(f"{root / image} has no caption: there is no {' or '.join(file.name for file in files)} beside it")


def captions_in_tars(index: TarIndex) -> Captions:
    """The captions of the images of archives, in the order of the index: KEY.txt, else KEY.json. DataError names an
    image without one, or whose caption cannot be used; files of no image do not matter."""
    table, at = CaptionTable(), 0
    for number, tar in enumerate(index.tars):
        found = _in_archive(Archive(tar))
        while at < len(index.labels) and index.shards[at] == number:  # the images of an archive follow each other
            key, _ = split_name(index.members[at])
            own = found.get((key, b"txt"), found.get((key, b"json")))
            if own is None:
                raise DataError(f"{tar}: {shown(index.members[at])} has no caption (.txt or .json)")
            if isinstance(own, ValueError):
                raise DataError(f"{tar}: the caption of {shown(index.members[at])} cannot be used: {own}")
            table.add(own)
            at += 1
    return table.finish()


def _in_archive(archive: Archive) -> dict[tuple[bytes, bytes], tuple[Caption, ...] | ValueError]:
    """(key, ending) -> the captions in this file, or what is wrong with them."""
    found: dict[tuple[bytes, bytes], tuple[Caption, ...] | ValueError] = {}
    for member in members(archive):
        key, ending = split_name(member.name)
        if ending not in (b"txt", b"json"):
            continue
        try:
            if member.size > MOST_BYTES:
                raise ValueError(f"it has {member.size:,} bytes, the most are {MOST_BYTES:,}")
            data = archive.read(member.offset, member.size)
            found[key, ending] = captions_of_text(data) if ending == b"txt" else captions_of_object(json_object(data))
        except ValueError as error:
            found[key, ending] = error.with_traceback(None)
    return found
