"""What `data.path` means. Of this table the first that is there:

| there                              | kind    | what it is                                                     |
|------------------------------------|---------|----------------------------------------------------------------|
| manifest.json, shards, encode.json | cache   | a latent cache, sound or not                                   |
| train-images-idx3-ubyte and such   | idx     | IDX files (MNIST kind)                                         |
| metadata.jsonl                     | list    | the images it lists                                          |
| *.tar                              | tars    | their images; refused beside class folders or loose images |
| folders                            | folders | class folders; loose images beside them are not read         |
| images                           | loose   | loose images, without classes                                |

Names led by a dot are passed over. metadata.csv, metadata.parquet and packed tars (.tar.gz) are refused where nothing
else is there, and else named in the log. A path may also be one tar, or a bundled set.
"""

import os
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

from ldit.config.assets import ASSETS
from ldit.config.sections import DataConfig
from ldit.data.formats.idx import HELDOUT as IDX_HELDOUT
from ldit.data.formats.idx import IdxImages, has_idx
from ldit.data.formats.image_folder import (
    ImageFolder,
    LooseImages,
    entries,
    files_in,
    is_folder,
    is_image,
    read_list,
)
from ldit.data.formats.metadata import MetadataImages, has_metadata, other_metadata, read_metadata
from ldit.data.formats.tar_index import PACKED, has_tars, read_tars
from ldit.data.formats.tars import TarImages
from ldit.data.images.decoding import Decoding
from ldit.data.images.image_set import ImageSet
from ldit.data.latent_cache.description import is_cache, is_shard
from ldit.data.latent_cache.job import JOB
from ldit.data.latent_cache.reader import LatentSamples, open_cache
from ldit.data.samples import Samples, fit_classes
from ldit.errors import DataError
from ldit.log import logger
from ldit.storage.manifest import NAME as MANIFEST

BUNDLED = ("emoji64",)
HELDOUT = "heldout.txt"
Kind = Literal["cache", "idx", "list", "tars", "folders", "loose"]


def data_root(path: str) -> Path:
    """The folder, or tar file, of a data path; DataError when there is none."""
    try:
        root = ASSETS / path if path in BUNDLED else Path(path).expanduser()
        if root.is_dir() or has_tars(root):
            return root
        is_file = root.exists()
    except (OSError, RuntimeError) as error:  # a folder above that may not be entered, the home of nobody
        raise DataError(f"data.path: cannot look at {path!r}: {getattr(error, 'strerror', None) or error}") from None
    if is_file:
        raise DataError(f"data.path: {path!r} is a file, neither a folder nor a tar archive")
    raise DataError(f"data.path: no folder {path!r} (bundled sets: {', '.join(BUNDLED)})")


def kind_of(root: Path) -> Kind:
    """What lies in a data path, sound or not; the first of the table that is there. A cache is told by its shards and
    by the job of one in the making too, not by its manifest alone.

    DataError for a folder that cannot be looked at, and for one with tars and other images: either half would be
    missing without a word. What else lies beside the images and could be taken for some is named in the log.
    """
    if not root.is_dir():
        return "tars"
    found = entries(root)
    names = [entry.name for entry in found]
    try:
        if is_cache(root) or JOB in names or any(map(is_shard, names)):
            return "cache"
        if has_idx(root):
            return "idx"
    except OSError as error:
        raise DataError(f"cannot look into folder {root}: {error.strerror}") from None
    if has_metadata(root):
        return "list"
    folders = sorted((entry.name for entry in found if is_folder(entry)), key=os.fsencode)
    return _tars_or_files(root, folders, sorted(set(names).difference(folders), key=os.fsencode))


def _tars_or_files(root: Path, folders: list[str], files: list[str]) -> Kind:
    tars = [name for name in files if name.lower().endswith(".tar")]
    packed = [name for name in files if name.lower().endswith(PACKED)]
    if tars or packed:
        image = _first_image(root, folders, files)
        if image is None:
            return "tars"
        if tars:
            raise DataError(
                f"{root} holds the archive {tars[0]} and the image {image}: which are the training images? "
                "Move the others elsewhere"
            )
        logger.warning("%s is not read: %s and others are the training images", root / packed[0], image)
    if (other := other_metadata(root)) is not None:
        if not folders:
            return "list"
        logger.warning("%s is not read: the folders beside it are the classes", root / other)
    return "folders" if folders or not any(map(is_image, files)) else "loose"


def _first_image(root: Path, folders: list[str], files: list[str]) -> str | None:
    """An image beside archives, by the rules of class folders and loose images."""
    below = (f"{folder}/{name}" for folder in folders for name in files_in(root / folder))
    return next(filter(is_image, chain(files, below)), None)


