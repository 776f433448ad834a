"""Optimisers over the masters, and the learning rate of a step."""

import math
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ldit.config.model import COND_MOST
from ldit.config.sections import OptimConfig, TrainConfig
from ldit.errors import ConfigError
from ldit.parallel.exchange import ModelGroup
from ldit.parallel.layout import Layout
from ldit.precision import DTYPES
from ldit.training.adamw import AdamW, Row
from ldit.training.moments import Moments
from ldit.training.muon import Muon, MuonSettings
from ldit.training.weights import Weights

FINAL_SHARE = 0.01  # of the peak learning rate, at the end of a cosine
# Matrices of Large-DiT's blocks, and of the original DiT's.
_MATRIX = re.compile(r"layers\.\d+\.(attention|feed_forward)\.w\w*\.weight|blocks\.\d+\.(attn|mlp)\.\w+\.weight")
_ADALN = re.compile(r"((layers|blocks)\.\d+\.)?adaLN_modulation\.1\.weight")
_QKV = re.compile(r"blocks\.\d+\.attn\.qkv\.weight")
_CONDITIONED = re.compile(r"adaLN_modulation|t_embedder")  # their input is the conditioning vector
# Matrices whose inputs become more with the width: all but the embedders of patches, classes and texts.
_HIDDEN = re.compile(
    r"((layers|blocks)\.\d+\.|adaLN_modulation|final_layer|mid_head|split|t_embedder\.mlp\.2)\S*weight"
)


class Optimizer:
    """AdamW for all parameters, or Muon for the blocks' attention and FFN matrices and AdamW for the rest.

    State tensors are named `moment.parameter` and have the parameter's layout: AdamW's `exp_avg`, `exp_avg_sq` and
    `step` (a scalar), Muon's `momentum`; see `moments` for other layouts.
    """

    def __init__(self, config: OptimConfig, weights: Weights, model_group: ModelGroup) -> None:
        self.weights = weights
        # Split the parameters between the two optimisers.
        chosen = [
            config.kind == "muon" and len(layout.shape) == 2 and _is_matrix(name, config.chunked)
            for name, layout in zip(weights.names, weights.layouts, strict=True)
        ]
        if config.kind == "muon" and not any(chosen):
            raise ConfigError(
                "optim.kind: muon is for attention and FFN matrices named as DiT's; this network has none"
            )
        every = zip(weights.names, weights.masters, weights.layouts, chosen, strict=True)
        rows = [row for row in every if row[0] not in weights.fixed]
        muon = [index for index, row in enumerate(rows) if row[3]]
        self.matrices = {rows[index][0]: rows[index][1] for index in muon}
        self._layouts = {name: layout for name, _, layout, _ in rows}
        others = [row[:3] for row in rows if not row[3]]
        shares = self._shares([name for name, *_ in others], config.base_width)
        every_row = [
            Row(name, master, layout, shares[name], Moments(master, layout, config.moments))
            for name, master, layout in others
        ]
        self.adamw = AdamW(every_row, config, weights.device)
        # Places of both kinds among the masters.
        places = {name: place for place, name in enumerate(weights.names)}
        self._of_muon = [places[name] for name in self.matrices]
        self._of_adamw = [places[row.name] for row in every_row]
        # bf16 is usual. Runs in fp32 use fp32, so that different world sizes agree more closely.
        own = torch.float32 if weights.compute == torch.float32 else torch.bfloat16
        pieces = tuple(6 if _ADALN.fullmatch(name) else 3 if _QKV.fullmatch(name) else 1 for name in self.matrices)
        self.muon = Muon(
            list(self.matrices.values()),
            [self._layouts[name] for name in self.matrices],
            model_group,
            MuonSettings(
                config.momentum,
                config.weight_decay,
                own if config.precision == "run" else DTYPES[config.precision],
                pieces if config.chunked else None,
                config.every,
            ),
        )

    def _shares(self, names: Sequence[str], base_width: int) -> dict[str, float]:
        """AdamW's share of the learning rate by parameter: for hidden matrices the number of their inputs at the base
        width over the one here (muP, Yang et al. 2022), else 1."""
        ends = {"x_embedder.weight": COND_MOST, "x_embedder.proj.weight": None}  # the original DiT has no bound
        first = next((name for name in self._layouts if name in ends), None)
        if not base_width:
            return dict.fromkeys(names, 1.0)
        if first is None:
            raise ConfigError("optim.base_width: is for networks whose parameters are named as DiT's")
        width, bound = self._layouts[first].shape[0], ends[first]
        shares = {}
        for name in names:
            is_hidden = len(self._layouts[name].shape) == 2 and _HIDDEN.fullmatch(name) is not None
            # The conditioning vector is as wide as the network only up to a bound.
            most = bound if bound and _CONDITIONED.search(name) else width + base_width
            shares[name] = min(base_width, most) / min(width, most) if is_hidden else 1.0
        return shares

    @torch.no_grad()
    def step(
        self, grads: Sequence[Tensor], lr: float, sound: Tensor, number: int = 0, factor: Tensor | None = None
    ) -> None:
        """Apply gradients, one for each master, times `factor` (None = 1), if `sound`, a bool on their device, is true;
        otherwise change nothing. `number` is the number of steps before this one. Their contents are lost."""
        grads = [grad.float() for grad in grads]
        if factor is not None:
            torch._foreach_mul_(grads, factor)
        self.adamw.step([grads[place] for place in self._of_adamw], lr, sound, number)
        self.step_muon(grads, lr, sound, number)

    def step_muon(
        self, grads: Sequence[Tensor], lr: float, sound: Tensor, number: int = 0, factor: Tensor | None = None
    ) -> None:
        """Muon's part of `step`, which leaves the gradients as they are."""
        self.muon.step([grads[place] for place in self._of_muon], lr, sound, number, factor)

    def state(self) -> Iterator[tuple[str, Layout, Tensor]]:
        """(name, layout, this rank's part) of every tensor that a checkpoint must hold. All ranks yield the same names:
        a rank without a part of a parameter yields empty moments."""
        yield from self.adamw.state()
        for name, buffer in zip(self.matrices, self.muon.buffers, strict=True):
            yield f"momentum.{name}", self._layouts[name], buffer

    @torch.no_grad()
    def load(self, read: Callable[[str, Layout], Tensor]) -> None:
        """Fill the state; `read(name, layout)` returns this rank's part."""
        for name, layout, value in self.state():
            if value.numel():
                value.copy_(read(name, layout))


def _is_matrix(name: str, chunked: bool = False) -> bool:
    """Whether Muon takes this parameter: a 2-D weight of attention or FFN in a block, including text keys and values;
    in pieces also that of the blocks' adaLN."""
    return _MATRIX.fullmatch(name) is not None or (chunked and _ADALN.fullmatch(name) is not None)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of step 1 … config.steps: linear warm-up, then constant, cosine down to `FINAL_SHARE`, or inverse
    square root; each times a linear cool-down at the end."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    rate = config.lr * _schedule(config, step)
    if config.cooldown_steps and step > config.steps - config.cooldown_steps:
        return rate * (config.steps - step + 1) / (config.cooldown_steps + 1)
    return rate


def _schedule(config: TrainConfig, step: int) -> float:
    """Share of the peak learning rate at a step after the warm-up, before any cool-down."""
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "inverse-sqrt":
        return math.sqrt(config.warmup_steps / step)
    share = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
