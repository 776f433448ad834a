"""C6: one flipped bit in any file of a step is always found, and the step before takes its place, loudly."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import steps
from counts import count

from ldit.checkpoint.open import Source, open_source
from ldit.checkpoint.run import latest_valid_step, step_folder
from ldit.errors import SourceError


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 1 and 2; every case mends what it damages."""
    run = tmp_path_factory.mktemp("flips") / "run"
    for step in (1, 2):
        steps.save(run, step)
    return run


def opened(run: Path, ema: bool) -> Source:
    """The run as a source whose weights were all read."""
    source = open_source(run, ema=ema)
    for _ in source.tensors(ema):
        pass
    return source


@pytest.mark.parametrize("case", range(count(50, 1000)))
def test_c6_a_flipped_bit_is_found(
    two: Path, case: int, flip: Callable[[Path, int], None], warnings_said: list[str]
) -> None:
    rng = random.Random(case)
    name = rng.choice(steps.FILES)
    path = step_folder(two, 2) / name
    bit = rng.randrange(8 * path.stat().st_size)
    where = f"bit {bit} of {name}"
    flip(path, bit)
    try:
        assert latest_valid_step(two) == (1, step_folder(two, 1)), where
        assert len(warnings_said) == 1 and "step 2" in warnings_said[0] and str(path) in warnings_said[0], where
        for ema, read in ((True, "ema.safetensors"), (False, "model.safetensors")):
            warnings_said.clear()
            fell_back = name in ("config.json", "manifest.json", read)
            assert opened(two, ema).path == step_folder(two, 1 if fell_back else 2), where
            assert len(warnings_said) == fell_back and all(str(path) in said for said in warnings_said), where
        with pytest.raises(SourceError, match=path.name):
            open_source(step_folder(two, 2)).verify()
    finally:
        flip(path, bit)


def test_c6_the_cases_mend_what_they_damage(two: Path, warnings_said: list[str]) -> None:
    """Otherwise the first of them would answer for all."""
    assert latest_valid_step(two) == (2, step_folder(two, 2)) and warnings_said == []
    assert steps.stands(step_folder(two, 2), 2) and steps.stands(step_folder(two, 1), 1)
