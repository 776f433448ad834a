"""Exports whose averages lie in shards with an index: opened as any other, and damage in any of their files found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import damage
import pytest
import shards
import steps

import ldit
from ldit.checkpoint.open import open_source
from ldit.errors import SourceError
from ldit.pipeline.load import load_model
from ldit.storage import manifest
from ldit.storage.atomic import committed
from ldit.storage.shards import shard_name

SHARDS = [shard_name("ema", i, 3) for i in range(3)]
INDEX = "ema.safetensors.index.json"
READ = ["config.json", INDEX, *SHARDS, "manifest.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with committed(tmp_path / "export") as temporary:
        shards.write_folder(temporary, steps.SPEC, steps.content(1))
    return tmp_path / "export"


def test_it_opens_as_any_other(folder: Path, same: Callable[..., bool]) -> None:
    sets = steps.content(1)
    assert {p.name for p in folder.iterdir()} == {*READ, "model.safetensors"}
    source = open_source(folder)
    assert source.kept == ("raw", "ema") and source.spec == steps.SPEC
    assert same(source.tensors(True), sets["ema"]) and same(source.tensors(False), sets["model"])
    assert source.shapes(True) == {name: (tuple(t.shape), "fp32") for name, t in sets["ema"].items()}
    assert same(ldit.load(str(folder), device="cpu").model.state_dict(), sets["ema"])
    assert same(load_model(source, ema=False).state_dict(), sets["model"])
    source.verify()


def test_averages_in_shards_may_be_all_there_is(folder: Path, same: Callable[..., bool]) -> None:
    for name in ("model.safetensors", "manifest.json"):
        (folder / name).unlink()
    source = open_source(folder)
    assert source.kept == ("ema",)
    assert same(load_model(source).state_dict(), steps.content(1)["ema"])


# An export may come without a manifest, so a missing one is no damage.
HURTS = [(name, hurt) for name in READ for hurt in damage.WAYS if (name, hurt) != ("manifest.json", damage.missing)]


@pytest.mark.parametrize(("name", "hurt"), HURTS)
def test_damage_in_any_file_is_found_when_it_is_read(
    folder: Path, name: str, hurt: Callable[[Path, str], None], fault: Callable[..., str]
) -> None:
    hurt(folder, name)
    for use in (lambda: load_model(open_source(folder)), lambda: open_source(folder).verify()):
        message = fault(use)
        assert name in message and str(folder) in message


def test_a_shard_swapped_for_a_sound_one_is_found(folder: Path, fault: Callable[..., str]) -> None:
    """Of the same size, with the same names: only the manifest tells."""
    other = folder.parent / "other"
    with committed(other) as temporary:
        shards.write_folder(temporary, steps.SPEC, steps.content(2))
    shutil.copy(other / SHARDS[1], folder / SHARDS[1])
    assert str(folder / SHARDS[1]) in fault(lambda: load_model(open_source(folder)))


def test_an_index_swapped_for_one_of_fewer_shards_is_found(folder: Path, fault: Callable[..., str]) -> None:
    """Without a manifest the model misses tensors; with one the index is damaged."""
    table = json.loads((folder / INDEX).read_text())
    table["weight_map"] = {name: file for name, file in table["weight_map"].items() if file != SHARDS[2]}
    (folder / INDEX).write_text(json.dumps(table))
    assert INDEX in fault(lambda: load_model(open_source(folder)))
    (folder / "manifest.json").unlink()
    assert "missing" in fault(lambda: load_model(open_source(folder)))


@pytest.mark.parametrize("name", SHARDS)
def test_without_a_manifest_a_missing_shard_is_named(folder: Path, name: str, fault: Callable[..., str]) -> None:
    (folder / manifest.NAME).unlink()
    (folder / name).unlink()
    assert fault(lambda: load_model(open_source(folder))) == f"{folder / name} is missing"


def test_shards_whose_index_is_lost_are_not_passed_over(folder: Path) -> None:
    """Raw weights must not silently take the place of averages that are there."""
    for name in (manifest.NAME, INDEX):
        (folder / name).unlink()
    with pytest.raises(SourceError, match=INDEX):
        load_model(open_source(folder))


def test_a_step_with_sharded_sets_falls_back_for_each_of_its_files(tmp_path: Path, warnings_said: list[str]) -> None:
    """As a run of several processes leaves it."""
    run = tmp_path / "run"
    steps.save(run, 1)
    for name in READ:
        folder = run / "checkpoints" / "step-00000002"
        with committed(folder) as temporary:
            shards.write_folder(temporary, steps.SPEC, steps.content(2))
            (temporary / "state").mkdir()
            shards.write_sharded(temporary, "state/optimizer", steps.content(2)["state/optimizer"])
        assert open_source(run).path == folder and not warnings_said
        damage.truncated(folder, name)
        assert open_source(run).path.name == "step-00000001"
        assert len(warnings_said) == 1 and name in warnings_said[0]
        warnings_said.clear()
