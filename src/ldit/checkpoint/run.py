"""The run directory: checks, lock, committed steps, best step."""

import errno
import fcntl
import os
import re
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import torch

from ldit.checkpoint.export import CONFIG, is_export
from ldit.config.assets import ASSETS
from ldit.config.run import RUN_FORMAT, model_kind
from ldit.errors import SourceError
from ldit.log import logger
from ldit.parallel.world import World
from ldit.storage import manifest
from ldit.storage.atomic import make_folder, read_json, remove_leftovers, write_json_atomic
from ldit.storage.manifest import check_not_in_checkpoint
from ldit.storage.names import BEST, CHECKPOINTS, RUN_CONFIG, SAMPLES, SNAPSHOTS, is_run

_STEP = re.compile(r"step-(\d{8,})$")
_T = TypeVar("_T")


def check_run_dir(run: Path) -> None:
    """SourceError or RequestError when `run` cannot become a run directory because of other files in it, which must not
    be changed. `run` need not exist."""
    if run.exists() and not run.is_dir():
        raise SourceError(f"{run} is a file, not a run directory")
    check_not_in_checkpoint(run)
    for name in (CHECKPOINTS, SNAPSHOTS, SAMPLES):
        if (run / name).exists() and not (run / name).is_dir():
            raise SourceError(f"{run / name} is a file, where a run has a folder")
    if (run / RUN_CONFIG).exists():
        config = read_json(run / RUN_CONFIG)
        if not isinstance(config, dict) or config.get("format") != RUN_FORMAT:
            raise SourceError(f"{run} is not a run directory: its {RUN_CONFIG} is not that of a run")


def run_kind(run: Path) -> str | None:
    """`model.kind` of a run, from RUN/config.json; None if it is not stated."""
    return model_kind(read_json(run / RUN_CONFIG)) if (run / RUN_CONFIG).is_file() else None


def run_is_begun(folder: Path) -> bool:
    """Whether a folder is a run directory, also one that has committed nothing yet."""
    return is_run(folder) or begun_with(folder, "train", "steps") is not None


def configuration_of(path: Path) -> dict[str, Any]:
    """The configuration of the run that `path` is or lies in, else the description of the model in it; {} of others."""
    for folder in (path, *path.absolute().parents[:2]):  # a run, or RUN/checkpoints/STEP
        if is_run(folder) and begun_with(folder, "train", "steps") is not None:
            return cast("dict[str, Any]", read_json(folder / RUN_CONFIG))
    return cast("dict[str, Any]", read_json(path / CONFIG)) if is_export(path) else {}


def begun_with(run: Path, section: str, key: str) -> Any:
    """A value of RUN/config.json, which a run had when it began; None where there is no run, or no such key."""
    path = run / RUN_CONFIG
    try:
        config = read_json(path) if path.is_file() else None
    except SourceError:  # what is wrong with it is said elsewhere
        return None
    values = config.get(section) if isinstance(config, dict) and config.get("format") == RUN_FORMAT else None
    return values.get(key) if isinstance(values, dict) else None


def trained_on(path: Path) -> Path | None:
    """What the run that `path` is or lies in was trained on, by its config.json; None for a bundled set."""
    for folder in (path, *path.absolute().parents[:2]):  # a run, or RUN/checkpoints/STEP
        named = begun_with(folder, "data", "path") if is_run(folder) else None
        if isinstance(named, str) and named:
            is_bundled = not os.path.isabs(named) and (ASSETS / named).is_dir()
            return None if is_bundled else Path(named)
    return None


def holds(path: Path, kind: str) -> bool:
    """Whether `path` is a run that trains a model of this kind, or a step of one."""
    if is_run(path):
        return run_kind(path) == kind
    return is_export(path) and model_kind(read_json(path / CONFIG)) == kind


def open_step(path: Path, opened: Callable[[Path], _T]) -> _T:
    """`opened(folder)` for the given step; for a run, of its latest step for which that raises no SourceError. Steps
    that fail are skipped with a warning. As long as the result lives, a run that goes on training leaves the step."""
    if not is_run(path):
        held = _hold(path) if path.parent.name == CHECKPOINTS else None
        return _holding(opened(path), held)
    # A step may be removed while it is opened: newer ones are there then.
    tried: set[Path] = set()
    while steps := [(step, folder) for step, folder in committed_steps(path) if folder not in tried]:
        for step, folder in steps:
            tried.add(folder)
            held = _hold(folder)
            try:
                manifest.read(folder)  # in a run, a step without a manifest is not committed
                return _holding(opened(folder), held)
            except SourceError as error:
                if held is not None:
                    held.close()
                if folder.exists():
                    logger.warning("step %d is skipped: %s", step, error)
    raise SourceError(f"{path} has no valid step")


def _hold(folder: Path) -> BinaryIO | None:
    """The step's manifest, open with a shared lock, for which `retire` leaves the step. None for a step that is gone or
    going, and where there are no locks."""
    try:
        file = (folder / manifest.NAME).open("rb")
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _holding(result: _T, held: BinaryIO | None) -> _T:
    """`result`, which releases its step when it is freed."""
    if held is not None:
        weakref.finalize(result, held.close)
    return result


