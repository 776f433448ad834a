"""What a training step costs beside the network, against the plain way of doing it.

    python benchmarks/training.py {update,memory,save,order} [--device cpu|cuda] [--size b|tiny] [--rounds N] [--json F]

update: norm, clip, optimiser and average of ours against loops over tensors, as the original has them ("plain").
memory: peak memory of a bf16 step of ours against the original's, each in a process of its own.
save:   how long a step waits for an asynchronous checkpoint, against a synchronous one.
order:  what the sample order of a three-million-step run allocates at its start.

The last line of stdout is one JSON object.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ldit.bench.ceiling import device_name, timed
from ldit.bench.train_step import CLIP, OriginalUpdate, bench_config, started, step_of
from ldit.config.model import ClassModelConfig
from ldit.config.presets import preset
from ldit.config.run import RunConfig
from ldit.config.sections import Precision
from ldit.config.spec import DDPMConfig
from ldit.data.order import EpochOrder
from ldit.nn.build import parameter_count
from ldit.rng import generator
from ldit.training import checkpointing
from ldit.training.saver import Saver, Staging
from ldit.training.step import train_step
from ldit.training.telemetry import peak_memory

MODELS: dict[str, ClassModelConfig] = {
    "b": preset("B", input_size=16, qk_norm=True),
    "tiny": preset("XS", dim=64, n_layers=2, multiple_of=32, input_size=16, qk_norm=True),
}
BATCH = 2


def configured(size: str, precision: Precision = "bf16") -> RunConfig:
    return replace(bench_config("imagenet256-600m", BATCH, precision), model=MODELS[size], process=DDPMConfig())


def update(size: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of norm + clip + optimiser + average, in turn, on the same gradients."""
    config = configured(size, "fp32")
    state, _, _ = started(config, device)
    masters: list[Tensor] = list(state.weights.masters)
    copies: list[Tensor] = [master.detach().clone().requires_grad_() for master in masters]
    plain = OriginalUpdate(copies, [copy.detach().clone() for copy in copies], config.train.lr)
    grads = [torch.randn(m.shape, generator=generator(0, "grad", 0, i)) for i, m in enumerate(masters)]

    def give(parameters: list[Tensor]) -> list[Tensor]:
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g.to(device, copy=True)
        return [p.grad for p in parameters if p.grad is not None]

    def ours(given: list[Tensor]) -> None:
        squares = torch.stack(torch._foreach_norm(given, 2, torch.float32)).double().square()
        norm = squares.sum().sqrt()
        factor = torch.where(norm > CLIP, CLIP / norm, 1.0).float()
        state.updates += 1
        state.update.queue(given, config.train.lr, torch.isfinite(norm), state.updates - 1, factor, state.updates)
        state.update.settle(state.updates)

    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for turn in range(rounds + 1):
        for name, form, parameters in (("ours", ours, masters), ("plain", plain, copies)):
            given = give(parameters)
            seconds = timed(lambda form=form, given=given: form(given), device)  # type: ignore[misc]
            if turn:  # the first warms up: optimiser state is made in it
                times[name].append(seconds)
    off = max((a - b).abs().max().item() for a, b in zip(masters, copies, strict=True))
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


def moments(size: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of optimiser + average by the kind of AdamW's moments, in turn; bytes of its state."""
    states = {}
    for kind in ("fp32", "bf16", "int8"):
        config = configured(size)
        states[kind], _, _ = started(replace(config, optim=replace(config.optim, moments=kind)), device)
    masters = states["fp32"].weights.masters
    grads = [torch.randn(m.shape, generator=generator(0, "grad", 0, i)) for i, m in enumerate(masters)]
    times: dict[str, list[float]] = {kind: [] for kind in states}
    for turn in range(rounds + 1):
        for kind, state in states.items():
            given = [grad.to(device, torch.bfloat16) for grad in grads]
            sound = torch.ones((), dtype=torch.bool, device=device)

            def call(state: Any = state, given: list[Tensor] = given, sound: Tensor = sound) -> None:
                state.updates += 1
                state.update.queue(given, 1e-4, sound, state.updates - 1, None, state.updates)
                state.update.settle(state.updates)

            seconds = timed(call, device)
            if turn:
                times[kind].append(seconds)
    count = parameter_count(configured(size).model)
    held = {kind: sum(part.numel() * part.element_size() for _, layout, part in state.optimizer.state() if layout.shape)
            for kind, state in states.items()}  # fmt: skip
    return {
        "parameters": count,
        "ms": {kind: median(values) * 1000 for kind, values in times.items()},
        "bytes_per_parameter": {kind: bytes_ / count for kind, bytes_ in held.items()},
        "all_ms": {kind: [v * 1000 for v in values] for kind, values in times.items()},
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
    """Growth of the peak, over what the process held before the network, by two steps."""
    before = peak_memory(device)
    step = step_of("original" if form == "plain" else "fused", *started(configured(size), device))
    for _ in range(2):
        step()
    return peak_memory(device) - before


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    themes = {"update": update, "moments": moments, "memory": memory, "save": save, "order": order}
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
    report = {
        "benchmark": f"training-{arguments.theme}",
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
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
