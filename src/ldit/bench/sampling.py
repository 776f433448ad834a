"""`ldit bench sample`: speed of sampling with random weights, compared with the measured matrix ceiling."""

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ldit.bench.ceiling import device_name, matrix_ceiling, open_device, wait
from ldit.bench.train_step import RECIPES
from ldit.config.model import ClassModelConfig
from ldit.config.recipes.registry import diffusion_recipe
from ldit.config.requests.bench import BenchSampleRequest
from ldit.diffusion.ddpm import DDPM
from ldit.diffusion.process import Level, Process
from ldit.errors import ConfigError
from ldit.log import logger
from ldit.nn.build import build_model, forward_flops, parameter_count
from ldit.precision import DTYPES
from ldit.rng import normal
from ldit.sampling.denoiser import build_denoiser
from ldit.sampling.fast.options import InferenceOptions
from ldit.sampling.fast.prepare import Prepared, check_options, prepare
from ldit.sampling.grids import build_grid
from ldit.sampling.guidance import Guided, Network
from ldit.sampling.solvers import find_solver
from ldit.training.telemetry import peak_memory
from ldit.version import __version__

COLUMNS = "batch  evaluations  ms/evaluation  images/s  of ceiling  peak GB"


@dataclass(frozen=True)
class Chain:
    """A sampling run from `noise` (B, C, h, w) along `levels`."""

    process: Process
    solver: str
    levels: tuple[Level, ...]
    labels: tuple[int, ...]
    null: int
    guidance: float
    noise: Tensor
    channels: int
    interval: tuple[float, float] = (0.0, 1.0)

    def run(self, network: Network | nn.Module, dtype: torch.dtype) -> tuple[Tensor, Guided, float]:
        """The latents, the guided network with its counts, and seconds, planning included."""
        device = self.noise.device
        wait(device)
        began = time.perf_counter()
        # Labels for an inference copy are on the host, where it reads them without waiting for the device.
        labels = torch.tensor(self.labels, device="cpu" if isinstance(network, Prepared) else device)
        guided = Guided(
            network, labels, torch.full_like(labels, self.null), self.guidance, self.channels, self.interval, dtype
        )
        # A new plan, so that every run computes its conditioning anew.
        if isinstance(network, Prepared):
            network.plan([])
            network.plan(guided.network_calls(self.levels[:-1]))
        # Sample, each image with its own noise.
        x = self.noise
        steps = find_solver(self.solver)(
            build_denoiser(self.process, guided),
            x,
            self.levels,
            lambda i: torch.stack([normal(x.shape[1:], k, "step", i) for k in range(len(x))]).to(x),
        )
        for step in steps:
            x = step.x
        wait(device)
        return x, guided, time.perf_counter() - began


def bench_sample(job: BenchSampleRequest) -> dict[str, Any]:
    """Measure every batch size; returns the report.

    Each has evaluations, milliseconds an evaluation, images/s (median and range of rounds), share of the matrix ceiling
    (by the FLOPs of `needed_flops`) and peak memory. ConfigError or RequestError names a flag that is not supported.
    """
    if job.size not in RECIPES:
        raise ConfigError(f"--size: expected one of {', '.join(RECIPES)}, got {job.size!r}")
    device = open_device(job.device)
    dtype_name = job.dtype or ("fp32" if device.type == "cpu" else "bf16")
    config, dtype = diffusion_recipe(RECIPES[job.size]).model, DTYPES[dtype_name]
    assert isinstance(config, ClassModelConfig)
    # Check solver, grid and options before anything is measured.
    find_solver(job.solver)
    build_grid(DDPM(), str(job.steps))
    inference = InferenceOptions(None, job.int8, job.compile, job.graphs, job.host_modulation)
    check_options(config, inference, device)
    # Measure the ceiling, then one batch size after the other with the same network.
    ceiling = matrix_ceiling(device, dtype)
    network = prepare(random_network(config, device, dtype), inference)
    logger.info(COLUMNS)
    rows = [_batch(job, config, network, count, device, dtype, ceiling) for count in job.batch]
    return {
        "benchmark": "sample",
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "ldit": __version__},
        "size": job.size,
        "parameters": parameter_count(config),
        "tokens": (config.input_size // config.patch_size) ** 2,
        "dtype": dtype_name,
        "solver": job.solver,
        "steps": job.steps,
        "guidance": job.guidance,
        "switches": asdict(inference),
        "forward_flops_per_row": forward_flops(config, config.input_size, config.input_size),
        "ceiling_flops": ceiling,
        "rows": rows,
    }


