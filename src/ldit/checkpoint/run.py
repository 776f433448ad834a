"""A run's directory: its lock, its committed steps, the training state behind each."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldit.checkpoint import manifest
from ldit.checkpoint.commit import committed, remove_leftovers, write_json
from ldit.checkpoint.export import read_json, write_export
from ldit.checkpoint.tensors import NamedTensors, read_safetensors, write_safetensors
from ldit.config.spec import ModelSpec
from ldit.errors import SourceError
from ldit.log import logger

CHECKPOINTS = "checkpoints"
RUN_CONFIG = "config.json"
STATE = "state"
OPTIMIZER = f"{STATE}/optimizer.safetensors"
TRAINER = f"{STATE}/trainer.json"
_STEP = re.compile(r"step-(\d{8,})$")


def is_run(folder: Path) -> bool:
    return (folder / CHECKPOINTS).is_dir()


def set_aside_newer(run: Path, step: int) -> None:
    """Rename steps newer than `step`, which the run falls back behind because they are damaged: nothing is lost, and
    they count no longer."""
    for number, folder in committed_steps(run):
        if number > step:
            aside = folder.with_name(f"{folder.name}.damaged")
            if aside.exists():
                shutil.rmtree(aside)
            os.rename(folder, aside)
            logger.warning("damaged step %d is set aside as %s", number, aside)


def step_folder(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:08d}"


def committed_steps(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every committed step, newest first; committed = renamed into place, so only the name counts."""
    if not is_run(run):
        return []
    found = [(int(m[1]), path) for path in (run / CHECKPOINTS).iterdir() if (m := _STEP.match(path.name))]
    return sorted(found, reverse=True)


def newest_true_step(run: Path) -> tuple[int, Path] | None:
    """The newest step all of whose files match its manifest; damaged ones are passed over loudly."""
    for step, folder in committed_steps(run):
        try:
            manifest.verify(folder)
            return step, folder
        except SourceError as error:
            logger.warning("step %d is damaged and passed over: %s", step, error)
    return None


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """One training process a directory; the kernel frees the lock when its holder dies."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SourceError(f"{run} is in use by another training process") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def save_step(
    run: Path,
    step: int,
    spec: ModelSpec,
    weights: NamedTensors,
    ema: NamedTensors,
    optimizer: NamedTensors,
    trainer: dict[str, Any],
    keep: int,
) -> Path:
    """Commit one step, then remove steps beyond the newest `keep` (0 = none)."""
    final = step_folder(run, step)
    with committed(final) as folder:
        (folder / STATE).mkdir()
        write_export(folder, spec, weights, ema)
        write_safetensors(folder / OPTIMIZER, optimizer)
        write_json(folder / TRAINER, trainer)
    others = [folder for number, folder in committed_steps(run) if number != step]
    for old in others[keep - 1 :] if keep else ():
        # Renamed first: a folder half removed must not look committed.
        doomed = old.with_name(f"{old.name}.tmp-old")
        os.rename(old, doomed)
        shutil.rmtree(doomed)
    return final


def read_state(folder: Path) -> tuple[NamedTensors, NamedTensors, NamedTensors, dict[str, Any]]:
    """(weights, EMA, optimiser tensors, trainer record) of a verified step folder."""
    return (
        read_safetensors(folder / "model.safetensors"),
        read_safetensors(folder / "ema.safetensors"),
        read_safetensors(folder / OPTIMIZER),
        read_json(folder / TRAINER),
    )


def clean(run: Path) -> None:
    """Remove what a killed process left behind."""
    remove_leftovers(run)
    if is_run(run):
        remove_leftovers(run / CHECKPOINTS)
