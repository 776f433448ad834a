"""N1: a loss or gradient that is not finite is applied nowhere; the run skips, stops or goes back, as it was told."""

import json
import math
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from counts import count
from faults import KINDS, Fault, Faulty
from smallrun import Run, begin, numbers, same_bits, small, tensors, trainer, unequal
from torch import Tensor

from ldit.cli.main import guard
from ldit.config.run import RunConfig
from ldit.errors import RunError
from ldit.training.state import TrainState
from ldit.training.step import train_step
from ldit.training.trainer import Hook

STEPS, COMMITS = 7, 2
POLICIES = ("skip", "stop", "rollback")


@dataclass(frozen=True)
class Case:
    """One fault of row N1, all of it drawn from its number."""

    number: int

    @property
    def drawn(self) -> random.Random:
        return random.Random(self.number)

    @property
    def policy(self) -> str:
        return POLICIES[self.number % 3]

    @property
    def step(self) -> int:
        """The step that fails; a step before it is committed, and steps come after it."""
        return 3 + self.drawn.randrange(3)

    def config(self) -> RunConfig:
        values = {
            "train.precision": ("fp32", "bf16", "fp16")[self.number // 3 % 3],
            "optim.kind": ("adamw", "muon")[self.number // 2 % 2],
            "optim.weight_decay": 0.1,
            "ema.more": (0.9,),
            "ema.power": (0.05,),
            "guard.nonfinite": self.policy,
            "train.steps": STEPS,
            "train.checkpoint_every": COMMITS,
            "train.micro_batch_size": (4, None)[self.number // 5 % 2],
        }
        return small(values, flow=("", "v", "x0")[self.number // 7 % 3])

    def fault(self, batch_size: int) -> Fault:
        drawn = self.drawn
        drawn.randrange(3)
        value = drawn.choice([math.nan, math.inf, -math.inf])
        position = (self.step - 1) * batch_size + drawn.randrange(batch_size)
        return Fault(KINDS[self.number % 4], value, position, self.number)


def begun(case: Case, out: Path) -> tuple[Run, dict[int, dict[str, Tensor]]]:
    """A Trainer that will meet the case's fault, and a dictionary that fills with the state after every step."""
    config, seen = case.config(), {}

    def look(state: TrainState) -> None:
        seen[state.step] = tensors(state)

    task = partial(_task, fault=case.fault(config.train.batch_size))
    run = trainer(config, out, task, hooks=[Hook(1, look)])
    run.state.scaler.scale = 1.0  # smaller loss scales mend nothing here
    return run, seen


def _task(config: RunConfig, spec: Any, fault: Fault) -> Faulty:
    return Faulty(config, spec, fault)


@pytest.mark.parametrize("number", range(count(20, 100)))
def test_n1_a_fault_is_applied_nowhere(number: int, tmp_path: Path) -> None:
    case = Case(number)
    run, seen = begun(case, tmp_path)
    if case.policy == "stop":
        with pytest.raises(RunError) as error:
            run.trainer.fit()
        assert error.value.code == 1 and "\n" not in str(error.value) and f"step {case.step}:" in str(error.value)
        assert unequal(tensors(run.state), seen[case.step - 1]) == []
        assert run.state.updates == case.step - 1
        return
    run.trainer.fit()
    assert run.state.step == STEPS and run.state.guard.left_out == 0
    assert all(value.isfinite().all() for value in tensors(run.state).values())
    json.dumps(run.records, allow_nan=False)
    assert [r["step"] for r in run.records if "left_out" in r] == ([case.step] if case.policy == "skip" else [])
    if case.policy == "skip":
        skipped(case, run, seen)
    else:
        went_back(case, run, tmp_path)


def skipped(case: Case, run: Run, seen: dict[int, dict[str, Tensor]]) -> None:
    assert unequal(seen[case.step], seen[case.step - 1]) == []
    assert unequal(seen[case.step + 1], seen[case.step]) != []
    assert run.state.updates == STEPS - 1 and run.state.offset == 0
    record = run.records[case.step - 1]
    assert record["left_out"] == "nonfinite" and None in (record["loss"], record["grad_norm"])


def went_back(case: Case, run: Run, out: Path) -> None:
    """The data from the commit to the fault is passed over; the whole happens again in the same way."""
    size, commit = 8, (case.step - 1) // COMMITS * COMMITS
    before = [step * size for step in range(case.step)]
    passed = (case.step - commit) * size
    assert run.positions == before + [passed + step * size for step in range(commit, STEPS)]
    assert run.state.offset == passed and run.state.updates == STEPS
    again, _ = begun(case, out / "again")
    again.trainer.fit()
    assert unequal(tensors(again.state), tensors(run.state)) == [] and numbers(again.state) == numbers(run.state)
    assert [(r["step"], r["loss"]) for r in again.records] == [(r["step"], r["loss"]) for r in run.records]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_n1_the_very_first_step(kind: str) -> None:
    """Moments that do not stand yet are zero afterwards, and the next step is the first update."""
    config = small({"optim.kind": kind})
    state, task, loader = begin(config)
    first, second = loader.from_step(0, 2)
    fresh = tensors(state)
    assert train_step(state, Faulty(config, task.spec, Fault("loss", math.nan, 3)), first).fault == "nonfinite"
    assert unequal(tensors(state), fresh) == [] and (state.step, state.updates) == (1, 0)
    train_step(state, task, second)
    other, _, _ = begin(config)
    other.step = 1
    train_step(other, task, second)
    assert unequal(tensors(state), tensors(other)) == []


def test_n1_going_back_restores_the_commit(tmp_path: Path) -> None:
    """What stands when the first step after a rollback begins is the committed state, bit for bit."""
    case = Case(2)  # rollback
    run, _ = begun(case, tmp_path)
    restored = []
    original = run.trainer._roll_back

    def watched(told: str) -> None:
        original(told)
        restored.append((run.state.step, tensors(run.state)))

    run.trainer._roll_back = watched  # type: ignore[method-assign]
    kept: dict[int, dict[str, Tensor]] = {}
    run.trainer.hooks = [Hook(1, lambda state: kept.setdefault(state.step, tensors(state)) and None)]
    run.trainer.fit()
    ((step, found),) = restored
    assert step == (case.step - 1) // COMMITS * COMMITS and unequal(found, kept[step]) == []


def endless(policy: str, out: Path, limit: int = 2, first: int = 24) -> Run:
    """A run all of whose samples from position `first` on are faulty."""
    config = small({"guard.nonfinite": policy, "guard.limit": limit, "train.steps": 40, "train.checkpoint_every": 3})
    faults = [Fault("loss", math.nan, position) for position in range(first, 400)]
    return trainer(config, out, lambda config, spec: Faulty(config, spec, *faults))


def test_n1_rollbacks_end(tmp_path: Path) -> None:
    """With nothing but faults ahead, the run ends after `limit` rollbacks, each past more data."""
    run = endless("rollback", tmp_path)
    with pytest.raises(RunError, match="2 rollbacks already"):
        run.trainer.fit()
    assert run.positions == [0, 8, 16, 24, 32, 40]
    with pytest.raises(RunError, match="no committed step to go back to"):
        endless("rollback", tmp_path / "uncommitted", first=8).trainer.fit()


def test_n1_steps_left_out_in_a_row_end_the_run(tmp_path: Path) -> None:
    run = endless("skip", tmp_path)
    with pytest.raises(RunError, match="step 6:"):
        run.trainer.fit()
    assert run.state.guard.left_out == 3 and run.state.updates == 3


def test_n1_rollbacks_count_anew_after_a_commit(tmp_path: Path) -> None:
    """Two lone faults, a commit between them: with `limit` 1 the run goes on to its end."""
    config = small({"guard.nonfinite": "rollback", "guard.limit": 1, "train.steps": 8, "train.checkpoint_every": 2})
    faults = [Fault("loss", math.nan, 3 * 8), Fault("picture", math.nan, 8 * 8 + 1)]
    run = trainer(config, tmp_path, lambda config, spec: Faulty(config, spec, *faults))
    run.trainer.fit()
    assert run.state.step == run.state.updates == 8 and run.state.offset == 8 * (4 - 2) + 8 * (7 - 6)


def test_n1_a_stopped_run_exits_1_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = endless("stop", tmp_path)

    def command() -> int:
        run.trainer.fit()
        return 0

    assert guard(command) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("ldit: step 4:") and "guard.nonfinite" in said[0]


def test_same_bits_tells_zeros_apart() -> None:
    """The comparison of this row's tests."""
    from torch import tensor

    assert same_bits(tensor([math.nan]), tensor([math.nan])) and not same_bits(tensor([0.0]), tensor([-0.0]))
