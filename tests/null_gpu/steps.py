"""Training steps of a recipe on a simulated GPU, alone or as one process of many: memory, launches, waits, collectives.

Run by test_null_gpu.py; by hand: `$LDIT_NULL_GPU/run python tests/null_gpu/steps.py --recipe imagenet256-7b --local 64
--micro 32 --world 8`. The last line is a JSON object. Numbers that steer the step are given here, since the device
computes nothing.
"""

import argparse
import json
import logging
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import counts
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldit.config.recipes.registry import diffusion_recipe
from ldit.config.spec import ModelSpec
from ldit.data.batch import Batch
from ldit.parallel import world as worlds
from ldit.training import ema, step
from ldit.training.tasks.diffusion import DiffusionTask


class Collectives(TorchDispatchMode):
    """Counts collectives and their bytes (of the largest tensor each)."""

    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(op).startswith("c10d."):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            name = str(op).split(".")[1]
            self.number[name] += 1
            self.bytes[name] += max((t.numel() * t.element_size() for t in tensors), default=0)
        return op(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="imagenet256-3b")
    parser.add_argument("--local", type=int, default=32, help="images of this process")
    parser.add_argument("--micro", type=int)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--replicate", type=int, default=1)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--reshard", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--moments", default="fp32")
    parser.add_argument("--ema-host", action="store_true")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--top", type=int, default=0, help="print the most frequent kernels of the last step")
    options = parser.parse_args()
    row = measure(options)
    print(json.dumps(row))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    # A process group that sends nothing; all groups are made of it.
    if options.world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.world)
        new_group = dist.new_group

        def fake_group(*args: Any, **more: Any) -> Any:
            return new_group(*args, **{**more, "backend": "fake", "timeout": None})

        dist.new_group = fake_group
        worlds._set_pg_timeout = lambda *args: None
        dist.get_backend_config = lambda *args: "fake"
    # The recipe, with what the options change.
    config = diffusion_recipe(options.recipe)
    parallel = {
        "recompute": options.recompute,
        "tp": options.tp,
        "replicate": options.replicate,
        "eager": options.eager,
    }
    if options.reshard is not None:
        parallel["reshard"] = options.reshard
    parts = options.world // options.tp
    config = replace(
        config,
        train=replace(config.train, batch_size=options.local * parts, micro_batch_size=options.micro),
        parallel=replace(config.parallel, **parallel),
        optim=replace(config.optim, kind=options.optimizer, moments=options.moments),
        ema=replace(config.ema, host=options.ema_host),
    )
    device = torch.device("cuda")
    world = worlds.world_of(config.parallel, device) if options.world > 1 else worlds.World(device)
    # The device's numbers are zeros; the host would skip such a step.
    wait = step._HostCopy.wait
    step._HostCopy.wait = lambda self: [1.0] * len(wait(self))
    ema._average = lambda piece, averages: None  # memory of the host that nobody reads stays address space
    compiled: Counter[str] = Counter(recompiles=0)
    _count_recompilations(compiled)
    task = DiffusionTask(config, ModelSpec(config.model, config.process, config.codec))
    row: dict[str, Any] = {"recipe": options.recipe, "world": options.world, "local": options.local}
    try:
        state = step.new_state(config, task, world)
        row["parameters"] = sum(torch.Size(layout.shape).numel() for layout in state.weights.layouts)
        row["state_gb"] = torch.cuda.memory_allocated() / 1e9
        model = config.model
        images = torch.zeros(options.local, model.in_channels, model.input_size, model.input_size)
        labels = torch.zeros(options.local, dtype=torch.long)
        batch = Batch(images, labels, tuple(range(options.local)))
        for _ in range(options.steps):
            torch.cuda.reset_peak_memory_stats()
            counts.reset()
            began = time.perf_counter()
            outcome = step.train_step(state, task, batch)
            row["host_seconds"] = time.perf_counter() - began
            state.averages.wait()
            found = counts.read()
            row |= {
                "fault": outcome.fault,
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
                "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
                "launches": counts.launches(found),
                "waits": counts.waits(found),
            }
        breaks = sum(counters["graph_break"].values())
        row["compilation"] = {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks, **compiled}
        # Collectives are counted in another step: what intercepts them also keeps compiled blocks from running.
        comm = Collectives()
        if options.world > 1:
            with comm:
                step.train_step(state, task, batch)
        row["collectives"] = {name: [n, comm.bytes[name] / 1e9] for name, n in sorted(comm.number.items())}
        for name, n in found.most_common(options.top):
            print(f"{n:6d} {name[:200]}")
    except torch.OutOfMemoryError:
        row |= {"out_of_memory": True, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    return row


def _count_recompilations(found: Counter[str]) -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found["recompiles"] += 1

    torch._logging.set_logs(recompiles=True)
    logging.getLogger("torch._dynamo.guards.__recompiles").addHandler(Handler())


if __name__ == "__main__":
    main()
