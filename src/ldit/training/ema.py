"""Moving averages of the weights, in fp32; each rank averages its own part.

They may be kept in host memory: a thread copies the weights there while the next step computes, and averages them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ldit.config.sections import EMAConfig
from ldit.training.background import Background

MAIN = "ema"
CHUNK = 1 << 26  # numbers that are on their way to the host at once: 256 MB
POWER = "power-"


def warmed_decay(decay: float, n: int) -> float:
    """min(decay, n/(9+n)) at update n = 1, 2, … (the usual (1+n)/(10+n), counted from 0), so that short runs forget
    their initial weights."""
    return min(decay, n / (9 + n))


def constant_decay(decay: float, n: int) -> float:
    """The decay at every update, as the original has it."""
    return decay


def power_name(sigma_rel: float) -> str:
    """The name of a power-function average in files."""
    return f"{POWER}{sigma_rel:.4f}"


@dataclass(frozen=True)
class Average:
    """One average. `decay(n)` is the share of the old average that update n = 1, 2, … keeps."""

    decay: Callable[[int], float]
    values: list[Tensor]


class Averages:
    """All averages of a run by name: "ema" (the one for sampling and export), "ema-D" with decay D, "power-S" with
    relative width S."""

    def __init__(self, config: EMAConfig, masters: Sequence[Tensor]) -> None:
        form = warmed_decay if config.warmup else constant_decay
        decays: dict[str, Callable[[int], float]] = {MAIN: partial(form, config.decay)}
        decays.update({f"{MAIN}-{decay}": partial(form, decay) for decay in config.more})
        if config.power:
            from ldit.training.posthoc import gamma_of, power_decay

            decays.update({power_name(width): partial(power_decay, gamma_of(width)) for width in config.power})
        self.every = config.every
        host = torch.device("cpu") if config.host else None
        self._tracks = {
            name: Average(decay, [torch.empty_like(m, requires_grad=False, device=host) for m in masters])
            for name, decay in decays.items()
        }
        self._host = HostCopies() if config.host else None

    @property
    def tracks(self) -> dict[str, Average]:
        """The averages by name, complete: those in host memory are waited for."""
        self.wait()
        return self._tracks

    @property
    def on_host(self) -> bool:
        """Whether they are kept in host memory."""
        return self._host is not None

    @property
    def failed(self) -> bool:
        """Whether averaging in host memory failed; `wait` raises its error."""
        return self._host is not None and self._host.failed

    def settle(self) -> None:
        """Wait until the weights may change: until their last copies to the host are made and averaged. Without raising
        the error of that."""
        if self._host is not None:
            self._host.settle()

    def wait(self) -> None:
        """The same; raises the error, once."""
        if self._host is not None:
            self._host.wait()

    @property
    def main(self) -> list[Tensor]:
        return self.tracks[MAIN].values

    @torch.no_grad()
    def start(self, masters: Sequence[Tensor]) -> None:
        """Set every average to the weights."""
        for track in self.tracks.values():
            torch._foreach_copy_(track.values, [m.detach() for m in masters])

    def share(self, name: str, n: int) -> float:
        """The share of the weights in an average after update n = 1, 2, …: 1 - decay(n), or, where averages are updated
        at every k-th update alone, 1 minus the product of the k decays. 0: it is not updated now."""
        if n % self.every:
            return 0.0
        decay = self._tracks[name].decay
        return 1.0 - math.prod(decay(i) for i in range(n - self.every + 1, n + 1))

    @torch.no_grad()
    def update(self, masters: Sequence[Tensor], n: int, but: Sequence[str] = ()) -> None:
        """average += share(n)·(weights - average), n = 1 for the first update, of all averages `but` these.

        Averages in host memory are updated by a thread; call `wait` before the weights change.
        """
        shares = {name: self.share(name, n) for name in self._tracks if name not in but}
        values = [m.detach() for m in masters]
        if self._host is not None:
            tracks = [(self._tracks[name].values, share) for name, share in shares.items() if share]
            if tracks and not self.failed:  # after a failure the run ends at the next step, on all ranks together
                self._host.average(values, tracks)
            return
        for name, share in shares.items():
            if share:
                torch._foreach_lerp_(self._tracks[name].values, values, share)


class HostCopies(Background):
    """Averages tensors of a device into tensors in host memory, on a thread: piece by piece through two pinned buffers,
    so that one is copied while the other is averaged."""

    def __init__(self) -> None:
        super().__init__("averages")
        self._buffers: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    def average(self, values: Sequence[Tensor], tracks: Sequence[tuple[Sequence[Tensor], float]]) -> None:
        """Start averages += share·(values - averages) for each (averages, share). The values may not change until
        `settle` returns."""
        device = next((value.device for value in values if value.is_cuda), None)
        ready = None
        if device is not None:
            ready = torch.cuda.Event()
            ready.record()  # the values are complete when the device has come this far
        self.start(lambda: self._run(values, tracks, device, ready))

    @torch.no_grad()
    def _run(
        self,
        values: Sequence[Tensor],
        tracks: Sequence[tuple[Sequence[Tensor], float]],
        device: torch.device | None,
        ready: torch.cuda.Event | None,
    ) -> None:
        # Pieces: (values, the same piece of each average with its share).
        pieces = [
            (piece, [(averages[i].view(-1)[first : first + CHUNK], share) for averages, share in tracks])
            for i, value in enumerate(values)
            for first in range(0, value.numel(), CHUNK)
            for piece in [value.reshape(-1)[first : first + CHUNK]]
        ]
        if device is None or ready is None:
            for piece, averages in pieces:
                _average(piece, averages)
            return
        with torch.cuda.device(device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)
                self._buffers = [torch.empty(CHUNK, pin_memory=True) for _ in range(2)]
            self._stream.wait_event(ready)
            # The copy of each piece is on its way while the one before it is averaged.
            before: tuple[Tensor, list[tuple[Tensor, float]], torch.cuda.Event] | None = None
            for turn, (piece, averages) in enumerate(pieces):
                copy = self._buffers[turn % 2][: piece.numel()]
                with torch.cuda.stream(self._stream):
                    copy.copy_(piece, non_blocking=True)
                    done = torch.cuda.Event()
                    done.record()
                if before is not None:
                    before[2].synchronize()
                    _average(*before[:2])
                before = copy, averages, done
            if before is not None:
                before[2].synchronize()
                _average(*before[:2])


def _average(piece: Tensor, averages: Sequence[tuple[Tensor, float]]) -> None:
    for average, share in averages:
        average.lerp_(piece, share)
