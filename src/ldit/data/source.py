"""What `data.path` means, and how a run opens it.

The first row of this table that fits the folder counts (`ldit.data.formats.table`):

| in the folder                      | kind    | what it is                                                     |
|------------------------------------|---------|----------------------------------------------------------------|
| manifest.json, shards, encode.json | cache   | a latent cache, intact or not                                  |
| train-images-idx3-ubyte and such   | idx     | IDX files (MNIST kind)                                         |
| metadata.jsonl                     | list    | the images it lists                                            |
| *.tar                              | tars    | their images                                                   |
| *.parquet, or state.json           | tables  | the images in their rows                                       |
| images, and none in folders        | loose   | loose images, without classes                                  |
| folders                            | folders | class folders                                                  |

A folder that also holds images of another kind is refused, because those would be left out silently. Hidden files and
folders that machines make are ignored; other files that are not read are counted in a warning. metadata.csv,
metadata.parquet and packed tars (.tar.gz) are not read: they are an error where nothing else is there, else a warning
names them. A path may also be one tar, the original's .yaml, .json or .jsonl (`ldit.data.formats.image_lists`), or the
name of a bundled set.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ldit.config.assets import ASSETS
from ldit.config.sections import DataConfig
from ldit.data.buckets import images_of
from ldit.data.formats.heldout import share_of
from ldit.data.formats.recognise import has_tars, is_image_list
from ldit.data.formats.table import Opening, format_of
from ldit.data.images.decoding import Decoding
from ldit.data.images.image_set import ImageSet
from ldit.data.latent_cache.description import JOB, is_cache
from ldit.data.samples import Captioned, Samples, Unlabelled, fit_classes
from ldit.errors import DataError
from ldit.storage.manifest import NAME as MANIFEST

if TYPE_CHECKING:
    from ldit.data.latent_cache.reader import LatentSamples

BUNDLED = {"emoji64": "emoji64-styles/3d", "emoji64-styles": "emoji64-styles"}
"""Folders of the bundled sets, by name."""
OBJECT = "object:"
"""Prefix of the data path of a run on a data set object; the rest is the name of its class."""


def data_root(path: str) -> Path:
    """The folder, or tar file, of a data path; DataError when there is none."""
    if path.startswith(OBJECT):
        raise DataError(
            f"data.path: the run was trained on an object, {path.removeprefix(OBJECT)}; resume it with the recipe that "
            "gave it (ldit train FILE.py:FUNCTION) or with ldit.train(…, data=…)"
        )
    try:
        root = ASSETS / BUNDLED[path] if path in BUNDLED else Path(path).expanduser()
        if root.is_dir() or has_tars(root) or is_image_list(root):
            return root
        is_file = root.exists()
    except (OSError, RuntimeError) as error:  # a parent folder without permission, or ~user of an unknown user
        raise DataError(f"data.path: cannot look at {path!r}: {getattr(error, 'strerror', None) or error}") from None
    if is_file:
        raise DataError(f"data.path: {path!r} is a file, neither a tar archive nor a list (.yaml, .json, .jsonl)")
    where = "" if Path(path).expanduser().is_absolute() else f" in {Path.cwd()}"
    raise DataError(f"data.path: no folder {path!r}{where} (bundled sets: {', '.join(BUNDLED)})")


def kind_of(root: Path) -> str:
    """The kind of a data path by the table above, intact or not. DataError for a folder that cannot be listed, or that
    has tars and other images."""
    return format_of(root).kind


def open_run_data(
    config: DataConfig,
    num_classes: int | None = None,
    share: tuple[int, int] = (0, 1),
    index_dir: Path | None = None,
    captions: bool = False,
) -> tuple[Samples, Samples | None]:
    """(training, held-out or None) of a run. `num_classes` is the model's number of classes, None for models that take
    any: 0 drops the labels, another number must be that of the set. `share` (i, n): this process verifies the i-th of n
    shares of a latent cache. `index_dir`: the folder in which `keep_index` may have saved an index. With
    `captions` the sets are those of a text model: see `Captioned`.

    DataError names what is missing, damaged or does not fit.
    """
    # A latent cache was encoded with settings of its own, which the run's must equal; all others are images.
    root = data_root(config.path)
    train: Samples
    heldout: Samples | None
    if kind_of(root) == "cache":
        if config.heldout and share_of(config.heldout) is None:  # of a share, the cache has a part of its own
            raise DataError(f"data.heldout: {root} is a latent cache; give it to ldit encode")
        cached, heldout = open_whole_cache(root, config.verify, share)
        cached.cache.check_run(root, config)
        train, heldout = cached, None if config.heldout == "" else heldout
    else:
        train, heldout = open_data(
            config.path, config.image_size, config.heldout, config.max_per_class, decoding_of(config), index_dir
        )
    if captions:
        return Captioned(train), None if heldout is None else Captioned(heldout)
    # Labels of a cache with captions are rows of those.
    if train.cache is not None and train.cache.captions:
        train, heldout = Unlabelled(train), None if heldout is None else Unlabelled(heldout)
    if num_classes is None:
        return train, heldout
    return fit_classes(train, num_classes), None if heldout is None else fit_classes(heldout, num_classes)


def keep_index(data: Samples, folder: Path) -> None:
    """Save the index of tar archives in `folder` for the next start; other sets have none."""
    images = images_of(data)
    if images is not None:
        images.keep_index(folder)


def open_whole_cache(
    root: Path, verify: bool = True, share: tuple[int, int] = (0, 1)
) -> "tuple[LatentSamples, LatentSamples | None]":
    """`open_cache`; for a folder without a manifest DataError says whether the cache is unfinished or damaged."""
    if is_cache(root):
        from ldit.data.latent_cache.reader import open_cache

        return open_cache(root, verify, share)
    if (root / JOB).exists():
        raise DataError(f"{root} is a latent cache that is not finished: run ldit encode again")
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
    index_dir: Path | None = None,
) -> tuple[ImageSet, ImageSet | None]:
    """(training, held-out or None), images cut to `size`.

    `heldout` names the list of images kept from training; "" = none, None = heldout.txt where there is one. The
    held-out set of IDX files is t10k-* where there is one; "" = none. `index_dir`: the folder in which `keep_index` may
    have saved an index. DataError names what is missing or damaged.
    """
    root = data_root(path)
    return format_of(root).open(Opening(root, size, heldout, max_per_class, decoding, index_dir))
