"""Schedules of the guidance scale, and guidance by a weaker model."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldit.diffusion import Flow
from ldit.diffusion.process import Level
from ldit.errors import RequestError
from ldit.sampling.guidance import SCHEDULES, Guided, check_schedule

Y = torch.tensor([1, 2])


def at(noise_time: float) -> Level:
    return Level(1.0 - noise_time, noise_time, 1000 * noise_time, noise_time)


def constant(value: float, batches: list[int] | None = None) -> object:
    """A network of four channels, each `value` times the label."""

    def network(x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        if batches is not None:
            batches.append(len(x))
        return (value * y).view(-1, 1, 1, 1).float().expand(len(x), 4, 1, 1)

    return network


def guided(scale: float, **changes: object) -> Guided:
    return Guided(constant(1.0), Y, torch.tensor([9, 9]), scale, 3, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scale", [1.5, 4.0, 0.5])
def test_the_mean_is_the_scale(schedule: str, scale: float) -> None:
    """Midpoints of 1000 intervals: exact for straight lines and whole cosine waves, up to rounding."""
    g = guided(scale, schedule=schedule)
    weights = [g.scale_at((i + 0.5) / 1000) for i in range(1000)]
    assert math.fsum(weights) / 1000 == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_larger_towards_data(schedule: str) -> None:
    g = guided(4.0, schedule=schedule)
    weights = [g.scale_at(i / 100) for i in range(101)]
    assert all(a > b for a, b in pairwise(weights))
    assert weights[0] == 7.0 and weights[-1] == 1.0


def test_constant_is_the_scale_to_the_last_bit() -> None:
    assert guided(0.3).scale_at(0.5) == 0.3


def test_formulas() -> None:
    assert guided(3.0, schedule="linear").scale_at(0.25) == 4.0
    assert guided(3.0, schedule="cosine").scale_at(0.25) == pytest.approx(1 + 2 * (1 + math.sqrt(0.5)), rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, [2, 2, 2, 2]),
        ({"schedule": "linear"}, [0, 2, 2, 2]),
        ({"schedule": "cosine"}, [0, 2, 2, 2]),
        ({"interval": (0.2, 0.6)}, [0, 2, 2, 0]),
        ({"schedule": "linear", "interval": (0.5, 1.0)}, [0, 2, 0, 0]),
        ({"weak": constant(0.5)}, [2, 2, 2, 2]),
        ({"weak": constant(0.5), "schedule": "cosine", "interval": (0.2, 1.0)}, [0, 2, 2, 0]),
    ],
)
def test_rows_are_computed_where_they_count(changes: dict[str, object], rows: list[int]) -> None:
    """A schedule that ends at 1 needs no second row at pure noise."""
    batches: list[int] = []
    weak_batches: list[int] = []
    g = guided(3.0, **changes)
    g.network = constant(1.0, batches)  # type: ignore[assignment]
    if g.weak is not None:
        g.weak = constant(0.5, weak_batches)  # type: ignore[assignment]
    seen = []
    for noise_time in (1.0, 0.6, 0.3, 0.1):
        before = g.guided_rows
        g(torch.zeros(2, 4, 1, 1), at(noise_time))
        seen.append(g.guided_rows - before)
    assert seen == rows and g.evaluations == 4
    assert sum(batches) + sum(weak_batches) == 8 + sum(rows)


def test_a_weaker_model_guides() -> None:
    """weak + w·(strong - weak) with the same labels on both; channels beyond the guided ones are the strong model's."""
    g = guided(3.0, weak=constant(0.5))
    out = g(torch.zeros(2, 4, 1, 1), at(0.5))
    assert out[:, :3].flatten(1).tolist() == [[2.0] * 3, [4.0] * 3]  # 0.5·y + 3·(y - 0.5·y)
    assert out[:, 3].flatten().tolist() == [1.0, 2.0]


def test_a_weaker_model_needs_no_null_class() -> None:
    g = Guided(constant(1.0), Y, None, 2.0, 4, weak=constant(0.0))  # type: ignore[arg-type]
    assert g(torch.zeros(2, 4, 1, 1), at(0.5)).flatten(1).tolist() == [[2.0] * 4, [4.0] * 4]
    assert g.guided_rows == 2


def test_other_schedules_are_refused_by_name() -> None:
    with pytest.raises(RequestError, match="guidance_schedule: expected one of constant, linear, cosine, got 'sine'"):
        check_schedule("sine")


@pytest.mark.parametrize(
    ("interval", "rows"), [((0.0, 0.3), 3), ((0.2, 1.0), 9), ((0.1, 1.0), 10), ((0.1, 0.9), 9), ((0.35, 0.55), 2)]
)
def test_an_interval_that_ends_at_a_step_has_it(interval: tuple[float, float], rows: int) -> None:
    guided = Guided(lambda x, t, y: x, torch.tensor([1]), torch.tensor([2]), 2.0, 3, interval)
    for level in Flow().own_grid(str(10))[:-1]:
        guided(torch.zeros(1, 3, 1, 1), level)
    assert guided.guided_rows == rows


def test_what_a_grid_will_ask_for() -> None:
    """The null class where it guides alone; of a weaker model the conditions where it guides, and no null class."""
    levels = Flow().own_grid(str(4))[:-1]
    guided = Guided(lambda x, t, y: x, torch.tensor([3, 1, 3]), torch.tensor([9, 9, 9]), 2.0, 3, (0.5, 0.8))
    asked = [(1000.0, 3), (1000.0, 1), (750.0, 3), (750.0, 1), (750.0, 9), (500.0, 3), (500.0, 1), (500.0, 9)]
    assert guided.network_calls(levels) == [*asked, (250.0, 3), (250.0, 1)]
    guided.weak = guided.network
    assert guided.network_calls(levels) == [(t, y) for t in (1000.0, 750.0, 500.0, 250.0) for y in (3, 1)]
    assert guided.network_calls(levels, of_weak=True) == [(t, y) for t in (750.0, 500.0) for y in (3, 1)]
