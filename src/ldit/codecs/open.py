"""Finds the folder of a codec: local, bundled or on the Hub; and copies it into an export."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldit.codecs.kl_config import CONFIG, MAX_BYTES, read_kl_config
from ldit.codecs.kl_weights import PICKLED, STEM, read_tensors
from ldit.config.assets import ASSETS
from ldit.config.autoencoder import is_autoencoder
from ldit.errors import CodecError, SourceError
from ldit.storage.atomic import read_json
from ldit.storage.hub import from_hub, is_hub_id
from ldit.storage.names import CHECKPOINTS
from ldit.storage.tensors import write_safetensors

_SUB = "vae"  # the sub-folder of a diffusers pipeline's codec
_FILES = (CONFIG, f"{STEM}.safetensors", f"{STEM}.safetensors.index.json", f"{STEM}-*-of-*.safetensors")
SAMPLING_HELP = "give its folder, or one that holds it: --codec-root DIR (--local-diffusers-model-root)"
TRAINING_HELP = "give its folder: --codec.name DIR"


def find_codec(name: str, roots: Sequence[Path] = ()) -> Path | None:
    """The local folder of codec `name`, or None.

    A path (/…, ./…, ../…) is used as it is. If it does not exist, its last two parts and its last part are looked for
    in each of `roots`. Any other name is looked for in `roots`, by the whole name and by its last part; then a root may
    be the codec itself; then among the bundled models, then in the working directory, so that a folder there does not
    hide a model. A folder without config.json is returned only if no other
    place has one.
    """
    folders = [folder for folder in _places(name, roots) if _is_dir(folder)]
    return next((folder for folder in folders if _has_config(folder)), folders[0] if folders else None)


def codec_folder(name: str, roots: Sequence[Path] = (), advice: str = SAMPLING_HELP) -> Path:
    """The folder with config.json and weights of autoencoder `name`: local, or downloaded from the Hub to its cache.

    HF_HUB_OFFLINE is honoured. CodecError if there is none, which ends in `advice`, or if the folder holds something
    else.
    """
    folder = find_codec(name, roots) or _downloaded(name, roots, advice)
    if (folder / _SUB / CONFIG).is_file() and not any(folder.glob(f"{STEM}*")):
        return folder / _SUB
    _refuse_own(folder)
    return folder


def portable_name(name: str) -> str:
    """The name that a checkpoint stores, so that its codec is found from any working directory.

    This is the absolute path of a local folder; bundled codecs and those of the Hub keep their name.
    """
    folder = find_codec(name)
    return name if folder is None or folder == _bundled(name) else str(folder.resolve())


def private_codec(name: str, own: Path) -> Path | None:
    """The folder of a codec that other machines cannot find by `name`; None if it is bundled, on the Hub or missing.

    Such a codec is given by path, or is inside `own`, the folder of its model.
    """
    folder = find_codec(name, [own])
    if folder is None or not (_is_path(name) or folder.is_relative_to(own)):
        return None
    return codec_folder(name, [own])


def copy_codec(source: Path, target: Path) -> None:
    """Copy a codec's configuration and weights to the new folder `target`, the weights as one safetensors file.

    CodecError if they cannot be read.
    """
    read_kl_config(source)
    target.mkdir()
    (target / CONFIG).write_bytes((source / CONFIG).read_bytes())
    write_safetensors(target / f"{STEM}.safetensors", ((name, t.clone()) for name, t in read_tensors(source)))


def _places(name: str, roots: Sequence[Path]) -> Iterator[Path]:
    """Where `find_codec` looks, in order."""
    if not name or "\0" in name:
        return
    if not _is_path(name):
        yield from (root / name for root in roots)
        yield from (root / Path(name).name for root in roots if "/" in name)
        yield from (root for root in roots if _is_codec(root))
        yield from (_bundled(name), Path(name))
        return
    yield Path(name)
    parts = [part for part in Path(name).parts if part not in ("/", "..")]
    for root in roots:
        yield from (root.joinpath(*parts[-count:]) for count in (2, 1) if count <= len(parts))


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../")) or name in (".", "..")


def _bundled(name: str) -> Path:
    return ASSETS / "models" / name


def _is_dir(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:  # the name is too long for the file system
        return False


def _is_codec(folder: Path) -> bool:
    """Whether a folder is itself an autoencoder in diffusers' layout."""
    with contextlib.suppress(SourceError):
        content = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
        return isinstance(content, dict) and content.get("_class_name") == "AutoencoderKL"
    return False


def _has_config(folder: Path) -> bool:
    return any((folder / sub / CONFIG).is_file() for sub in ("", _SUB))


def _refuse_own(folder: Path) -> None:
    """CodecError for a folder of ldit's own: a run, or a model that is not a codec."""
    content: object = None
    path = folder / CONFIG
    if path.is_file() and path.stat().st_size <= MAX_BYTES:
        with contextlib.suppress(SourceError):
            content = read_json(path)
    if is_autoencoder(content):
        raise CodecError(
            f"{folder} is an autoencoder in training; `ldit convert {folder} OUT --to diffusers` makes a codec of it"
        )
    if (folder / CHECKPOINTS).is_dir() or (isinstance(content, dict) and "format" in content):
        raise CodecError(f"{folder} is a diffusion model, not an autoencoder")


def _downloaded(name: str, roots: Sequence[Path], advice: str) -> Path:
    """The codec's folder in the Hub's cache. The pickled file is downloaded only if there are no safetensors."""
    looked = ", ".join(dict.fromkeys(str(folder.absolute()) for folder in _places(name, roots))) or "no folder"
    try:
        if not is_hub_id(name):
            raise SourceError("there is no such folder")
        folder = from_hub(name, _with_sub(_FILES))
        if not any(any(place.glob(f"{STEM}*.safetensors")) for place in (folder, folder / _SUB)):
            folder = from_hub(name, _with_sub((CONFIG, PICKLED)))
    except SourceError as error:
        raise CodecError(
            f"the autoencoder {name!r:.200} was not found: {error}; looked in {looked}; {advice}"
        ) from None
    return folder


def _with_sub(files: Sequence[str]) -> list[str]:
    return [*files, *(f"{_SUB}/{file}" for file in files)]
