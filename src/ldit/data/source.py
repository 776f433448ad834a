"""What `data.path` means: a bundled set or a folder."""

from pathlib import Path

from ldit.data.image_folder import ImageFolder, read_list
from ldit.errors import DataError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLED = ("emoji64",)
HELDOUT = "heldout.txt"


def data_root(path: str) -> Path:
    """The folder of a data path; DataError when there is none."""
    root = ASSETS / path if path in BUNDLED else Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"data.path: no folder {path!r} (bundled sets: {', '.join(BUNDLED)})")
    return root


def open_data(
    path: str, size: int, heldout: str | None = None, max_per_class: int = 0
) -> tuple[ImageFolder, ImageFolder | None]:
    """(training, held-out or None); `heldout` names the list, "" = none, None = heldout.txt where there is one."""
    root = data_root(path)
    if heldout is None:
        heldout = HELDOUT if (root / HELDOUT).is_file() else ""
    if not heldout:
        return ImageFolder(root, size, max_per_class=max_per_class), None
    listed = read_list(root / heldout)
    train = ImageFolder(root, size, exclude=listed, max_per_class=max_per_class)
    return train, ImageFolder(root, size, only=listed)
