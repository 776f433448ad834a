"""Rows D1 and D5 of the reliability table, the loader's part: images that cannot be read, threads that hang."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from counts import count

from ldit.data.images.image_set import ImageSet
from ldit.data.loader import Loader, load_batch
from ldit.data.order import EpochOrder
from ldit.data.workers import Stuck, Workers
from ldit.errors import DataError, RunError

ROOT = Path(__file__).resolve().parents[2]
COUNT = 97
BAD = {3, 8, 40, 41, 42, 96}


class Fake(ImageSet):
    root, size, names, found = Path("fake"), 2, ("a",), COUNT

    def __init__(self, bad: set[int] | None = None, hangs: int = -1) -> None:
        self.bad, self.hangs, self.gate = BAD if bad is None else bad, hangs, threading.Event()

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index == self.hangs:
            self.gate.wait(60)
        if index in self.bad:
            raise DataError(f"cannot read image {self.where(index)}: broken")
        return np.full((2, 2, 3), index, np.uint8), 0

    def where(self, index: int) -> str:
        return f"a/{index:02d}.png"

    def fingerprint(self) -> str:
        return "fake"


@pytest.mark.parametrize(("workers", "parts"), list(product((0, 2), (1, 2, 4))))
def test_d1_an_epoch_leaves_out_the_bad_ones_and_nothing_else(workers: int, parts: int) -> None:
    """On any number of processes and threads: the faults are the bad images, every other sample is its own image
    (never a neighbour), and no row changes its place."""
    steps, batch = -(-COUNT // 8), 8
    shares = [
        Loader(Fake(), batch, 5, False, workers, part, parts, bad="skip").from_step(0, steps) for part in range(parts)
    ]
    order, faults = EpochOrder(COUNT, 5), {}
    for share in shares:
        for found in share:
            sound = dict(zip(found.positions, found.sound, strict=True))
            for row, position in enumerate(found.positions):
                index = order[position]
                assert sound[position] == (index not in BAD)
                expected = index / np.float32(127.5) - 1 if sound[position] else 0
                assert (found.inputs[row].numpy() == np.float32(expected)).all()
            for fault in found.faults:
                assert fault.where == f"a/{order[fault.position]:02d}.png" and fault.where in fault.reason
                if fault.position < COUNT:
                    faults[fault.where] = fault.position
    assert sorted(faults) == [f"a/{index:02d}.png" for index in sorted(BAD)]


def test_slices_of_a_batch_keep_their_faults() -> None:
    batch = load_batch(Fake(), range(10, 16), [0, 3, 1, 8, 40, 2], None, "skip")
    assert [fault.position for fault in batch.faults] == [11, 13, 14]
    assert [[fault.position for fault in part.faults] for part in batch.micro(2)] == [[11], [13], [14]]
    assert [part.sound for part in batch.micro(3)] == [(True, False, True), (False, False, True)]
    readable = batch.readable()
    assert readable.positions == (10, 12, 15) and not readable.faults
    assert torch.equal(readable.inputs, batch.inputs[[0, 2, 5]]) and len(readable.labels) == 3


def test_stop_is_the_default() -> None:
    with pytest.raises(DataError, match=r"a/03\.png: broken"):
        load_batch(Fake(), range(2), [1, 3], None)


@pytest.mark.parametrize("case", range(count(10, 10)))
def test_d5_a_thread_that_hangs_is_named_with_its_image(case: int) -> None:
    order = EpochOrder(COUNT, 1)
    hanging = order[5 + 7 * (case % 10)]
    data = Fake(set(), hanging)
    batches = Loader(data, 8, 1, False, workers=2, timeout=0.3).from_step(0, 12)
    began = time.monotonic()
    with pytest.raises(RunError, match=rf"a/{hanging:02d}\.png cannot be read: thread loader-\d has been at it"):
        list(batches)
    assert time.monotonic() - began < 10
    data.gate.set()


def test_d5_a_slow_set_is_not_a_hanging_one() -> None:
    """Each image has the whole time to itself, however many wait for the same batch."""

    class Slow(Fake):
        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            time.sleep(0.1)
            return super().__getitem__(index)

    (batch,) = Loader(Slow(set()), 24, 1, False, workers=2, timeout=1.0).from_step(0, 1)
    assert len(batch) == 24  # 1.2 s on two threads


def test_d5_a_hanging_thread_does_not_keep_the_process(tmp_path: Path) -> None:
    """A run whose image never comes ends by itself: exit code 1 and one line."""
    script = tmp_path / "hang.py"
    script.write_text(
        textwrap.dedent("""
            import sys, time
            from pathlib import Path
            import numpy as np
            from ldit.cli.main import guard
            from ldit.data.loader import Loader
            from ldit.data.images.image_set import ImageSet

            class Hanging(ImageSet):
                root, size, names, found = Path("slow-disk"), 2, (), 4
                def __len__(self): return 4
                def __getitem__(self, index):
                    time.sleep(1000 if index == 2 else 0)
                    return np.zeros((2, 2, 3), np.uint8), 0
                def where(self, index): return f"{index}.png"
                def fingerprint(self): return ""

            sys.exit(guard(lambda: len(list(Loader(Hanging(), 4, 0, False, 2, timeout=0.5).from_step(0, 1)))))
        """)
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 1, done.stderr
    assert "slow-disk: 2.png cannot be read: thread loader-" in done.stderr and done.stderr.count("\n") == 1


def test_d5_a_fault_of_any_kind_ends_the_batch_that_it_belongs_to() -> None:
    class Raising(Fake):
        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            raise MemoryError(f"no memory for {self.where(index)}")

    for workers in (0, 2):
        with pytest.raises(MemoryError, match=r"a/\d\d\.png"):
            next(Loader(Raising(set()), 4, 0, False, workers, bad="skip").from_step(0, 3))


def test_workers_take_jobs_in_order_and_drop_the_rest() -> None:
    workers, seen, gate = Workers(1, "test"), [], threading.Event()
    jobs = [workers.submit(lambda job, i=i: seen.append(i) or (i == 1 and gate.wait(30))) for i in range(5)]
    jobs[0].finish(10)
    with pytest.raises(Stuck, match=r"^thread test-0 has been at it for 0 s$"):
        jobs[1].finish(0.01)
    with pytest.raises(Stuck, match=r"^no thread has begun with it for 0 s$"):
        jobs[2].finish(0.01)
    closing = threading.Timer(0.05, gate.set)
    closing.start()
    workers.close(10)
    closing.join()
    assert seen == [0, 1] and not [t for t in threading.enumerate() if t.name.startswith("test-")]
    assert json.dumps([job.thread for job in jobs]) == '["test-0", "test-0", "", "", ""]'
