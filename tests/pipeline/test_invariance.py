"""Image k is a function of its seed (its label, its image to start from): batch size, order and company change
rounding at most, whatever the solver."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline.models import close, tiny, tiny_flow
from torch import Tensor

from ldit.pipeline.load import Pipeline
from ldit.sampling.fast.conditioning_cache import ModulationCache, Pair
from ldit.sampling.solvers import ADAPTIVE, SOLVERS

LABELS = [0, 1, 2, 3, 1]
SEEDS = [10, 11, 7, 40, 2]
ORDER = [3, 0, 4, 1, 2]


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8))


IMAGES = [image(seed) for seed in range(5)]
CASES: dict[str, dict[str, Any]] = {
    **{solver: {"solver": solver} for solver in (*SOLVERS, ADAPTIVE)},
    "SiT's last step": {"solver": "euler-maruyama", "last_step": "mean:0.1"},
    "ddim of eta 1": {"solver": "ddim", "eta": 1.0},
    "schedule": {"guidance_schedule": "cosine"},
    "init image": {"init_image": IMAGES, "strength": 0.7},
    "one init image": {"init_image": IMAGES[0], "strength": 0.7, "solver": "dpm++2m-sde"},
    "guide": {},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [tiny, tiny_flow])
def test_a_image_depends_on_its_seed_alone(make: Callable[..., Pipeline], case: str) -> None:
    pipe = make()
    options: dict[str, Any] = {"steps": 4, **CASES[case]}
    if case == "guide":
        options["guide"] = make(weights=1)

    def sample(rows: list[int], size: int = 16) -> torch.Tensor:
        chosen = dict(options)
        if isinstance(options.get("init_image"), list):
            chosen["init_image"] = [IMAGES[row] for row in rows]
        labels, seeds = [LABELS[row] for row in rows], [SEEDS[row] for row in rows]
        return pipe.sample_latents(labels, seeds=seeds, batch_size=size, **chosen)

    whole = sample(list(range(5)))
    assert whole.isfinite().all()
    assert torch.equal(sample(list(range(5))), whole)
    for size in (1, 2):
        assert close(sample(list(range(5)), size), whole)
    turned = sample(ORDER)  # the same batch shape: the same bits
    assert all(torch.equal(turned[i], whole[row]) for i, row in enumerate(ORDER))
    alone = sample([2])
    assert close(alone[0], whole[2])
    halves = torch.cat([sample([0, 1, 2]), sample([3, 4])])  # as two processes would share the work
    assert close(halves, whole)
    assert not close(pipe.sample_latents([LABELS[2]], seeds=[99], **{**options, **_one(options)})[0], whole[2])


def _one(options: dict[str, Any]) -> dict[str, Any]:
    return {"init_image": IMAGES[2]} if isinstance(options.get("init_image"), list) else {}


def test_conditioning_is_made_once_for_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all steps together, for batches with the same labels; the null class where it guides alone."""
    made: list[int] = []
    real = ModulationCache.rows

    def rows(self: ModulationCache, pairs: Sequence[Pair]) -> Tensor:
        made.append(len(pairs))
        return real(self, pairs)

    monkeypatch.setattr(ModulationCache, "rows", rows)
    pipe = tiny_flow()
    options = {"steps": 4, "solver": "euler", "batch_size": 2}
    pipe.sample_latents([1, 2, 1, 2], guidance_interval=(0.4, 0.8), **options)
    assert made == [4 * 2 + 2]  # two labels at 1, .75, .5, .25; null at .75 and .5
    pipe.sample_latents([1, 2], guidance=1, **options)
    assert made == [10, 8]
    with torch.no_grad():  # weights changed in place are seen by the next request
        pipe.model.final_layer.adaLN_modulation[1].bias.add_(1.0)
    changed = pipe.sample_latents([1, 2], guidance=1, **options)
    pipe.inference = None
    assert made == [10, 8, 8] and close(changed, pipe.sample_latents([1, 2], guidance=1, **options))
