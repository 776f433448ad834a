"""A recipe and a data set of the user's own, in a file: killed and resumed, on one and two processes, with the losses
of an undisturbed run."""

import signal
from pathlib import Path

import pytest
from crash.processes import PATIENCE, Job, Server, finished, losses, until, verify

from ldit.checkpoint.run import committed_steps

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]

LOSS = 2e-6  # relative: sums in another order, as in test_r2_worlds
OWN = '''
import hashlib
from dataclasses import replace

import numpy as np

import ldit
from ldit.config.recipes.registry import diffusion_recipe


class Stripes:
    """Horizontal and vertical stripes of random phase."""

    names = ("horizontal", "vertical")

    def __len__(self):
        return 40

    def fingerprint(self):
        return hashlib.sha256(b"stripes 1").hexdigest()

    def read(self, index):
        phase = np.random.default_rng(index).uniform(0, 6)
        wave = 127 + 120 * np.sin(np.arange(20)[:, None] * 1.3 + phase) * np.ones((20, 24))
        image = wave if index % 2 == 0 else wave.T[:20, :20]
        return np.repeat(image[:, :, None], 3, axis=2).astype(np.uint8), index % 2


def recipe():
    config = diffusion_recipe("tiny-cpu")
    train = replace(
        config.train, steps=12, batch_size=12, checkpoint_every=4, log_every=1, sample_every=0, attention_every=0
    )
    config = replace(config, model=replace(config.model, num_classes=2), train=train)
    return ldit.Experiment(config=config, data=Stripes())
'''


@pytest.mark.parametrize("size", [1, 2])
def test_a_recipe_of_ones_own_resumes_after_a_kill(size: int, server: Server, tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(OWN)
    command = ["train", str(tmp_path / "my.py:recipe"), "--out"]
    finished(server, [*command, str(tmp_path / "undisturbed")], tmp_path / "said")
    out = tmp_path / "run"
    # Killed after its first checkpoint, wherever it is then.
    with Job(server, [*command, str(out)], tmp_path / "said", size) as job:
        until(lambda: bool(committed_steps(out)), PATIENCE, job.said)
        for rank in job.ranks:
            rank.send(signal.SIGKILL)
        job.wait()
    steps = verify(out)
    assert steps and steps[0] < 12
    # The same command again.
    finished(server, [*command, str(out)], tmp_path / "said", size)
    assert verify(out)[0] == 12
    expected, found = losses(tmp_path / "undisturbed"), losses(out)
    assert [step for step, _ in found] == [step for step, _ in expected] == list(range(1, 13))
    if size == 1:
        assert found == expected
    assert max(abs(a - b) / b for (_, a), (_, b) in zip(found, expected, strict=True)) <= LOSS
