"""How other evaluation packages prepare images for Inception, by their names.

All of them use the published network of 2015. They differ in the resize to 299 x 299 and in the scaling of pixels, and
this moves a distance more than many changes of a model do. Sources: the evaluator of guided-diffusion (ADM);
torch-fidelity 0.4; pytorch-fid 0.3; clean-fid 0.1 in its mode "clean" (Parmar et al. 2022).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.extractors.resize import bicubic, tf1_bilinear

SIZE = 299


@dataclass(frozen=True)
class Protocol:
    name: str
    resize: str
    """The resize rule in words, as in reports and statistics: features of the same rule are comparable."""
    prepare: Callable[[Tensor], Tensor]
    """uint8 (B, 3, H, W) -> a new tensor (B, 3, 299, 299), fp32, about -1 to 1."""
    shuffled_splits: bool = False
    """Whether the Inception Score is of ten splits of a shuffled order; else of 5,000 images in their order."""


def _tensorflow(images: Tensor) -> Tensor:
    return tf1_bilinear(images, SIZE).sub_(128.0).div_(128.0)


def _half_pixel(images: Tensor) -> Tensor:
    """Pixels to 0 to 1, bilinear about the centres of pixels without antialiasing, then to -1 to 1."""
    unit = images.float().div_(255.0)
    return F.interpolate(unit, (SIZE, SIZE), mode="bilinear", align_corners=False).mul(2.0).sub_(1.0)


def _antialiased(images: Tensor) -> Tensor:
    """Pillow's bicubic of one channel at a time in fp32, cut to 0 to 255."""
    return bicubic(images, SIZE).sub(128.0).div_(128.0)


_TENSORFLOW = "299x299, TensorFlow-1 bilinear"
ADM = Protocol("adm", _TENSORFLOW, _tensorflow)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        ADM,
        Protocol("torch-fidelity", _TENSORFLOW, _tensorflow, shuffled_splits=True),
        Protocol("pytorch-fid", "299x299, bilinear about pixel centres, x/127.5-1", _half_pixel),
        Protocol("clean-fid", "299x299, antialiased bicubic", _antialiased),
    )
}


def protocol_of(name: str | None) -> Protocol:
    """The protocol with this name; None is the field's, ADM's. EvaluationError for an unknown name."""
    if name is None:
        return ADM
    if name not in PROTOCOLS:
        raise EvaluationError(f"protocol: expected {', '.join(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]
