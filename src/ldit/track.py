"""Where metrics go besides metrics.jsonl: TensorBoard and Weights & Biases, each imported only when asked for."""

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ldit.config.sections import TrackConfig
from ldit.errors import ConfigError

TENSORBOARD = "tensorboard"  # folder below the run, as in the original's results
WANDB = "wandb.json"  # file of the run that holds the id of its W&B run


class Tracker(Protocol):
    """Takes the records of metrics.jsonl, one a logged step."""

    def write(self, record: dict[str, Any]) -> None:
        """Pass on every number of `record` at its "step"; numbers that are not finite are passed on as they are."""

    def close(self) -> None:
        """Hand over what is left."""


def check_packages(config: TrackConfig) -> None:
    """ConfigError naming the extra to install when a tracker's package is missing. For every process, before any work:
    `trackers` itself is the main process's business."""
    if config.tensorboard:
        _summary_writer()
    if config.wandb:
        _wandb()


def trackers(config: TrackConfig, run: Path, run_config: dict[str, Any], committed_step: int = 0) -> list[Tracker]:
    """The trackers of a run that goes on after `committed_step` (0 = from the start); for the main process alone.

    What an earlier process wrote of later steps is dropped (TensorBoard) or kept in place of what would be sent again
    (W&B), so no line is drawn twice. `run_config` is the content of RUN/config.json. ConfigError when a package is
    missing or W&B cannot start.
    """
    found: list[Tracker] = []
    if config.tensorboard:
        found.append(TensorBoard(run / TENSORBOARD, committed_step))
    if config.wandb:
        found.append(Wandb(config.wandb, run, run_config))
    return found


def numbers(record: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    """(name, number or null) of a record without its step; a list or object gives name/0, name/1, … or name/key. Text
    and integers beyond a double's range are left out."""
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
        try:
            yield name, float(value)
        except OverflowError:
            return


def _known(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in numbers(record) if value is not None}


class TensorBoard:
    """Event files in `folder`. The viewer discards events after `committed_step` that older files hold."""

    def __init__(self, folder: Path, committed_step: int) -> None:
        self._writer = _summary_writer()(str(folder), purge_step=committed_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in _known(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()  # log lines are rare, and a killed process should not lack them

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A W&B run in `project` with the id that the run's own folder stores, so that a resumed run goes on there.

    The service takes no step twice: repeated ones are the same numbers, as a resumed run repeats itself. WANDB_MODE and
    its other variables are honoured by the package itself.
    """

    def __init__(self, project: str, run: Path, run_config: dict[str, Any]) -> None:
        wandb = _wandb()
        name = run.resolve().name
        try:
            self._run = wandb.init(
                project=project, id=_wandb_id(run), name=name, resume="allow", dir=str(run), config=run_config
            )
        except wandb.Error as error:  # no key, no network, no such team
            raise ConfigError(f"track.wandb: {error}") from None

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(_known(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _wandb_id(run: Path) -> str:
    """The id in RUN/wandb.json, made at first."""
    path = run / WANDB
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
        raise ConfigError(f"{path}: holds no W&B run id; remove it to start a new W&B run")
    return stored


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "track.tensorboard: the package tensorboard is missing (pip install 'large-dit[tensorboard]')"
        ) from None
    return SummaryWriter


def _wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("track.wandb: the package wandb is missing (pip install 'large-dit[wandb]')") from None
    return wandb
