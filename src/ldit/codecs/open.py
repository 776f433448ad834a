"""From a codec configuration to what decodes latents."""

from pathlib import Path

from ldit.codecs.pixels import PixelCodec
from ldit.config.spec import CodecConfig, PixelCodecConfig
from ldit.errors import CodecError

Codec = PixelCodec


def open_codec(config: CodecConfig, root: Path | None = None) -> Codec:
    """The codec of `config`; local autoencoders are looked for in `root`/name. CodecError says which folder."""
    if isinstance(config, PixelCodecConfig):
        return PixelCodec()
    folder = (root or Path()) / config.name
    state = "is there" if folder.is_dir() else "is not there"
    raise CodecError(
        f"this model needs the autoencoder {config.name!r}: looked for the folder {folder}, which {state}; "
        "autoencoders are not built yet, so only latents can be written (--latents-out FILE)"
    )
