"""What the processes of a group promise each other beside equal losses, looked at from inside the group. Each check
returns, on every process, what `test_variants.py` judges; the parent never sees the processes themselves."""

import errno
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import data_checks
import numpy as np
import torch
import torch.distributed as dist
from runs import ALONE, after, started, tiny
from torch import Tensor
from torch.distributed.tensor import DTensor

from ldit.checkpoint import save
from ldit.checkpoint.run import step_folder
from ldit.commands import train as flow
from ldit.config.experiment import Experiment
from ldit.config.run import RunConfig
from ldit.config.sections import EMAConfig, OptimConfig, ParallelConfig
from ldit.config.spec import FlowConfig
from ldit.data.batch import Batch
from ldit.errors import LditError, RunError, SourceError
from ldit.parallel.exchange import gather_whole, scatter_parts
from ldit.parallel.layout import Layout, view
from ldit.parallel.watchdog import Watchdog
from ldit.parallel.world import REPLICATE, SHARD, TP, World, world_of
from ldit.storage import shards as sets
from ldit.training import checkpointing
from ldit.training.saver import Staging
from ldit.training.state import TrainState
from ldit.training.step import train_step
from ldit.training.trainer import Trainer

SAVED_STEPS = 3
LIMIT = 20.0  # seconds after which processes that went different ways give up waiting for each other
WIDE = {"qk_norm": True, "learn_sigma": False}


def run(name: str, folder: Path) -> Any:
    """The check `name`, or `name:argument`."""
    check, _, argument = name.partition(":")
    return CHECKS[check](folder, argument)


def world(**parallel: Any) -> World:
    if not dist.is_initialized():
        return ALONE
    return world_of(ParallelConfig(**parallel), torch.device("cpu"))


def config_for(kind: str) -> RunConfig:
    """A run with all that a checkpoint can hold: two averages, a power average, moments, and momentum with Muon."""
    config = tiny(batch_size=8)
    tp, replicate, muon = ("tp2" in kind) + 1, ("replicate" in kind) + 1, "muon" in kind
    return replace(
        config,
        model=replace(config.model, **WIDE),
        process=FlowConfig(),
        optim=OptimConfig(kind="muon" if muon else "adamw"),
        ema=EMAConfig(0.99, (0.9,), (0.05,)),
        parallel=ParallelConfig(tp=tp, replicate=replicate),
    )


# ---- what a process holds, told without the code that writes files


def held(state: TrainState) -> Iterator[tuple[str, Layout, tuple[slice, ...], Tensor]]:
    """(set:name, layout, part, this process's numbers) of everything that trains."""
    place = state.world.model_group.here
    rows = zip(state.weights.names, state.weights.layouts, state.weights.masters, strict=True)
    yield from ((f"model:{name}", layout, layout.part(*place), value.detach()) for name, layout, value in rows)
    for track, average in state.averages.tracks.items():
        rows = zip(state.weights.names, state.weights.layouts, average.values, strict=True)
        yield from ((f"{track}:{name}", layout, layout.part(*place), value) for name, layout, value in rows)
    for name, layout, value in state.optimizer.state():
        yield f"optimizer:{name}", layout, layout.part(*place), value


def dump(state: TrainState, file: Path) -> None:
    """Each number with its place, for a reader that lays them together itself."""
    np.savez(file, **{
        "|".join([name, str(list(layout.shape)), str([[s.start, s.stop] for s in part])]): value.numpy()
        for name, layout, part, value in held(state)
    })  # fmt: skip


def digest(state: TrainState) -> str:
    found = hashlib.sha256()
    for name, _, _, value in held(state):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def write(folder: Path, kind: str) -> Any:
    """Three steps, a checkpoint in as many files as there are processes, a dump of each process's own numbers, and the
    losses of three steps more."""
    config = config_for(kind)
    state, outcomes = after(config, SAVED_STEPS, world(tp=config.parallel.tp, replicate=config.parallel.replicate))
    _, task, loader = started(config, state.world)
    save.SHARD_BYTES = 1 << 14
    checkpointing.save_work(folder / kind, state, task.spec, Staging(), {"pictures": 1})()
    dump(state, folder / kind / f"written-{state.world.rank}.npz")
    assert not any(o.fault for o in outcomes)
    return [train_step(state, task, batch).values["loss"] for batch in loader.from_step(SAVED_STEPS, 2 * SAVED_STEPS)]


def read(folder: Path, kind: str) -> Any:
    """The same checkpoint in a process group of another size: a dump, and the losses of the next three steps."""
    config = config_for(kind)
    size = dist.get_world_size() if dist.is_initialized() else 1
    config = replace(config, parallel=ParallelConfig(tp=min(config.parallel.tp, size)))
    state, task, loader = started(config, world(tp=config.parallel.tp))
    checkpointing.restore(step_folder(folder / kind, SAVED_STEPS), state)
    dump(state, folder / kind / f"read-by-{size}-{state.world.rank}.npz")
    return [train_step(state, task, batch).values["loss"] for batch in loader.from_step(SAVED_STEPS, 2 * SAVED_STEPS)]


