"""What a training step costs beside the network, against the plain way of doing it.

    python benchmarks/training.py {update,memory,save,order} [--device cpu|cuda] [--size b|tiny] [--rounds N] [--json F]

update: norm, clip, optimiser and average of ours against loops over tensors, as the original has them.
memory: peak memory of a bf16 step of ours against the plain form, each in a process of its own.
save:   how long a step waits for an asynchronous checkpoint, against a synchronous one.
order:  what the sample order of a three-million-step run allocates at its start.

The last line of stdout is one JSON object.
"""

import argparse
import copy
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ldit.config.model import ClassModelConfig
from ldit.config.presets import preset
from ldit.config.recipes.registry import diffusion_recipe
from ldit.config.run import RunConfig
from ldit.config.sections import Precision
from ldit.config.spec import DDPMConfig, ModelSpec
from ldit.data.batch import Batch
from ldit.data.order import EpochOrder
from ldit.nn.build import parameter_count
from ldit.parallel.world import World
from ldit.rng import generator
from ldit.train import checkpointing
from ldit.train.saver import Saver, Staging
from ldit.train.state import TrainState
from ldit.train.step import fill_fresh, new_state, train_step
from ldit.train.tasks.diffusion import DiffusionTask

MODELS: dict[str, ClassModelConfig] = {
    "b": preset("B", input_size=16, qk_norm=True),
    "tiny": preset("XS", dim=64, n_layers=2, multiple_of=32, input_size=16, qk_norm=True),
}
BATCH = 2


def configured(size: str, precision: Precision = "bf16") -> RunConfig:
    config = diffusion_recipe("imagenet256-600m")
    train = replace(config.train, batch_size=BATCH, micro_batch_size=None, precision=precision)
    return replace(config, model=MODELS[size], process=DDPMConfig(), train=train)


def started(config: RunConfig, device: torch.device) -> tuple[TrainState, DiffusionTask, Batch]:
    task = DiffusionTask(config, ModelSpec(config.model, config.process, config.codec))
    state = new_state(config, task, World(device))
    fill_fresh(state, task)
    side = config.model.input_size
    images = torch.randn(BATCH, config.model.in_channels, side, side, generator=generator(0, "bench"))
    return state, task, Batch(images, torch.arange(BATCH), tuple(range(BATCH)))


class Plain:
    """The same update as loops over tensors with an unfused optimiser and a second network for the average."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model, self.average = model, copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, foreach=False, fused=False)

    def update(self, clip: float) -> None:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = sum(g.norm().item() ** 2 for g in grads) ** 0.5
        if norm > clip:
            for g in grads:
                g.mul_(clip / norm)
        self.optimizer.step()
        with torch.no_grad():
            for a, p in zip(self.average.parameters(), self.model.parameters(), strict=True):
                a.mul_(0.9999).add_(p, alpha=1 - 0.9999)


def update(size: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of norm + clip + optimiser + average, in turn."""
    config = configured(size, "fp32")
    state, _, _ = started(config, device)
    grads = [torch.randn(m.shape, generator=generator(0, "grad", 0, i)) for i, m in enumerate(state.weights.masters)]
    plain_model = copy.deepcopy(state.weights.model)
    plain = Plain(plain_model, config.train.lr)

    def give(parameters: list[Tensor]) -> None:
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g.to(device, copy=True)

    def ours() -> None:
        squares = torch.stack(torch._foreach_norm(state.weights.gradients())).double().square()
        norm = squares.sum().sqrt()
        factor = torch.where(norm > 2.0, 2.0 / norm, 1.0).float()
        torch._foreach_mul_([m.grad for m in state.weights.masters if m.grad is not None], factor)
        state.optimizer.step(config.train.lr, torch.isfinite(norm))
        state.updates += 1
        state.averages.update(state.weights.masters, state.updates)

    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for turn in range(rounds + 1):
        give(list(state.weights.masters))
        a = timed(ours, device)
        give(list(plain_model.parameters()))
        b = timed(lambda: plain.update(2.0), device)
        if turn:  # the first warms up: optimiser state is made in it
            times["ours"].append(a)
            times["plain"].append(b)
    rows = zip(state.weights.masters, plain_model.parameters(), strict=True)
    off = max((a - b).abs().max().item() for a, b in rows)
    assert off < 1e-4 * (rounds + 1), f"the two updates differ by {off}"
    middle = {name: median(values) * 1000 for name, values in times.items()}
    count = parameter_count(config.model)
    return {
        "parameters": count,
        "ms": middle,
        "ratio": middle["plain"] / middle["ours"],
        "bytes_per_parameter_floor": 52,
        "gbytes_per_second": 52 * count / middle["ours"] / 1e6,
        "all_ms": {name: [v * 1000 for v in values] for name, values in times.items()},
    }


