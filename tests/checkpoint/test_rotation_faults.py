"""Old steps and leftovers that cannot be removed: a warning or nothing, and what is committed stands."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import steps

from ldit.checkpoint.run import committed_steps, latest_valid_step, step_folder
from ldit.storage import manifest
from ldit.storage.atomic import committed, remove_leftovers

BUSY = os.strerror(errno.EBUSY)


def busy(real: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """`real`, refused for these names."""

    def call(path: Any, *rest: Any, **options: Any) -> Any:
        if Path(path).name in names:
            raise OSError(errno.EBUSY, BUSY, str(path))
        return real(path, *rest, **options)

    return call


def test_a_step_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_said: list[str]
) -> None:
    """The newer one is committed, the other old ones go, and the next rotation tries again."""
    for step in (1, 2):
        steps.save(tmp_path, step)
    old = step_folder(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", busy(os.rename, old.name))
        newest = steps.save(tmp_path, 3, keep=1)
    assert warnings_said == [f"step 1 could not be removed ({BUSY}): {old}"]
    assert committed_steps(tmp_path) == [(3, newest), (1, old)] and latest_valid_step(tmp_path) == (3, newest)
    assert steps.stands(newest, 3) and steps.stands(old, 1)
    steps.save(tmp_path, 4, keep=1)
    assert steps.names_in(tmp_path) == {"step-00000004"} and len(warnings_said) == 1


def test_a_step_half_removed_does_not_count_and_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_said: list[str]
) -> None:
    """A file that is held open where the disk is another machine's: not a word, and the sweep removes what is left."""
    steps.save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy(os.unlink, "model.safetensors"))
        steps.save(tmp_path, 2, keep=1)
    assert [step for step, _ in committed_steps(tmp_path)] == [2] and len(steps.names_in(tmp_path)) == 2
    remove_leftovers(tmp_path / "checkpoints")
    assert steps.names_in(tmp_path) == {"step-00000002"} and warnings_said == []


def test_the_sweep_passes_over_what_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a file that is held open stays until the next sweep; the others go, and what stands stays."""
    with committed(tmp_path / "final") as folder:
        (folder / "a").write_text("whole")
    for number in range(4):
        left = tmp_path / f"step-{number}.tmp-0123abcd"
        left.mkdir()
        (left / f"part-{number}").write_text("half")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy(os.unlink, "part-1"))
        remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"final", "step-1.tmp-0123abcd"}
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    manifest.verify(tmp_path / "final")


def test_a_leftover_that_is_gone_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed and then removed by someone else, file or folder."""
    (tmp_path / "config.json.tmp-0123abcd").write_text("half")
    (tmp_path / "final.tmp-0123abcd").mkdir()
    real = Path.iterdir

    def listed(folder: Path) -> Any:
        found = list(real(folder))
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", listed)
    remove_leftovers(tmp_path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
