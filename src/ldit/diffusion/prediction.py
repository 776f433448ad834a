"""What a network gives an objective."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """A network's output and whatever else its objective may want."""

    out: Tensor
    aux: Any = None


Predict = Callable[[Tensor, Tensor], Tensor | Prediction]
"""predict(x_t, network_time) -> output; x_t (B, C, H, W), network_time (B,)."""


def output_of(prediction: Tensor | Prediction) -> Tensor:
    """The output in fp32: objectives compute in fp32 whatever the network's dtype."""
    return (prediction.out if isinstance(prediction, Prediction) else prediction).float()


def per_sample(x: Tensor) -> Tensor:
    """Mean over all axes but the first."""
    return x.flatten(1).mean(1)
