"""The ladder's runs and measured points: which there are, and what comes next."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from json_lines import append_line, read_lines
from ladder_arms import ARMS, ORDER, Arm, Task, configured

from ldit.config.run import RunConfig

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
TUNING_SEED = 100
LADDER_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
MOST_FURTHER = 2


@dataclass(frozen=True)
class Job:
    """One run: an arm at a learning rate. `phase` is "tune" (a third of the budget, measured at its end) or "full"."""

    task: Task
    arm: Arm
    phase: str
    rate: float
    seed: int

    @property
    def steps(self) -> int:
        return self.task.tuning_steps if self.phase == "tune" else self.task.steps

    @property
    def points(self) -> tuple[int, ...]:
        return (self.steps,) if self.phase == "tune" else self.task.points

    @property
    def name(self) -> str:
        return f"{self.task.name}-{self.arm.name}-{self.phase}-{self.rate:g}-{self.seed}"

    def config(self, path: str) -> RunConfig:
        return configured(self.arm, self.task, path, self.rate, self.seed, self.steps)

    def key(self, step: int) -> tuple[Any, ...]:
        return (self.arm.name, self.phase, self.rate, self.seed, self.steps, step)


def results_file(task: Task) -> Path:
    return RESULTS / f"ladder-{task.name}.jsonl"


def read_points(task: Task) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The measured points by their key."""
    rows = read_lines(results_file(task))
    return {tuple(row[name] for name in ("arm", "phase", "rate", "seed", "steps", "step")): row for row in rows}


def tuned_rate(arm: Arm, task: Task, points: dict[tuple[Any, ...], dict[str, Any]]) -> float | None:
    """The rate with the lowest Fréchet distance in Lite0's features at the end of tuning; None until all are in."""
    if len(arm.rates) == 1:
        return arm.rates[0]
    jobs = tuning(arm, task, points)
    rows = [points.get(job.key(job.steps)) for job in jobs]
    return None if None in rows else min((row for row in rows if row), key=lambda row: row["fd_lite0"])["rate"]


def tuning(arm: Arm, task: Task, points: dict[tuple[Any, ...], dict[str, Any]]) -> list[Job]:
    """The tuning runs of an arm. While the best rate is at an end of the grid, the grid grows there, twice at most."""
    rates = list(arm.rates)
    for _ in range(MOST_FURTHER):
        jobs = [Job(task, arm, "tune", rate, TUNING_SEED) for rate in rates]
        rows = [points.get(job.key(job.steps)) for job in jobs]
        if None in rows:
            return jobs
        best = min((row for row in rows if row), key=lambda row: row["fd_lite0"])["rate"]
        if best not in (min(rates), max(rates)):
            return jobs
        place = LADDER_RATES.index(best) + (1 if best == max(rates) else -1)
        if not 0 <= place < len(LADDER_RATES):
            return jobs
        rates.append(LADDER_RATES[place])
    return [Job(task, arm, "tune", rate, TUNING_SEED) for rate in rates]


def next_job(task: Task, arms: list[str]) -> Job | None:
    """The first run that is not complete: by groups, and in those one seed of every arm before the next seed."""
    points = read_points(task)
    for group in ORDER:
        for seed, name in product(SEEDS, (name for name in group if name in arms)):
            arm = ARMS[name]
            source = ARMS[arm.rates_of] if arm.rates_of else arm
            tunes = tuning(source, task, points) if len(source.rates) > 1 else []
            rate = tuned_rate(source, task, points)
            full = [] if rate is None else [Job(task, arm, "full", rate, seed)]
            for job in (*tunes, *full):
                if any(job.key(step) not in points for step in job.points):
                    return job
    return None


def append(task: Task, row: dict[str, Any]) -> None:
    append_line(results_file(task), row)