def random_network(config: ClassModelConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network with random weights, matrices of unit gain: with the zero gates of a new one, blocks have no effect."""
    model = build_model(config, "meta").to(dtype).to_empty(device=device)
    source = torch.Generator(device).manual_seed(0)
    for name, p in model.named_parameters():
        std = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1
        torch.nn.init.normal_(p, float("norm" in name and name.endswith("weight")), std, generator=source)
    return model.eval().requires_grad_(False)


def needed_flops(
    network: Network | nn.Module, config: ClassModelConfig, guided: Guided, levels: tuple[Level, ...]
) -> int:
    """FLOPs of the matrix products that a run of `guided` needs, at the training size.

    Every row of every evaluation is a forward pass of `forward_flops`. An inference copy, however, computes its
    conditioning (the time's MLP and all adaLN products) once for each pair of time and label, so there it counts once
    a pair. Rows that only fill up a product are not counted.
    """
    count = len(guided.cond)
    rows = guided.evaluations * count + guided.guided_rows
    total = rows * forward_flops(config, config.input_size, config.input_size)
    if not isinstance(network, Prepared):
        return total
    # Take off the conditioning of every row beyond one a pair.
    linears = [
        *network.modulations.linears,
        *(m for m in network.model.t_embedder.modules() if isinstance(m, nn.Linear)),
    ]
    pairs = len(set(guided.network_calls(levels[:-1])))
    return total - (rows - pairs) * 2 * sum(linear.weight.numel() for linear in linears)


@torch.no_grad()
def _batch(
    job: BenchSampleRequest,
    config: ClassModelConfig,
    network: Network | nn.Module,
    count: int,
    device: torch.device,
    dtype: torch.dtype,
    ceiling: float | None,
) -> dict[str, Any]:
    """The report's row of a batch size; it is also logged."""
    # Images of different noise and class, sampled with the original's process and guided channels.
    side = config.input_size
    noise = torch.stack([normal((config.in_channels, side, side), k, "picture") for k in range(count)]).to(device)
    process = DDPM()
    labels = tuple(k % config.num_classes for k in range(count))
    chain = Chain(
        process, job.solver, build_grid(process, str(job.steps)), labels, config.num_classes, job.guidance, noise,
        min(3, config.in_channels),
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        chain.run(network, dtype)  # warm-up: kernels, compilation, graphs
        runs = [chain.run(network, dtype)[1:] for _ in range(job.rounds)]
    except torch.OutOfMemoryError:
        logger.info("%5d  does not fit", count)
        return {"batch": count, "fits": False}
    # Speed from the median round; all rounds have the same counts.
    seconds = [elapsed for _, elapsed in runs]
    guided = runs[0][0]
    middle = median(seconds)
    needed = needed_flops(network, config, guided, chain.levels)
    flops = needed / middle
    row: dict[str, Any] = {
        "batch": count,
        "fits": True,
        "evaluations": guided.evaluations,
        "guided_rows": guided.guided_rows,
        "ms_per_evaluation": 1000 * middle / guided.evaluations,
        "images_per_second": count / middle,
        "spread": [count / max(seconds), count / min(seconds)],
        "flops": needed,
        "tflops": flops / 1e12,
        **({"of_ceiling": flops / ceiling} if ceiling else {}),
        "peak_bytes": peak_memory(device),
    }
    logger.info(
        "%5d  %11d  %13.2f  %8.3f  %10s  %7.2f", count, row["evaluations"], row["ms_per_evaluation"],
        row["images_per_second"], f"{row['of_ceiling']:.0%}" if ceiling else "-", row["peak_bytes"] / 1e9,
    )  # fmt: skip
    return row