# ---- a step that must not be applied


def not_finite(folder: Path, kind: str) -> Any:
    """Step 3 meets a NaN on the last process alone (in its images, or with `-gradient` in its gradient): what each
    process says of it, whether anything changed there, and whether step 4 was applied."""
    config = config_for(kind)
    state, task, loader = started(config, world(tp=config.parallel.tp))
    me, last = state.world.rank, state.world.size - 1
    found: dict[str, Any] = {}
    for number, batch in enumerate(loader.from_step(0, 4), 1):
        poisoned = number == 3 and me == last
        if poisoned and "gradient" not in kind:
            batch.inputs[-1, 0, 0, 0] = torch.nan
        before = digest(state)
        with _poisoned_gradient(state) if poisoned and "gradient" in kind else _nothing():
            outcome = train_step(state, task, batch)
        if number >= 3:
            found[str(number)] = [outcome.fault, before == digest(state), state.step, state.updates]
    return state.world.gather(found)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _poisoned_gradient(state: TrainState) -> Iterator[None]:
    sound = state.weights.gradients

    def gradients() -> list[Tensor]:
        found = sound()
        next(g for g in found if g.numel()).view(-1)[0] = torch.inf
        return found

    state.weights.gradients = gradients  # type: ignore[method-assign]
    yield
    del state.weights.gradients


# ---- a save that fails on one process


def failing_save(folder: Path, where: str) -> Any:
    """A run whose second save fails on the last process alone, when it opens its file or writes its first tensor:
    (class and words of what ends the run, steps done) on each process. Saves are asynchronous; the process that fails
    lets its save end before it asks for the next batch."""
    config = tiny(batch_size=8, steps=40, checkpoint_every=2, log_every=0, attention_every=0)
    state, task, loader = started(config, world())
    last = state.world.rank == state.world.size - 1
    save.SHARD_BYTES = 1 << 14
    trainer = Trainer(config, task, state, loader.from_step, folder / f"fail-{where}", lambda record: None,
                      watchdog=Watchdog(state.world, 600.0))  # fmt: skip

    def batches(first: int, end: int, offset: int) -> Iterator[Batch]:
        for batch in loader.from_step(first, end, offset):
            if state.step % 2 == 0 and last and trainer.saver._thread is not None:
                trainer.saver._thread.join()
            yield batch

    trainer.batches = batches
    with _failing_writer(where, lambda: last and state.step >= 4):
        try:
            trainer.fit()
            said = ["", ""]
        except LditError as error:
            said = [type(error).__name__, str(error)]
    return state.world.gather([*said, state.step])


@contextmanager
def _failing_writer(where: str, now: Callable[[], bool]) -> Iterator[None]:
    class Failing(sets.ShardWriter):
        def __init__(self, *arguments: Any) -> None:
            if where == "open" and now():
                raise OSError(errno.EIO, "injected")
            super().__init__(*arguments)

        def add(self, tensor: Tensor) -> None:
            if where == "add" and now():
                raise OSError(errno.EIO, "injected")
            super().add(tensor)

    save.ShardWriter, sound = Failing, save.ShardWriter  # type: ignore[misc]
    try:
        yield
    finally:
        save.ShardWriter = sound  # type: ignore[misc]


# ---- a step that one process cannot read


def failing_restore(folder: Path, where: str) -> Any:
    """A step that all have verified and the last process cannot read, when a run resumes or rolls back: (class and
    words of what ends the run, whether another is to print it) on each process."""
    w = world(timeout=LIMIT)
    config = tiny(batch_size=8, steps=2, log_every=0, attention_every=0, sample_every=0)
    config = replace(config, data=replace(config.data, workers=0), parallel=ParallelConfig(timeout=LIMIT))
    run = folder / f"unread-{where}"
    with ExitStack() as stack:
        flow._train(Experiment(config=config), run, w, stack)
    state, task, loader = started(config, w)
    trainer = Trainer(config, task, state, loader.from_step, run, lambda record: None, Watchdog(w, LIMIT))
    longer = replace(config, train=replace(config.train, steps=4))
    sound = checkpointing.restore

    def restore(step: Path, into: TrainState) -> None:
        if w.rank == w.size - 1:
            raise SourceError(f"{step.name} cannot be read")
        sound(step, into)

    checkpointing.restore = restore
    try:
        with ExitStack() as stack:
            found = _met(
                lambda: (
                    trainer._roll_back("a")
                    if where == "back"
                    else flow._train(Experiment(config=longer), run, w, stack)
                )
            )
    finally:
        checkpointing.restore = sound
    return w.gather(found)


# ---- what the flags of `parallel` do


