"""Images in tables: parquet files, and Arrow folders as Hugging Face `datasets` saves them (`save_to_disk`).

| column                                        | meaning                                                             |
|-----------------------------------------------|---------------------------------------------------------------------|
| "image", "img", "jpg", "png" or "webp"        | the file of an image: binary, or a struct with "bytes"; required    |
| "label", "class" or "cls"                     | its class, an integer or a name (`formats.labels` has the rules)    |
| "text", "caption" or "prompt"                 | its caption, or a list of captions                                  |
| others                                        | ignored                                                             |

Names of classes that `datasets` stored with the table are used. Rows are read in place. Arrow folders are mapped into
memory; of parquet files a whole group of rows is decompressed for each image, of which the last ones are kept, so
`ldit encode`, which reads in order, is the fast way to use them.
"""

import io
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldit.data.captions import Captions, CaptionTable, checked
from ldit.data.formats.labels import LABEL_KEYS, LabelTable, checked_label
from ldit.data.formats.listed import ListedImages
from ldit.data.formats.recognise import STATE, is_table
from ldit.data.images.limits import unread
from ldit.errors import DataError

IMAGES = ("image", "img", "jpg", "png", "webp")
TEXTS = ("text", "caption", "prompt")
INSTALL = "needs the package pyarrow: pip install 'large-dit[data]'"
KEPT_GROUPS = 4  # decompressed groups of rows


@dataclass(frozen=True)
class Tables:
    """The rows of all files of a folder, in order, and where each group of rows begins."""

    files: tuple[Path, ...]
    groups: tuple[tuple[int, int], ...]
    """(file, group of rows in it) of each group."""
    starts: np.ndarray
    """(G + 1,) int64: the first row of each group."""
    column: str
    labels: np.ndarray
    names: tuple[str, ...]
    captions: Captions | str
    """Or why there are none."""


class TableImages(ListedImages[Tables]):
    """The images of the tables of a folder, with their classes or captions. DataError names a file that is damaged or
    lacks the column of images."""

    def _open(self, index: Tables | None) -> Tables:
        index = read_tables(self.root) if index is None else index
        self._groups = _Groups(index)
        return index

    def captions(self) -> Captions:
        if isinstance(self.index.captions, str):
            raise DataError(self.index.captions)
        return self.index.captions

    def _name(self, at: int) -> str:
        group, row = self._place(at)
        file, number = self.index.groups[group]
        first = group - number  # the groups of a file follow each other
        return f"{self.index.files[file].name}[{int(self.index.starts[group] - self.index.starts[first]) + row}]"

    def _path(self, at: int) -> Path:
        return self.root / self._name(at)

    def _source(self, at: int) -> io.BytesIO:
        group, row = self._place(at)
        value = self._groups.get(group)[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise DataError(f"cannot read image {self._path(at)}: its column {self.index.column} holds no bytes")
        return io.BytesIO(data)

    def _place(self, at: int) -> tuple[int, int]:
        group = int(np.searchsorted(self.index.starts, at, side="right")) - 1
        return group, at - int(self.index.starts[group])


class _Groups:
    """Columns of images by group of rows; the last ones stay in memory."""

    def __init__(self, tables: Tables) -> None:
        self._tables, self._lock = tables, threading.Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def get(self, group: int) -> Any:
        with self._lock:
            if group not in self._kept:
                file, number = self._tables.groups[group]
                path = self._tables.files[file]
                try:
                    self._kept[group] = _column(path, number, self._tables.column)
                except Exception as error:  # pyarrow raises many types
                    raise unread(path, " ".join(str(error).split())[:200]) from None
                if len(self._kept) > KEPT_GROUPS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]


