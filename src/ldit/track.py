"""Trackers of metrics: metrics.jsonl always; TensorBoard, W&B and trackio on request, with sample grids."""

import importlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ldit.config.sections import TrackConfig
from ldit.errors import ConfigError
from ldit.log import logger
from ldit.storage.atomic import replaced
from ldit.storage.names import METRICS, SAMPLES

TENSORBOARD = "tensorboard"  # folder below the run, as in the original's results
WANDB, TRACKIO = "wandb.json", "trackio.json"  # files of the run that hold the id of its run there
_HELDOUT = ("eps_mse", "accuracy", "cross_entropy", "psnr", "latent_")
_EVAL = ("fid", "fd_", "sfid", "kid", "precision", "recall", "inception_score")


class Tracker(Protocol):
    """Receives a record, a JSON object with "step", for each logged step."""

    def write(self, record: dict[str, Any]) -> None:
        """Store all numbers of `record` under its "step"; numbers that are not finite are stored as they are."""

    def show(self, step: int, grid: Path) -> None:
        """Store the sample grid of `step`, a PNG file."""

    def cut(self, step: int) -> None:
        """Drop the records after `step`: the run went back to it and continues from there."""

    def close(self) -> None:
        """Write what is not written yet."""


def check_packages(config: TrackConfig) -> None:
    """ConfigError naming the extra to install when a tracker's package is missing. Every process calls it before any
    work; only the main process calls `trackers`."""
    if config.tensorboard:
        _summary_writer()
    if config.wandb:
        _package("wandb")
    if config.trackio:
        _package("trackio")


def trackers(config: TrackConfig, run: Path, run_config: dict[str, Any], committed_step: int = 0) -> list[Tracker]:
    """The trackers of a run that continues after `committed_step` (0 = from the start); for the main process only.

    So that no step occurs twice, records of later steps by an earlier process are dropped (metrics.jsonl, TensorBoard)
    or stay instead of the new ones (W&B). `run_config` is the content of RUN/config.json. ConfigError when a package is
    missing or W&B cannot start.
    """
    used: list[Tracker] = [MetricsFile(run / METRICS, committed_step)]
    if config.tensorboard:
        used.append(TensorBoard(run / TENSORBOARD, committed_step))
    if config.wandb:
        used.append(Wandb(config.wandb, run, run_config))
    if config.trackio:
        used.append(Trackio(config.trackio, run, run_config))
    return used


class Trackers:
    """All trackers of a run. An error of one (a full disk, a service that does not answer) is logged as a warning: the
    run continues, and the others still get their records."""

    def __init__(self, trackers: Sequence[Tracker], run: Path | None = None) -> None:
        self.trackers, self.run = trackers, run

    def write(self, record: dict[str, Any]) -> None:
        self._each(f"step {record['step']} is missing", lambda tracker: tracker.write(record))

    def show(self, step: int) -> None:
        """The sample grid of a step, where there is one."""
        grid = None if self.run is None else self.run / SAMPLES / f"step-{step:08d}.png"
        if grid is not None and grid.is_file():
            self._each(f"the samples of step {step} are missing", lambda tracker: tracker.show(step, grid))

    def cut(self, step: int) -> None:
        self._each(f"records after step {step} are not removed", lambda tracker: tracker.cut(step))

    def close(self) -> None:
        self._each("the last records may be missing", lambda tracker: tracker.close())

    def _each(self, loss: str, do: Callable[[Tracker], None]) -> None:
        """Call `do` with each tracker; after an error a warning says what is lost."""
        for tracker in self.trackers:
            try:
                do(tracker)
            except Exception as error:
                reason = getattr(error, "strerror", None) or error
                logger.warning("%s in %s: %s", loss, type(tracker).__name__, reason)


