"""Checks that the run in a run directory is the one to be resumed."""

from pathlib import Path
from typing import Any

from ldit.checkpoint.export import read_any_spec
from ldit.config.autoencoder import AutoencoderRun
from ldit.config.classifier import ClassifierRun
from ldit.config.kinds import AnySpec, run_from_json
from ldit.config.run import BaseRun
from ldit.config.serial import to_dict
from ldit.errors import ConfigError, DataError, SourceError, some
from ldit.log import logger
from ldit.storage.atomic import read_json
from ldit.storage.names import RUN_CONFIG, TRAINER

# Keys that may differ when a run is resumed; any other difference would make it another run.
RESUMABLE = {
    "train.steps",
    "train.micro_batch_size",
    "train.cooldown",
    "train.cooldown_share",
    "train.log_every",
    "train.checkpoint_every",
    "train.sample_every",
    "train.attention_every",
    "train.keep",
    "train.keep_every",
    "train.async_save",
    "ema.snapshot_every",
    "ema.host",
    "data.path",
    "data.fit_model",
    "data.workers",
    "data.timeout",
    "data.verify",
    "data.bad",
    "heldout.every",
    "text.cache",
    "text.offload",
    "text.prompts",
}
OBJECTS = ("objective", "network")
"""Keys of the record that name the user's objects; None = the package's own."""
RESUMABLE_SECTIONS = ("sampling", "parallel", "guard", "track", "eval")


def check_same_run(
    config: BaseRun,
    spec: AnySpec,
    out: Path,
    record: dict[str, Any],
    resume: tuple[int, Path] | None,
    has_steps: bool,
) -> None:
    """Refuse to resume another run. `resume`: the latest valid step of `out`, None for a new run. `has_steps`: whether
    there is any committed step. `record` identifies the training set.

    SourceError when all steps are damaged, ConfigError or DataError when the run in `out` is another one. Differences
    that are allowed are logged.
    """
    # A new run, unless every step is damaged: starting over would hide that.
    if resume is None:
        if has_steps:
            raise SourceError(f"{out}: every committed step is damaged; nothing to resume from")
        return
    # The same kind of run, with the same classes in the same order.
    _, folder = resume
    old = run_from_json(read_json(out / RUN_CONFIG))
    if _kind(old) != _kind(config):
        raise ConfigError(f"{out} is another run, choose a new --out: it trains {_kind(old)}, this one {_kind(config)}")
    # The codec may have another name where its fingerprint is the same.
    old_record = _data_record(folder)
    same_codec = "codec" in record and record["codec"] == old_record.get("codec")
    # Every key that differs is either allowed, and logged, or refused.
    differences = _differences(old.to_json(), config.to_json())
    lines = {key: f"{key} {before!r} -> {after!r}" for key, (before, after) in differences.items()}
    refused = [text for key, text in lines.items() if not _may_change(key, same_codec)]
    if refused:
        raise ConfigError(f"{out} is another run, choose a new --out: {'; '.join(refused)}")
    if lines:
        logger.info("resumes with %s", "; ".join(lines.values()))
    if "train.steps" in lines and (config.train.cooldown_steps or config.train.schedule == "cosine"):
        logger.info("the learning rate follows the new number of steps: it may rise again before it falls")
    _same_classes(folder, spec)
    if old_record:
        _same_data(folder, old_record, record)


def _data_record(folder: Path) -> dict[str, Any]:
    """The record of the training set in a step; empty in steps of older versions."""
    trainer = read_json(folder / TRAINER)
    record = trainer.get("data") or {} if isinstance(trainer, dict) else None
    if not isinstance(record, dict):
        raise SourceError(f"{folder / TRAINER} is not a training record")
    return record


def _same_data(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """ConfigError or DataError when two records are not of the same training. Records of older versions do not name
    the user's objects: those are not compared."""
    for what in OBJECTS:
        if what in old and old[what] != new.get(what):
            there, now = (record.get(what) or "the package's own" for record in (old, new))
            raise ConfigError(
                f"{what}: {folder} was trained with {there}, this start has {now}; resume with the recipe that began "
                "the run (ldit train FILE.py:FUNCTION)"
            )
    encoded, cached = "images that are encoded in the step", "a latent cache"
    if ("codec" in old) != ("codec" in new):
        before, now = (encoded, cached) if "codec" in old else (cached, encoded)
        raise DataError(f"the run of {folder} trains on {before}, data.path is now {now}")
    if old.get("codec") != new.get("codec"):
        before, now = (str(record["codec"])[:12] for record in (old, new))
        raise DataError(f"the autoencoder differs from that of {folder}: fingerprint {before} there, {now} now")
    if old.get("text") != new.get("text"):
        before, now = (str(record.get("text"))[:12] for record in (old, new))
        raise DataError(f"the text encoder differs from that of {folder}: fingerprint {before} there, {now} now")
    if _without_objects(old) != _without_objects(new):
        raise DataError(
            f"the training images differ from those of {folder}: {old.get('pictures')} there, "
            f"{new['pictures']} now, or other names"
        )


def _without_objects(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in OBJECTS}


def _kind(config: BaseRun) -> str:
    kinds = {AutoencoderRun: "an autoencoder", ClassifierRun: "a classifier"}
    return next((words for kind, words in kinds.items() if isinstance(config, kind)), "a diffusion model")


def _may_change(key: str, same_codec: bool) -> bool:
    """Whether a resumed run may have another value; a codec's name may differ if its fingerprint does not."""
    if key == "codec.name":
        return same_codec
    return key in RESUMABLE or key.split(".")[0] in RESUMABLE_SECTIONS


def _same_classes(folder: Path, spec: AnySpec) -> None:
    old = read_any_spec(folder)
    if old.class_names != spec.class_names:
        before, now = old.class_names or (), spec.class_names or ()
        only = [sorted(set(a) - set(b)) or a for a, b in ((before, now), (now, before))]
        there, here = (some(names, 4) or "none" for names in only)
        raise DataError(
            f"class names differ from those of {folder}: {there} there, {here} here; is it another recipe or data.path?"
        )


def _differences(old: Any, new: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) of every value that differs."""
    new = to_dict(new)
    if isinstance(old, dict) and isinstance(new, dict):
        differences: dict[str, tuple[Any, Any]] = {}
        for key in sorted(old.keys() | new.keys()):
            differences.update(_differences(old.get(key), new.get(key), f"{where}.{key}" if where else key))
        return differences
    return {} if old == new else {where: (old, new)}
