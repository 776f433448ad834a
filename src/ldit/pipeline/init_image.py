"""Start images of sampling (SDEdit, Meng et al. 2022): opens, crops and encodes them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from ldit.codecs.codec import Codec
from ldit.codecs.pixels import from_pil
from ldit.data.images.decoding import BadImage, Decoding, open_image, to_rgb
from ldit.data.images.transforms import center_crop
from ldit.errors import RequestError
from ldit.sampling.fast.oom import out_of_memory

A = TypeVar("A")
B = TypeVar("B")
Given = Image.Image | str | Path
InitImage = Given | Sequence[Given] | None


def given_images(given: InitImage) -> list[Image.Image] | None:
    """RGB images of one or several PIL images or files; the EXIF orientation of files is applied. None for None.
    RequestError names a file that is no image."""
    if given is None:
        return None
    try:
        images = [given] if isinstance(given, (Image.Image, str, Path)) else list(given)
    except TypeError:
        raise RequestError(f"init_image: expected images or files, got a {type(given).__name__}") from None
    if not images:
        raise RequestError("init_image: no image given")
    return _each(_opened, images)


def cut(images: Sequence[Image.Image], width: int, height: int) -> tuple[Image.Image, ...]:
    """Resize and crop each image to width x height pixels by ADM's rule. RequestError when memory runs out."""
    with _memory_for(width, height):
        return tuple(_each(lambda one: center_crop(one, width, height), images))


def encoded(images: Sequence[Image.Image], codec: Codec) -> Tensor:
    """Scaled latents (B, C, h, w), fp32 on the CPU; an autoencoder's are posterior means. Images are encoded one at a
    time, so that a latent does not depend on the other images, nor memory on their number. RequestError when memory
    runs out."""
    with _memory_for(*images[0].size):
        return torch.stack(_each(lambda one: codec.encode(from_pil([one]))[0].cpu(), images))


@contextmanager
def _memory_for(width: int, height: int) -> Iterator[None]:
    """A block for work on images of this size: running out of memory in it becomes a RequestError."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise RequestError(
            f"init_image: memory does not suffice for an image of {width}x{height}: a smaller height and width need "
            "less"
        ) from None


def _each(function: Callable[[A], B], values: Sequence[A]) -> list[B]:
    """`function` of each value, computed once for an object that occurs several times."""
    results = {key: function(value) for key, value in {id(value): value for value in values}.items()}
    return [results[id(value)] for value in values]


def _opened(one: Given) -> Image.Image:
    if isinstance(one, Image.Image):
        return to_rgb(one)
    if not isinstance(one, (str, Path)):
        raise RequestError(f"init_image: expected an image or a file, got a {type(one).__name__}")
    try:
        return open_image(Path(one), Decoding(exif=True))
    except BadImage as error:
        raise RequestError(f"init_image {one}: {error}") from None
