"""Tables are made once for what they depend on, and a number of them is kept: those of the original DiT too."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ldit.config.model import OriginalDiTConfig
from ldit.nn import dit_original as baseline
from ldit.nn.build import build_model
from ldit.nn.rope import GridScale
from ldit.nn.tables import TableCache

CONFIG = OriginalDiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=4, num_classes=5)


def test_the_last_ones_are_kept() -> None:
    tables, made = TableCache(3), []

    def table(number: int) -> Tensor:
        def make() -> Tensor:
            made.append(number)
            return torch.tensor(number)

        return tables.get(("table", number), make)

    assert [int(table(number)) for number in (0, 1, 2, 0, 1, 2)] == [0, 1, 2, 0, 1, 2] and made == [0, 1, 2]
    assert int(table(3)) == 3 and len(tables) == 3
    for number in (1, 2, 3):
        table(number)
    assert made == [0, 1, 2, 3]
    table(0)
    assert made == [0, 1, 2, 3, 0] and len(tables) == 3


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The tables that are computed."""
    calls: list[tuple[Any, ...]] = []
    real = baseline.position_table

    def table(*given: Any) -> Tensor:
        calls.append(given)
        return real(*given)

    monkeypatch.setattr(baseline, "position_table", table)
    return calls


@torch.no_grad()
def test_positions_of_the_baseline(made: list[tuple[Any, ...]]) -> None:
    """By rows, columns, scaling and dtype; the stored one serves its own size."""
    model: Any = build_model(CONFIG)
    for p in model.parameters():
        p.copy_(torch.randn_like(p))
    t, y, grid = torch.ones(2), torch.zeros(2, dtype=torch.long), GridScale(rows=2.0, columns=2.0)
    made.clear()
    for turn in range(3):
        for height, width in ((8, 8), (8, 12), (12, 8)):
            x = torch.full((2, 4, height, width), float(turn))
            plain, scaled = model(x, t, y), model(x, t, y, grid=grid)
            if turn == 2:
                assert not torch.equal(plain, scaled)
                again = copy.deepcopy(model)
                again._tables = TableCache(8)
                assert torch.equal(again(x, t, y), plain) and torch.equal(again(x, t, y, grid=grid), scaled)
                del made[-2 if (height, width) != (8, 8) else -1 :]
    assert len(made) == len(set(made)) == 5
    model.to(torch.bfloat16)
    low = model(torch.zeros(2, 4, 8, 12, dtype=torch.bfloat16), t, y)
    assert low.dtype == torch.bfloat16 and len(made) == 6


@torch.no_grad()
def test_many_sizes_do_not_pile_up(made: list[tuple[Any, ...]]) -> None:
    model: Any = build_model(CONFIG)
    t, y = torch.ones(1), torch.zeros(1, dtype=torch.long)
    for side in range(2, 80, 2):
        model(torch.zeros(1, 4, 2, side), t, y)
    assert len(made) == 39 + 1 and len(model._tables) == 8  # the stored one was made with the model


def test_tables_made_in_inference_mode_serve_gradients(made: list[tuple[Any, ...]]) -> None:
    model: Any = build_model(CONFIG)
    x, t, y = torch.zeros(1, 4, 8, 12), torch.ones(1), torch.zeros(1, dtype=torch.long)
    with torch.inference_mode():
        model(x, t, y)
    model(x, t, y).sum().backward()
    assert model.x_embedder.proj.weight.grad is not None and len(made) == 2
