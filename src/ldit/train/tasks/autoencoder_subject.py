"""An autoencoder to be trained: its reconstructions along the way, and the statistics of its latents."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ldit.codecs.pixels import labelled_grid, to_pil, to_uint8
from ldit.config.autoencoder import AutoencoderRun, AutoencoderSpec
from ldit.config.kinds import AnySpec
from ldit.data.latent_cache.reader import LatentSamples
from ldit.data.loader import load_batch
from ldit.data.samples import Samples
from ldit.errors import DataError
from ldit.log import logger
from ldit.parallel.world import World
from ldit.precision import COMPUTE
from ldit.train.hooks import heldout_hook, save_grid, tell
from ldit.train.step import TrainState, fill_fresh
from ldit.train.tasks.autoencoder import AutoencoderTask
from ldit.train.tasks.subject import Surroundings
from ldit.train.trainer import Hook

SHOWN = 12


class AutoencoderSubject:
    """See `ldit.train.tasks.subject.Subject`."""

    flops_per_image = 0.0

    def __init__(self, config: AutoencoderRun, out: Path, data: Samples, world: World) -> None:
        if isinstance(data, LatentSamples):
            raise DataError(f"data.path: {data.root} holds latents, an autoencoder is trained on images")
        self.config, self.out = config, out
        self.task = AutoencoderTask(config, AutoencoderSpec(config.model))
        self.parameters = world.run_on_all(lambda: sum(p.numel() for p in self.task.network().parameters()))

    def describe(self) -> str:
        model, side = self.config.model, self.config.data.image_size // self.config.model.factor
        return f"{self.parameters:,} parameters, latents {model.latent_channels} x {side} x {side}"

    def record(self) -> dict[str, str]:
        """Nothing."""
        return {}

    def begin(self, state: TrainState) -> None:
        """Fresh weights."""
        state.world.run_on_all(lambda: fill_fresh(state, self.task))

    def resumed(self, spec: AnySpec) -> None:
        """The latents' statistics, which commits carry until they are measured again."""
        assert isinstance(spec, AutoencoderSpec)
        self.task.spec = replace(self.task.spec, latents=spec.latents)

    def hooks(self, around: Surroundings) -> list[Hook]:
        """Held-out quality and the latents' statistics, of training images where none are kept from training; pairs
        of images."""
        heldout, shown = self.config.heldout, around.heldout
        if shown is None:
            logger.info("no held-out images: psnr is measured on training images")
            shown = around.data
        measure = heldout_hook(self.task, shown, heldout.num, around)

        def run(state: TrainState) -> dict[str, float]:
            values = measure(state)
            if values:  # none where heldout.num is 0 or no image could be read
                self.task.conclude(values)
            return values

        pairs = reconstruction_hook(self.task, shown, self.out, around)
        return [Hook(heldout.every, run), Hook(self.config.train.sample_every, pairs)]


def reconstruction_hook(
    task: AutoencoderTask, data: Samples, out: Path, around: Surroundings
) -> Callable[[TrainState], None]:
    """Images above what the EMA weights make of them: RUN/samples/step-….png. With data.bad "skip" those that cannot
    be read are not shown, and made known."""
    count = min(SHOWN, len(data))
    indices = [i * len(data) // count for i in range(count)]

    def run(state: TrainState) -> None:
        dtype, device = COMPUTE[state.config.train.precision], state.world.device
        batch = load_batch(data, range(len(indices)), indices, None, state.config.data.bad)
        tell(batch.faults, data, around, state)
        # Every process takes part in the pass; one that can show nothing does it on zeros.
        batch = batch.readable() if any(batch.sound) else batch
        with state.weights.showing(state.averages.main) as model, torch.no_grad():
            noise = torch.zeros_like(task.noise(batch, device))
            found = model(batch.inputs.to(device, dtype), noise.to(dtype)).images.float().cpu()
        if state.world.is_main and not batch.faults:
            both = torch.stack([batch.inputs, found], dim=1).flatten(0, 1)
            grid = labelled_grid(to_pil(to_uint8(both)), ["image", "reconstruction"] * len(batch), columns=8, scale=2)
            save_grid(out, state.step, grid)

    return run
