"""What `data.path` means: a bundled set, a latent cache, class folders, loose pictures, IDX files, tars, a list."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ldit.config.assets import ASSETS
from ldit.config.sections import DataConfig
from ldit.data.cache import is_cache
from ldit.data.decoding import Decoding
from ldit.data.idx import HELDOUT as IDX_HELDOUT
from ldit.data.idx import IdxPictures, has_idx
from ldit.data.image_folder import SUFFIXES, ImageFolder, LoosePictures, read_list
from ldit.data.latents import open_cache
from ldit.data.metadata import MetadataPictures, has_metadata, read_metadata
from ldit.data.picture_set import PictureSet
from ldit.data.samples import Samples, fit_classes
from ldit.data.tars import TarPictures, has_tars, read_tars
from ldit.errors import DataError
from ldit.log import logger

BUNDLED = ("emoji64",)
HELDOUT = "heldout.txt"


def data_root(path: str) -> Path:
    """The folder, or .tar file, of a data path; DataError when there is none."""
    root = ASSETS / path if path in BUNDLED else Path(path).expanduser()
    if not root.is_dir() and not (root.suffix == ".tar" and root.is_file()):
        raise DataError(f"data.path: no folder {path!r} (bundled sets: {', '.join(BUNDLED)})")
    return root


def open_run_data(
    config: DataConfig, num_classes: int | None = None, share: tuple[int, int] = (0, 1)
) -> tuple[Samples, Samples | None]:
    """(training, held-out or None) of a run. `num_classes`, where given, is the model's: 0 takes the labels away, any
    other must be the set's. Of a latent cache this process verifies the i-th of n shares, `share` (i, n).

    DataError names what is missing, damaged or does not fit.
    """
    root = data_root(config.path)
    found: tuple[Samples, Samples | None]
    if root.is_dir() and is_cache(root):
        if config.heldout or config.max_per_class:
            key = "heldout" if config.heldout else "max_per_class"
            raise DataError(f"data.{key}: {root} is a latent cache; give it to ldit encode")
        train, kept = open_cache(root, config.verify, share)
        found = train, None if config.heldout == "" else kept
    else:
        found = open_data(config.path, config.image_size, config.heldout, config.max_per_class, decoding_of(config))
    if num_classes is None:
        return found
    return fit_classes(found[0], num_classes), None if found[1] is None else fit_classes(found[1], num_classes)


def decoding_of(config: DataConfig) -> Decoding:
    """How a run's picture files become pictures."""
    return Decoding(config.exif, config.background, config.max_pixels)


def open_data(
    path: str,
    size: int,
    heldout: str | None = None,
    max_per_class: int = 0,
    decoding: Decoding = Decoding(),  # noqa: B008
) -> tuple[PictureSet, PictureSet | None]:
    """(training, held-out or None), pictures cut to `size`.

    `heldout` names the list of pictures kept from training, "" = none, None = heldout.txt where there is one. IDX
    files: the held-out set is t10k-* where it is there; "" = none. DataError names what is missing or damaged.
    """
    root = data_root(path)
    if root.is_dir() and is_cache(root):
        raise DataError(f"data.path: {root} is a latent cache, pictures are needed here")
    if root.is_dir() and has_idx(root):
        return _open_idx(root, size, heldout, max_per_class)
    return _open_files(root, size, heldout, max_per_class, decoding)


def _open_idx(root: Path, size: int, heldout: str | None, max_per_class: int) -> tuple[PictureSet, PictureSet | None]:
    if heldout:
        raise DataError(
            f"data.heldout: {root} holds IDX files, whose held-out set is {IDX_HELDOUT}-*; "
            f'{heldout!r} cannot be used ("" = none)'
        )
    train = IdxPictures(root, size, max_per_class=max_per_class)
    if heldout is None and has_idx(root, IDX_HELDOUT):
        return train, IdxPictures(root, size, IDX_HELDOUT)
    return train, None


def _open_files(
    root: Path, size: int, heldout: str | None, max_per_class: int, decoding: Decoding
) -> tuple[PictureSet, PictureSet | None]:
    folder = root if root.is_dir() else root.parent
    if heldout is None:
        heldout = HELDOUT if (folder / HELDOUT).is_file() else ""
    listed = read_list(folder / heldout) if heldout else None
    make = _maker(root, size, decoding)
    if listed is None:
        return make((), None, max_per_class), None
    train, kept = make(listed, None, max_per_class), make((), listed, 0)
    if len(kept) < len(set(listed)):
        logger.warning("%s lists %d pictures, %d of them are there", folder / heldout, len(set(listed)), len(kept))
    return train, kept


def _maker(
    root: Path, size: int, decoding: Decoding
) -> Callable[[Sequence[str], Sequence[str] | None, int], PictureSet]:
    """(exclude, only, max_per_class) -> the pictures of `root`; lists and archives are read once for both sets."""
    if has_tars(root):
        tars = read_tars(root)
        return lambda exclude, only, most: TarPictures(root, size, decoding, exclude, only, most, tars)
    if has_metadata(root):
        lines = read_metadata(root)
        return lambda exclude, only, most: MetadataPictures(root, size, decoding, exclude, only, most, lines)
    entries = list(root.iterdir())
    loose = not any(entry.is_dir() for entry in entries) and any(e.suffix.lower() in SUFFIXES for e in entries)
    kind = LoosePictures if loose else ImageFolder
    return lambda exclude, only, most: kind(root, size, exclude, only, most, decoding)
