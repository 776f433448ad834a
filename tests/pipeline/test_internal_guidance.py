"""Internal guidance: the model's own second head takes the place of the unconditional output."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pipeline.models import MODEL, close, tiny, tiny_flow

from ldit.config.model import OriginalDiTConfig
from ldit.errors import RequestError
from ldit.rng import normal
from ldit.sampling.fast.options import InferenceOptions

TWO_HEADS = replace(MODEL, learn_sigma=False, n_layers=3, mid_layer=1)


def two_heads(**changes: Any) -> Any:
    return tiny_flow(model=replace(TWO_HEADS, **changes))


def test_by_hand() -> None:
    """Euler from noise: v = mid + w·(out - mid) inside the interval, out alone outside; no row is unconditional."""
    pipe = two_heads()
    x = normal((3, 8, 8), 7, "picture")[None]
    found = pipe.sample_latents(
        [2], seed=7, steps=4, solver="euler", guide="internal", guidance=1.4, guidance_interval=(0.4, 1.0)
    )
    for t in (1.0, 0.75, 0.5, 0.25):
        out, mid = pipe.model(x, torch.tensor([1000 * t]), torch.tensor([2]), mid=True)
        v = mid + 1.4 * (out - mid) if t >= 0.4 else out
        x = x - 0.25 * v
    assert close(found, x)
    (*_, done) = pipe.iterate([2], steps=4, solver="euler", guide="internal", guidance=1.4)
    assert (done.evaluations, done.guided_rows) == (4, 0)


@pytest.mark.parametrize("changes", [{}, {"class_dropout_prob": 0.0}, {"num_classes": 0}], ids=str)
def test_it_needs_no_null_class(changes: dict[str, Any]) -> None:
    pipe = two_heads(**changes)
    labels = [] if changes.get("num_classes") == 0 else [1]
    plain, guided = (pipe.sample_latents(labels, seed=1, steps=3, guide="internal", guidance=w) for w in (1.0, 2.0))
    assert (plain - guided).abs().max() > 1e-2
    assert close(plain, pipe.sample_latents(labels, seed=1, steps=3, guidance=1.0))


def test_with_every_copy_of_the_network() -> None:
    pipe = two_heads()
    wanted: dict[str, Any] = {"seed": 3, "steps": 3, "guide": "internal", "guidance": 1.5}
    expected = pipe.sample_latents([0, 1], **wanted)
    for inference in (None, InferenceOptions(packed=True)):
        pipe.inference, pipe._network = inference, None
        assert close(pipe.sample_latents([0, 1], **wanted), expected)


def test_a_model_without_a_second_head() -> None:
    original = OriginalDiTConfig(input_size=8, in_channels=3, hidden_size=32, depth=1, num_heads=2, num_classes=4)
    for pipe in (tiny_flow(), tiny(original)):  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=r"guide internal: the model has no second head \(model\.mid_layer\)"):
            pipe.sample_latents([0], guide="internal", guidance=2.0)
