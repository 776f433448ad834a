"""R3: what may change when a run goes on does, with a notice; everything else is refused with the difference."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import make_folder, over, said
from runs import ALONE
from safetensors.torch import load_file
from smallrun import changed

from ldit.checkpoint.run import committed_steps, latest_valid_step, step_folder
from ldit.commands.train import run as train
from ldit.config.autoencoder import AutoencoderModelConfig, AutoencoderRun, AutoencoderSpec
from ldit.config.run import RunConfig
from ldit.config.sections import DataConfig, TrainConfig
from ldit.config.spec import AutoencoderConfig, FlowConfig
from ldit.data.samples import Samples
from ldit.data.source import open_data
from ldit.errors import ConfigError, DataError, SourceError
from ldit.storage import manifest
from ldit.storage.atomic import committed, write_json
from ldit.training.resume import RESUMABLE, RESUMABLE_SECTIONS, check_same_run
from ldit.training.tasks.diffusion import model_spec

BASE: dict[str, Any] = {"ema.power": (0.1,), "train.micro_batch_size": 4}

ALLOWED: dict[str, Any] = {
    "train.steps": 4, "train.micro_batch_size": 2, "train.cooldown": 1, "train.log_every": 2,
    "train.checkpoint_every": 1, "train.sample_every": 9, "train.attention_every": 3, "train.keep": 1,
    "train.keep_every": 2, "train.async_save": True, "ema.snapshot_every": 2, "ema.host": True, "data.workers": 1,
    "data.timeout": 9.0, "data.verify": False, "data.bad": "skip",
    "heldout.every": 2, "sampling.steps": 5, "sampling.guidance": 2.0, "parallel.recompute": "full",
    "parallel.reshard": False, "parallel.eager": True, "parallel.timeout": 5.0, "parallel.shard": 1,
    "guard.nonfinite": "stop",
    "guard.spike": "rollback", "guard.spike_z": 4.0, "guard.limit": 3, "track.wandb": "somewhere",
    "track.tensorboard": True, "eval.every": 3, "eval.num": 9, "eval.reference": "x", "eval.extractor": "x",
    "eval.inception_weights": "x", "eval.batch_size": 3,
    "eval.protocol": "clean-fid", "train.cooldown_share": 0.5, "data.fit_model": True,
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "train.batch_size": 8, "train.lr": 0.5, "train.warmup": 1, "train.schedule": "cosine", "train.seed": 1,
    "train.precision": "bf16", "train.reduce_precision": "bf16", "train.grad_clip": 1.0, "train.init_from": "x",
    "train.init_ema": False, "optim.kind": "muon", "optim.momentum": 0.9, "optim.beta1": 0.8, "optim.beta2": 0.99,
    "optim.weight_decay": 0.1, "ema.decay": 0.9, "ema.warmup": False, "ema.more": (0.5,), "ema.power": (0.2,),
    "data.flip": True,
    "data.heldout": "", "data.max_per_class": 9, "data.exif": True, "data.background": (0, 0, 0),
    "data.max_pixels": 4096, "data.codec_precision": "bf16", "heldout.num": 3, "objective.time_mean": 1.0,
    "objective.time_std": 2.0, "model.dim": 32, "model.qk_norm": "head", "model.class_dropout_prob": 0.2,
    "model.learn_sigma": False, "process.": FlowConfig(), "optim.chunked": True, "optim.every": 2,
    "optim.precision": "fp32", "optim.base_width": 8, "optim.moments": "bf16", "ema.every": 2,
    "objective.min_snr": 5.0, "objective.direction": 0.5,
    "objective.nearest_of": 2, "objective.mid_weight": 1.0, "objective.augment": 0.1, "objective.dropout": 0.1,
    "objective.route": 0.5, "objective.route_blocks": (1, 1), "model.class_tokens": 2, "model.shared_adaln": True,
    "train.warmup_share": 0.5, "data.buckets": True, "objective.times": "uniform", "objective.loss_weight": "velocity",
}  # fmt: skip
TEXT = ("encoder", "tokenizer", "max_tokens", "dropout", "precision", "cache", "prompts", "offload")
COMPANIONS: dict[str, dict[str, Any]] = {
    "optim.chunked": {"optim.kind": "muon"}, "optim.precision": {"optim.kind": "muon"},
    "optim.every": {"optim.kind": "muon", "optim.chunked": True}, "ema.every": {"ema.power": ()},
    "objective.augment": {"model.augment_labels": True},
    "objective.route": {"objective.route_blocks": (1, 1)}, "objective.route_blocks": {"objective.route": 0.5},
    "objective.loss_weight": {"process.": FlowConfig(prediction="eps")},
}  # fmt: skip
"""What a key needs beside it, to be a sound configuration."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and a finished run `run` over it."""
    base = tmp_path_factory.mktemp("r3")
    make_folder(base / "data")
    assert train(configured(base), base / "run") == 0
    return base


