"""`ldit bench train`: speed of the training step on random latents, in several variants.

"original" is the step of the original code (eager blocks, loops over tensors, `.item()` on the loss after every
micro-batch). "fused" is ours (fused optimiser, foreach clip and average, one synchronisation a step). "compiled" is
ours with compiled blocks. All train the same network on the same numbers, so their first losses must agree.
"""

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ldit.bench.ceiling import device_name, matrix_ceiling, open_device, timed
from ldit.config.model import TextModelConfig
from ldit.config.recipes.registry import diffusion_recipe
from ldit.config.requests.bench import VARIANTS, BenchTrainRequest
from ldit.config.run import RunConfig
from ldit.config.sections import Precision
from ldit.config.spec import ModelSpec
from ldit.data.batch import Batch
from ldit.errors import ConfigError
from ldit.log import logger
from ldit.nn.build import forward_flops, parameter_count
from ldit.parallel.world import World
from ldit.precision import COMPUTE, products
from ldit.rng import generator
from ldit.storage.manifest import check_not_in_checkpoint
from ldit.training.optim import learning_rate
from ldit.training.state import TrainState
from ldit.training.step import new_state, train_step
from ldit.training.tasks.diffusion import DiffusionTask
from ldit.training.telemetry import peak_flops, peak_memory
from ldit.training.update import update_for
from ldit.version import __version__

RECIPES = {"tiny": "tiny-cpu", "600m": "imagenet256-600m", "3b": "imagenet256-3b", "7b": "imagenet256-7b"}
AGREEMENT = 2e-2  # relative tolerance of the first loss: bf16 sums in another order
CLIP, DECAY = 2.0, 0.9999  # largest gradient norm; decay of the EMA


def check_report(file: Path) -> None:
    """ConfigError if the report cannot be written to `file`; called before anything is measured."""
    check_not_in_checkpoint(file)
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--json: no folder {file.absolute().parent}")


def bench_train(job: BenchTrainRequest) -> dict[str, Any]:
    """Measure every variant; returns the report.

    Each has images/s (median and range of rounds), FLOP/s, MFU, share of the measured matrix ceiling, and peak memory;
    or "fits": false if memory runs out; "micro_batch" is what was used. ConfigError names a flag that is not supported.
    """
    if job.size not in RECIPES:
        raise ConfigError(f"--size: expected one of {', '.join(RECIPES)}, got {job.size!r}")
    if not job.variants:
        raise ConfigError(f"--variants: name at least one of {', '.join(VARIANTS)}")
    device = open_device(job.device)
    with products(job.precision):
        return _report(job, device)