def memory(size: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Peak bytes of two steps, each form in a process of its own."""
    peaks = {}
    for form in ("ours", "plain"):
        command = [sys.executable, __file__, "memory", "--size", size, "--device", device.type, "--form", form]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[form] = json.loads(done.stdout.splitlines()[-1])
    count = parameter_count(MODELS[size])
    per = {form: peak / count for form, peak in peaks.items()}
    return {
        "parameters": count,
        "peak_bytes": peaks,
        "bytes_per_parameter": per,
        "ratio": peaks["ours"] / peaks["plain"],
    }


def memory_of(form: str, size: str, device: torch.device) -> int:
    """Growth of the peak over what the process held before the network."""
    config = configured(size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak(device)
    if form == "ours":
        state, task, batch = started(config, device)
        for _ in range(2):
            train_step(state, task, batch)
    else:
        state, task, batch = started(configured(size, "fp32"), device)
        master = copy.deepcopy(state.weights.model)
        del state
        compute = copy.deepcopy(master).bfloat16()
        plain = Plain(master, config.train.lr)
        for _ in range(2):
            losses = task.losses(compute, batch, device, torch.bfloat16)
            (losses["loss"].sum() / BATCH).backward()
            for p, q in zip(master.parameters(), compute.parameters(), strict=True):
                p.grad = None if q.grad is None else q.grad.float()
            compute.zero_grad()
            plain.update(2.0)
            with torch.no_grad():
                for p, q in zip(master.parameters(), compute.parameters(), strict=True):
                    q.copy_(p)
            plain.optimizer.zero_grad()
    return peak(device) - before


def peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def save(size: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds that the loop waits, synchronous and asynchronous in turn, and the first of each by itself. The host
    memory of the asynchronous ones is made before, beside the first steps in training (`reserve_seconds`)."""
    config = configured(size)
    state, task, batch = started(config, device)
    train_step(state, task, batch)
    blocked: dict[str, list[float]] = {"synchronous": [], "asynchronous": []}
    staging = {"synchronous": Staging(), "asynchronous": Staging()}
    reserved = timed(checkpointing.reserve_work(state, staging["asynchronous"]), device)
    with tempfile.TemporaryDirectory() as name:
        for turn in range(rounds + 1):
            for form, times in blocked.items():
                saver = Saver(form == "asynchronous")
                state.step = turn + 1
                began = time.perf_counter()
                saver.start(checkpointing.save_work(Path(name) / form, state, task.spec, staging[form]))
                times.append(time.perf_counter() - began)
                saver.wait()
        folder = next((Path(name) / "synchronous" / "checkpoints").iterdir())
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    first = {form: times.pop(0) for form, times in blocked.items()}
    middle = {form: median(times) for form, times in blocked.items()}
    return {
        "bytes": written,
        "seconds": middle,
        "first_seconds": first,
        "first_share": first["asynchronous"] / first["synchronous"],
        "reserve_seconds": reserved,
        "share": middle["asynchronous"] / middle["synchronous"],
        "all_seconds": blocked,
    }


def order(size: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Bytes for the order of 3 million steps: at the start, and after the first batch, by size of the set."""
    found = {}
    for pictures in (1_654, 60_000, 1_281_167):
        tracemalloc.start()
        one = EpochOrder(pictures, 0)
        start = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        one.batch(2_999_999, 256)
        held = one._permutation.nbytes
        found[str(pictures)] = {"at_start": start, "after_first_batch": held}
    return {"steps": 3_000_000, "bytes": found}


def timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    themes = {"update": update, "memory": memory, "save": save, "order": order}
    parser.add_argument("theme", choices=themes)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=MODELS, default="b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.form:
        print(memory_of(arguments.form, arguments.size, device))
        return
    result = themes[arguments.theme](arguments.size, device, arguments.rounds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    report = {
        "benchmark": f"training-{arguments.theme}",
        "date": datetime.now(UTC).date().isoformat(),
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "size": arguments.size,
        **result,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
