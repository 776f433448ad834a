"""The ladder's bookkeeping: what is run next, what a kill leaves, and the numbers of its table."""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import ladder  # noqa: E402
import ladder_measure  # noqa: E402
import ladder_points  # noqa: E402
import ladder_table  # noqa: E402
from ladder_arms import ARMS, ORDER, SIZES, TASKS, configured, training_flops  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))  # some scripts have the names of folders of tests

from ldit.config.run import RunConfig  # noqa: E402
from ldit.config.sections import ParallelConfig  # noqa: E402
from ldit.nn.build import parameter_count  # noqa: E402

TINY = replace(
    TASKS["emoji64"], name="tiny", side=16, patch=4, batch=4, steps=6, points=(2, 4, 6), dim=32, layers=3, heads=2
)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ladder_points, "RESULTS", tmp_path)
    return tmp_path / "ladder-tiny.jsonl"


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_sound_run(name: str) -> None:
    """And has the size of the others: the ladder compares recipes, not networks of other sizes."""
    arm, task = ARMS[name], TASKS["fashion"]
    config = configured(arm, task, "x", 1e-3, 0, task.steps)
    config.check()
    base = configured(ARMS["published"], task, "x", 1e-3, 0, task.steps)
    ratio = parameter_count(config.model) / parameter_count(base.model)
    assert (ratio < 0.3 or ratio > 3.5) if name in SIZES else 0.95 < ratio < 1.06
    assert training_flops(config, 2.0) > training_flops(config, 1.0) > 0
    assert name in [one for group in ORDER for one in group]


def row(arm: str, phase: str, rate: float, seed: int, steps: int, step: int, fd: float) -> dict[str, Any]:
    return {"arm": arm, "phase": phase, "rate": rate, "seed": seed, "steps": steps, "step": step, "images": step * 4,
            "fd_lite0": fd, "fd_classifier": fd / 10, "neighbours": 1.0, "heldout": 0.1}  # fmt: skip


def test_what_comes_next(results: Path) -> None:
    """The published recipe, then the tuning of the next arm, then its runs at the best rate; seeds within a group."""
    seen = []
    while (job := ladder.next_job(TINY, ["published", "cooldown"])) is not None:
        seen.append((job.arm.name, job.phase, job.rate, job.seed))
        for step in job.points:
            fd = abs(math.log(job.rate / 1e-3)) if job.phase == "tune" else 1.0
            ladder.append(TINY, row(job.arm.name, job.phase, job.rate, job.seed, job.steps, step, fd))
    assert seen == [
        ("published", "full", 1e-4, 0),
        *(("cooldown", "tune", rate, ladder_points.TUNING_SEED) for rate in ARMS["cooldown"].rates),
        ("cooldown", "full", 1e-3, 0),
        *((name, "full", rate, seed) for seed in (1, 2) for name, rate in (("published", 1e-4), ("cooldown", 1e-3))),
    ]
    # A line that was cut short counts as not measured, and the next one is not lost with it.
    lines = results.read_bytes()
    results.write_bytes(lines[:-5])
    again = ladder.next_job(TINY, ["published", "cooldown"])
    assert again is not None and (again.arm.name, again.seed) == ("cooldown", 2)
    ladder.append(TINY, json.loads(lines.splitlines()[-1]))
    assert ladder.next_job(TINY, ["published", "cooldown"]) is None


