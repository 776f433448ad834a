"""Flow matching on straight lines: x_t = (1-t)·x0 + t·noise, t = 0 data, t = 1 noise (Lipman et al. 2023, SiT, JiT)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ldit.diffusion.prediction import Predict, output_of, per_sample

LEAST_TIME = 0.05  # floor of t where a data prediction is turned into a velocity (JiT)


@dataclass(frozen=True)
class Flow:
    """The objective and the network's conventions: `data_at` is the native time of the data (0 here, 1 in SiT), the
    network is given native time x `time_scale` and predicts the native velocity "v" or the data "x0"."""

    prediction: Literal["v", "x0"] = "v"
    time_scale: float = 1000.0
    data_at: Literal[0, 1] = 0
    shift: float = 1.0

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is given for t (B,)."""
        return (t if self.data_at == 0 else 1.0 - t) * self.time_scale

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """(1-t)·x0 + t·noise."""
        t = _columns(t, x0)
        return (1.0 - t) * x0 + t * noise

    def velocity(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """dx/dt = noise - x0 from the network's output; a network with 2C channels predicts in the first C (SiT)."""
        out = out[:, : x_t.shape[1]]
        if self.prediction == "x0":
            return (x_t - out) / _columns(t, x_t).clamp(min=LEAST_TIME)
        return out if self.data_at == 0 else -out

    def losses(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Squared error of the velocity, per sample: {"loss", "mse"}, each (B,).

        x0, noise (B, C, H, W) fp32; t (B,) in [0, 1]; `predict` is given x_t and `network_time(t)`.
        """
        x_t = self.q_sample(x0, t, noise)
        out = output_of(predict(x_t, self.network_time(t)))
        # With t below the floor the target is rescaled like the estimate, so a perfect x0 still has zero loss.
        target = self.velocity(x0, x_t, t) if self.prediction == "x0" else noise - x0
        mse = per_sample((self.velocity(out, x_t, t) - target).square())
        return {"loss": mse, "mse": mse}

    def heldout_error(self, losses: dict[str, Tensor], t: Tensor) -> Tensor:
        """Squared error of eps = x_t + (1-t)·v (B,), comparable across processes."""
        return (1.0 - t).square() * losses["mse"]


def _columns(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))