def numbers(record: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    """(name, number or None) of each value of a record except its step. A list gives name/0, name/1, …, an object
    name/key. Text is left out."""
    for key, value in record.items():
        if key != "step":
            yield from _flat(key, value)


def _flat(name: str, value: Any) -> Iterator[tuple[str, float | None]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{name}/{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _flat(f"{name}/{index}", item)
    elif value is None:
        yield name, None
    elif isinstance(value, (int, float)):
        yield name, float(value)


def _known(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record under grouped names: heldout/…, eval/…, and train/… for the rest."""
    return {f"{_group(name)}/{name}": value for name, value in numbers(record) if value is not None}


def _group(name: str) -> str:
    if name.startswith(_HELDOUT):
        return "heldout"
    return "eval" if name.startswith(_EVAL) else "train"


class MetricsFile:
    """RUN/metrics.jsonl: a JSON object a line for each logged step; a resumed run removes lines after its step."""

    def __init__(self, path: Path, committed_step: int) -> None:
        self.path = path
        self.cut(committed_step)

    def cut(self, step: int) -> None:
        """Remove all lines from the first one of a later step on."""
        path, kept = self.path, []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        for line in lines:
            if not _is_record(line, step):
                break  # of a later step, or incomplete because the run was killed
            kept.append(line + "\n")
        with replaced(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one line completely or not at all, and fsync: the log of a committed step must not be lost."""
        line = json.dumps(record).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:  # a buffer would be written at the end, even after an error
            before = file.tell()
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    os.truncate(self.path, before)
                raise

    def show(self, step: int, grid: Path) -> None:
        """Nothing to do: the grid is a file of the run."""

    def close(self) -> None:
        """Nothing to do: every line is on the disk already."""


def _is_record(line: str, last_step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    step = record.get("step") if isinstance(record, dict) else None
    return isinstance(step, int) and step <= last_step


class TensorBoard:
    """Event files in `folder`. The viewer ignores events after `committed_step` in older files."""

    def __init__(self, folder: Path, committed_step: int) -> None:
        self.folder = folder
        self._writer = _summary_writer()(str(folder), purge_step=committed_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in _known(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()  # records are rare, and none should be lost when the process is killed

    def show(self, step: int, grid: Path) -> None:
        with Image.open(grid) as image:
            self._writer.add_image("samples", np.array(image), step, dataformats="HWC")
        self._writer.flush()

    def cut(self, step: int) -> None:
        self._writer.close()
        self._writer = _summary_writer()(str(self.folder), purge_step=step + 1)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A W&B run in `project`. The run directory stores its id, so that a resumed run continues it.

    W&B adds to the record of its last step and ignores records of earlier ones. The steps that a resumed run repeats
    have the same numbers anyway; those after a rollback do not. WANDB_MODE and W&B's other variables have their usual
    effect.
    """

    def __init__(self, project: str, run: Path, run_config: dict[str, Any]) -> None:
        self._package = _package("wandb")
        wandb, name = self._package, run.resolve().name
        try:
            self._run = wandb.init(
                project=project, id=_stored_id(run / WANDB), name=name, resume="allow", dir=str(run), config=run_config
            )
        except wandb.Error as error:  # no key, no network, no such team
            raise ConfigError(f"track.wandb: {error}") from None

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(_known(record), step=record["step"])

    def show(self, step: int, grid: Path) -> None:
        self._run.log({"samples": self._package.Image(str(grid))}, step=step)

    def cut(self, step: int) -> None:
        logger.warning("W&B keeps its old records of steps after %d; metrics.jsonl has the new ones", step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run in a trackio project, on this machine unless trackio's variables name a Space. The run directory stores its
    name, so that a resumed run continues it; the records of steps that are repeated stay beside the new ones."""

    def __init__(self, project: str, run: Path, run_config: dict[str, Any]) -> None:
        self._package = _package("trackio")
        name = f"{run.resolve().name}-{_stored_id(run / TRACKIO)}"
        try:
            self._package.init(project=project, name=name, config=run_config, resume="allow")
        except Exception as error:  # no such Space, no network
            raise ConfigError(f"track.trackio: {error}") from None

    def write(self, record: dict[str, Any]) -> None:
        self._package.log(_known(record), step=record["step"])

    def show(self, step: int, grid: Path) -> None:
        self._package.log({"samples": self._package.Image(str(grid))}, step=step)

    def cut(self, step: int) -> None:
        logger.warning("trackio keeps its old records of steps after %d; metrics.jsonl has the new ones", step)

    def close(self) -> None:
        self._package.finish()


def _stored_id(path: Path) -> str:
    """The id in a file such as RUN/wandb.json; the first start creates it."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["id"]
    except FileNotFoundError:
        stored = uuid.uuid4().hex[:12]
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps({"id": stored}) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except (ValueError, KeyError, TypeError):
        stored = None
    if not isinstance(stored, str) or not stored:
        raise ConfigError(f"{path}: holds no run id; remove it to start a new run there")
    return stored


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "track.tensorboard: the package tensorboard is missing (pip install 'large-dit[tensorboard]')"
        ) from None
    return SummaryWriter


def _package(name: str) -> Any:
    """The module of a tracker; ConfigError when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"track.{name}: the package {name} is missing (pip install 'large-dit[{name}]')") from None
