"""Positions for images of another size than those of training, without training again.

| scaling    | an axis s times as long as in training                                                                |
|------------|-------------------------------------------------------------------------------------------------------|
| none       | positions go on beyond the trained ones                                                               |
| linear     | all frequencies divided by s (position interpolation, Chen et al. 2023): the whole image is framed  |
|            | as in training, neighbours look nearer than they are                                                  |
| ntk        | the highest frequency kept, the lowest divided by s, geometrically between (NTK-aware scaling)        |
| time-aware | from linear in pure noise, when the layout is settled, to ntk in clean data, when details are         |
|            | (Zhuo et al. 2024, Lumina-Next, who step from one to the other; here blended over noise time)         |

An axis that is not longer than in training stays as it is. For raster positions the next row is always as far as in
training, and columns are scaled; rows get NTK in every scaling, for a fraction of a row's distance is not half a row
further down but some columns to the right. Interpolated rows shred an image.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from ldit.config.model import ClassModelConfig, ModelConfig, OriginalDiTConfig
from ldit.diffusion.process import Process
from ldit.errors import RequestError
from ldit.nn.rope import GridScale
from ldit.sampling.guidance import Network

Scaling = Literal["none", "linear", "ntk", "time-aware"]
SCALINGS: tuple[str, ...] = get_args(Scaling)


@dataclass(frozen=True)
class Positioned:
    """A network whose positions are scaled at every call: `network(x, time, cond, grid=…)`; see `positioned`.

    `side`: rows and columns of tokens in training; `rows`, `columns`: of the images asked for.
    """

    network: Any
    process: Process
    raster: bool
    side: int
    rows: int
    columns: int
    scaling: Scaling
    proportional: bool

    def __call__(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        """x (B, C, H, W), time (B,) the same for all rows -> the network's output."""
        # Only time-aware positions need the number, for which a GPU has to be waited for.
        noise = self.process.noise_time_of(float(time[0])) if self.scaling == "time-aware" else 1.0
        return self.network(x, time, cond, grid=self.scale(noise))

    def scale(self, noise: float) -> GridScale:
        """The positions at noise time `noise`, 0 = data, 1 = noise."""
        rows, columns = (max(1.0, count / self.side) for count in (self.rows, self.columns))
        # s^w of interpolation and s^(1-w) of NTK divide frequency i of n by s^(w + (1-w)·i/(n-1)): the lowest always
        # by s, the highest by s^w.
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
            stride=self.side if self.raster and self.scaling != "none" else None,
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
    """`network(x, time, cond, *, grid)` as the sampler calls it, for images of rows x columns tokens: with `scaling`
    of positions (see the table above) and, if `proportional`, logits of attention multiplied by `proportion`. The
    network itself where that changes nothing, at the training size above all.

    RequestError for an unknown scaling and for networks whose positions cannot be scaled.
    """
    check_scaling(config, scaling, proportional)
    if not isinstance(config, (ClassModelConfig, OriginalDiTConfig)):
        return network
    side = config.input_size // config.patch_size
    if (rows, columns) == (side, side) or (scaling == "none" and not proportional):
        return network
    raster = isinstance(config, ClassModelConfig) and config.rope == "raster"
    known: Scaling = scaling  # type: ignore[assignment]
    return Positioned(network, process, raster, side, rows, columns, known, proportional)


def check_scaling(config: ModelConfig, scaling: str, proportional: bool = False) -> None:
    """RequestError unless the network of `config` can be given such positions."""
    if scaling not in SCALINGS:
        raise RequestError(f"rope_scaling: expected {', '.join(SCALINGS[:-1])} or {SCALINGS[-1]}, got {scaling!r}")
    if (scaling != "none" or proportional) and not isinstance(config, (ClassModelConfig, OriginalDiTConfig)):
        raise RequestError(f"rope_scaling {scaling}: positions of text models are not scaled yet")


def proportion(tokens: int, trained: int) -> float:
    """sqrt(log tokens / log trained): as a factor on logits it keeps the entropy of attention over more tokens where it
    was in training (Jin et al. 2023)."""
    return math.sqrt(math.log(tokens) / math.log(trained)) if min(tokens, trained) > 1 else 1.0
