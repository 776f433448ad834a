"""Row R2: a run goes on with another number of processes, or another way of sharing the work."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crash.processes import RUN, STEPS, Server, finished, losses, tensors, verify

pytestmark = [pytest.mark.crash, pytest.mark.timeout(900)]

# A world: number of processes, tensor-parallel ones, replicas; FSDP over the rest.
WORLDS = {"1": (1, 1, 1), "fsdp2": (2, 1, 1), "fsdp4": (4, 1, 1), "tp2": (2, 2, 1), "tp4": (4, 4, 1),
          "fsdp2xtp2": (4, 2, 1), "2xfsdp2": (4, 1, 2)}  # fmt: skip
PAIRS = [("1", "fsdp2"), ("fsdp2", "1"), ("fsdp2", "fsdp4"), ("fsdp4", "fsdp2"), ("1", "fsdp4"), ("fsdp4", "1"),
         ("1", "tp2"), ("tp2", "1"), ("fsdp2", "tp2"), ("tp4", "fsdp2xtp2"), ("fsdp2xtp2", "fsdp4"),
         ("tp2", "2xfsdp2")]  # fmt: skip

# Losses as in tests/distributed: sums in another order, off by 6e-8 each time, over 40 steps.
LOSS = 2e-6
# Distance of two states over the length of one. Each step rounds each weight once, half a unit of fp32 (6e-8), and
# AdamW's step, lr = 1e-3 against weights of about 0.1, carries on the relative error of its gradient. Measured over
# these pairs: 1.5e-7. A resume that forgets the optimiser's moments is off by more than a hundred times the bound.
WEIGHTS = 2e-6


def flags(world: str) -> list[str]:
    _, tp, replicate = WORLDS[world]
    return ["--parallel.tp", str(tp), "--parallel.replicate", str(replicate)]


def apart(left: Path, right: Path, stem: str) -> float:
    """Distance of two states, relative to the length of the first."""
    a, b = (
        torch.cat([t.double().flatten() for name, t in sorted(tensors(run).items()) if name.startswith(stem)])
        for run in (left, right)
    )
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["->".join(pair) for pair in PAIRS])
def test_r2_another_world_goes_on_alike(
    first: str, second: str, server: Server, undisturbed: Callable[[int], Path], tmp_path: Path
) -> None:
    """Half of the steps in one world, the rest in another: each step's loss is that of a single process that was never
    interrupted, so each step saw the same samples with the same noise; weights and averages end in the same place."""
    out = tmp_path / "run"
    argv = [*RUN, "--out", str(out)]
    finished(server, [*argv, *flags(first), "--train.steps", str(STEPS // 2)], tmp_path / "said", WORLDS[first][0])
    assert STEPS // 2 in verify(out)
    finished(server, [*argv, *flags(second)], tmp_path / "said", WORLDS[second][0])
    assert STEPS in verify(out)
    expected, found = losses(undisturbed(1)), losses(out)
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert max(abs(a - b) / b for (_, a), (_, b) in zip(found, expected, strict=True)) <= LOSS
    assert apart(undisturbed(1), out, "model:") <= WEIGHTS
    assert apart(undisturbed(1), out, "ema:") <= WEIGHTS