def configured(place: Path, changes: dict[str, Any] | None = None) -> RunConfig:
    return over(place / "data", {**BASE, **(changes or {})})


def resume_step(config: RunConfig, data: Samples, run: Path, record: dict[str, Any]) -> tuple[int, Path] | None:
    """As `ldit train` decides it: the latest valid step, and whether its run is this one."""
    latest = latest_valid_step(run, ALONE)
    check_same_run(config, model_spec(config, data), run, record, latest, bool(committed_steps(run)))
    return latest


def resume(place: Path, config: RunConfig, run: Path | None = None) -> tuple[int, Path] | None:
    """What the flow asks before it goes on."""
    data, _ = open_data(config.data.path, config.data.image_size)
    record = {"pictures": len(data), "sha256": data.fingerprint()}
    return resume_step(config, data, run or place / "run", record)


@pytest.mark.parametrize("key", ALLOWED)
def test_r3_allowed_with_a_notice(key: str, place: Path) -> None:
    config = configured(place, {key: ALLOWED[key]})
    with said() as lines:
        found = resume(place, config)
    assert found == (2, step_folder(place / "run", 2))
    old = getattr(getattr(configured(place), key.split(".")[0]), key.split(".")[1])
    assert lines == [f"resumes with {key} {old!r} -> {ALLOWED[key]!r}"]


@pytest.mark.parametrize("key", REFUSED)
def test_r3_refused_with_the_difference(key: str, place: Path) -> None:
    """Through the whole flow: one line with key, old and new value; nothing in the run is written."""
    before = {p: p.read_bytes() for p in (place / "run").rglob("*.json*")}
    changes = {key: REFUSED[key]}
    if key.startswith("objective."):  # DDPM has none of it, and says so before it looks at the run
        changes |= {"process.": FlowConfig(), "model.learn_sigma": False}
    changes |= COMPANIONS.get(key, {})
    with pytest.raises(ConfigError) as error:
        train(configured(place, changes), place / "run")
    said = str(error.value)
    assert "another run" in said and f"{key.strip('.')}" in said and " -> " in said and "\n" not in said
    if not key.endswith("."):
        new = REFUSED[key]
        assert f"{key} " in said and f"-> {list(new) if isinstance(new, tuple) else new!r}" in said
    assert {p: p.read_bytes() for p in (place / "run").rglob("*.json*")} == before


def leaves(value: Any, where: str = "") -> set[str]:
    if isinstance(value, dict) and value:
        return {leaf for key, inner in value.items() for leaf in leaves(inner, f"{where}.{key}" if where else key)}
    return {where}


def test_r3_every_key_of_a_run_was_thought_of(place: Path) -> None:
    """A key added to a section belongs into one of the two tables, or into the exceptions here."""
    keys = leaves(configured(place).to_json())
    free = {key for key in keys if key in RESUMABLE or key.split(".")[0] in RESUMABLE_SECTIONS}
    assert keys >= RESUMABLE
    looked_at = ("train", "optim", "ema", "data", "heldout", "objective", "guard", "text")
    told = {key for key in keys if key.startswith(looked_at)}
    of_text = {f"text.{name}" for name in TEXT}  # tests/e2e/test_text_model.py
    unheard = told - set(ALLOWED) - set(REFUSED) - {"data.path", "data.image_size"} - of_text
    assert unheard == set()
    assert set(ALLOWED) <= free and not set(REFUSED) & free


