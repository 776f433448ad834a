"""Convolutions with folded batch normalisation, filled strictly from published state dicts.

At inference bn(w * x) = (g·w) * x + (b - g·m) with g = gamma / sqrt(variance + eps) for each channel (Ioffe & Szegedy
2015, section 3.1). Folding halves the passes over memory. Factors are computed in float64 and rounded once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.errors import EvaluationError

_NORM = ("weight", "bias", "running_mean", "running_var")
_COUNT = "num_batches_tracked"  # not used at inference; older files lack it

Pair = tuple[int, int]


class Folded(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, H', W'): padding, convolution with bias, activation.

    `padding` is (rows, columns) on both sides; `before` is additional, possibly asymmetric padding in the order of
    torch.nn.functional.pad. Weights are uninitialised until `fill`.
    """

    def __init__(
        self,
        channels: Pair,
        kernel: Pair,
        stride: int = 1,
        padding: Pair = (0, 0),
        groups: int = 1,
        before: tuple[int, int, int, int] | None = None,
        activation: Callable[[Tensor], Tensor] | None = torch.relu_,
    ) -> None:
        super().__init__()
        shape = (channels[1], channels[0] // groups, *kernel)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(channels[1]), requires_grad=False)
        self.stride, self.padding, self.groups = stride, padding, groups
        self.before, self.activation = before, activation

    def forward(self, x: Tensor) -> Tensor:
        if self.before is not None:
            x = F.pad(x, self.before)
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
        return x if self.activation is None else self.activation(x)


@dataclass(frozen=True)
class Place:
    """A convolution, and the names of its weights and of its normalisation in the published state dict."""

    unit: Folded
    convolution: str
    normalisation: str


def fill(state: Mapping[str, Tensor], places: Sequence[Place], head: nn.Linear, head_name: str, where: str) -> None:
    """Fill the convolutions and the linear head from a published state dict; eps is 1e-3.

    `num_batches_tracked` is optional. EvaluationError names the first entry that is missing, unknown, of a wrong shape,
    or not finite; `where` is the file, for messages.
    """
    _check(state, _expected(places, head, head_name), {f"{place.normalisation}.{_COUNT}" for place in places}, where)
    for place in places:
        gamma, beta, mean, variance = (state[f"{place.normalisation}.{leaf}"].double() for leaf in _NORM)
        factor = gamma / torch.sqrt(variance + 1e-3)
        name = f"{place.convolution}.weight"
        weight = state[name].double() * factor[:, None, None, None]
        _set(place.unit.weight, weight.contiguous(memory_format=torch.channels_last), f"{where}: {name}")
        _set(place.unit.bias, beta - mean * factor, f"{where}: {place.normalisation}.bias")
    _set(head.weight, state[f"{head_name}.weight"], f"{where}: {head_name}.weight")
    _set(head.bias, state[f"{head_name}.bias"], f"{where}: {head_name}.bias")


def _set(parameter: Tensor, value: Tensor, what: str) -> None:
    parameter.data = value.to(torch.float32, copy=True)
    if not bool(torch.isfinite(parameter.data).all()):
        raise EvaluationError(f"{what} is not finite after folding the normalisation")


def _expected(places: Sequence[Place], head: nn.Linear, head_name: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for place in places:
        shapes[f"{place.convolution}.weight"] = tuple(place.unit.weight.shape)
        shapes.update({f"{place.normalisation}.{leaf}": tuple(place.unit.bias.shape) for leaf in _NORM})
    shapes[f"{head_name}.weight"], shapes[f"{head_name}.bias"] = tuple(head.weight.shape), (head.out_features,)
    return shapes


def _check(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], free: set[str], where: str) -> None:
    for name, shape in expected.items():
        if name not in state:
            raise EvaluationError(f"{where} lacks {name}")
        tensor = state[name]
        if not tensor.is_floating_point() or tensor.layout is not torch.strided:
            raise EvaluationError(f"{where}: {name} is a {tensor.dtype} tensor, expected plain floating-point numbers")
        if tuple(tensor.shape) != shape:
            raise EvaluationError(f"{where}: {name} has shape {tuple(tensor.shape)}, the network needs {shape}")
    for name in state:
        if name not in expected and name not in free:
            raise EvaluationError(f"{where}: {name[:100]} is not a tensor of this network")
