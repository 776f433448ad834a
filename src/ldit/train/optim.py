"""Optimisers over the masters, and the learning rate of a step."""

import math
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ldit.config.sections import OptimConfig, TrainConfig
from ldit.errors import ConfigError
from ldit.parallel.exchange import ModelGroup
from ldit.parallel.layout import Layout
from ldit.train.muon import Muon
from ldit.train.weights import Weights

FINAL_SHARE = 0.01  # of the peak learning rate, at the end of a cosine
_MATRIX = re.compile(r"layers\.\d+\.(attention|feed_forward)\.w\w*\.weight")
_MOMENTS = ("exp_avg", "exp_avg_sq")
SCALAR = Layout(())


class Optimizer:
    """AdamW for everything, or Muon for the blocks' attention and FFN matrices and AdamW for the rest.

    State is named `moment.parameter`, with the parameter's layout: `exp_avg`, `exp_avg_sq`, `step` (a number) of
    AdamW, `momentum` of Muon.
    """

    def __init__(self, config: OptimConfig, weights: Weights, model_group: ModelGroup) -> None:
        self.weights = weights
        chosen = [config.kind == "muon" and _is_matrix(name) for name in weights.names]
        if config.kind == "muon" and not any(chosen):
            raise ConfigError(
                "optim.kind: muon is for attention and FFN matrices named as DiT's; this network has none"
            )
        rows = list(zip(weights.names, weights.masters, weights.layouts, chosen, strict=True))
        self.matrices = {name: master for name, master, _, muon in rows if muon}
        self.others = {name: master for name, master, _, muon in rows if not muon}
        self._layouts = {name: layout for name, _, layout, _ in rows}
        self.adamw = torch.optim.AdamW(
            [p for p in self.others.values() if p.numel()],  # a process may hold no row of a small tensor
            lr=1.0,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        # Made here rather than by the first step: a checkpoint and its host memory know them from the start.
        for p in self.adamw.param_groups[0]["params"]:
            moments = {moment: torch.zeros_like(p, requires_grad=False) for moment in _MOMENTS}
            self.adamw.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        self.muon = Muon(
            list(self.matrices.values()),
            [self._layouts[name] for name in self.matrices],
            model_group,
            config.momentum,
            config.weight_decay,
            # bf16 as is usual; fp32 for runs in fp32, which then agree more closely across world sizes.
            torch.float32 if weights.compute == torch.float32 else torch.bfloat16,
        )

    @torch.no_grad()
    def step(self, lr: float, sound: Tensor) -> None:
        """Apply the masters' gradients where `sound`, a bool on their device, is true; otherwise change nothing.

        The host need not know: AdamW's fused kernel skips by itself, as it does for gradient scalers.
        """
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.found_inf = (~sound).to(torch.float32)  # type: ignore[attr-defined]
        self.adamw.grad_scale = None  # type: ignore[attr-defined]
        self.adamw.step()
        self.muon.step(lr, sound)

    def state(self) -> Iterator[tuple[str, Layout, Tensor]]:
        """(name, layout, this process's part) of all that a checkpoint must hold. Every process yields the same names:
        a parameter of which this one has no part yields empty moments."""
        steps = next((held["step"] for held in self.adamw.state.values()), torch.zeros(()))
        for name, p in self.others.items():
            held = self.adamw.state[p] if p.numel() else {"step": steps, **dict.fromkeys(_MOMENTS, p.detach())}
            for moment in _MOMENTS:
                yield f"{moment}.{name}", self._layouts[name], held[moment]
            # Equal for all parameters, but torch counts each for itself.
            yield f"step.{name}", SCALAR, held["step"]
        for name, buffer in zip(self.matrices, self.muon.buffers, strict=True):
            yield f"momentum.{name}", self._layouts[name], buffer

    @torch.no_grad()
    def load(self, read: Callable[[str, Layout], Tensor]) -> None:
        """Fill the state; `read(name, layout)` gives this process's part."""
        for name, layout, value in self.state():
            if value.numel():
                value.copy_(read(name, layout))


def _is_matrix(name: str) -> bool:
    """The 2-D weights of attention and FFN in a block; the text's keys and values too."""
    return _MATRIX.fullmatch(name) is not None


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of step 1 … config.steps: linear warm-up, then constant (with a linear cooldown at the end), cosine, or
    inverse square root."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    if config.cooldown and step > config.steps - config.cooldown:
        return config.lr * (config.steps - step + 1) / (config.cooldown + 1)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "inverse-sqrt":
        return config.lr * math.sqrt(config.warmup / step)
    share = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))