def _report(job: BenchTrainRequest, device: torch.device) -> dict[str, Any]:
    config = bench_config(RECIPES[job.size], job.batch, job.precision, job.micro)
    config = replace(
        config,
        parallel=replace(config.parallel, recompute=job.recompute),
        optim=replace(config.optim, kind="muon" if job.muon else "adamw", moments=job.moments),
        ema=replace(config.ema, host=job.host_ema),
    )
    # FLOPs of an image in a training step, and the most that the device can do.
    flops = 3.0 * forward_flops(config.model, config.model.input_size, config.model.input_size)
    ceiling = matrix_ceiling(device, COMPUTE[job.precision])
    peak = peak_flops(World(device), job.precision)
    variants: list[dict[str, Any]] = []
    for name in job.variants:
        row = _fitted(name, config, job, device)
        # Compare it with the ceiling and the datasheet, and its loss with that of the first variant.
        if row["fits"]:
            rate = row["images_per_second"]
            row |= {"tflops": rate * flops / 1e12}
            row |= {"of_ceiling": rate * flops / ceiling} if ceiling else {}
            row |= {"mfu": rate * flops / peak} if peak else {}
            first = next((r["first_loss"] for r in variants if r["fits"]), row["first_loss"])
            row["agrees"] = abs(row["first_loss"] - first) <= AGREEMENT * abs(first)
        logger.info("%s", json.dumps(row))
        variants.append(row)
        _free(device)
    return {
        "benchmark": "train",
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "versions": {"torch": torch.__version__, "ldit": __version__},
        "size": job.size,
        "parameters": parameter_count(config.model),
        "tokens": (config.model.input_size // config.model.patch_size) ** 2,
        "batch": job.batch,
        "precision": job.precision,
        "recompute": job.recompute,
        "ema": job.ema,
        "host_ema": job.host_ema,
        "optimizer": "muon" if job.muon else "adamw",
        "moments": job.moments,
        "train_flops_per_image": flops,
        "ceiling_flops": ceiling,
        "variants": variants,
    }


def bench_config(recipe: str, batch: int, precision: Precision, micro: int | None = None) -> RunConfig:
    """The configuration of a recipe with another batch size and precision."""
    config = diffusion_recipe(recipe)
    train = replace(config.train, batch_size=batch, micro_batch_size=micro, precision=precision, grad_clip=CLIP)
    return replace(config, train=train)


def _fitted(name: str, config: RunConfig, job: BenchTrainRequest, device: torch.device) -> dict[str, Any]:
    """The report's row of a variant. Unless the request names a micro-batch, it is the largest part of the batch that
    fits: halves are tried. A variant that does not fit must not stop the others: its row says so."""
    micro = job.micro or job.batch
    while True:
        train = replace(config.train, micro_batch_size=micro)
        try:
            return {**_measure(name, replace(config, train=train), job, device), "micro_batch": micro}
        except torch.cuda.OutOfMemoryError:
            if job.micro or micro == 1:
                return {"name": name, "fits": False, "micro_batch": micro}
        _free(device)
        micro = next(size for size in range(micro // 2, 0, -1) if job.batch % size == 0)
        logger.info("%s: out of memory; with a micro-batch of %d", name, micro)


def _measure(name: str, config: RunConfig, job: BenchTrainRequest, device: torch.device) -> dict[str, Any]:
    """The report's row of a variant."""
    compiled = name == "compiled"
    config = replace(config, parallel=replace(config.parallel, compile=compiled, eager=not compiled))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    state, task, batch = started(config, device)
    if not job.ema:
        state.averages.tracks.clear()
    # One pass in both forms of ours, whatever is compiled.
    state.update = update_for(state.weights, state.averages, state.optimizer)
    step = step_of(name, state, task, batch)
    # Warm up: the first step compiles and creates the optimiser state, the second lets the allocator settle.
    losses: list[float] = []
    warm = timed(lambda: losses.append(step()), device)
    step()
    rates = []
    for _ in range(job.rounds):
        seconds = timed(lambda: [step() for _ in range(job.steps)], device)
        rates.append(job.steps * job.batch / seconds)
    return {
        "name": name,
        "fits": True,
        "images_per_second": median(rates),
        "spread": [min(rates), max(rates)],
        "first_step_seconds": warm,
        "first_loss": losses[0],
        "peak_bytes": peak_memory(device),
    }


def started(config: RunConfig, device: torch.device) -> tuple[TrainState, DiffusionTask, Batch]:
    """A run's state and task, and a batch of random latents.

    All weights are small random numbers: with the zero gates of a new network its blocks would have no effect.
    """
    # The state of a run that starts, then its weights.
    task = DiffusionTask(config, ModelSpec(config.model, config.process, config.codec))
    state = new_state(config, task, World(device))
    source = torch.Generator(device).manual_seed(0)
    for master in state.weights.masters:
        torch.nn.init.normal_(master, 0.0, 0.02, generator=source)
    state.weights.sync_to_model()
    state.averages.start(state.weights.masters)
    # The batch: random latents, classes in turn.
    count, model = config.train.batch_size, config.model
    shape = (count, model.in_channels, model.input_size, model.input_size)
    latents = torch.randn(shape, generator=generator(0, "bench"))
    assert not isinstance(model, TextModelConfig)
    return state, task, Batch(latents, torch.arange(count) % max(model.num_classes, 1), tuple(range(count)))


def step_of(variant: str, state: TrainState, task: DiffusionTask, batch: Batch) -> Callable[[], float]:
    """A function that takes one step and returns its loss."""
    if variant == "original":
        return _original_step(state, task, batch)
    return lambda: train_step(state, task, batch).values["loss"]


class OriginalUpdate:
    """Gradient clipping, optimiser and EMA as in the original: loops over tensors, unfused AdamW, `.item()`.

    `averages` may be empty.
    """

    def __init__(self, parameters: list[Tensor], averages: list[Tensor], lr: float) -> None:
        self.parameters, self.averages = parameters, averages
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, foreach=False, fused=False)

    def __call__(self, grads: list[Tensor]) -> None:
        """`grads` are the parameters' own `.grad`."""
        norm = sum(grad.norm().item() ** 2 for grad in grads) ** 0.5
        if norm > CLIP:
            for grad in grads:
                grad.mul_(CLIP / norm)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.averages, self.parameters, strict=False):
                average.mul_(DECAY).add_(parameter, alpha=1 - DECAY)


def _original_step(state: TrainState, task: DiffusionTask, batch: Batch) -> Callable[[], float]:
    weights, config = state.weights, state.config.train
    averages = state.averages.main if state.averages.tracks else []
    update = OriginalUpdate(list(weights.masters), averages, learning_rate(config, 1))

    def step() -> float:
        total = 0.0
        for micro in batch.micro(config.micro_batch_size or len(batch)):
            losses = task.losses(weights.model, micro, state.world.device, COMPUTE[config.precision])
            (losses["loss"].sum() / len(batch)).backward()
            total += losses["loss"].sum().item() / len(batch)
        grads = [grad.float() for grad in weights.gradients()]
        for master, grad in zip(weights.masters, grads, strict=True):
            master.grad = grad
        update(grads)
        for master in weights.masters:
            master.grad = None
        weights.sync_to_model()
        weights.zero_grad()
        return total

    return step


def _free(device: torch.device) -> None:
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
