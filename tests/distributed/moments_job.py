"""One of four processes that merge moments and scores, and evaluate images, in worlds of one, two and four of them;
`test_moments.py` judges.

python tests/distributed/moments_job.py FOLDER RANK
"""

import faulthandler
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from eval.evaluation import Inceptive, job
from torch import Tensor

from ldit.eval.evaluate import evaluate_with
from ldit.eval.features import Features
from ldit.eval.measure import STOP
from ldit.eval.metrics.moments import Moments
from ldit.eval.metrics.scores import InceptionScore
from ldit.parallel.world import World

PROCESSES, WORLDS = 4, (1, 2, 4)
ROWS, WIDTH, BATCH, SPLIT = 120, 40, 7, 25


def data(seed: int) -> Tensor:
    """Rows that do not lie about zero, as features after a ReLU."""
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).relu_() * (1.0 + seed)


def shares(size: int) -> list[list[range]]:
    """Batches of each rank, dealt in turn; in a world of four the third sees none."""
    batches = [range(first, min(first + BATCH, ROWS)) for first in range(0, ROWS, BATCH)]
    busy = [rank for rank in range(size) if (size, rank) != (4, 2)]
    return [batches[busy.index(rank) :: len(busy)] if rank in busy else [] for rank in range(size)]


def merged(world: World) -> dict[str, Any]:
    """Mean and covariance of rows, and the score of logits, of which this process saw its share alone."""
    own, score = Moments(WIDTH), InceptionScore(SPLIT)
    for batch in reversed(shares(world.size)[world.rank]):
        own.add(data(0)[batch.start : batch.stop])
        score.add(batch.start, data(1)[batch.start : batch.stop])
    before = own.count
    whole = own.merged(world)
    assert own.count == before
    value = np.array(score.merged(world).value())
    return {"count": whole.count, "mean": whole.mean.numpy(), "covariance": whole.covariance.numpy(), "score": value}


def evaluated(place: Path, world: World) -> dict[str, Any]:
    """Figures of 23 images in blocks of 5: in a world of four, one process has two of them, the others one."""
    report = evaluate_with(job(place / "a", place / "b", components=2, bootstrap=5), Inceptive(), world)
    known = evaluate_with(job(place / "a", place / "statistics.npz"), Inceptive(), world)
    found = {name: report[name] for name in [*report["figures"], "fid_2_interval"]}
    return found | {f"known-{name}": known[name] for name in known["figures"]}


def stopped(place: Path, world: World) -> dict[str, Any]:
    """The last process fails at its first block; the others are at theirs until they may know, and make no more."""
    calls = 0

    class Failing(Inceptive):
        def __call__(self, images: Tensor) -> Features:
            nonlocal calls
            calls += 1
            if world.rank == world.size - 1:
                raise ValueError("broken")
            until = time.monotonic() + 60
            while not world.alarmed(STOP) and time.monotonic() < until:
                time.sleep(0.01)
            return super().__call__(images)

    try:
        evaluate_with(job(place / "a", place / "statistics.npz"), Failing(), world)
        said = "nothing"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return {"calls": calls, "said": said}


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    faulthandler.dump_traceback_later(420, exit=True)  # a job that hangs says where, and ends
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    device, found = torch.device("cpu"), {}
    for size in WORLDS:
        group = dist.new_group(list(range(size)))
        if rank < size:
            world = World(device, rank, size, shard=size, control=None if size == 1 else group)
            found |= {f"{key}-{size}": value for key, value in merged(world).items()}
            found |= {f"figure-{key}-{size}": value for key, value in evaluated(folder, world).items()}
            if size == 2:
                store = dist.FileStore(str(folder / "alarms"), size)
                found |= {
                    f"stopped-{key}": value for key, value in stopped(folder, replace(world, store=store)).items()
                }
    np.savez(folder / f"found-{rank}.npz", **found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
