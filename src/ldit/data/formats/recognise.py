"""How the kinds of data sets are recognised, by names of files alone, before what opens them is imported."""

import os
from pathlib import Path

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
METADATA = "metadata.jsonl"
YAML = (".yaml", ".yml")
STATE, PARTS_OF_SET = "state.json", "dataset_dict.json"
"""Files of folders that `datasets` saved: of a part, and of a set of parts."""
OTHER_LISTS = ("metadata.csv", "metadata.parquet")
IDX_TRAIN, IDX_HELDOUT = "train", "t10k"
IDX_IMAGES, IDX_LABELS = ("images", 3), ("labels", 1)  # part of the file's name, axes


def has_tars(root: Path) -> bool:
    """Whether `root` is a tar archive or a folder with some. Packed ones count: opening them raises an error that says
    what to do."""
    if root.is_dir():
        return any(is_tar(entry.name) for entry in os.scandir(root))
    return is_tar(root.name) and root.exists()


def is_tar(name: str) -> bool:
    return name.lower().endswith((".tar", *PACKED)) and not name.startswith(".")


def is_table(name: str) -> bool:
    """Whether a file of this name is a table of images, not a list of them."""
    return name.lower().endswith(".parquet") and not name.startswith(".") and name not in OTHER_LISTS


def is_image_list(path: Path) -> bool:
    """Whether a file is one of the original's lists of images, or names some."""
    return path.suffix.lower() in (*YAML, ".json", ".jsonl") and path.is_file()


def has_metadata(root: Path) -> bool:
    """Whether a folder has something called metadata.jsonl: opening says what is wrong with it."""
    return os.path.lexists(root / METADATA)


def other_metadata(root: Path) -> str | None:
    """The name of a folder's metadata file in a format that is not read; None where there is none."""
    return next((name for name in OTHER_LISTS if os.path.lexists(root / name)), None)


def has_idx(root: Path, part: str = IDX_TRAIN) -> bool:
    """Whether the folder has a file of images or labels of `part`."""
    return any(path.is_file() for kind in (IDX_IMAGES, IDX_LABELS) for path in idx_spellings(root, part, *kind))


def idx_spellings(root: Path, part: str, kind: str, axes: int) -> list[Path]:
    """The names that an IDX file may have, the unpacked ones first."""
    return [root / f"{part}-{kind}{dot}idx{axes}-ubyte{packed}" for packed in ("", ".gz") for dot in "-."]
