"""C3: a process that dies at any call of a save leaves the old step or the new one, never neither, and no litter."""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import steps
from calls import counted, in_child

from ldit.checkpoint.run import clean, latest_valid_step, step_folder

DIED = 7


def next_step(run: Path) -> None:
    """Step 3 beside 1 and 2: when it stands, rotation takes 1 and `keep_every` holds 2."""
    steps.save(run, 3, keep=1, keep_every=2)


def same_step(run: Path) -> None:
    """Step 1 once more with other numbers, as after a fall back behind it."""
    steps.save(run, 1, salt=1)


def dies_at(number: int, half: bool) -> Callable[[int, str], float | None]:
    """End the process, as SIGKILL would, at this call: before it, or for a write after half of its bytes."""

    def act(count: int, name: str) -> float | None:
        if count != number:
            return None
        if half and name == "write":
            return 0.5
        os._exit(DIED)

    return act


def disturbed(save: Callable[[Path], None], run: Path, act: Callable[[int, str], float | None]) -> int:
    with counted(act):
        save(run)
    return 0


def calls_of(save: Callable[[Path], None], run: Path) -> list[str]:
    """The calls of a save that nothing disturbs."""
    with counted() as calls:
        save(run)
    return calls.made


@pytest.mark.parametrize(
    ("save", "before", "after"),
    [
        (next_step, [(1, 0), (2, 0)], (3, 0)),
        (same_step, [(1, 0)], (1, 1)),
    ],
    ids=["next step", "same step"],
)
def test_c3_death_at_every_call(
    tmp_path: Path, save: Callable[[Path], None], before: list[tuple[int, int]], after: tuple[int, int]
) -> None:
    start = tmp_path / "start"
    start.mkdir()
    for step, salt in before:
        steps.save(start, step, salt)
    made = calls_of(save, Path(shutil.copytree(start, tmp_path / "dry")))
    assert {"open", "write", "fsync", "rename", "mkdir"} <= set(made)
    print(f"{len(made)} calls: {', '.join(f'{made.count(name)} {name}' for name in sorted(set(made)))}")
    outcomes = []
    for number, name in enumerate(made, 1):
        for half in (False, True) if name == "write" else (False,):
            run = Path(shutil.copytree(start, tmp_path / "run"))
            status = in_child(functools.partial(disturbed, save, run, dies_at(number, half)))
            assert status == DIED, f"call {number}, {name}"
            outcomes.append(what_stands(run, before, after, f"call {number}, {name}"))
            shutil.rmtree(run)
    changed = outcomes.index("new")
    assert set(outcomes[:changed]) == {"old"} and set(outcomes[changed:]) == {"new"}


def what_stands(run: Path, before: list[tuple[int, int]], after: tuple[int, int], where: str) -> str:
    """ "old" or "new": every step in the folder is whole, the newest of them counts, and nothing else is there."""
    clean(run)
    newest = latest_valid_step(run)
    assert newest is not None, f"{where}: neither old nor new"
    found = {int(name.removeprefix("step-")) for name in steps.names_in(run)}
    written = [*before, after]
    for number in found:
        salts = [salt for step, salt in written if step == number]
        assert any(steps.stands(step_folder(run, number), number, salt) for salt in salts), f"{where}: step {number}"
    assert newest[0] == max(found), where
    if newest[0] == after[0] and steps.stands(newest[1], *after):
        return "new"
    assert found == {step for step, _ in before}, f"{where}: an old step went before the new one stood"
    return "old"
