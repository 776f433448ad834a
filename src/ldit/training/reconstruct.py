"""Reconstructs an EMA of any length from a run's snapshots (Karras et al. 2024, section 3.2)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ldit.checkpoint import export
from ldit.errors import ConfigError, SourceError
from ldit.log import logger
from ldit.precision import DTYPES
from ldit.storage import manifest
from ldit.storage.atomic import read_json
from ldit.storage.names import SNAPSHOTS
from ldit.storage.outputs import whole_folder
from ldit.storage.shards import read_set
from ldit.training.posthoc import combination, residual

SNAPSHOT = "snapshot.json"
WIDEST = 0.28  # as in RunConfig.check
DOUBTFUL = 0.1  # residual above which the result differs noticeably from the average asked for

_STEP = re.compile(r"step-(\d{8,})$")
_WIDTH = re.compile(r"power-(\d\.\d{4})(?:-\d+-of-\d+)?\.safetensors$")
_NEGLIGIBLE = 1e-8  # coefficients below this, an eighth of fp32's rounding, do not justify reading a set of weights


@dataclass(frozen=True)
class Snapshot:
    """A committed folder of power averages: its step, the updates until then, and file stem -> relative width."""

    folder: Path
    step: int
    updates: int
    stems: dict[str, float]


@dataclass(frozen=True)
class Part:
    """One stored average and its coefficient."""

    snapshot: Snapshot
    stem: str
    weight: float


@dataclass(frozen=True)
class Reconstruction:
    """The result: the folder `out`, its width and step, the numbers of snapshots and of sets of weights read, the
    relative residual of the profile (see `posthoc.residual`), and the sum of the coefficients' magnitudes, the factor
    by which rounding errors grow."""

    out: Path
    sigma_rel: float
    step: int
    snapshots: int
    sets: int
    residual: float
    magnitude: float


def reconstruct(
    run: Path, out: Path, sigma_rel: float, step: int | None = None, dtype: str | None = None
) -> Reconstruction:
    """Write the power average of relative width `sigma_rel` at `step` (default: the last snapshot) to `out`, as an
    export. Snapshots up to that step are combined in float64, one tensor at a time; weights are written as `dtype`,
    default fp32.

    `step` must be that of a snapshot: profiles that end at snapshots cannot express one that ends between two
    (residuals of 10 to 40 %). ConfigError for a width outside (0, 0.28); SourceError names what is missing, damaged or
    in the way.
    """
    # Check the request before anything is read.
    if not 0 < sigma_rel < WIDEST:
        raise ConfigError(f"sigma-rel: must be in (0, {WIDEST}), got {sigma_rel}")
    if not out.absolute().parent.is_dir():
        raise SourceError(f"no folder {out.absolute().parent} to write {out.name} into")
    manifest.check_not_in_checkpoint(out.absolute().parent)
    if out.exists():
        raise SourceError(f"{out} exists already; choose another name")
    # Solve for the coefficients, and verify the files that they need.
    snapshots = _up_to(_snapshots(run), step)
    parts, error = _parts(snapshots, sigma_rel)
    newest = snapshots[-1]
    used = {part.snapshot.step for part in parts}
    for snapshot in snapshots:
        if snapshot.step in used or snapshot is newest:
            _verify(snapshot, [part.stem for part in parts if part.snapshot is snapshot])
    if error > DOUBTFUL:
        logger.warning("the snapshots cannot express width %g well: profile residual %.0f %%", sigma_rel, 100 * error)
    # Write the export, atomically.
    spec = export.read_spec(newest.folder)
    record = {"step": newest.step, "ema": {"sigma_rel": sigma_rel, "snapshots": len(used)}}
    target = DTYPES[dtype] if dtype is not None else torch.float32
    with whole_folder(out) as folder:
        weights = ((name, total.to(target)) for name, total in _sums(parts))
        export.write_export(folder, replace(spec, training={**(spec.training or {}), **record}), weights)
    magnitude = sum(abs(part.weight) for part in parts)
    return Reconstruction(out, sigma_rel, newest.step, len(used), len(parts), error, magnitude)


def _snapshots(run: Path) -> list[Snapshot]:
    """Every committed snapshot that holds averages, oldest first."""
    if not run.is_dir():
        raise SourceError(f"no folder {run}")
    folder = run / SNAPSHOTS
    paths = sorted(path for path in folder.iterdir() if _STEP.match(path.name)) if folder.is_dir() else []
    snapshots = [snapshot for path in paths if (snapshot := _read_snapshot(path)).stems and snapshot.updates]
    if not snapshots:
        raise SourceError(
            f"{run} has no snapshots; ldit train makes them with --ema.power 0.05 0.10 --ema.snapshot-every N"
        )
    return sorted(snapshots, key=lambda snapshot: snapshot.step)


def _read_snapshot(path: Path) -> Snapshot:
    """The snapshot in a folder. The widths come from the manifest, so that a missing file is noticed."""
    files = manifest.read(path)
    manifest.verify(path, [SNAPSHOT])
    data = read_json(path / SNAPSHOT)
    step, updates = (data.get("step"), data.get("updates")) if isinstance(data, dict) else (None, None)
    if not isinstance(step, int) or not isinstance(updates, int) or min(step, updates) < 0:
        raise SourceError(f"{path / SNAPSHOT}: expected the numbers step and updates")
    stems = {f"power-{match[1]}": float(match[1]) for name in sorted(files) if (match := _WIDTH.match(name))}
    for stem, width in stems.items():
        if not 0 < width < WIDEST:
            raise SourceError(f"{path}: {stem} is not the average of a relative width in (0, {WIDEST})")
    return Snapshot(path, step, updates, stems)


def _verify(snapshot: Snapshot, stems: list[str]) -> None:
    """Verify the configuration and the files of the averages `stems`."""
    files = [name for name in manifest.read(snapshot.folder) if name.startswith(tuple(stems))]
    manifest.verify(snapshot.folder, [export.CONFIG, *files])


def _up_to(snapshots: list[Snapshot], step: int | None) -> list[Snapshot]:
    """The snapshots up to `step`, which must be the step of one of them."""
    steps = [snapshot.step for snapshot in snapshots]
    if step is None or step in steps:
        return [snapshot for snapshot in snapshots if step is None or snapshot.step <= step]
    if step > steps[-1]:
        raise SourceError(f"step {step} is beyond the last snapshot, of step {steps[-1]}")
    if step < steps[0]:
        raise SourceError(f"step {step} is before the first snapshot, of step {steps[0]}")
    below = max(s for s in steps if s < step)
    above = min(s for s in steps if s > step)
    raise SourceError(f"there is no snapshot of step {step}; the nearest are of steps {below} and {above}")


def _parts(snapshots: list[Snapshot], sigma_rel: float) -> tuple[list[Part], float]:
    """The stored averages worth reading, with their coefficients, and the residual of the fit."""
    sets = [(snapshot, stem) for snapshot in snapshots for stem in snapshot.stems]
    stored = [(snapshot.updates, snapshot.stems[stem]) for snapshot, stem in sets]
    target = (snapshots[-1].updates, sigma_rel)
    coefficients = combination(stored, target)
    parts = [
        Part(snapshot, stem, weight)
        for (snapshot, stem), weight in zip(sets, coefficients, strict=True)
        if abs(weight) > _NEGLIGIBLE
    ]
    return parts, residual(stored, target, coefficients)


def _sums(parts: list[Part]) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, weighted sum over the parts), float64."""
    first, *others = parts
    sets = [(part.weight, _Set(part)) for part in others]
    for name, tensor in read_set(first.snapshot.folder, first.stem):
        total = tensor.double() * first.weight
        for weight, stored in sets:
            total.add_(stored.take(name, tensor.shape), alpha=weight)
        yield name, total
    for _, stored in sets:
        stored.close()


class _Set:
    """A set of weights read by name, in step with other sets. Sets of one run have the same order, so one tensor is
    held at a time. Where shards were split differently, tensors that come early wait, memory-mapped."""

    def __init__(self, part: Part) -> None:
        self.where = part.snapshot.folder / part.stem
        self.tensors = read_set(part.snapshot.folder, part.stem)
        self.waiting: dict[str, Tensor] = {}

    def take(self, name: str, shape: torch.Size) -> Tensor:
        """The tensor of this name; SourceError when the set has none, or another shape."""
        while name not in self.waiting:
            entry = next(self.tensors, None)
            if entry is None:
                raise SourceError(f"{self.where}: {name} is missing")
            self.waiting[entry[0]] = entry[1]
        tensor = self.waiting.pop(name)
        if tensor.shape != shape:
            raise SourceError(f"{self.where}: {name} has shape {tuple(tensor.shape)}, elsewhere {tuple(shape)}")
        return tensor

    def close(self) -> None:
        """SourceError when a tensor is left that was not taken."""
        for name in (*self.waiting, *(name for name, _ in self.tensors)):
            raise SourceError(f"{self.where}: {name} is not in the other snapshots")
