"""The bundled model: whole, small, and it makes the images it is asked for."""

from pathlib import Path

import ldit
from ldit.checkpoint.open import open_source
from ldit.config.recipes.registry import recipe
from ldit.config.spec import ModelSpec


def test_the_bundled_model_is_its_recipes() -> None:
    source = open_source("emoji64-class-xs")
    source.verify()
    config = recipe("emoji64-class-xs")
    assert (source.spec.model, source.spec.process) == (config.model, config.process)
    assert source.spec.sampling == config.sampling
    assert source.spec.training == {"step": config.train.steps, "images": config.train.steps * config.train.batch_size}
    assert sum(f.stat().st_size for f in Path(source.path).iterdir()) <= 16_000_000


def test_it_draws() -> None:
    """Flags fill the width of the image with colour, symbols and smileys stand on white: cheap facts about most
    images that a network with scrambled weights does not reproduce."""
    pipe = ldit.load("emoji64-class-xs")
    assert isinstance(pipe.spec, ModelSpec)
    images = pipe(class_labels=["flags"] * 4 + ["smileys"] * 4, seed=0, steps=8, output_type="tensor")
    assert images.shape == (8, 3, 64, 64) and images.isfinite().all()
    flags, smileys = images.split(4)
    assert (smileys[:, :, :3, :3].mean(dim=(1, 2, 3)) > 0.8).sum() >= 3  # corners
    assert (smileys[:, :, 24:40, 24:40].mean(dim=(1, 2, 3)) < 0.7).sum() >= 3  # faces
    assert (flags[:, :, 28:36, 1:4].amin(dim=1).mean(dim=(1, 2)) < 0.3).sum() >= 3  # left edge, some colour low
