"""The original's sample.py: its defaults, whatever the checkpoint's own section says."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ldit.cli.original import sample as original_sample
from ldit.commands import sample as images
from ldit.config.spec import SamplingConfig

ITS_OWN = {
    "solver": "ddpm", "steps": "250", "guidance": 4.0, "guidance_interval": (0.0, 1.0), "grid": "uniform", "eta": 0.0,
    "guidance_schedule": "constant", "rope_scaling": "none", "proportional_attention": False,
    "diffusion": "sigma", "last_step": "tweedie", "tolerance": 1e-3,
}  # fmt: skip


def test_no_default_of_the_checkpoint_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key of a sampling section is stated; the guided channels are the three of its published grid."""
    jobs: list[Any] = []
    monkeypatch.setattr(images, "make_images", lambda job, published: jobs.append((job, published)) or [])
    assert original_sample.run(["--ckpt", str(tmp_path)]) == 0
    ((job, published),) = jobs
    assert {key: getattr(job, key) for key in ITS_OWN} == ITS_OWN and published
    assert {field.name for field in fields(SamplingConfig)} == {*ITS_OWN, "guidance_channels"}
