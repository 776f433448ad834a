"""What a run looks at beside its steps, where images cannot be read."""

import json
from pathlib import Path

import pytest
from folders import make_folder, over, said
from smallrun import ALONE, Images, begin, changed, small

from ldit.commands.train import run as train
from ldit.data.batch import Fault
from ldit.errors import DataError
from ldit.parallel.watchdog import Watchdog
from ldit.training.hooks import attention_hook, heldout_hook
from ldit.training.tasks.task import HookContext


class Broken(Images):
    """Images of which some cannot be read; `asked` has every index that was tried."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__(12)
        self.bad, self.asked = bad, []

    def __getitem__(self, index):
        self.asked.append(index)
        if index in self.bad:
            raise DataError(f"cannot read image {self.where(index)}: broken")
        return super().__getitem__(index)


def around(data: Images, heldout: Images | None) -> tuple[HookContext, list[tuple[list[Fault], int]]]:
    told: list[tuple[list[Fault], int]] = []
    place = HookContext(
        Path(), ALONE, data, heldout, Watchdog(ALONE, 60.0), lambda faults, step: told.append((faults, step))
    )
    return place, told


@pytest.mark.parametrize("kept", [True, False])
def test_bad_held_out_images_are_made_known(kept: bool) -> None:
    """By their names, marked where they are kept from training; the others are measured."""
    state, task, _ = begin(small({"data.bad": "skip"}))
    state.step = 5
    data = Broken({3, 7})
    place, told = around(Images() if kept else data, data if kept else None)
    values = heldout_hook(task, data, 12, place)(state)
    mark = "held-out " if kept else ""
    ((faults, step),) = told
    assert step == 5 and [fault.where for fault in faults] == [f"{mark}image 3", f"{mark}image 7"]
    assert all("broken" in fault.reason for fault in faults) and values["eps_mse"] > 0
    place, told = around(data, None)
    heldout_hook(task, Broken(set()), 12, place)(state)
    assert told == []


def test_nothing_to_measure_is_said() -> None:
    state, task, _ = begin(small({"data.bad": "skip"}))
    data = Broken(set(range(12)))
    place, told = around(Images(), data)
    with said() as lines:
        assert heldout_hook(task, data, 4, place)(state) == {}
    assert lines == ["step 0: no held-out value: none of the 4 images can be read"] and len(told[0][0]) == 4


def test_a_run_records_them_once(tmp_path: Path) -> None:
    """Over all measurements, and a resume."""
    data = make_folder(tmp_path / "data")
    (data / "heldout.txt").write_text("a/0.png\na/1.png\nb/0.png\n")
    (data / "a/1.png").write_bytes(b"no picture")
    config = over(data, {"data.bad": "skip", "data.heldout": None, "heldout.every": 1, "heldout.num": 3})
    for steps in (2, 4):
        assert train(changed(config, {"train.steps": steps}), tmp_path / "run") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert [(line["where"], line["step"]) for line in lines] == [("held-out a/1.png", 1)]
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all("eps_mse" in record for record in records)


def test_images_for_attention_are_read_when_it_is_looked_at() -> None:
    state, task, _ = begin(small())
    data = Broken(set())
    hook = attention_hook(task, data)
    assert data.asked == []
    first, asked = hook(state), list(data.asked)
    assert hook(state) == first and data.asked == asked != []
