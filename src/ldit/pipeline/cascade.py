"""The second stage of a cascade (Ho et al. 2022): a network that also sees each image at a smaller size, enlarged."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldit.codecs.codec import Codec
from ldit.codecs.latents import enlarged
from ldit.config.spec import ModelSpec
from ldit.errors import RequestError
from ldit.pipeline.init_image import InitImage, cut, encoded, given_images
from ldit.sampling.guidance import Network


def small_images(
    spec: ModelSpec, given: InitImage, shape: tuple[int, int, int], count: int
) -> tuple[Image.Image, ...] | None:
    """The images that a second stage enlarges, one for all or one each, cut to its small size; None for other models.
    `shape` (C, h, w) is that of the latents to be sampled. RequestError where the images and the model do not go
    together."""
    if spec.cascade is None:
        if spec.model.cond_channels:
            raise RequestError("model.cond_channels: this model does not say what its further input channels are")
        if given is not None:
            raise RequestError("from_image: this model enlarges no images; image to image is init_image")
        return None
    if given is None:
        raise RequestError(
            f"from_image: this model enlarges images of {spec.cascade.size} pixels: give some (--from-image FILE …), "
            "or a model that makes them (--base MODEL)"
        )
    images = given_images(given) or []
    if len(images) not in (1, count):
        raise RequestError(f"from_image: {len(images)} images to enlarge for {count}; give one, or one each")
    # As many times smaller as in training.
    factor = spec.model.input_size * spec.codec.factor // spec.cascade.size
    height, width = (side * spec.codec.factor for side in shape[1:])
    if height % factor or width % factor:
        raise RequestError(f"height, width: {height}x{width} pixels are no multiple of {factor}")
    return cut(images, width // factor, height // factor)


def small_latents(images: Sequence[Image.Image], codec: Codec, shape: tuple[int, int, int]) -> Tensor:
    """Latents of small images, enlarged to `shape`: (B, C, h, w) fp32 on the CPU."""
    return enlarged(encoded(images, codec), shape[1:])


def seeing(network: Network, small: Tensor) -> Network:
    """The network, which is given the small images besides: `small` (B, C, h, w), for one or more copies of a batch of
    B images, as guidance makes them."""

    def call(x: Tensor, time: Tensor, cond: Any, **more: Any) -> Any:
        own = small.repeat(len(x) // len(small), 1, 1, 1).to(x)
        return network(torch.cat([x, own], dim=1), time, cond, **more)

    return call
