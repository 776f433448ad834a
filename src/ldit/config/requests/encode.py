"""The request of `ldit encode` and `ldit.encode`."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from ldit.config.model import TextModelConfig
from ldit.config.requests.fields import flag
from ldit.config.run import BaseRun, RunConfig
from ldit.config.sections import DataConfig, TextConfig
from ldit.config.spec import AutoencoderConfig
from ldit.errors import ConfigError

_SHARED = ("image_size", "heldout", "max_per_class", "bad", "exif", "background", "max_pixels", "workers", "timeout")
"""Settings of images that a run has under the same names."""
_LEAST = {
    "image_size": 1,
    "batch_size": 1,
    "shard_size": 1,
    "max_tokens": 1,
    "workers": 0,
    "max_per_class": 0,
    "max_pixels": 1,
}


@dataclass(frozen=True)
class EncodeRequest:
    """What: images that an autoencoder encodes into a latent cache."""

    path: str = field(metadata=flag(positional=True))
    """Images: a folder with class folders, loose images, metadata.jsonl, IDX files or tar shards, or the bundled
    "emoji64". A set is identified by the names of its images (in tars also their sizes): an image that is changed but
    keeps its name is not noticed."""
    out: Path
    """Folder of the cache."""
    recipe: str = ""
    """Recipe, FILE.py:FUNCTION or run directory that the cache is for: its settings of images and autoencoder are the
    defaults of all flags below."""
    image_size: int = 256
    """Side of the square images, in pixels."""
    heldout: str | None = None
    """File, in the folder of the images, that lists the held-out ones. Default: heldout.txt where there is one; "" =
    none."""
    max_per_class: int = 0
    """Use at most this many images of each class; 0 = all."""
    codec: str = field(default="stabilityai/sd-vae-ft-ema", metadata=flag(group="Autoencoder"))
    """Autoencoder: a folder or Hub id."""
    local_diffusers_model_root: Path | None = field(default=None, metadata=flag("codec_root", group="Autoencoder"))
    """Folder in which autoencoders are looked for by name."""
    dtype: Literal["bf16", "fp32"] = field(default="bf16", metadata=flag(group="Autoencoder"))
    """Dtype of the stored latents."""
    precision: Literal["fp32", "bf16", "fp16"] = field(default="fp32", metadata=flag(group="Autoencoder"))
    """Dtype in which the autoencoder computes."""
    bad: Literal["stop", "skip"] = field(default="stop", metadata=flag(group="Decoding"))
    """What happens at an image that cannot be read: stop = the job ends; skip = the image is left out and listed in the
    cache's manifest."""
    exif: bool = field(default=False, metadata=flag(group="Decoding"))
    """Apply the EXIF orientation of images."""
    background: tuple[int, int, int] = field(default=(255, 255, 255), metadata=flag(group="Decoding"))
    """Colour behind transparent images."""
    max_pixels: int = field(default=1 << 26, metadata=flag(group="Decoding"))
    """Most pixels of an image; larger images count as bad and are not decoded."""
    batch_size: int = field(default=32, metadata=flag(group="Machine"))
    """Images encoded at once."""
    shard_size: int = field(default=4096, metadata=flag(group="Machine"))
    """Images per file of the cache. After an interruption unfinished files are made again."""
    workers: int = field(default=2, metadata=flag(group="Machine"))
    """Threads that read images in advance; 0 = read in the main thread."""
    timeout: float = field(default=DataConfig.timeout, metadata=flag(group="Machine"))
    """Seconds that reading one image may take; then the job ends and names the image."""
    device: str | None = field(default=None, metadata=flag(group="Machine"))
    """cpu, cuda, … Default: cuda where there is one."""
    captions: bool = False
    """Keep the captions of the images too, for text models; classes are left out."""
    text: bool = field(default=False, metadata=flag(group="Text"))
    """Cache the text features of all captions instead of latents (text.cache of a run)."""
    encoder: str = field(default=TextConfig.encoder, metadata=flag(group="Text"))
    """Text encoder: a folder or Hub id."""
    tokenizer: str = field(default="", metadata=flag(group="Text"))
    """Its tokenizer. Default: that of the encoder."""
    max_tokens: int = field(default=TextConfig.max_tokens, metadata=flag(group="Text"))
    """Longer captions are cut to so many tokens."""

    def with_recipe(self, config: BaseRun) -> "EncodeRequest":
        """This request with the settings of a run in place of those that are at their defaults, so that the run takes
        the cache."""
        data, codec = config.data, getattr(config, "codec", None)
        theirs = {name: getattr(data, name) for name in _SHARED} | {"precision": data.codec_precision}
        if isinstance(codec, AutoencoderConfig):
            theirs["codec"] = codec.name
        if isinstance(config, RunConfig) and isinstance(config.model, TextModelConfig):
            theirs["captions"] = not self.text
            if self.text:
                own_text = config.text
                theirs |= {
                    name: getattr(own_text, name) for name in ("encoder", "tokenizer", "max_tokens", "precision")
                }
        own = {entry.name: entry.default for entry in fields(self)}
        return replace(self, **{name: value for name, value in theirs.items() if getattr(self, name) == own[name]})

    def __post_init__(self) -> None:
        for key, least in _LEAST.items():
            if getattr(self, key) < least:
                raise ConfigError(f"--{key.replace('_', '-')}: must be at least {least}, got {getattr(self, key)}")
        if not self.timeout > 0:
            raise ConfigError(f"--timeout: must be more than 0, got {self.timeout}")
        if not all(0 <= value <= 255 for value in self.background):
            raise ConfigError(f"--background: three numbers from 0 to 255, got {self.background}")
