"""What `data.path` means: a bundled set or a folder."""

from pathlib import Path

from ldit.config.assets import ASSETS
from ldit.data.image_folder import ImageFolder, pictures_in, read_list
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
    "*-ubyte*": "an MNIST-kind data set",
}


def _check_kind(root: Path) -> None:
    """DataError for kinds of data that are not built yet, and for a folder of loose pictures."""
    for pattern, kind in _LATER.items():
        if next(root.glob(pattern), None) is not None:
            raise DataError(f"data.path: {root} is {kind}; training on those is not built yet")
    if not any(entry.is_dir() for entry in root.iterdir()) and pictures_in(root):
        raise DataError(f"data.path: {root} holds loose pictures; unconditional training is not built yet")


def open_data(
    path: str, size: int, heldout: str | None = None, max_per_class: int = 0
) -> tuple[ImageFolder, ImageFolder | None]:
    """(training, held-out or None); `heldout` names the list, "" = none, None = heldout.txt where there is one."""
    root = data_root(path)
    _check_kind(root)
    if heldout is None:
        heldout = HELDOUT if (root / HELDOUT).is_file() else ""
    if not heldout:
        return ImageFolder(root, size, max_per_class=max_per_class), None
    listed = read_list(root / heldout)
    train = ImageFolder(root, size, exclude=listed, max_per_class=max_per_class)
    return train, ImageFolder(root, size, only=listed)