def test_a_grid_of_rates_grows_where_its_best_is_at_an_end(results: Path) -> None:
    seen = []
    while (job := ladder.next_job(TINY, ["cooldown"])) is not None and job.phase == "tune":
        seen.append(job.rate)
        fd = 1e9 if job.rate == 3e-2 else abs(math.log(job.rate / 1e-2))
        ladder.append(TINY, row("cooldown", "tune", job.rate, job.seed, job.steps, job.steps, fd))
    assert seen == [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert job is not None and (job.phase, job.rate) == ("full", 1e-2)


def test_costs_of_stages_and_routes() -> None:
    """A stage's images cost less than those after it; routed tokens and the second head count."""
    task = TASKS["fashion"]

    def flops(name: str, images: float) -> float:
        return training_flops(configured(ARMS[name], task, "x", 1e-3, 0, task.steps), images)

    stage = 1920 * 64  # 60 % of 3,200 steps
    assert flops("stages", stage) < 0.26 * flops("muon", stage)
    after = flops("stages", stage + 100) - flops("stages", stage)
    assert after == pytest.approx(flops("muon", 100))
    assert 0.7 < flops("route", 1) / flops("muon", 1) < 0.8  # half of the tokens skip three of six blocks
    assert 1.0 < flops("internal", 1) / flops("tokens", 1) < 1.02
    config = configured(ARMS["stages"], task, "x", 1e-3, 0, task.steps)
    assert ladder_table.training_seconds(config, [1000.0, 250.0], stage + 500) == pytest.approx(stage / 1000 + 2)


def test_a_kill_between_two_points(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rerun measures what is missing, and nothing twice; the images are of the steps that the points name."""

    class Judge:
        def __init__(self, *args: Any) -> None:
            self.seen: list[float] = []

        def floor(self) -> dict[str, float]:
            return {"fd_lite0": 0.5}

        def fingerprints(self) -> dict[str, str]:
            return {}

        def of_images(self, images: torch.Tensor) -> dict[str, float]:
            if killing and len(self.seen) == 2:
                raise KeyboardInterrupt
            self.seen.append(images.float().mean().item())
            return {"fd_lite0": self.seen[-1], "fd_classifier": 0.0}

    monkeypatch.setattr(ladder_measure, "Judge", Judge)
    monkeypatch.setattr(ladder_measure, "SAMPLES", 4)
    monkeypatch.setattr(ladder_measure, "SAMPLER", {"solver": "euler", "steps": 2, "guidance": 1.0})
    monkeypatch.setattr(ladder_points, "SEEDS", (0,))

    def quick(config: RunConfig) -> RunConfig:
        """Eager, in fp32, with an average that moves within six steps."""
        train = replace(config.train, precision="fp32", lr=1e-2)
        return replace(config, train=train, parallel=ParallelConfig(), ema=replace(config.ema, warmup=True))

    monkeypatch.setitem(ladder.ARMS, "published", replace(ARMS["published"], change=quick))
    args = argparse.Namespace(arms=["published"], data="", classifier=tmp_path, work=tmp_path / "work")
    killing = True
    with pytest.raises(KeyboardInterrupt):
        ladder.run(args, TINY)
    assert len(results.read_text().splitlines()) == 3  # real images, and two points
    killing = False
    ladder.run(args, TINY)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(one["phase"], one["step"]) for one in rows] == [("real", 0), ("full", 2), ("full", 4), ("full", 6)]
    assert len({one["fd_lite0"] for one in rows[1:]}) == 3, "each point has images of its own"
    assert all(one["heldout"] > 0 for one in rows[1:]) and not list((tmp_path / "work").glob("tiny-*"))
    ladder.run(args, TINY)
    assert len(results.read_text().splitlines()) == 4


def test_images_that_are_needed() -> None:
    """Between two points by log-linear interpolation; the first point may be good enough; others never are."""
    curve = [(100.0, 50.0), (400.0, 30.0), (1600.0, 10.0)]
    assert ladder_table.needed(curve, 40.0) == (pytest.approx(200.0), False)
    assert ladder_table.needed(curve, 20.0) == (pytest.approx(800.0), False)
    assert ladder_table.needed(curve, 60.0) == (100.0, True)
    assert ladder_table.needed(curve, 9.0) is None


def test_the_table_is_made_of_the_file_alone(results: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for seed in (0, 1):
        for step, fd in ((2, 50.0), (4, 30.0), (6, 10.0 + seed)):
            ladder.append(TINY, row("published", "full", 1e-4, seed, 6, step, fd))
            ladder.append(TINY, row("cooldown", "full", 1e-3, seed, 6, step, fd - 20))
    ladder.append(TINY, row("cooldown", "tune", 1e-3, 100, 2, 2, 7.0))
    files = {"markdown": tmp_path / "table.md", "figure": tmp_path / "curves.png"}
    args = argparse.Namespace(arms=["published", "cooldown"], **files)
    ladder.table(args, TINY)
    assert Image.open(tmp_path / "curves.png").size[0] > 1000
    text = (tmp_path / "table.md").read_text()
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert "| published | 0.0001 | 2 | 10.5 ± 0.7 | 1.05 ± 0.07 |" in text
    # Seed 0 reaches 10 at step 4, of 6 that the published recipe took; seed 1 reaches 11 a little before.
    assert "| published | 1.0 ± 0.0x |" in text and "| cooldown | 1.5 ± 0.0x |" in text
    assert "- cooldown: 0.001: 7.0 (the best is at an end of the grid)" in text