def open_run_data(
    config: DataConfig, num_classes: int | None = None, share: tuple[int, int] = (0, 1)
) -> tuple[Samples, Samples | None]:
    """(training, held-out or None) of a run. `num_classes`, where given, is the model's: 0 takes the labels away, any
    other must be the set's. Of a latent cache this process verifies the i-th of n shares, `share` (i, n).

    DataError names what is missing, damaged or does not fit.
    """
    root = data_root(config.path)
    found: tuple[Samples, Samples | None]
    if kind_of(root) == "cache":
        if config.heldout:
            raise DataError(f"data.heldout: {root} is a latent cache; give it to ldit encode")
        train, kept = open_whole_cache(root, config.verify, share)
        train.cache.check_run(root, config)
        found = train, None if config.heldout == "" else kept
    else:
        found = open_data(config.path, config.image_size, config.heldout, config.max_per_class, decoding_of(config))
    if num_classes is None:
        return found
    return fit_classes(found[0], num_classes), None if found[1] is None else fit_classes(found[1], num_classes)


def open_whole_cache(
    root: Path, verify: bool = True, share: tuple[int, int] = (0, 1)
) -> tuple[LatentSamples, LatentSamples | None]:
    """`open_cache`; DataError says of a folder with a cache's files and no sound manifest how it came to that."""
    if is_cache(root):
        return open_cache(root, verify, share)
    if (root / JOB).exists():
        raise DataError(f"{root} is a latent cache that is not whole: run ldit encode again")
    raise DataError(f"{root} is a latent cache that is damaged: no manifest of one in {root / MANIFEST}")


def decoding_of(config: DataConfig) -> Decoding:
    """How a run's image files become images."""
    return Decoding(config.exif, config.background, config.max_pixels)


def open_data(
    path: str,
    size: int,
    heldout: str | None = None,
    max_per_class: int = 0,
    decoding: Decoding = Decoding(),  # noqa: B008
) -> tuple[ImageSet, ImageSet | None]:
    """(training, held-out or None), images cut to `size`.

    `heldout` names the list of images kept from training, "" = none, None = heldout.txt where there is one. IDX
    files: the held-out set is t10k-* where it is there; "" = none. DataError names what is missing or damaged.
    """
    root = data_root(path)
    kind = kind_of(root)
    if kind == "cache":
        raise DataError(f"data.path: {root} is a latent cache, images are needed here")
    if kind == "idx":
        return _open_idx(root, size, heldout, max_per_class)
    return _open_files(root, kind, size, heldout, max_per_class, decoding)


def _open_idx(root: Path, size: int, heldout: str | None, max_per_class: int) -> tuple[ImageSet, ImageSet | None]:
    if heldout:
        raise DataError(
            f"data.heldout: {root} holds IDX files, whose held-out set is {IDX_HELDOUT}-*; "
            f'{heldout!r} cannot be used ("" = none)'
        )
    train = IdxImages(root, size, max_per_class=max_per_class)
    if heldout is None and has_idx(root, IDX_HELDOUT):
        return train, IdxImages(root, size, IDX_HELDOUT)
    return train, None


def _open_files(
    root: Path, kind: Kind, size: int, heldout: str | None, max_per_class: int, decoding: Decoding
) -> tuple[ImageSet, ImageSet | None]:
    folder = root if root.is_dir() else root.parent
    if heldout is None:
        heldout = HELDOUT if (folder / HELDOUT).is_file() else ""
    make = _maker(root, kind, size, decoding)
    if not heldout:
        return make((), None, max_per_class), None
    listed = read_list(folder / heldout)
    if not listed:
        raise DataError(f'{folder / heldout} lists no images (data.heldout "" = none)')
    train, kept = make(listed, None, max_per_class), make((), listed, 0)
    _refuse_emptied(folder / heldout, train)
    _tell_lost(folder / heldout, listed, kept)
    return train, kept


def _refuse_emptied(path: Path, train: ImageSet) -> None:
    """DataError where a held-out list took all images of a class: the model would have one that it never sees. A cap
    leaves an image of each."""
    present = {train.label(index) for index in range(len(train))}
    if train.names and len(present) < len(train.names):
        absent = next(name for label, name in enumerate(train.names) if label not in present)
        raise DataError(f"{path} lists every image of class {absent!r}: none is left for training")


def _tell_lost(path: Path, listed: list[str], kept: ImageSet) -> None:
    """A warning where entries of a held-out list match no image: what they were to keep from training is in it."""
    there = {call for index in range(len(kept)) for call in kept.calls(index)}
    lost = [entry for entry in dict.fromkeys(listed) if entry not in there]
    if lost:
        of = len(set(listed))
        logger.warning("%s: %d of %d entries match no image, the first is %r", path, len(lost), of, lost[0])


def _maker(
    root: Path, kind: Kind, size: int, decoding: Decoding
) -> Callable[[Sequence[str], Sequence[str] | None, int], ImageSet]:
    """(exclude, only, max_per_class) -> the images of `root`; lists and archives are read once for both sets."""
    if kind == "tars":
        tars = read_tars(root)
        return lambda exclude, only, most: TarImages(root, size, decoding, exclude, only, most, tars)
    if kind == "list":
        lines = read_metadata(root)
        return lambda exclude, only, most: MetadataImages(root, size, decoding, exclude, only, most, lines)
    files = LooseImages if kind == "loose" else ImageFolder
    return lambda exclude, only, most: files(root, size, exclude, only, most, decoding)
