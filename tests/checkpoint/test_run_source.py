"""A run, or one of its steps, as a source of weights: true to the manifest, or passed over loudly."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import pytest

from ldit.checkpoint.open import open_source
from ldit.checkpoint.run import step_folder
from ldit.pipeline.load import load_model

Save = Callable[..., Path]


def marker(source: Any, ema: bool = True) -> float:
    return load_model(source, ema=ema).y_embedder.embedding_table.weight[0, 0].item()


@pytest.mark.parametrize("hurt", damage.WAYS)
@pytest.mark.parametrize("name", ["config.json", "ema.safetensors", "manifest.json"])
def test_a_run_as_source_falls_back_loudly(
    save: Save, run: Path, hurt: Callable[[Path, str], None], name: str, warnings_said: list[str]
) -> None:
    save(1)
    hurt(save(2), name)
    source = open_source(run)
    assert source.path == step_folder(run, 1) and marker(source) == 1
    assert len(warnings_said) == 1 and "step 2" in warnings_said[0]


def test_a_changed_configuration_that_still_reads_is_hurt(save: Save, run: Path, warnings_said: list[str]) -> None:
    save(1)
    path = save(2) / "config.json"
    path.write_text(path.read_text().replace("class 3", "class 4"))
    assert open_source(run).path == step_folder(run, 1)
    assert len(warnings_said) == 1 and "config.json" in warnings_said[0]


def test_weights_not_checked_at_opening_are_checked_at_loading(
    save: Save, run: Path, fault: Callable[..., str]
) -> None:
    """A run is opened for its EMA weights; asked for the raw ones, it checks those then."""
    folder = save(1)
    source = open_source(run)
    damage.bit(folder, "model.safetensors")
    assert marker(source) == 1
    assert "model.safetensors" in fault(load_model, source, ema=False)


def test_a_run_as_source_falls_back_for_raw_weights_too(save: Save, run: Path, warnings_said: list[str]) -> None:
    save(1)
    damage.bit(save(2), "model.safetensors")
    assert marker(open_source(run, ema=False), ema=False) == 1
    assert len(warnings_said) == 1


def test_a_step_of_a_run_without_manifest_and_state_does_not_count(
    save: Save, run: Path, warnings_said: list[str]
) -> None:
    """An export may come without a manifest, a step of a run may not, whatever else it lost."""
    save(1)
    folder = save(2)
    shutil.rmtree(folder / "state")
    (folder / "manifest.json").unlink()
    assert open_source(run).path == step_folder(run, 1)
    assert len(warnings_said) == 1


def test_a_run_as_source_takes_the_newest(save: Save, run: Path, warnings_said: list[str]) -> None:
    for step in (1, 2):
        save(step)
    (run / "checkpoints" / "step-00000003.tmp-01234567").mkdir()
    assert marker(open_source(run)) == 2 and warnings_said == []


def test_a_run_without_a_true_step_is_no_source(save: Save, run: Path, fault: Callable[..., str]) -> None:
    (run / "checkpoints").mkdir(parents=True)
    assert str(run) in fault(open_source, run)
    damage.bit(save(1), "ema.safetensors")
    assert "has no valid step" in fault(open_source, run)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "config.json"])
def test_a_damaged_named_step_is_an_error(save: Save, name: str, fault: Callable[..., str]) -> None:
    """No fallback for a step asked for by name."""
    save(1)
    folder = save(2)
    damage.bit(folder, name)

    def use() -> None:
        load_model(open_source(folder), ema=name != "model.safetensors")

    assert str(folder / name) in fault(use)


def test_opening_a_named_step_verifies_its_configuration(save: Save, fault: Callable[..., str]) -> None:
    """Not only when weights are read: `spec` alone must not be false."""
    folder = save(1)
    text = (folder / "config.json").read_text()
    assert '"input_size": 8' in text
    (folder / "config.json").write_text(text.replace('"input_size": 8', '"input_size": 4'))
    assert "config.json" in fault(open_source, folder)


def test_verify_reads_every_file(save: Save, fault: Callable[..., str]) -> None:
    folder = save(1)
    open_source(folder).verify()
    source = open_source(folder)
    damage.bit(folder, "state/optimizer.safetensors")
    assert "optimizer" in fault(source.verify)
