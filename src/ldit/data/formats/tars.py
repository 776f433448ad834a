"""Images in tar archives, in the WebDataset convention.

Members whose paths agree up to the first dot of the last component are one sample.

| member of a sample                              | meaning                                                     |
|-------------------------------------------------|-------------------------------------------------------------|
| KEY.jpg jpeg jfif png webp bmp ppm tif tiff gif | the image, exactly one                                      |
| KEY.cls                                         | its label, an integer or a name; comes before KEY.json      |
| KEY.json                                        | an object; "label", "class" or "cls" is the label           |
| other endings, hidden names, names without dot  | ignored                                                     |

A sample's members need not be neighbours. Archives are read by position: one pass over the headers makes the index,
each image is one read. Nothing is unpacked, nothing is written but, where a folder is given for it, the index: the next
start then reads no header of an archive whose size and time are the same.
"""

import io
import threading
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

from ldit.data.formats.listed import ListedImages
from ldit.data.formats.tar_index import TarIndex, read_tars, shown, split_name
from ldit.data.formats.tar_members import Archive
from ldit.data.images.decoding import Decoding
from ldit.data.images.limits import unread
from ldit.errors import LditError, RunError

MOST_OPEN = 64  # archives at once, beside those that threads are reading from


class TarImages(ListedImages):
    """The images of the *.tar files of a folder, or of one *.tar file, with their classes (`formats.labels` has
    the rules). `exclude` / `only` list "shard.tar/key.jpg" or bare keys, which hold in every archive;
    `max_per_class` keeps a fixed random subset of each larger class. `index` is that of the same root, where it was
    made before.

    DataError names an archive, and the member, that is damaged, hostile, packed, or without what a sample needs.
    """

    def __init__(
        self,
        root: Path,
        size: int,
        decoding: Decoding,
        exclude: Collection[str] = (),
        only: Collection[str] | None = None,
        max_per_class: int = 0,
        index: TarIndex | None = None,
    ) -> None:
        self.index = read_tars(root) if index is None else index
        super().__init__(root, size, decoding, self.index.names, self.index.labels)
        self._open = _OpenArchives(self.index)
        self._choose(exclude, only, max_per_class)

    def keep_index(self, folder: Path) -> None:
        """Of the archives' headers and labels."""
        self.index.keep(self.root, folder)

    def _name(self, at: int) -> str:
        return self.index.where(at)

    def _path(self, at: int) -> Path:
        return self.index.tars[self.index.shards[at]] / shown(self.index.members[at])

    def _aliases(self, at: int) -> tuple[str, ...]:
        key, _ = split_name(self.index.members[at])
        return self._name(at), shown(key)

    def _bytes(self, at: int) -> int:
        return int(self.index.sizes[at])

    def _source(self, at: int) -> io.BytesIO:
        """In memory. RunError where the archive cannot be read or has changed, which is not one image's fault."""
        size = int(self.index.sizes[at])
        try:
            data = self._open.get(int(self.index.shards[at])).read(int(self.index.offsets[at]), size)
        except LditError as error:
            raise unread(self._path(at), str(error)) from None
        except MemoryError:
            raise unread(self._path(at), f"no memory for its {size} bytes") from None
        if len(data) != size:
            raise unread(self._path(at), "the archive has become shorter")
        return _InMemory(data, str(self._path(at)))


class _InMemory(io.BytesIO):
    """An image's file with its name, for messages."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


class _OpenArchives:
    """Archives, opened at first use; the `MOST_OPEN` used last stay open."""

    def __init__(self, index: TarIndex) -> None:
        self._index = index
        self._held: OrderedDict[int, Archive] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: int) -> Archive:
        """The archive for the time the caller holds it: one that makes room is closed by its last reader."""
        with self._lock:
            archive = self._held.pop(shard, None)
            if archive is None:
                archive = Archive(self._index.tars[shard])
                if archive.version != self._index.versions[shard]:
                    raise RunError(f"{archive.path} has changed since it was opened")
                while len(self._held) >= MOST_OPEN:
                    self._held.popitem(last=False)
            self._held[shard] = archive
            return archive