def read_tables(root: Path) -> Tables:
    """The index of a folder's tables: their columns of labels and captions are read, those of images are not."""
    files = tuple(_files(root))
    column, labels, texts = "", LabelTable(), CaptionTable()
    groups: list[tuple[int, int]] = []
    starts, problem, names = [0], "", None
    for number, path in enumerate(files):
        try:
            schema = _schema(path)
            column = column or _first(IMAGES, schema.names) or ""
            if not column or column not in schema.names:
                raise ValueError(f"no column of images ({', '.join(IMAGES)})")
            names = names or _class_names(schema, _first(LABEL_KEYS, schema.names))
            for group, part in enumerate(_parts(path, [_first(LABEL_KEYS, schema.names), _first(TEXTS, schema.names)])):
                groups.append((number, group))
                starts.append(starts[-1] + part.rows)
                for label, text in zip(part.labels, part.texts, strict=True):
                    labels.add(None if label is None else checked_label(_named(label, names)))
                    if not problem:
                        problem = _add(texts, text, f"{path}, row {len(labels) - 1}")
        except DataError:
            raise
        except Exception as error:  # pyarrow raises many types
            raise DataError(f"{path}: {' '.join(str(error).split())[:200]}") from None
    tables = Tables(files, tuple(groups), np.array(starts, np.int64), column, np.empty(0), (), "")

    def where(at: int) -> str:
        return f"row {at}"

    own, classes = labels.finish(root, root, where)
    captions = problem or texts.finish()
    return Tables(files, tables.groups, tables.starts, column, own, classes, captions)


def _add(table: CaptionTable, text: Any, where: str) -> str:
    """Add a row's captions; what is wrong with them, "" where nothing is."""
    try:
        table.add(checked(text))
    except ValueError as error:
        return f"{where}: no caption ({' or '.join(TEXTS)})" if text is None else f"{where}: {error}"
    return ""


@dataclass(frozen=True)
class _Part:
    rows: int
    labels: list[Any]
    texts: list[Any]


def _files(root: Path) -> list[Path]:
    """The files of a folder: those that state.json lists, else its parquet files in byte order."""
    state = root / STATE
    if not state.exists():
        names = sorted(filter(is_table, os.listdir(root)), key=os.fsencode)
        return [root / name for name in names]
    try:
        listed = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        names = [entry["filename"] for entry in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state} is not that of a data set folder: {error!r:.100}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (root / name).is_file():
            raise DataError(f"{state}: there is no file {name!r:.80} in the folder")
    return [root / name for name in names]


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"a set of tables {INSTALL}") from None
    return pyarrow


def _schema(path: Path) -> Any:
    arrow = _arrow()
    if path.suffix.lower() == ".parquet":
        return arrow.parquet.read_schema(path)
    with arrow.memory_map(str(path)) as source:
        return arrow.ipc.open_stream(source).schema


def _parts(path: Path, columns: list[str | None]) -> Iterator[_Part]:
    """Labels and captions of each group of rows, None where there is no such column."""
    arrow, wanted = _arrow(), [name for name in columns if name is not None]

    def part(table: Any) -> _Part:
        values = [table.column(name).to_pylist() if name else [None] * table.num_rows for name in columns]
        return _Part(table.num_rows, values[0], values[1])

    if path.suffix.lower() == ".parquet":
        with arrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                yield part(file.read_row_group(group, columns=wanted)) if wanted else _Part(rows, *[[None] * rows] * 2)
        return
    with arrow.memory_map(str(path)) as source:
        for batch in arrow.ipc.open_stream(source):
            yield part(arrow.Table.from_batches([batch]))


def _column(path: Path, group: int, column: str) -> Any:
    """The column of images of a group of rows."""
    arrow = _arrow()
    if path.suffix.lower() == ".parquet":
        with arrow.parquet.ParquetFile(path) as file:
            return file.read_row_group(group, columns=[column]).column(column)
    for number, batch in enumerate(arrow.ipc.open_stream(arrow.memory_map(str(path)))):
        if number == group:
            return batch.column(column)
    raise ValueError(f"there is no group {group}")


def _class_names(schema: Any, column: str | None) -> tuple[str, ...] | None:
    """Names of the classes that `datasets` stored; None where there are none."""
    try:
        stored = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(map(str, stored))


def _named(label: Any, names: tuple[str, ...] | None) -> Any:
    if names is None or not isinstance(label, int):
        return label
    if not 0 <= label < len(names):
        raise ValueError(f"its label {label} is none of {len(names)} classes")
    return names[label]


def _first(names: tuple[str, ...], present: list[str]) -> str | None:
    return next((name for name in names if name in present), None)
