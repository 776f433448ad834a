"""Opens a codec: from its configuration to the object that turns images into latents and back."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ldit.codecs.autoencoder import AutoencoderCodec, check_folder
from ldit.codecs.kl_config import CONFIG, MAX_BYTES, read_kl_config
from ldit.codecs.kl_weights import PICKLED, STEM, read_tensors
from ldit.codecs.pixels import PixelCodec
from ldit.config.assets import ASSETS
from ldit.config.autoencoder import is_autoencoder
from ldit.config.spec import AutoencoderConfig, CodecConfig, PixelCodecConfig
from ldit.errors import CodecError, SourceError
from ldit.storage.atomic import read_json
from ldit.storage.hub import from_hub, is_hub_id
from ldit.storage.names import CHECKPOINTS
from ldit.storage.tensors import write_safetensors

Codec = PixelCodec | AutoencoderCodec

_SUB = "vae"  # the sub-folder of a diffusers pipeline's codec
_FILES = (CONFIG, f"{STEM}.safetensors", f"{STEM}.safetensors.index.json", f"{STEM}-*-of-*.safetensors")
_HELP = "--local_diffusers_model_root ROOT names a folder that holds it; --latents-out FILE samples latents without it"


def open_codec(
    config: CodecConfig,
    roots: Sequence[Path] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels: int | None = None,
) -> Codec:
    """The codec of `config`: of a local folder (see `find_codec`), else of the Hub.

    CodecError says where was looked, or what in the folder is wrong; `channels` is the number of latent channels that
    it must have.
    """
    if isinstance(config, PixelCodecConfig):
        return PixelCodec()
    folder = codec_folder(config.name, roots)
    check_folder(config, folder, channels)
    return AutoencoderCodec(config, folder, device, dtype)


def check_codec(config: CodecConfig, roots: Sequence[Path] = (), channels: int | None = None) -> None:
    """CodecError where `open_codec` would find no codec or none that fits; no weights are read."""
    if isinstance(config, AutoencoderConfig):
        check_folder(config, codec_folder(config.name, roots), channels)


def find_codec(name: str, roots: Sequence[Path] = ()) -> Path | None:
    """The local folder `name`; None when there is none.

    A path (/…, ./…, ../…) is taken as it is; if it does not exist, its last two parts and its last one are looked for
    in each of `roots`. Any other name is looked for in `roots`, among the bundled models, and last in the working
    directory, so that a folder there does not hide a model. A folder without a configuration counts only where no other
    has one.
    """
    folders = [folder for folder in _places(name, roots) if _is_dir(folder)]
    return next((folder for folder in folders if _has_config(folder)), folders[0] if folders else None)


def codec_folder(name: str, roots: Sequence[Path] = ()) -> Path:
    """The folder with config.json and weights of autoencoder `name`, local or of the Hub, which is downloaded to its
    cache (HF_HUB_OFFLINE is honoured). CodecError otherwise."""
    folder = find_codec(name, roots) or _downloaded(name, roots)
    if (folder / _SUB / CONFIG).is_file() and not any(folder.glob(f"{STEM}*")):
        return folder / _SUB
    _refuse_own(folder)
    return folder


def whole_name(name: str) -> str:
    """The name by which a checkpoint, which is opened from anywhere, finds its codec: the absolute path of a folder;
    bundled codecs and those of the Hub keep their name."""
    folder = find_codec(name)
    return name if folder is None or folder == _bundled(name) else str(folder.resolve())


def private_codec(name: str, own: Path) -> Path | None:
    """The folder of a codec that only this machine finds by `name`: it is given by path, or is inside `own`, the
    folder of its model. None for one that is bundled, of the Hub, or missing."""
    folder = find_codec(name, [own])
    if folder is None or not (_is_path(name) or folder.is_relative_to(own)):
        return None
    return codec_folder(name, [own])


def copy_codec(source: Path, target: Path) -> None:
    """Make the folder `target` of a codec's configuration and weights, one file of safetensors whatever they were in.
    CodecError when they cannot be read."""
    read_kl_config(source)
    target.mkdir()
    (target / CONFIG).write_bytes((source / CONFIG).read_bytes())
    write_safetensors(target / f"{STEM}.safetensors", ((name, t.clone()) for name, t in read_tensors(source)))


def _places(name: str, roots: Sequence[Path]) -> Iterator[Path]:
    if not name or "\0" in name:
        return
    if not _is_path(name):
        yield from (*(root / name for root in roots), _bundled(name), Path(name))
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
    except OSError:  # a name longer than the file system takes
        return False


def _has_config(folder: Path) -> bool:
    return any((folder / sub / CONFIG).is_file() for sub in ("", _SUB))


def _refuse_own(folder: Path) -> None:
    """CodecError for a run or a model of ours, which is not an autoencoder's folder."""
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


def _downloaded(name: str, roots: Sequence[Path]) -> Path:
    looked = ", ".join(dict.fromkeys(str(folder.absolute()) for folder in _places(name, roots))) or "no folder"
    try:
        if not is_hub_id(name):
            raise SourceError("there is no such folder")
        folder = from_hub(name, _with_sub(_FILES))
        if not any(any(place.glob(f"{STEM}*.safetensors")) for place in (folder, folder / _SUB)):
            folder = from_hub(name, _with_sub((CONFIG, PICKLED)))
    except SourceError as error:
        raise CodecError(f"the autoencoder {name!r:.200} was not found: {error}; looked in {looked}; {_HELP}") from None
    return folder


def _with_sub(files: Sequence[str]) -> list[str]:
    return [*files, *(f"{_SUB}/{file}" for file in files)]
