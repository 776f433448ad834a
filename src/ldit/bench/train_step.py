"""`ldit bench train`: how fast the training step is, rung by rung, on random latents.

The ladder climbs from the form the original runs (eager blocks, loops over tensors, a look at the loss after every
micro-batch) to ours (fused optimiser, foreach clip and average, one wait a step), then with compiled blocks. Every
rung trains the same network on the same numbers; the loss of its first step must agree with the first rung's.
"""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ldit.config.recipes.registry import diffusion_recipe
from ldit.config.requests.bench import RUNGS, BenchTrainRequest
from ldit.config.run import RunConfig
from ldit.config.spec import ModelSpec
from ldit.data.batch import Batch
from ldit.errors import ConfigError
from ldit.log import logger
from ldit.nn.build import forward_flops, parameter_count
from ldit.parallel.world import World
from ldit.precision import COMPUTE, products
from ldit.rng import generator, normal
from ldit.storage.manifest import check_not_in_checkpoint
from ldit.train.optim import learning_rate
from ldit.train.state import TrainState
from ldit.train.step import new_state, train_step
from ldit.train.tasks.diffusion import DiffusionTask
from ldit.train.telemetry import peak_flops, peak_memory
from ldit.version import __version__

RECIPES = {"tiny": "tiny-cpu", "600m": "imagenet256-600m", "3b": "imagenet256-3b", "7b": "imagenet256-7b"}
AGREEMENT = 2e-2  # relative, of the first loss: bf16 in another order


def check_report(file: Path) -> None:
    """Whether the report can be written there; before anything is measured."""
    check_not_in_checkpoint(file)
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--json: no folder {file.absolute().parent}")


