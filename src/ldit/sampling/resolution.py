"""Scales positions, so that a network samples at sizes it was not trained at.

| scaling    | an axis s times as long as in training                                                                |
|------------|-------------------------------------------------------------------------------------------------------|
| none       | positions beyond the trained ones                                                                     |
| linear     | all frequencies divided by s (position interpolation, Chen et al. 2023): the layout is as in          |
|            | training, but neighbours are closer together than they were                                           |
| ntk        | the highest frequency kept, the lowest divided by s, geometrically between (NTK-aware scaling)        |
| time-aware | linear in pure noise, where the layout is decided, to ntk in clean data, where details are (Zhuo et   |
|            | al. 2024, Lumina-Next, switch from one to the other; here they are blended over noise time)           |

An axis that is no longer than in training is not scaled. With raster positions a row is always as far from the next as
in training, and columns are scaled. Rows get NTK in every scaling: half of a row's distance in a raster is not half a
row down but some columns to the right, so interpolated rows destroy the image.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from ldit.config.model import ClassModelConfig, ModelConfig, OriginalDiTConfig, TextModelConfig
from ldit.diffusion.process import Process
from ldit.errors import RequestError
from ldit.nn.rope import GridScale
from ldit.sampling.guidance import Network

Scaling = Literal["none", "linear", "ntk", "time-aware"]
SCALINGS: tuple[str, ...] = get_args(Scaling)


@dataclass(frozen=True)
class Positioned:
    """A network with scaled positions, called as `network(x, time, cond)`; see `positioned`.

    `side`: rows and columns of tokens in training; `stride`: tokens of a row there. `rows`, `columns`: those of the
    images to be sampled.
    """

    network: Any
    process: Process
    raster: bool
    side: int
    rows: int
    columns: int
    scaling: Scaling
    proportional: bool
    stride: int

    def __call__(self, x: Tensor, time: Tensor, cond: Any, **more: Any) -> Any:
        """x (B, C, H, W), time (B,) the same in all rows -> the network's output."""
        # Reading the time may wait for the GPU, so only time-aware scaling does.
        noise = self.process.noise_time_of(float(time[0])) if self.scaling == "time-aware" else 1.0
        return self.network(x, time, cond, grid=self.scale(noise), **more)

    def scale(self, noise: float) -> GridScale:
        """How positions are computed at noise time `noise`, 0 = data, 1 = noise."""
        # How many times as long as in training each axis is.
        rows, columns = (max(1.0, count / self.side) for count in (self.rows, self.columns))
        # w blends the two: interpolation by s^w and NTK by s^(1-w) divide frequency i of n by s^(w + (1-w)·i/(n-1)),
        # the lowest always by s, the highest by s^w.
        w = {"none": 0.0, "linear": 1.0, "ntk": 0.0}.get(self.scaling, min(max(noise, 0.0), 1.0))
        if self.scaling == "none":
            rows = columns = 1.0
        w_rows = 0.0 if self.raster else w
        return GridScale(
            rows=rows**w_rows,
            columns=columns**w,
            ntk_rows=rows ** (1.0 - w_rows),
            ntk_columns=columns ** (1.0 - w),
            softmax=proportion(self.rows * self.columns, self.side**2) if self.proportional else 1.0,
            stride=self.stride if self.raster and self.scaling != "none" else None,
        )


def positioned(
    network: Any,
    process: Process,
    config: ModelConfig,
    rows: int,
    columns: int,
    scaling: str = "none",
    proportional: bool = False,
) -> Network:
    """The network as the sampler calls it, with positions for images of rows x columns tokens.

    `network` takes (x, time, cond, *, grid). `scaling` is a row of the table above; `proportional` multiplies attention
    logits by `proportion`. Where neither changes anything, as at the training size, the network is returned as it is.
    RequestError for an unknown scaling, and for networks whose positions cannot be scaled.
    """
    check_scaling(config, scaling, proportional)
    side = config.input_size // config.patch_size
    if (rows, columns) == (side, side) or (scaling == "none" and not proportional):
        return network
    raster = not isinstance(config, OriginalDiTConfig) and config.rope == "raster"
    known: Scaling = scaling  # type: ignore[assignment]
    # Rows of text models have a token more, the end of the line.
    stride = side + isinstance(config, TextModelConfig)
    return Positioned(network, process, raster, side, rows, columns, known, proportional, stride)


def check_scaling(config: ModelConfig, scaling: str, proportional: bool = False) -> None:
    """RequestError unless the network of `config` supports this scaling."""
    if scaling not in SCALINGS:
        raise RequestError(f"rope_scaling: expected {', '.join(SCALINGS[:-1])} or {SCALINGS[-1]}, got {scaling!r}")
    if proportional and isinstance(config, TextModelConfig):
        raise RequestError("proportional_attention: not for text models, whose queries attend to the text as well")
    if proportional and isinstance(config, ClassModelConfig) and (config.fine_layers or config.class_tokens):
        raise RequestError("proportional_attention: not for models with class tokens or two patch levels")


def proportion(tokens: int, trained: int) -> float:
    """sqrt(log tokens / log trained), a factor on attention logits (Jin et al. 2023).

    It keeps the entropy of attention over more tokens as it was in training.
    """
    return math.sqrt(math.log(tokens) / math.log(trained)) if min(tokens, trained) > 1 else 1.0
