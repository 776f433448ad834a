"""The processes of a run: ranks, process groups, and how they agree on results and errors."""

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from ldit import errors
from ldit.config.sections import ParallelConfig
from ldit.errors import ConfigError, LditError, SourceError
from ldit.log import logger
from ldit.parallel.exchange import ModelGroup

T = TypeVar("T")
TP, SHARD, REPLICATE = "tp", "shard", "replicate"
UNHEARD = 10.0  # seconds after which a process logs its failure itself, if the others do not answer
GRACE = 10.0  # seconds that collectives wait longer than the watchdog, which can name the process that stalls
MEETING = timedelta(hours=1)
"""All processes must start within this time."""


@dataclass(frozen=True)
class World:
    """`size` processes as replicate x shard x tp; neighbouring ranks share a tensor-parallel group.

    `model_group`: the shard x tp processes that together hold one whole model. `control`: a CPU group for small
    messages. `saving`, `saving_model_group`: CPU groups for the thread that writes checkpoints. `store`: a key-value
    store for messages that nobody waits for; None in a single process.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    tp: int = 1
    shard: int = 1
    replicate: int = 1
    mesh: DeviceMesh | None = None
    model_group: ModelGroup = field(default_factory=ModelGroup)
    control: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None
    saving_model_group: ModelGroup = field(default_factory=ModelGroup)
    store: Any = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, rank 0, which writes files and logs."""
        return self.rank == 0

    @property
    def tp_index(self) -> int:
        """Index in the tensor-parallel group."""
        return self.rank % self.tp

    @property
    def replica(self) -> int:
        """Index of the model copy that this process holds a part of."""
        return self.rank // (self.tp * self.shard)

    @property
    def data_parts(self) -> int:
        """Number of parts of a batch: the processes that get different samples."""
        return self.shard * self.replicate

    @property
    def data_part(self) -> int:
        """Index of the part of a batch that this process gets."""
        return self.rank // self.tp

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """The tensor-parallel group; None if there is no tensor parallelism."""
        return self.mesh.get_group(TP) if self.mesh is not None and self.tp > 1 else None

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """The JSON-able `value` of every process, on every process, in rank order."""
        if self.size == 1:
            return [value]
        # As bytes of JSON, padded to the longest: every backend can gather tensors, and nothing is unpickled.
        group = group or self.control
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([data.numel()]), group=group)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, padded, group=group)
        return [json.loads(t[: int(n)].numpy().tobytes()) for t, n in zip(texts, lengths, strict=True)]

    def run_on_all(self, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Run `work()` on every process. If one rank fails, every rank raises.

        The rank that failed raises its own exception, the others an LditError with the same message. If several fail,
        all raise the failure of the lowest rank, but a SourceError only if there is no other kind: a caller that skips
        damaged files must do so on all ranks or on none.
        """
        # Run it, and tell all ranks how it went.
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        reports = self._reported(failure, group)
        failures = [(rank, kind, text) for rank, (kind, text) in enumerate(reports) if kind]
        if not failures:
            return result  # type: ignore[return-value]
        # All ranks choose the same failure and raise it.
        rank, kind, text = next((f for f in failures if f[1] != SourceError.__name__), failures[0])
        if rank == self.rank and failure is not None:
            raise failure
        known: type[LditError] | None = getattr(errors, kind, None)
        reported = known(text) if known is not None else errors.RunError(f"process {rank}: {text}")
        reported.said_elsewhere = True
        raise reported from failure

    def _reported(self, failure: Exception | None, group: dist.ProcessGroup | None) -> list[tuple[str, str]]:
        """(class, message) of the failure of every process, empty for success.

        The others may be busy for long, or gone. So a process that failed logs its failure after UNHEARD seconds, and
        raises it if the exchange fails.
        """
        if failure is None or self.size == 1:
            return self.gather(["" if failure is None else type(failure).__name__, str(failure or "")], group)
        timer = threading.Timer(UNHEARD, logger.error, ("process %d waits for the others: %s", self.rank, failure))
        timer.daemon = True
        timer.start()
        try:
            return self.gather([type(failure).__name__, str(failure)], group)
        except RuntimeError:  # from the process group: the others did not answer
            raise failure from None
        finally:
            timer.cancel()

    def alarm(self, subject: str) -> None:
        """Tell the others, without waiting for them, that this process cannot continue the work `subject`."""
        if self.store is not None:
            self.store.set(f"alarm {subject}", b"1")

    def alarmed(self, subject: str) -> bool:
        """Whether any process has raised this alarm."""
        return self.store is not None and bool(self.store.check([f"alarm {subject}"]))

    def clear_alarm(self, subject: str) -> None:
        """Clear an alarm, so that the work can be tried again. All processes call it together, after all saw it."""
        if self.store is not None:
            self.from_rank0(lambda: self.store.delete_key(f"alarm {subject}"))

    def from_rank0(self, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Run `work()` on rank 0 only. Every process gets its result, which must be JSON-able, or raises its error."""
        result = self.run_on_all(lambda: work() if self.is_main else None, group)
        return self.gather(result, group)[0]


@dataclass(frozen=True)
class Launch:
    """The place of this process, from the launcher's environment variables."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    nodes: int = 1


def launched() -> Launch:
    """Rank and size from the variables of torchrun or srun; a single process without them."""
    env = os.environ
    # torchrun
    if "RANK" in env and "WORLD_SIZE" in env:
        size, local = _number("WORLD_SIZE"), _number("LOCAL_WORLD_SIZE", _number("WORLD_SIZE"))
        return Launch(_number("RANK"), size, _number("LOCAL_RANK", 0), max(size // max(local, 1), 1))
    # srun: set the variables that torchrun would set, because torch reads them.
    if "SLURM_PROCID" in env and _number("SLURM_STEP_NUM_TASKS", 1) > 1:
        size, rank = _number("SLURM_STEP_NUM_TASKS"), _number("SLURM_PROCID")
        env.setdefault("MASTER_ADDR", _first_host())
        env.setdefault("MASTER_PORT", str(20000 + _number("SLURM_JOB_ID", 0) % 20000))
        env.update(RANK=str(rank), WORLD_SIZE=str(size))
        return Launch(rank, size, _number("SLURM_LOCALID", 0), _number("SLURM_STEP_NUM_NODES", 1))
    if _number("WORLD_SIZE", 1) > 1:
        raise ConfigError("WORLD_SIZE is set but RANK is not: start with torchrun or srun")
    return Launch()


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(f"environment variable {name}: expected a number, got {text!r}") from None


def _first_host() -> str:
    """The first host of the Slurm job, where rank 0 runs."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if not any(c in nodes for c in "[,"):
        return nodes or "127.0.0.1"
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise ConfigError(f"cannot find the first host of {nodes!r}: set MASTER_ADDR") from None
    return listed.stdout.split()[0]


def shape(config: ParallelConfig, size: int) -> tuple[int, int, int]:
    """(replicate, shard, tp) for `size` processes; ConfigError unless their product is `size`."""
    fixed = config.tp * config.replicate
    shard = config.shard or max(size // fixed, 1)
    if fixed * shard != size:
        rest = config.shard or "rest"
        raise ConfigError(
            f"parallel.replicate {config.replicate} x parallel.shard {rest} x parallel.tp {config.tp} "
            f"does not fit {size} process{'es' if size > 1 else ''}"
        )
    return config.replicate, shard, config.tp


has_met_others = False
"""Whether this process has had a process group, whose threads outlive it and may abort an interpreter that ends."""


@contextmanager
def report_once(kind: type[LditError] = LditError) -> Iterator[None]:
    """Let only the main process print an error that every process raises by itself, such as a mistake in a flag."""
    try:
        yield
    except kind as error:
        error.said_elsewhere = launched().rank > 0
        raise


def let_segments_grow(environment: MutableMapping[str, str]) -> None:
    """Let torch's allocator map memory into growing segments, unless the user has set how it allocates. Blocks of many
    sizes then leave no gaps: 9 GB of an 80 GB card for 7B parameters on 8 GPUs. It is read at the first allocation."""
    if not any(name in environment for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")):
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


@contextmanager
def joined(config: ParallelConfig) -> Iterator[World]:
    """The world of this run. A single process needs no launcher and makes no process group."""
    launch = launched()
    # Check the number of processes before they wait for each other.
    with report_once():
        shape(config, launch.size)
    limit = timedelta(seconds=config.timeout + GRACE)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        let_segments_grow(os.environ)
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if launch.size == 1:
        yield World(device)
        return
    # Meet the other processes at a store, then make the process group.
    meeting = min(limit, MEETING)
    store, rank, size = next(rendezvous("env://", launch.rank, launch.size, timeout=meeting))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" else None  # NCCL need not guess the device then
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit, device_id=bound)
    global has_met_others
    has_met_others = True
    yield world_of(config, device, PrefixStore("ldit", store.clone()))
    dist.destroy_process_group()  # only after success: after a failure it could wait for dead processes


def world_of(config: ParallelConfig, device: torch.device, store: Any = None) -> World:
    """The world of the default process group, which must exist."""
    rank, size = dist.get_rank(), dist.get_world_size()
    replicate, shard, tp = shape(config, size)
    limit = timedelta(seconds=config.timeout + GRACE)
    backend = dist.get_backend_config() if device.type == "cuda" else "gloo"
    mesh = init_device_mesh(device.type, (replicate, shard, tp), mesh_dim_names=(REPLICATE, SHARD, TP))
    for name in (REPLICATE, SHARD, TP):  # the mesh creates its groups with torch's default timeout
        _set_pg_timeout(limit, mesh.get_group(name))
    return World(
        device, rank, size, tp, shard, replicate,
        mesh=mesh,
        model_group=_model_group(rank, shard, tp, replicate, backend, limit),
        control=dist.new_group(backend="gloo", timeout=limit),
        saving=dist.new_group(backend="gloo", timeout=limit),
        saving_model_group=_model_group(rank, shard, tp, replicate, "gloo", limit),
        store=store,
    )  # fmt: skip


def _model_group(rank: int, shard: int, tp: int, replicate: int, backend: str, limit: timedelta) -> ModelGroup:
    """The model group of this process. Every process creates the groups of all replicas, as torch requires."""
    size = shard * tp
    groups = [
        dist.new_group(list(range(r * size, (r + 1) * size)), timeout=limit, backend=backend) for r in range(replicate)
    ]
    members = tuple((s, t) for s in range(shard) for t in range(tp))
    return ModelGroup(members, rank % size, groups[rank // size])
