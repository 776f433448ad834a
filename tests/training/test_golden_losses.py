"""R4: fifty steps compute what they did when tests/golden/losses.json was written."""

import json

import pytest
from golden_losses import FILE, STEPS, losses, machine, recipes

# Sums in another order: instruction sets (none, AVX2, AVX512), thread counts and last bits of the starting weights move
# these losses by 1e-7 of themselves at most (measured, torch 2.13); one step's learning rate wrong moves them by 1e-4.
OTHER_MACHINES = 2e-6


@pytest.mark.parametrize("name", recipes())
def test_r4_losses_are_the_golden_ones(name: str) -> None:
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    found = losses(recipes()[name])
    assert len(found) == STEPS
    if machine() == golden["machine"]:
        assert found == golden["losses"][name]
    assert found == pytest.approx(golden["losses"][name], rel=OTHER_MACHINES)
