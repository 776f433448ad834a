"""A run's directory: which steps count, which are kept, who may write."""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldit.checkpoint import manifest
from ldit.checkpoint.open import open_source
from ldit.checkpoint.run import (
    clean,
    committed_steps,
    is_run,
    newest_true_step,
    read_state,
    run_lock,
    save_step,
    step_folder,
)
from ldit.flows.pipeline import load_model

Save = Callable[..., Path]
HOLDER = (
    "import fcntl, sys\nfile = open(sys.argv[1], 'a')\n"
    "try:\n    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept OSError:\n    sys.exit(3)\n"
    "print('held', flush=True)\nsys.stdin.read()\n"
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def save(tiny: Any, run: Path) -> Save:
    """Commit a step whose label table tells the step, and whose optimiser state is one tensor."""

    def commit(step: int, keep: int = 0) -> Path:
        table = {"y_embedder.embedding_table.weight": torch.full((11, 64), float(step))}
        optimizer = [("exp_avg.x", torch.full((3,), float(step)))]
        raw, ema = {**tiny.raw, **table}, {**tiny.ema, **table}
        return save_step(run, step, tiny.spec, raw.items(), ema.items(), optimizer, {"step": step}, keep)

    return commit


def steps(run: Path) -> list[int]:
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


def test_state_comes_back(tiny: Any, save: Save, same: Callable[..., bool]) -> None:
    weights, ema, optimizer, record = read_state(save(3))
    table = {"y_embedder.embedding_table.weight": torch.full((11, 64), 3.0)}
    assert same(weights, {**tiny.raw, **table})
    assert same(ema, {**tiny.ema, **table})
    assert same(optimizer, {"exp_avg.x": torch.full((3,), 3.0)})
    assert record == {"step": 3}


def test_committed_steps_are_newest_first_and_nothing_half_written(save: Save, run: Path) -> None:
    assert not is_run(run) and committed_steps(run) == []
    for step in (2, 10, 1):
        save(step)
    checkpoints = run / "checkpoints"
    for name in ("step-00000011.tmp-0123abcd", "step-00000010.tmp-old", "step-12", "xstep-00000013", "other"):
        (checkpoints / name).mkdir()
    assert is_run(run)
    assert steps(run) == [10, 2, 1]
    assert committed_steps(run)[0] == (10, checkpoints / "step-00000010")


def test_steps_past_eight_digits_sort_by_number(run: Path) -> None:
    for step in (99_999_999, 100_000_000):
        step_folder(run, step).mkdir(parents=True)
    assert steps(run) == [100_000_000, 99_999_999]


@pytest.mark.parametrize("keep", [0, 1, 2, 5])
def test_only_the_newest_are_kept(save: Save, run: Path, keep: int) -> None:
    for step in range(1, 6):
        save(step, keep)
        assert steps(run) == list(range(step, 0, -1))[: keep or None]
    assert {p.name for p in (run / "checkpoints").iterdir()} == {p.name for _, p in committed_steps(run)}


def test_a_death_during_rotation_leaves_no_half_step(save: Save, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(1)
    with monkeypatch.context() as patch:
        patch.setattr("ldit.checkpoint.run.shutil.rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(2, keep=1)
    assert steps(run) == [2]
    clean(run)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002"]


def test_rotation_never_removes_the_step_just_saved(
    save: Save, run: Path, flip: Callable[[Path, int], None], warnings_said: list[str]
) -> None:
    """Training fell back behind a damaged newest step and saves again: what it saved must stay."""
    save(1)
    flip(save(3) / "model.safetensors", 9000)
    newest = newest_true_step(run)
    assert newest is not None and newest[0] == 1
    saved = save(2, keep=1)
    assert saved.is_dir()
    newest = newest_true_step(run)
    assert newest == (2, saved)


def test_a_step_saved_again_replaces_the_damaged_one(save: Save, flip: Callable[[Path, int], None], run: Path) -> None:
    flip(save(1) / "model.safetensors", 9000)
    manifest.verify(save(1))
    assert steps(run) == [1]


def damage_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()


def damage_truncated(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])


def damage_bit(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 4
    (folder / name).write_bytes(data)


FILES = ["config.json", "model.safetensors", "ema.safetensors", "state/optimizer.safetensors", "state/trainer.json"]


@pytest.mark.parametrize("damage", [damage_missing, damage_truncated, damage_bit])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_resume_passes_over_damage_loudly(
    save: Save, run: Path, damage: Callable[[Path, str], None], name: str, warnings_said: list[str]
) -> None:
    save(1)
    damage(save(2), name)
    assert newest_true_step(run) == (1, step_folder(run, 1))
    assert len(warnings_said) == 1 and "step 2" in warnings_said[0] and name in warnings_said[0]


def test_nothing_to_resume_when_all_is_damaged(save: Save, run: Path, warnings_said: list[str]) -> None:
    for step in (1, 2):
        damage_bit(save(step), "config.json")
    assert newest_true_step(run) is None
    assert [said.split()[1] for said in warnings_said] == ["2", "1"]


def test_resume_passes_over_a_hostile_manifest(save: Save, run: Path, warnings_said: list[str]) -> None:
    save(1)
    (save(2) / "manifest.json").write_text("[" * 100_000)
    assert newest_true_step(run) == (1, step_folder(run, 1))


@pytest.mark.parametrize("damage", [damage_missing, damage_truncated, damage_bit])
@pytest.mark.parametrize("name", ["config.json", "ema.safetensors", "manifest.json"])
def test_a_run_as_source_falls_back_loudly(
    save: Save, run: Path, damage: Callable[[Path, str], None], name: str, warnings_said: list[str]
) -> None:
    save(1)
    damage(save(2), name)
    source = open_source(run)
    assert source.path == step_folder(run, 1) and marker(source) == 1
    assert len(warnings_said) == 1 and "step 2" in warnings_said[0]


def test_a_changed_configuration_that_still_reads_is_damage(save: Save, run: Path, warnings_said: list[str]) -> None:
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
    damage_bit(folder, "model.safetensors")
    assert marker(source) == 1
    assert "model.safetensors" in fault(load_model, source, ema=False)


def test_a_run_as_source_falls_back_for_raw_weights_too(save: Save, run: Path, warnings_said: list[str]) -> None:
    save(1)
    damage_bit(save(2), "model.safetensors")
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
    damage_bit(save(1), "ema.safetensors")
    assert "damaged" in fault(open_source, run)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "config.json"])
def test_a_damaged_named_step_is_an_error(save: Save, name: str, fault: Callable[..., str]) -> None:
    """No fallback for a step asked for by name."""
    save(1)
    folder = save(2)
    damage_bit(folder, name)

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
    damage_bit(folder, "state/optimizer.safetensors")
    assert "optimizer" in fault(source.verify)


def test_the_lock_refuses_a_second_holder(run: Path, fault: Callable[..., str]) -> None:
    """Within the process too: each opening is a holder of its own."""

    def second() -> None:
        with run_lock(run):
            pytest.fail("two holders")

    with run_lock(run):
        assert str(run) in fault(second)
        child = subprocess.run([sys.executable, "-c", HOLDER, run / ".lock"], stdin=subprocess.DEVNULL, check=False)
        assert child.returncode == 3
    with run_lock(run):
        pass


def test_the_lock_is_freed_by_an_exception(run: Path) -> None:
    with pytest.raises(ValueError, match="inside"), run_lock(run):
        raise ValueError("inside")
    with run_lock(run):
        pass


def test_the_lock_outlives_no_holder(run: Path, fault: Callable[..., str]) -> None:
    """Refused while another process holds it, given once that one is killed; a stale file is no lock."""
    run.mkdir()

    def take() -> str:
        with run_lock(run):
            return (run / ".lock").read_text()

    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, run / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        (run / ".lock").write_text("12345\n")
        assert str(run) in fault(take)
        assert (run / ".lock").read_text() == "12345\n", "the refused one must not overwrite the holder's number"
    finally:
        child.kill()
        child.communicate()
    assert take().strip().isdigit() and "12345" not in take()


def test_two_directories_do_not_lock_each_other(tmp_path: Path) -> None:
    with run_lock(tmp_path / "one"), run_lock(tmp_path / "two"):
        for name in ("one", "two"):
            with (tmp_path / name / ".lock").open("a") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_clean_sweeps_the_run_and_its_checkpoints(save: Save, run: Path) -> None:
    save(1)
    (run / "config.json.tmp-01234567").write_text("half")
    (run / "checkpoints" / "step-00000002.tmp-01234567").mkdir()
    clean(run)
    assert {p.name for p in run.iterdir()} == {"checkpoints"}
    assert steps(run) == [1] and len(list((run / "checkpoints").iterdir())) == 1
    clean(run / "never made")
