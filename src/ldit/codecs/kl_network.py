"""diffusers' KL autoencoder as one module, for training and for codecs.

The only file that imports diffusers. That takes seconds, so import this file inside functions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldit.codecs.imports import absent
from ldit.codecs.kl_config import CONFIG, KLConfig, diffusers_arguments, kl_config
from ldit.codecs.latents import LOGVAR_RANGE, draw
from ldit.errors import CodecError

with absent("torchvision"):  # diffusers would import it for networks that are not used here
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

MAX_PARAMETERS = 2_000_000_000
"""More than twenty times the usual network, which has 84 million."""


class Reconstruction(NamedTuple):
    """Images (B, 3, H, W), and mean and clamped log-variance (B, C, h, w) of the posterior they were decoded from."""

    images: Tensor
    mean: Tensor
    logvar: Tensor


class KLNetwork(AutoencoderKL):
    """diffusers' parameter names, configuration and arithmetic; `forward` is given its noise."""

    def to(self, *args: Any, **kwargs: Any) -> "KLNetwork":  # type: ignore[override]
        """As torch.nn.Module.to; diffusers' own method warns at every change of dtype."""
        return nn.Module.to(self, *args, **kwargs)

    def forward(self, images: Tensor, noise: Tensor) -> Reconstruction:  # type: ignore[override]
        """Encode images (B, 3, H, W) in [-1, 1], sample the posterior with `noise` (B, C, h, w), decode."""
        mean, logvar = self.moments(images)
        return Reconstruction(self.images(draw(mean, logvar, noise)), mean, logvar)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> raw mean and log-variance (B, C, h, w), the log-variance clamped to [-30, 20]."""
        out = self.encoder(images)
        if self.quant_conv is not None:
            out = self.quant_conv(out)
        mean, logvar = out.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def images(self, raw: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> (B, 3, H, W), not clamped."""
        if self.post_quant_conv is not None:
            raw = self.post_quant_conv(raw)
        return self.decoder(raw)


def build_network(config: KLConfig | dict[str, Any], where: str = CONFIG) -> KLNetwork:
    """The network of a config.json on torch's current device, with new weights (none on the meta device).

    CodecError names `where` and the key that is not supported. The size is checked before memory is allocated.
    """
    checked = config if isinstance(config, KLConfig) else kl_config(config, where)
    arguments = diffusers_arguments(checked)
    with torch.device("meta"):
        network = KLNetwork(**arguments)
    count = sum(parameter.numel() for parameter in network.parameters())
    if count > MAX_PARAMETERS:
        raise CodecError(
            f"{where}: block_out_channels and layers_per_block make {count} parameters, more than {MAX_PARAMETERS}"
        )
    return network if torch.get_default_device().type == "meta" else KLNetwork(**arguments)
