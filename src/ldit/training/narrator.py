"""Tells how a run goes: a bar on a terminal, otherwise a line at least every 30 seconds, and a line for each record."""

import sys
import time
from typing import Any

from ldit.log import logger
from ldit.readable import clock, size

LINE_EVERY = 30.0  # seconds between lines, without a terminal
SETTLED = 5  # steps after which the speed says something about the rest
_SHOWN = ("loss", "grad_norm", "lr", "eps_mse", "accuracy", "mfu", "left_out")


class Narrator:
    """Of the main process. `steps` in all, of `batch` images each, out of a set of `images`."""

    def __init__(self, step: int, steps: int, batch: int, images: int) -> None:
        self.first, self.steps, self.batch, self.images = step, steps, batch, images
        self._began = self._said = time.monotonic()
        self._bar: Any = None
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=steps, initial=step, unit=" step", leave=False, dynamic_ncols=True, mininterval=0.5,
                bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}  {desc}",
            )  # fmt: skip

    def step(self, step: int, loss: float) -> None:
        """A step is done, which is not logged."""
        self._advance(step, loss)
        if self._bar is None and time.monotonic() - self._said > LINE_EVERY:
            self._say(step, {"loss": loss})

    def _advance(self, step: int, loss: float) -> None:
        """Move the bar; say how long the run will take, once that is known."""
        if step <= self.first + 1:  # the first one compiles and allocates: it says nothing about the others
            self._began = time.monotonic()
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_description_str("  ".join(self._parts(step, {"loss": loss})), refresh=False)
            self._bar.update(0)
        if step == self.first + 1 + SETTLED and step < self.steps:
            seconds = (time.monotonic() - self._began) / SETTLED * (self.steps - step)
            logger.info("the rest takes about %s at this speed", clock(seconds))

    def record(self, record: dict[str, Any]) -> None:
        """A step has been logged: its record, as in metrics.jsonl."""
        values = {name: record[name] for name in _SHOWN if name in record}
        values |= {name: value for name, value in record.items() if name == "fid" or name.startswith("fd_")}
        self._advance(record["step"], record["loss"])
        self._say(record["step"], values, record["images_per_second"], record["memory"])

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _say(self, step: int, values: dict[str, Any], rate: float | None = None, memory: int | None = None) -> None:
        self._said = time.monotonic()
        parts = [*self._parts(step, values, rate, memory), time.strftime("%H:%M:%S")]
        logger.info("step %d/%d  %s", step, self.steps, "  ".join(parts))

    def _parts(
        self, step: int, values: dict[str, Any], rate: float | None = None, memory: int | None = None
    ) -> list[str]:
        """Epoch, values, images/s (given, else the mean since the first step), memory, time left."""
        done, spent = step - self.first - 1, time.monotonic() - self._began
        mean = done * self.batch / spent if done > 0 and spent > 0 else 0.0
        parts = [f"epoch {step * self.batch / self.images:.1f}"]
        parts += [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        ]
        if rate or mean:
            parts.append(f"{rate or mean:.1f} images/s")
        if memory:
            parts.append(size(memory))
        if done >= SETTLED and step < self.steps:
            parts.append(f"left {clock((self.steps - step) * self.batch / mean)}")
        return parts
