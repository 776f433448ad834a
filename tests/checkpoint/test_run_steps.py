"""A run's directory: which steps count, and which are kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from models import TABLE

from ldit.checkpoint.open import open_source
from ldit.checkpoint.run import (
    clean,
    committed_steps,
    latest_valid_step,
    quarantine_newer,
    retire,
    step_folder,
)
from ldit.pipeline.load import load_model
from ldit.storage import manifest
from ldit.storage.atomic import read_json
from ldit.storage.names import OPTIMIZER, TRAINER, is_run
from ldit.storage.shards import read_set

Save = Callable[..., Path]


def numbers(run: Path) -> list[int]:
    return [step for step, _ in committed_steps(run)]


def marker(source: Any, ema: bool = True) -> float:
    return load_model(source, ema=ema).y_embedder.embedding_table.weight[0, 0].item()


def test_a_step_is_a_source_wherever_it_is_copied(save: Save, run: Path, tmp_path: Path) -> None:
    folder = save(7)
    assert folder == run / "checkpoints" / "step-00000007" == step_folder(run, 7)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        "config.json",
        "model.safetensors",
        "ema.safetensors",
        "state/optimizer.safetensors",
        "state/trainer.json",
        "manifest.json",
    }
    manifest.verify(folder)
    moved = folder.rename(tmp_path / "elsewhere")
    assert marker(open_source(moved)) == 7


def test_what_is_saved_comes_back(tiny: Any, save: Save, same: Callable[..., bool]) -> None:
    folder = save(3)
    table = {TABLE: torch.full((11, 64), 3.0)}
    assert same(read_set(folder, "model"), {**tiny.raw, **table})
    assert same(read_set(folder, "ema"), {**tiny.ema, **table})
    assert same(read_set(folder, OPTIMIZER), {"exp_avg.x": torch.full((3,), 3.0)})
    assert read_json(folder / TRAINER) == {"step": 3}


def test_committed_steps_are_newest_first_and_nothing_half_written(save: Save, run: Path) -> None:
    assert not is_run(run) and committed_steps(run) == []
    for step in (2, 10, 1):
        save(step)
    checkpoints = run / "checkpoints"
    for name in ("step-00000011.tmp-0123abcd", "step-00000010.tmp-old", "step-12", "xstep-00000013", "other"):
        (checkpoints / name).mkdir()
    assert is_run(run)
    assert numbers(run) == [10, 2, 1]
    assert committed_steps(run)[0] == (10, checkpoints / "step-00000010")


def test_steps_past_eight_digits_sort_by_number(run: Path) -> None:
    for step in (99_999_999, 100_000_000):
        step_folder(run, step).mkdir(parents=True)
    assert numbers(run) == [100_000_000, 99_999_999]


@pytest.mark.parametrize("keep", [0, 1, 2, 5])
def test_only_the_newest_are_kept(save: Save, run: Path, keep: int) -> None:
    for step in range(1, 6):
        save(step, keep)
        assert numbers(run) == list(range(step, 0, -1))[: keep or None]
    assert {p.name for p in (run / "checkpoints").iterdir()} == {p.name for _, p in committed_steps(run)}


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [
        (1, 4, [10, 8, 4]),
        (2, 5, [10, 9, 8, 5]),
        (1, 1, list(range(10, 0, -1))),
        (0, 3, list(range(10, 0, -1))),
        (1, 0, [10]),
        (2, 11, [10, 9]),
    ],
)
def test_steps_that_keep_every_divides_stay(run: Path, keep: int, keep_every: int, left: list[int]) -> None:
    """Beside the newest `keep` of the others; keep = 0 removes none."""
    for step in range(1, 11):
        step_folder(run, step).mkdir(parents=True)
        retire(run, keep, keep_every)
    assert numbers(run) == left
    assert len(list((run / "checkpoints").iterdir())) == len(left)


def test_a_death_during_rotation_leaves_no_half_step(save: Save, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(1)
    with monkeypatch.context() as patch:
        patch.setattr("ldit.checkpoint.run.shutil.rmtree", lambda path, **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(2, keep=1)
    assert numbers(run) == [2]
    clean(run)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002"]


def test_rotation_never_removes_the_step_just_saved(save: Save, run: Path, warnings_said: list[str]) -> None:
    """Training fell back behind damaged newer steps and saves again: what it saved stays, and they are lost neither."""
    save(1)
    for step in (3, 4):
        damage.bit(save(step), "model.safetensors")
    newest = latest_valid_step(run)
    assert newest is not None and newest[0] == 1
    quarantine_newer(run, 1)
    assert numbers(run) == [1]
    saved = save(2, keep=1)
    assert latest_valid_step(run) == (2, saved)
    clean(run)
    assert {p.name for p in (run / "checkpoints").iterdir()} == {
        "step-00000002",
        "step-00000003.damaged",
        "step-00000004.damaged",
    }


def test_a_step_damaged_again_is_set_aside_again(save: Save, run: Path, warnings_said: list[str]) -> None:
    """Beside the one set aside before, which stays, with a word of where it is; older ones are left alone."""
    for number, word in ((1, ""), (2, "-2")):
        save(1)
        (save(2) / "config.json").write_text(f"hurt {number}")
        quarantine_newer(run, 1)
        aside = run / "checkpoints" / f"step-00000002.damaged{word}"
        assert numbers(run) == [1] and (aside / "config.json").read_text() == f"hurt {number}"
        assert warnings_said[-1].endswith(str(aside))
    quarantine_newer(run, 1)
    assert numbers(run) == [1] and len(warnings_said) == 2


def test_a_step_saved_again_replaces_the_damaged_one(save: Save, flip: Callable[[Path, int], None], run: Path) -> None:
    flip(save(1) / "model.safetensors", 9000)
    manifest.verify(save(1))
    assert numbers(run) == [1]


FILES = ["config.json", "model.safetensors", "ema.safetensors", "state/optimizer.safetensors", "state/trainer.json"]


@pytest.mark.parametrize("hurt", damage.WAYS)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_resume_passes_over_damage_loudly(
    save: Save, run: Path, hurt: Callable[[Path, str], None], name: str, warnings_said: list[str]
) -> None:
    save(1)
    hurt(save(2), name)
    assert latest_valid_step(run) == (1, step_folder(run, 1))
    assert len(warnings_said) == 1 and "step 2" in warnings_said[0] and name in warnings_said[0]


def test_nothing_to_resume_when_all_is_damaged(save: Save, run: Path, warnings_said: list[str]) -> None:
    for step in (1, 2):
        damage.bit(save(step), "config.json")
    assert latest_valid_step(run) is None
    assert [said.split()[1] for said in warnings_said] == ["2", "1"]


def test_resume_passes_over_a_hostile_manifest(save: Save, run: Path, warnings_said: list[str]) -> None:
    save(1)
    (save(2) / "manifest.json").write_text("[" * 100_000)
    assert latest_valid_step(run) == (1, step_folder(run, 1))
