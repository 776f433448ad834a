"""The Inception-v3 network of the Fréchet Inception Distance: TensorFlow's graph of 2015-12-05 (Szegedy et al. 2016).

It differs from torchvision's network. Average pooling inside the blocks does not count the padding, the last block uses
max pooling, the head has 1,008 outputs, there is no auxiliary head, and batch normalisation has eps 1e-3.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.errors import EvaluationError
from ldit.eval.extractors.folded import Folded, Pair, Place, fill
from ldit.eval.extractors.inception_weights import check_weights, read_state
from ldit.eval.extractors.protocol import ADM, Protocol
from ldit.precision import unrounded

WIDTH, SPATIAL, CLASSES = 2048, 7 * 17 * 17, 1008
_SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class _Conv:
    """A convolution of a branch: name in the published files, output channels, kernel, stride. With stride 1 it is
    padded to keep the size."""

    name: str
    width: int
    kernel: Pair = (1, 1)
    stride: int = 1

    def build(self, width: int) -> Folded:
        rows, columns = self.kernel
        padding = (0, 0) if self.stride > 1 else (rows // 2, columns // 2)
        return Folded((width, self.width), self.kernel, self.stride, padding)


@dataclass(frozen=True)
class _Branch:
    """An optional pooling, then a chain of convolutions, then optionally several in parallel (`fork`)."""

    chain: tuple[_Conv, ...]
    fork: tuple[_Conv, ...] = ()
    pool: str = ""


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


def _shrink(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2)


_POOLS = {"average": _average, "maximum": _maximum, "shrink": _shrink}


def _a(pool: int) -> list[_Branch]:
    """35x35."""
    return [
        _Branch((_Conv("branch1x1", 64),)),
        _Branch((_Conv("branch5x5_1", 48), _Conv("branch5x5_2", 64, (5, 5)))),
        _Branch(
            (_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3)))
        ),
        _Branch((_Conv("branch_pool", pool),), pool="average"),
    ]


def _b() -> list[_Branch]:
    """35x35 -> 17x17."""
    double = (_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3), 2))
    return [_Branch((_Conv("branch3x3", 384, (3, 3), 2),)), _Branch(double), _Branch((), pool="shrink")]


def _c(c: int) -> list[_Branch]:
    """17x17, with 7x7 convolutions factored into rows and columns."""
    row, column = (1, 7), (7, 1)
    double = (
        _Conv("branch7x7dbl_1", c),
        _Conv("branch7x7dbl_2", c, column),
        _Conv("branch7x7dbl_3", c, row),
        _Conv("branch7x7dbl_4", c, column),
        _Conv("branch7x7dbl_5", 192, row),
    )
    return [
        _Branch((_Conv("branch1x1", 192),)),
        _Branch((_Conv("branch7x7_1", c), _Conv("branch7x7_2", c, row), _Conv("branch7x7_3", 192, column))),
        _Branch(double),
        _Branch((_Conv("branch_pool", 192),), pool="average"),
    ]


def _d() -> list[_Branch]:
    """17x17 -> 8x8."""
    long = (
        _Conv("branch7x7x3_1", 192),
        _Conv("branch7x7x3_2", 192, (1, 7)),
        _Conv("branch7x7x3_3", 192, (7, 1)),
        _Conv("branch7x7x3_4", 192, (3, 3), 2),
    )
    short = (_Conv("branch3x3_1", 192), _Conv("branch3x3_2", 320, (3, 3), 2))
    return [_Branch(short), _Branch(long), _Branch((), pool="shrink")]


def _e(pool: str) -> list[_Branch]:
    """8x8."""
    row, column = (1, 3), (3, 1)
    short = (_Conv("branch3x3_2a", 384, row), _Conv("branch3x3_2b", 384, column))
    long = (_Conv("branch3x3dbl_3a", 384, row), _Conv("branch3x3dbl_3b", 384, column))
    return [
        _Branch((_Conv("branch1x1", 320),)),
        _Branch((_Conv("branch3x3_1", 384),), short),
        _Branch((_Conv("branch3x3dbl_1", 448), _Conv("branch3x3dbl_2", 384, (3, 3))), long),
        _Branch((_Conv("branch_pool", 192),), pool=pool),
    ]


class _Mixed(nn.Module):
    """Branches on the same input, whose channels are concatenated in order."""

    def __init__(self, width: int, branches: list[_Branch]) -> None:
        super().__init__()
        self.branches, self.width = branches, 0
        for branch in branches:
            channels = width
            for conv in branch.chain:
                self.add_module(conv.name, conv.build(channels))
                channels = conv.width
            for conv in branch.fork:
                self.add_module(conv.name, conv.build(channels))
            self.width += sum(conv.width for conv in branch.fork) or channels

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for branch in self.branches:
            h = _POOLS[branch.pool](x) if branch.pool else x
            for conv in branch.chain:
                h = self.get_submodule(conv.name)(h)
            parts += [self.get_submodule(conv.name)(h) for conv in branch.fork] or [h]
        return torch.cat(parts, dim=1)


class Inception(nn.Module):
    """uint8 (B, 3, H, W) of any size, in RGB -> {"pool" (B, 2048), "spatial" (B, 2023), "logits_unbiased" (B, 1008)}.

    Images are resized and scaled as `protocol` does.

    Pool features are for FID. Spatial features are for sFID: the first 7 channels of the 1x1 branch of Mixed_6d, 17x17,
    flattened with the channel last. The logits omit the head's bias, as TensorFlow's evaluators do for the Inception
    Score.

    It computes in fp32, regardless of autocast and TF32 settings, without gradients. The batch normalisation is folded
    into the convolutions, so the module's names differ from those of the published files.
    """

    def __init__(self, protocol: Protocol = ADM) -> None:
        super().__init__()
        self.prepare = protocol.prepare
        self.Conv2d_1a_3x3 = Folded((3, 32), (3, 3), 2)
        self.Conv2d_2a_3x3 = Folded((32, 32), (3, 3))
        self.Conv2d_2b_3x3 = Folded((32, 64), (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = Folded((64, 80), (1, 1))
        self.Conv2d_4a_3x3 = Folded((80, 192), (3, 3))
        width = 192
        for name, branches in self._mixed():
            mixed = _Mixed(width, branches)
            self.add_module(name, mixed)
            width = mixed.width
        self.fc = nn.utils.skip_init(nn.Linear, WIDTH, CLASSES).requires_grad_(False)

    @staticmethod
    def _mixed() -> Iterator[tuple[str, list[_Branch]]]:
        yield from (("Mixed_5b", _a(32)), ("Mixed_5c", _a(64)), ("Mixed_5d", _a(64)), ("Mixed_6a", _b()))
        yield from (("Mixed_6b", _c(128)), ("Mixed_6c", _c(160)), ("Mixed_6d", _c(160)), ("Mixed_6e", _c(192)))
        yield from (("Mixed_7a", _d()), ("Mixed_7b", _e("average")), ("Mixed_7c", _e("maximum")))

    def places(self) -> list[Place]:
        """Every convolution with its names in the published files."""
        units = ((name, unit) for name, unit in self.named_modules() if isinstance(unit, Folded))
        return [Place(unit, f"{name}.conv", f"{name}.bn") for name, unit in units]

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise EvaluationError(
                f"inception takes uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        with unrounded(), torch.autocast(images.device.type, enabled=False):
            return self._features(self.prepare(images).contiguous(memory_format=torch.channels_last))

    def _features(self, x: Tensor) -> dict[str, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = _shrink(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_shrink(x))))  # (B, 192, 35, 35)
        spatial = x
        for name, _ in self._mixed():
            x = self.get_submodule(name)(x)
            if name == "Mixed_6d":
                spatial = x[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 2023)
        pool = x.mean((2, 3))  # (B, 2048, 8, 8) -> (B, 2048)
        return {"pool": pool, "spatial": spatial, "logits_unbiased": pool @ self.fc.weight.T}


def load_inception(path: Path | str, check_hash: bool = True, protocol: Protocol = ADM) -> Inception:
    """The network on the CPU, with the weights of the published .pth file, or of a .safetensors file with the same
    names.

    With `check_hash` only the published file itself is accepted (see `inception_weights`); converted copies need
    `check_hash=False`. Entries must match exactly, but `num_batches_tracked` is optional.

    EvaluationError for another file, or naming the first entry that is missing, unknown or of a wrong shape.
    SourceError for a file that is missing, damaged or holds more than tensors.
    """
    path = Path(path)
    if check_hash:
        check_weights(path)
    network = Inception(protocol)
    fill(read_state(path), network.places(), network.fc, "fc", str(path))
    return network.eval()