@contextmanager
def _locked_for_removal(folder: Path) -> Iterator[bool]:
    """Whether nobody reads the step, and nobody begins to within the block. Without locks: yes."""
    try:
        file = (folder / manifest.NAME).open("r+b")  # NFS locks exclusively only what may be written
    except OSError:
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        else:
            yield True


def quarantine_newer(run: Path, step: int) -> None:
    """Rename the damaged steps newer than `step`, at which the run resumes. Nothing is deleted, but they no longer
    count as committed."""
    for number, folder in committed_steps(run):
        if number > step:
            aside, again = folder.with_name(f"{folder.name}.damaged"), 1
            while aside.exists():
                again += 1
                aside = folder.with_name(f"{folder.name}.damaged-{again}")
            os.rename(folder, aside)
            logger.warning("damaged step %d is renamed to %s", number, aside)


def drop_after(run: Path, step: int) -> None:
    """Remove EMA snapshots and the record of a best step after `step`, at which the run resumes: it may train
    differently from there, and makes them again if not."""
    # The best step falls back to the last earlier best that is still committed.
    best, committed = best_step(run), {number for number, _ in committed_steps(run)}
    if best is not None and not (best.step <= step and best.step in committed):
        earlier = [pair for pair in best.before if pair[0] <= step and pair[0] in committed]
        if earlier:
            write_best(run, Best(*earlier[-1], best.conditions, tuple(earlier[:-1])))
        else:
            (run / BEST).unlink()
    # Remove later snapshots.
    for path in (run / SNAPSHOTS).iterdir() if (run / SNAPSHOTS).is_dir() else ():
        if (match := _STEP.match(path.name)) and int(match[1]) > step:
            _remove(path)


def _remove(folder: Path) -> None:
    """Rename first, because a partly removed folder must not look committed."""
    doomed = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # files open on NFS remain: the next start removes them


def step_folder(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:08d}"


def committed_steps(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every committed step, latest first. A committed folder is recognised by its final name."""
    if not is_run(run):
        return []
    steps = [(int(m[1]), path) for path in (run / CHECKPOINTS).iterdir() if (m := _STEP.match(path.name))]
    return sorted(steps, reverse=True)


def latest_valid_step(run: Path, world: World | None = None) -> tuple[int, Path] | None:
    """The latest step all of whose files match its manifest; damaged steps are skipped with a warning. All ranks call
    it together, and each verifies its share of the files."""
    world = world or World(torch.device("cpu"))
    for step in world.from_rank0(lambda: [number for number, _ in committed_steps(run)]):
        folder = step_folder(run, step)
        try:
            world.run_on_all(partial(manifest.verify, folder, share=(world.rank, world.size)))
            return step, folder
        except SourceError as error:
            logger.warning("step %d is damaged and skipped: %s", step, error)
    return None


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the lock of a run directory, so that only one job trains there. The kernel frees it when the process ends,
    even if killed."""
    make_folder(run)
    with (run / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise SourceError(f"{run} is in use by another training process") from None
            logger.warning(
                "%s: this file system has no locks (%s); make sure that only one job writes here", run, error.strerror
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


class Best(NamedTuple):
    """The step with the lowest value measured during training. `conditions`: what was measured and how. `before`:
    (step, value) of earlier best steps, oldest first."""

    step: int
    value: float
    conditions: dict[str, Any]
    before: tuple[tuple[int, float], ...] = ()


def best_step(run: Path) -> Best | None:
    """The content of RUN/best.json; None if there is none or, with a warning, if it cannot be read."""
    if not (run / BEST).exists():
        return None
    try:
        data = read_json(run / BEST)
        best = Best(int(data["step"]), float(data["value"]), dict(data["of"]))
        return best._replace(before=tuple((int(step), float(value)) for step, value in data.get("before", ())))
    except (SourceError, KeyError, TypeError, ValueError, OverflowError):
        logger.warning("%s cannot be read: the best step is not known", run / BEST)
        return None


def write_best(run: Path, best: Best) -> None:
    """Write RUN/best.json."""
    data = {"step": best.step, "value": best.value, "of": best.conditions, "before": best.before}
    write_json_atomic(run / BEST, data)


def retire(run: Path, keep: int, keep_every: int) -> None:
    """Remove committed steps beyond the latest `keep` (0 = remove none), except those that `keep_every` divides, the
    best one, and those that another process reads: they go at the next commit. If the best step is not committed yet,
    the best before it is kept."""
    committed, best = committed_steps(run), best_step(run)
    # The last of the successive best steps that is committed.
    chain = [] if best is None else [*(step for step, _ in best.before), best.step]
    kept = max(set(chain) & {number for number, _ in committed}, default=None)
    steps = [
        (number, folder)
        for number, folder in committed
        if not (keep_every and number % keep_every == 0) and number != kept
    ]
    for number, old in steps[keep:] if keep else ():
        try:
            with _locked_for_removal(old) as is_free:
                if is_free:
                    _remove(old)
        except OSError as error:  # perhaps open on another machine; no reason to end the run
            logger.warning("step %d could not be removed (%s): %s", number, error.strerror or error, old)


def clean(run: Path) -> None:
    """Remove temporary files and folders that killed processes left."""
    for folder in (run, run / CHECKPOINTS, run / SNAPSHOTS, run / SAMPLES):
        remove_leftovers(folder)
