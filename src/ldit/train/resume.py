"""Whether a run directory holds the run that is asked for, so that it may be resumed."""

from pathlib import Path
from typing import Any

from ldit.checkpoint.export import read_any_spec
from ldit.config.autoencoder import AutoencoderRun
from ldit.config.classifier import ClassifierRun
from ldit.config.kinds import AnySpec, run_from_json
from ldit.config.run import BaseRun
from ldit.config.serial import to_dict
from ldit.errors import ConfigError, DataError, SourceError
from ldit.log import logger
from ldit.storage.atomic import read_json
from ldit.storage.names import RUN_CONFIG, TRAINER

# What may differ when a run goes on; everything else would make it another run.
RESUMABLE = {
    "train.steps",
    "train.micro_batch_size",
    "train.cooldown",
    "train.log_every",
    "train.checkpoint_every",
    "train.sample_every",
    "train.attention_every",
    "train.keep",
    "train.keep_every",
    "train.async_save",
    "ema.snapshot_every",
    "data.path",
    "data.workers",
    "data.timeout",
    "data.verify",
    "data.bad",
    "heldout.every",
}
RESUMABLE_SECTIONS = ("sampling", "parallel", "guard", "track", "eval")


def check_same_run(
    config: BaseRun,
    spec: AnySpec,
    out: Path,
    record: dict[str, Any],
    resume: tuple[int, Path] | None,
    has_steps: bool,
) -> None:
    """Refuse to resume another run. `resume` is the latest valid step of `out`, None for a new run; `has_steps` whether
    there is any committed one; `record` identifies the training set.

    SourceError when there are steps and all are damaged, ConfigError or DataError when the run in `out` is another one;
    differences that are allowed are logged.
    """
    if resume is None:
        if has_steps:
            raise SourceError(f"{out}: every committed step is damaged; nothing to resume from")
        return
    _, folder = resume
    old = run_from_json(read_json(out / RUN_CONFIG))
    if type(old) is not type(config):
        raise ConfigError(f"{out} is another run, choose a new --out: it trains {_kind(old)}, this one {_kind(config)}")
    _same_classes(folder, spec)
    # The codec may have another name where its fingerprint is the same.
    old_record = _data_record(folder)
    same_codec = "codec" in record and record["codec"] == old_record.get("codec")
    # Every key that differs is either allowed, and logged, or ends the start.
    differences = _differences(old.to_json(), config.to_json())
    lines = {key: f"{key} {before!r} -> {after!r}" for key, (before, after) in differences.items()}
    refused = [text for key, text in lines.items() if not _may_change(key, same_codec)]
    if refused:
        raise ConfigError(f"{out} is another run, choose a new --out: {'; '.join(refused)}")
    if lines:
        logger.info("resumes with %s", "; ".join(lines.values()))
    if old_record:
        _same_data(folder, old_record, record)


def _data_record(folder: Path) -> dict[str, Any]:
    """What a step says of the data that it was trained on; empty in steps from before that was kept."""
    trainer = read_json(folder / TRAINER)
    found = trainer.get("data") or {} if isinstance(trainer, dict) else None
    if not isinstance(found, dict):
        raise SourceError(f"{folder / TRAINER} is not a training record")
    return found


def _same_data(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for what in ("objective", "network"):
        if old.get(what) != new.get(what):
            there, now = (f"{record[what]}" if what in record else "the package's own" for record in (old, new))
            raise ConfigError(
                f"{what}: {folder} was trained with {there}, this start has {now}; resume with the recipe that began "
                "the run (ldit train FILE.py:FUNCTION)"
            )
    encoded, cached = "images that are encoded in the step", "a latent cache"
    if ("codec" in old) != ("codec" in new):
        there, now = (encoded, cached) if "codec" in old else (cached, encoded)
        raise DataError(f"the run of {folder} trains on {there}, data.path now means {now}")
    if old.get("codec") != new.get("codec"):
        shown = [str(record["codec"])[:12] for record in (old, new)]
        raise DataError(f"the autoencoder is not that of {folder}: fingerprint {shown[0]} there, {shown[1]} now")
    if old != new:
        raise DataError(
            f"the training images are not those of {folder}: {old.get('pictures')} there, "
            f"{new['pictures']} now, or other names"
        )


def _kind(config: BaseRun) -> str:
    kinds = {AutoencoderRun: "an autoencoder", ClassifierRun: "a classifier"}
    return kinds.get(type(config), "a diffusion model")


def _may_change(key: str, same_codec: bool) -> bool:
    """Whether a run goes on with another value; its codec with another name where it is the same by its fingerprint."""
    if key == "codec.name":
        return same_codec
    return key in RESUMABLE or key.split(".")[0] in RESUMABLE_SECTIONS


def _same_classes(folder: Path, spec: AnySpec) -> None:
    old = read_any_spec(folder)
    if old.class_names != spec.class_names:
        missing = sorted(set(old.class_names or ()) ^ set(spec.class_names or ()))
        raise DataError(f"class names differ from those of {folder}: {', '.join(missing[:6])}")


def _differences(old: Any, new: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    new = to_dict(new)
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(old.keys() | new.keys()):
            found.update(_differences(old.get(key), new.get(key), f"{where}.{key}" if where else key))
        return found
    return {} if old == new else {where: (old, new)}
