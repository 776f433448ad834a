"""Images in tar archives, in the WebDataset convention.

Members whose paths agree up to the first dot of the last component are one sample.

| member of a sample                              | meaning                                                     |
|-------------------------------------------------|-------------------------------------------------------------|
| KEY.jpg jpeg jfif png webp bmp ppm tif tiff gif | the image, exactly one                                      |
| KEY.cls                                         | its label, an integer or a name; comes before KEY.json      |
| KEY.json                                        | an object; "label", "class" or "cls" is the label, "text"   |
|                                                 | or "caption" the caption                                    |
| KEY.txt                                         | its captions, one a line; comes before KEY.json             |
| other endings, hidden names, names without dot  | ignored                                                     |

A sample's members need not follow each other. One pass over the headers makes the index; then each image is one read
at its offset. Nothing is unpacked. `keep_index` writes the index into a folder, so that the next start reads no headers
of archives whose size and time are the same.
"""

import io
import threading
from collections import OrderedDict
from pathlib import Path

from ldit.data.captions import Captions
from ldit.data.formats.caption_files import captions_in_tars
from ldit.data.formats.listed import ListedImages
from ldit.data.formats.tar_index import TarIndex, read_tars, shown, split_name
from ldit.data.formats.tar_members import Archive
from ldit.data.images.limits import unread
from ldit.errors import LditError, RunError

MOST_OPEN = 64  # archives at once, beside those that threads are reading from


class TarImages(ListedImages[TarIndex]):
    """The images of the *.tar files of a folder, or of one *.tar file, with their classes (rules: `formats.labels`).

    Held-out lists name "shard.tar/key.jpg", or bare keys, which count in every archive. DataError names an archive, and
    the member, that is damaged, hostile, packed, or without what a sample needs.
    """

    def _open(self, index: TarIndex | None) -> TarIndex:
        index = read_tars(self.root) if index is None else index
        self._archives = _OpenArchives(index)
        return index

    def captions(self) -> Captions:
        """Read from the archives at the first call, for training and held-out images together: only text models need
        them."""
        if self.index.captions is None:
            object.__setattr__(self.index, "captions", captions_in_tars(self.index))
        assert self.index.captions is not None
        return self.index.captions

    def keep_index(self, folder: Path) -> None:
        """Write offsets and labels, the result of reading all headers, into `folder`."""
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
        """The file in memory. RunError when the archive cannot be read or has changed: no single image is at fault."""
        size = int(self.index.sizes[at])
        try:
            data = self._archives.get(int(self.index.shards[at])).read(int(self.index.offsets[at]), size)
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
        """The archive; RunError when it is not the file that was indexed. One that is dropped to make room stays open
        until its last reader is done with it."""
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