def gathered(folder: Path, how: str) -> Any:
    """After a forward pass without a backward one: the parts of the network whose weights are whole, and those whose
    weights are shared out."""
    config = tiny(batch_size=8)
    config = replace(config, model=replace(config.model, n_layers=3), parallel=ParallelConfig(reshard=how == "reshard"))
    state, task, loader = started(config, world())
    (batch,) = loader.from_step(0, 1)
    task.losses(state.weights.model, batch, state.world.device, torch.float32)
    found: tuple[set[str], set[str]] = set(), set()
    for name, p in state.weights.model.named_parameters():
        block, part = ".".join(name.split(".")[:2]), "modulations" if "adaLN" in name else ""
        found[isinstance(p, DTensor)].add(part or block if name.startswith("layers.") else "rest")
    return state.world.gather([sorted(names) for names in found])


def limits(folder: Path, _: str) -> Any:
    """Seconds after which the collectives of each group give up."""
    w = world(replicate=2, timeout=37.0)
    assert w.mesh is not None
    groups = {name: w.mesh.get_group(name) for name in (REPLICATE, SHARD, TP)}
    groups |= {"control": w.control, "saving": w.saving}
    groups |= {"circle": w.model_group.group, "saving circle": w.saving_model_group.group}
    backends = {name: group._get_backend(torch.device("cpu")) for name, group in groups.items()}
    return w.gather({name: backend.options._timeout.total_seconds() for name, backend in backends.items()})


# ---- what processes say to each other


def words(folder: Path, _: str) -> Any:
    """[what each process got or which error it met, whether another is to print it] for one fault after another."""
    w = world()
    last = w.size - 1
    found = {
        "sound": _met(lambda: w.run_on_all(lambda: w.rank)),
        "own class": _met(lambda: w.run_on_all(lambda: _raise(SourceError("no é")) if w.rank == last else 1)),
        "os": _met(lambda: w.run_on_all(lambda: _raise(OSError(errno.EIO, "broken")) if w.rank == last else 1)),
        "worst": _met(lambda: w.run_on_all(lambda: _raise((RunError if w.rank == last else SourceError)("stale")))),
        "alike": _met(lambda: w.run_on_all(lambda: _raise(SourceError("same")))),
        "first": _met(lambda: w.from_rank0(lambda: _raise(SourceError("first")))),
        "after": _met(lambda: w.from_rank0(lambda: {"from": w.rank})),
        "gather": _met(lambda: w.gather(["é" * w.rank, w.rank])),
    }
    return w.gather(found)


def _met(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (LditError, OSError) as error:
        return [type(error).__name__, str(error), getattr(error, "said_elsewhere", False)]


def _raise(error: Exception) -> Any:
    raise error


SHAPES = [((5, 3), None), ((7,), None), ((3,), None), ((), None), ((1, 4), None), ((4, 8), 1), ((8, 2), 0), ((4,), 0),
          ((9, 4), 1), ((12, 1), 0), ((2, 3, 5), None)]  # fmt: skip


def exchange(folder: Path, cut: str) -> Any:
    """Tensors of uneven sizes, some with empty parts, made whole and given out again in rounds of one a process, with
    a gap in the last round: the names of those that came back changed, on each process."""
    shard, tp, replicate = map(int, cut.split("x"))
    w = world(tp=tp, replicate=replicate)
    assert w.shard == shard
    model_group, wrong = w.model_group, []
    layouts = [Layout(shape, axis if tp > 1 else None, tp, shard) for shape, axis in SHAPES]
    for first in range(0, len(layouts), len(model_group)):
        chosen: list[Layout | None] = list(layouts[first : first + len(model_group)])
        chosen += [None] * (len(model_group) - len(chosen))
        full = [None if x is None else _numbers(x, first + i) for i, x in enumerate(chosen)]
        parts = [_mine(x, f, model_group.here) for x, f in zip(chosen, full, strict=True)]
        whole = gather_whole(parts, chosen, model_group)
        own = full[model_group.me]
        if (whole is None) != (own is None) or (own is not None and not torch.equal(own, whole)):
            wrong.append(f"gather {first + model_group.me}")
        back = scatter_parts(None if own is None else own.clone(), chosen, model_group, torch.empty(0))
        for i, (layout, value, part) in enumerate(zip(chosen, full, back, strict=True)):
            sound = part is None if layout is None else torch.equal(part, view(value, layout.part(*model_group.here)))
            wrong += [] if sound else [f"scatter {first + i}"]
    return w.gather(wrong)


def _numbers(layout: Layout, seed: int) -> Tensor:
    return torch.randn(layout.shape, generator=torch.Generator().manual_seed(seed))


def _mine(layout: Layout | None, full: Tensor | None, here: tuple[int, int]) -> Tensor | None:
    """This process's part; of equal copies all but the first are spoilt, since only that one is to be asked."""
    if layout is None or full is None:
        return None
    part = view(full, layout.part(*here)).clone()
    return part if layout.sent_by(*here) else torch.full_like(part, torch.nan)


CHECKS: dict[str, Callable[[Path, str], Any]] = {
    "write": write, "read": read, "not-finite": not_finite, "failing-save": failing_save, "words": words,
    "failing-restore": failing_restore, "gathered": gathered, "limits": limits, "exchange": exchange,
    "skipping": data_checks.skipping, "autoencoder": data_checks.autoencoder,
    "classifier": data_checks.classifier, "evaluation": data_checks.evaluation,
}  # fmt: skip