def bench_train(job: BenchTrainRequest) -> dict[str, Any]:
    """Measure every rung: images/s (median and spread of rounds), FLOP/s, MFU and share of the measured matrix ceiling,
    peak memory. Returns the report.

    A rung that does not fit in memory says so instead of figures.
    """
    if job.size not in RECIPES:
        raise ConfigError(f"--size: expected one of {', '.join(RECIPES)}, got {job.size!r}")
    if not job.rungs:
        raise ConfigError(f"--rungs: name at least one of {', '.join(RUNGS)}")
    if job.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here")
    device = torch.device(job.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with products(job.precision):
        return _ladder(job, device)


def _ladder(job: BenchTrainRequest, device: torch.device) -> dict[str, Any]:
    config = _config(job)
    flops = 3.0 * forward_flops(config.model, config.model.input_size, config.model.input_size)
    # CPUs emulate fp16 products: no ceiling for a network that is not made of them alone.
    emulated = (device.type, job.precision) == ("cpu", "fp16")
    ceiling = None if emulated else matrix_ceiling(device, COMPUTE[job.precision])
    peak = peak_flops(World(device), job.precision)
    rungs: list[dict[str, Any]] = []
    for name in job.rungs:
        try:
            rung = _measure(name, config, job, device)
        except torch.cuda.OutOfMemoryError:
            rung = {"name": name, "fits": False}
        if rung["fits"]:
            rate = rung["images_per_second"]
            rung |= {"tflops": rate * flops / 1e12}
            rung |= {"of_ceiling": rate * flops / ceiling} if ceiling else {}
            rung |= {"mfu": rate * flops / peak} if peak else {}
            reference = next((r["first_loss"] for r in rungs if r["fits"]), rung["first_loss"])
            rung["agrees"] = abs(rung["first_loss"] - reference) <= AGREEMENT * abs(reference)
        logger.info("%s", json.dumps(rung))
        rungs.append(rung)
        _free(device)
    report = {
        "benchmark": "train",
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "ldit": __version__},
        "size": job.size,
        "parameters": parameter_count(config.model),
        "tokens": (config.model.input_size // config.model.patch_size) ** 2,
        "batch": job.batch,
        "micro_batch": job.micro or job.batch,
        "precision": job.precision,
        "recompute": job.recompute,
        "ema": job.ema,
        "train_flops_per_image": flops,
        "ceiling_flops": ceiling,
        "rungs": rungs,
    }
    return report


def matrix_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Best FLOP/s of square products on this device, now: what a step is to be measured against."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (normal((side, side), 0, "gemm", i).to(device, dtype) for i in range(2))
    best = 0.0
    for _ in range(3):
        count = 20 if device.type == "cuda" else 3
        _wait(device)
        began = time.perf_counter()
        for _ in range(count):
            a @ b
        _wait(device)
        best = max(best, 2.0 * side**3 * count / (time.perf_counter() - began))
    return best


def _config(job: BenchTrainRequest) -> RunConfig:
    config = diffusion_recipe(RECIPES[job.size])
    train = replace(
        config.train, batch_size=job.batch, micro_batch_size=job.micro, precision=job.precision, grad_clip=2.0
    )
    return replace(config, train=train, parallel=replace(config.parallel, recompute=job.recompute))


def _measure(name: str, config: RunConfig, job: BenchTrainRequest, device: torch.device) -> dict[str, Any]:
    if name == "compiled":
        config = replace(config, parallel=replace(config.parallel, compile=True))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    state, task = _started(config, device)
    if not job.ema:
        state.averages.tracks.clear()
    batch = _batch(config)
    step: Callable[[], float] = (
        _original_step(state, task, batch) if name == "original" else _our_step(state, task, batch)
    )
    began = time.perf_counter()
    first = step()
    _wait(device)
    warm = time.perf_counter() - began
    step()
    rates = []
    for _ in range(job.rounds):
        _wait(device)
        began = time.perf_counter()
        for _ in range(job.steps):
            step()
        _wait(device)
        rates.append(job.steps * job.batch / (time.perf_counter() - began))
    return {
        "name": name,
        "fits": True,
        "images_per_second": median(rates),
        "spread": [min(rates), max(rates)],
        "first_step_seconds": warm,
        "first_loss": first,
        "peak_bytes": peak_memory(device),
    }


def _started(config: RunConfig, device: torch.device) -> tuple[TrainState, DiffusionTask]:
    task = DiffusionTask(config, ModelSpec(config.model, config.process, config.codec))
    state = new_state(config, task, World(device))
    # Small random numbers everywhere: with zero gates the network would compute nothing worth the name.
    source = torch.Generator(device).manual_seed(0)
    for master in state.weights.masters:
        torch.nn.init.normal_(master, 0.0, 0.02, generator=source)
    state.weights.sync_to_model()
    state.averages.start(state.weights.masters)
    return state, task


def _batch(config: RunConfig) -> Batch:
    count, model = config.train.batch_size, config.model
    shape = (count, model.in_channels, model.input_size, model.input_size)
    images = torch.randn(shape, generator=generator(0, "bench"))
    return Batch(images, torch.arange(count) % max(model.num_classes, 1), tuple(range(count)))


def _our_step(state: TrainState, task: DiffusionTask, batch: Batch) -> Callable[[], float]:
    return lambda: train_step(state, task, batch).values["loss"]


def _original_step(state: TrainState, task: DiffusionTask, batch: Batch) -> Callable[[], float]:
    """The same step as the original takes it: loops over tensors, unfused optimiser, `.item()` where it looks."""
    weights, config = state.weights, state.config.train
    optimizer = torch.optim.AdamW(weights.masters, lr=config.lr, weight_decay=0.0, foreach=False, fused=False)
    averages: list[Tensor] = state.averages.main if state.averages.tracks else []

    def step() -> float:
        total = 0.0
        for micro in batch.micro(config.micro_batch_size or len(batch)):
            losses = task.losses(weights.model, micro, state.world.device, COMPUTE[config.precision])
            (losses["loss"].sum() / len(batch)).backward()
            total += losses["loss"].sum().item() / len(batch)
        grads = weights.gradients()
        norm = sum(grad.norm() ** 2 for grad in grads) ** 0.5
        if norm > config.grad_clip:
            for grad in grads:
                grad.mul_(config.grad_clip / norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, 1)
        optimizer.step()
        with torch.no_grad():
            for average, master in zip(averages, weights.masters, strict=False):
                average.mul_(0.9999).add_(master, alpha=1 - 0.9999)
        weights.sync_to_model()
        weights.zero_grad()
        return total

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
