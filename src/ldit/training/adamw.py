"""AdamW (Loshchilov and Hutter 2019) whose moments may be stored in fewer bits.

With fp32 moments the arithmetic is torch's fused kernel. With others each parameter's moments are read into fp32,
updated and stored again, a piece at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Size, Tensor, nn
from torch.optim.adamw import adamw

from ldit.config.sections import OptimConfig
from ldit.parallel.layout import Layout
from ldit.training.moments import Moments, seed_of

EPS = 1e-8
SCALAR = Layout(())


@dataclass(frozen=True)
class Row:
    """A parameter: its name, this rank's part of its master, the layout, its share of the learning rate (1, or less by
    muP), and its moments."""

    name: str
    master: nn.Parameter
    layout: Layout
    share: float
    moments: Moments


class AdamW:
    """`rows` are all parameters in the network's order, also those that this rank has no part of. `count`: the number
    of applied steps, a scalar on the device."""

    def __init__(self, rows: Sequence[Row], config: OptimConfig, device: torch.device) -> None:
        self.rows = list(rows)
        self._betas = self.beta1, self.beta2 = config.beta1, config.beta2
        self.weight_decay = config.weight_decay
        self.count = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], lr: float, sound: Tensor, number: int = 0) -> None:
        """Apply fp32 gradients, one for each row, if `sound`, a bool on the device, is true; otherwise change nothing.
        `number` is the number of steps before this one.

        The host does not wait for `sound`: the fused kernel skips the step itself, as it does for GradScaler.
        """
        shares: dict[float, list[tuple[Row, Tensor]]] = {}
        low = []
        for index, (row, grad) in enumerate(zip(self.rows, grads, strict=True)):
            if not row.master.numel():
                continue
            if row.moments.kind == "fp32":
                shares.setdefault(row.share, []).append((row, grad))
            else:
                low.append((index, row, grad))
        for share, group in shares.items():
            adamw(
                [row.master for row, _ in group],
                [grad for _, grad in group],
                [row.moments.first for row, _ in group],
                [row.moments.second for row, _ in group],
                [],
                list(self.count.repeat(len(group)).unbind()),  # torch counts the steps of each parameter
                fused=True,
                found_inf=(~sound).to(torch.float32),
                amsgrad=False,
                beta1=self.beta1,
                beta2=self.beta2,
                lr=lr * share,
                weight_decay=self.weight_decay,
                eps=EPS,
                maximize=False,
            )
        self.count += sound
        for index, row, grad in low:
            self._step_one(row, grad, lr * row.share, sound, seed_of(number, index))

    def _step_one(self, row: Row, grad: Tensor, lr: float, sound: Tensor, seed: int) -> None:
        """One parameter whose moments are not fp32, piece by piece."""
        master, grad, (bias1, bias2) = row.master.detach().view(-1), grad.reshape(-1), self.biases()
        for piece in row.moments.pieces():
            first, second = row.moments.read(piece)
            given, p = grad[piece].view_as(first), master[piece].view_as(first)
            first.lerp_(given, 1 - self.beta1)
            squares = given.square()
            in_blocks = second.shape != given.shape
            second.lerp_(squares.mean(-1, keepdim=True) if in_blocks else squares, 1 - self.beta2)
            moved = p.mul(1 - lr * self.weight_decay).sub_(first / (second.sqrt() / bias2 + EPS) * (lr / bias1))
            torch.where(sound, moved, p, out=p)
            row.moments.write(piece, first, second, seed, sound)

    def describe(self) -> str:
        """How the moments are stored: "int8 for 98 % of AdamW's parameters, fp32 for the rest"."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.moments.kind] = counts.get(row.moments.kind, 0) + Size(row.layout.shape).numel()
        kind = next((kind for kind in counts if kind != "fp32"), "fp32")
        share = counts.get(kind, 0) / max(sum(counts.values()), 1)
        rest = "" if share == 1 else ", fp32 for the rest"
        return f"{kind} for {share:.0%} of AdamW's parameters{rest}".replace("%", " %")

    def biases(self) -> tuple[Tensor, Tensor]:
        """What the first moment and the root of the second are divided by: scalars on the device. 1 before any step."""
        count = self.count.clamp(min=1)
        # 1 - beta^count; expm1 keeps the digits that 1 - 0.999 loses in fp32.
        first, second = (-torch.expm1(count * log(beta)) if beta else count.new_ones(()) for beta in self._betas)
        return first, second.sqrt()

    def state(self) -> Iterator[tuple[str, Layout, Tensor]]:
        """(name, layout, this rank's part) of every tensor that a checkpoint must hold; all ranks yield the same
        names."""
        for row in self.rows:
            for moment, layout, part in row.moments.tensors():
                yield f"{moment}.{row.name}", layout, part
            # The same number for all parameters. Torch keeps one for each, and so do checkpoints.
            yield f"step.{row.name}", SCALAR, self.count
