"""Images of other sizes through the pipeline."""

from typing import Any

import pytest
import torch

import ldit
from ldit.errors import RequestError
from ldit.pipeline.load import Pipeline


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return ldit.load("emoji64-class-xs")


def latents(pipe: Pipeline, **options: Any) -> torch.Tensor:
    return pipe.sample_latents([1, 3], steps=2, solver="euler", **options)


def test_scaling_is_for_other_sizes(pipe: Pipeline) -> None:
    """At 64 x 64 nothing changes; at 64 x 96 every scaling is another image."""
    assert torch.equal(latents(pipe, rope_scaling="time-aware", proportional_attention=True), latents(pipe))
    wide = {"height": 64, "width": 96}
    made = [latents(pipe, rope_scaling=name, **wide) for name in ("none", "linear", "ntk", "time-aware")]
    made.append(latents(pipe, rope_scaling="none", proportional_attention=True, **wide))
    assert all(z.shape == (2, 3, 64, 96) and z.isfinite().all() for z in made)
    assert all(not torch.equal(a, b) for i, a in enumerate(made) for b in made[:i])


def test_the_guide_is_placed_as_the_model_is(pipe: Pipeline) -> None:
    """Autoguidance by the model itself is the model: u + w·(c - u) = c only if both stand at the same positions."""
    wide = {"height": 64, "width": 96, "rope_scaling": "time-aware"}
    guided = latents(pipe, guide=pipe, guidance=3.0, **wide)
    assert (guided - latents(pipe, guidance=1.0, **wide)).abs().max() <= 1e-5


def test_an_unknown_scaling(pipe: Pipeline) -> None:
    with pytest.raises(RequestError, match="rope_scaling: expected none, linear, ntk or time-aware, got 'yarn'"):
        pipe([0], rope_scaling="yarn")