def test_r3_several_differences_are_all_named(place: Path) -> None:
    with pytest.raises(ConfigError) as error:
        resume(place, configured(place, {"train.lr": 0.5, "optim.kind": "muon", "train.steps": 9}))
    assert "train.lr 0.001 -> 0.5" in str(error.value) and "optim.kind 'adamw' -> 'muon'" in str(error.value)
    assert "train.steps" not in str(error.value)


def test_r3_the_same_images_elsewhere(place: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(place / "data", tmp_path / "moved")
    assert resume(place, over(moved, BASE)) is not None
    (moved / "a" / "0.png").unlink()
    with pytest.raises(DataError, match="12 there, 11 now"):
        resume(place, over(moved, BASE))
    renamed = make_folder(tmp_path / "renamed", ("a", "b", "z"))
    with pytest.raises(DataError, match=r"class names differ.*: c there, z here"):
        resume(place, over(renamed, BASE))


def test_a_run_that_a_bad_image_ended_goes_on_without_it(tmp_path: Path) -> None:
    config = over(make_folder(tmp_path / "data"), {"train.checkpoint_every": 1, "train.steps": 6})
    assert train(changed(config, {"train.steps": 1}), tmp_path / "run") == 0
    (tmp_path / "data/b/1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"b/1\.png"):
        train(config, tmp_path / "run")
    assert train(changed(config, {"data.bad": "skip"}), tmp_path / "run") == 0
    assert step_folder(tmp_path / "run", 6).is_dir()
    assert "b/1.png" in (tmp_path / "run/skipped.jsonl").read_text()


def test_a_run_of_another_kind_is_called_so(place: Path, tmp_path: Path) -> None:
    """Before its classes are compared, of which an autoencoder has none."""
    config = AutoencoderRun(
        model=AutoencoderModelConfig(2, (8, 16), 1, 4, mid_block_attention=False),
        data=DataConfig(str(place / "data"), 8, workers=0),
        train=TrainConfig(steps=1, batch_size=4, attention_every=0),
    )
    with pytest.raises(ConfigError, match=r"run is another run.*it trains a diffusion model, this one an autoencoder"):
        train(config, place / "run")
    run = tmp_path / "run"
    step_folder(run, 1).mkdir(parents=True)
    with committed(step_folder(run, 1)) as folder:
        write_json(folder / "config.json", AutoencoderSpec(config.model).to_json())
    (run / "config.json").write_text(json.dumps(config.to_json()))
    with pytest.raises(ConfigError, match="it trains an autoencoder, this one a diffusion model"):
        train(configured(place), run)


def recorded(place: Path, tmp_path: Path, codec: str | None, name: str = "x") -> tuple[Path, dict[str, Any]]:
    """A copy of the run, with a codec of this name and fingerprint (None: a latent cache), and its record."""
    run = shutil.copytree(place / "run", tmp_path / f"run-{codec}")
    folder = step_folder(run, 2)
    trainer = json.loads((folder / "state/trainer.json").read_text())
    trainer["data"] |= {} if codec is None else {"codec": codec}
    (folder / "state/trainer.json").write_text(json.dumps(trainer))
    (folder / manifest.NAME).write_text(json.dumps(manifest.build(folder)))
    (run / "config.json").write_text(json.dumps(latent(place, name).to_json()))
    return run, trainer["data"]


def latent(place: Path, name: str) -> RunConfig:
    return changed(configured(place), {"codec.": AutoencoderConfig(name), "model.in_channels": 4})


def asked(place: Path, name: str, run: Path, record: dict[str, Any]) -> tuple[int, Path] | None:
    config = latent(place, name)
    data, _ = open_data(config.data.path, config.data.image_size)
    return resume_step(config, data, run, record)


def test_images_and_a_cache_of_them_are_told_apart(place: Path, tmp_path: Path) -> None:
    online, with_codec = recorded(place, tmp_path, "f" * 64)
    cached, without = recorded(place, tmp_path, None)
    there, now = "images that are encoded in the step", "a latent cache"
    with pytest.raises(DataError, match=f"step-00000002 trains on {there}, data.path is now {now}"):
        asked(place, "x", online, without)
    with pytest.raises(DataError, match=f"step-00000002 trains on {now}, data.path is now {there}"):
        asked(place, "x", cached, with_codec)
    with pytest.raises(
        DataError, match=r"autoencoder differs from that of .*: fingerprint ffffffffffff there, eeeeeeeeeeee"
    ):
        asked(place, "x", online, {**with_codec, "codec": "e" * 64})


def test_the_same_autoencoder_elsewhere(place: Path, tmp_path: Path) -> None:
    """It is known by its fingerprint; without one, or with another, its name must stay."""
    run, record = recorded(place, tmp_path, "f" * 64, "here")
    with said() as lines:
        assert asked(place, "there", run, record) == (2, step_folder(run, 2))
    assert lines == ["resumes with codec.name 'here' -> 'there'"]
    cached, without = recorded(place, tmp_path, None, "here")
    for other, found in ((run, {**record, "codec": "e" * 64}), (cached, without)):
        with pytest.raises(ConfigError, match=r"another run.*codec\.name 'here' -> 'there'"):
            asked(place, "there", other, found)


def test_r3_a_run_that_goes_on_saves_what_it_goes_on_with(place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "run", tmp_path / "run")
    assert train(configured(place, {"train.steps": 3, "guard.limit": 4}), run) == 0
    saved = json.loads((run / "config.json").read_text())
    assert saved["train"]["steps"] == 3 and saved["guard"]["limit"] == 4
    with pytest.raises(ConfigError, match=r"train\.lr"):
        train(configured(place, {"train.steps": 3, "train.lr": 1.0}), run)


NEW_SECTIONS = ("guard", "parallel", "track")
NEW_KEYS = {
    "train": ("cooldown", "keep_every", "async_save", "attention_every", "init_from", "init_ema", "reduce_precision"),
    "optim": ("kind", "momentum"),
    "ema": ("more", "power", "snapshot_every", "warmup", "host", "every"),
}
OLD_BASE = {"ema.power": (), "train.micro_batch_size": 4}


def age(run: Path, step: int) -> None:
    """The run as it was written before there were guards, layouts, trackers, Muon and further averages."""
    config = json.loads((run / "config.json").read_text())
    for section in NEW_SECTIONS:
        del config[section]
    for section, keys in NEW_KEYS.items():
        for key in keys:
            del config[section][key]
    (run / "config.json").write_text(json.dumps(config))
    folder = step_folder(run, step)
    trainer = json.loads((folder / "state" / "trainer.json").read_text())
    for key in ("updates", "offset", "scaler", "guard"):
        del trainer[key]
    (folder / "state" / "trainer.json").write_text(json.dumps(trainer))
    (folder / manifest.NAME).write_text(json.dumps(manifest.build(folder)))


def test_r3_a_run_from_before_the_new_keys(place: Path, tmp_path: Path) -> None:
    """It goes on, and ends in the bits of a run that was written with them."""
    config = over(place / "data", OLD_BASE)
    longer = over(place / "data", {**OLD_BASE, "train.steps": 4})
    for run in ("old", "whole"):
        assert train(config, tmp_path / run) == 0
    age(tmp_path / "old", 2)
    for run in ("old", "whole"):
        with said() as lines:
            assert train(longer, tmp_path / run) == 0
        assert any(line.startswith("resumed from") for line in lines)
    for file in ("model.safetensors", "ema.safetensors", "state/optimizer.safetensors"):
        a, b = (load_file(step_folder(tmp_path / run, 4) / file) for run in ("old", "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), file


@pytest.mark.parametrize("text", ["[]", '{"format": "run-9"}', "{", '{"format": "run-1", "model": {}, "colour": 1}'])
def test_r3_a_damaged_record_of_the_configuration(text: str, place: Path, tmp_path: Path) -> None:
    """One line, and nothing is trained."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    (run / "config.json").write_text(text)
    with pytest.raises((ConfigError, SourceError)) as error:
        train(configured(place, {"train.steps": 4}), run)
    assert "\n" not in str(error.value)
    assert not step_folder(run, 4).exists()
