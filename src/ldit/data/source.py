"""What `data.path` means: a bundled set, a folder of class folders or loose pictures, or IDX files."""

from pathlib import Path

from ldit.config.assets import ASSETS
from ldit.data.idx import HELDOUT as IDX_HELDOUT
from ldit.data.idx import IdxPictures, has_idx
from ldit.data.image_folder import SUFFIXES, ImageFolder, LoosePictures, read_list
from ldit.data.picture_set import PictureSet, fit_classes
from ldit.errors import DataError

BUNDLED = ("emoji64",)
HELDOUT = "heldout.txt"


def data_root(path: str) -> Path:
    """The folder of a data path; DataError when there is none."""
    root = ASSETS / path if path in BUNDLED else Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"data.path: no folder {path!r} (bundled sets: {', '.join(BUNDLED)})")
    return root


_LATER = {
    "manifest.json": "a latent cache",
    "metadata.jsonl": "a captioned folder",
    "*.tar": "tar shards",
}


def _check_kind(root: Path) -> None:
    """DataError for kinds of data that are not built yet."""
    for pattern, kind in _LATER.items():
        if next(root.glob(pattern), None) is not None:
            raise DataError(f"data.path: {root} is {kind}; training on those is not built yet")


def open_data(
    path: str, size: int, heldout: str | None = None, max_per_class: int = 0, num_classes: int | None = None
) -> tuple[PictureSet, PictureSet | None]:
    """(training, held-out or None), pictures cut to `size`.

    Folders: `heldout` names the list, "" = none, None = heldout.txt where there is one. IDX files: the held-out set is
    t10k-* where it is there; "" = none. `num_classes`, where given, is the model's: 0 takes the labels away, any other
    must be the set's. DataError names what is missing, damaged or does not fit.
    """
    root = data_root(path)
    _check_kind(root)
    if has_idx(root):
        train, kept = _open_idx(root, size, heldout, max_per_class)
    else:
        train, kept = _open_folder(root, size, heldout, max_per_class)
    if num_classes is not None:
        train, kept = fit_classes(train, num_classes), None if kept is None else fit_classes(kept, num_classes)
    return train, kept


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


def _open_folder(
    root: Path, size: int, heldout: str | None, max_per_class: int
) -> tuple[PictureSet, PictureSet | None]:
    entries = list(root.iterdir())
    loose = not any(entry.is_dir() for entry in entries) and any(e.suffix.lower() in SUFFIXES for e in entries)
    kind = LoosePictures if loose else ImageFolder
    if heldout is None:
        heldout = HELDOUT if (root / HELDOUT).is_file() else ""
    if not heldout:
        return kind(root, size, max_per_class=max_per_class), None
    listed = read_list(root / heldout)
    train = kind(root, size, exclude=listed, max_per_class=max_per_class)
    return train, kind(root, size, only=listed)
