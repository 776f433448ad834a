"""Moments and scores of features that lie on several processes: the same on every process, and those of one process
but for rounding. One job of four real processes makes worlds of one, two and four."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from distributed.jobs import HERE, LIMIT, ROOT
from distributed.moments_job import PROCESSES, ROWS, WIDTH, WORLDS, data, shares
from eval.evaluation import folder as images
from eval.evaluation import noise, rows_of

from ldit.eval.metrics.frechet import frechet_distance

pytestmark = pytest.mark.timeout(900)

Found = list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each process has found."""
    folder = tmp_path_factory.mktemp("moments")
    images(folder / "a", noise(23, 0))
    images(folder / "b", noise(31, 1, low=40))
    rows = rows_of(noise(40, 2))
    np.savez(folder / "statistics.npz", mu=rows.mean(0), sigma=np.cov(rows.T), arr_0=noise(31, 1, low=40))
    paths = (ROOT / "src", ROOT / "tests")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    started = [
        subprocess.Popen([sys.executable, str(HERE / "moments_job.py"), str(folder), str(rank)],
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
        for rank in range(PROCESSES)
    ]  # fmt: skip
    try:
        for process in started:
            _, complaints = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, complaints[-6000:]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [dict(np.load(folder / f"found-{rank}.npz")) for rank in range(PROCESSES)]


def test_the_shares_are_uneven_and_one_is_empty() -> None:
    counts = [sum(map(len, share)) for share in shares(4)]
    assert sum(counts) == ROWS and counts[2] == 0 and len(set(counts)) > 2


@pytest.mark.parametrize("size", WORLDS)
def test_every_process_has_the_same_bits(found: Found, size: int) -> None:
    for key in (f"{name}-{size}" for name in ("count", "mean", "covariance", "score")):
        assert all(np.array_equal(found[rank][key], found[0][key]) for rank in range(size))
        assert all(key not in found[rank] for rank in range(size, PROCESSES))


@pytest.mark.parametrize("size", WORLDS)
def test_they_are_those_of_one_process(found: Found, size: int) -> None:
    """Sums of 120 float64 numbers in another order: some 1e-15 of their size."""
    exact = data(0).double().numpy()
    assert int(found[0][f"count-{size}"]) == ROWS
    mean, covariance = found[0][f"mean-{size}"], found[0][f"covariance-{size}"]
    assert np.abs(mean - exact.mean(0)).max() < 1e-14 * np.abs(exact).max()
    assert np.abs(covariance - np.cov(exact, rowvar=False)).max() < 1e-13 * np.abs(covariance).max()
    assert found[0][f"score-{size}"] == pytest.approx(found[0]["score-1"], rel=1e-12)


@pytest.mark.parametrize("size", WORLDS[1:])
def test_a_distance_from_them_is_that_of_one_process(found: Found, size: int) -> None:
    """From a singular reference, of 30 rows 40 wide: 1e-10 relative."""
    other = data(2)[:30].double()
    reference = other.mean(0), torch.from_numpy(np.cov(other.numpy(), rowvar=False))
    assert len(other) < WIDTH
    distances = [
        frechet_distance(*(torch.from_numpy(found[0][f"{name}-{n}"]) for name in ("mean", "covariance")), *reference)
        for n in (1, size)
    ]
    assert distances[1] == pytest.approx(distances[0], rel=1e-10) and distances[0] > 1.0


@pytest.mark.parametrize("size", WORLDS[1:])
def test_figures_of_images_are_those_of_one_process(found: Found, size: int) -> None:
    """The same blocks give the same features; moments are merged in another order, rows are put in their own."""
    names = [key.removesuffix("-1") for key in found[0] if key.startswith("figure-") and key.endswith("-1")]
    assert len(names) == 13
    for name in names:
        assert all(np.array_equal(found[rank][f"{name}-{size}"], found[0][f"{name}-{size}"]) for rank in range(size))
        assert found[0][f"{name}-{size}"] == pytest.approx(found[0][f"{name}-1"], rel=1e-10)


def test_what_one_process_cannot_do_all_stop_at(found: Found) -> None:
    """At the next block, not at the end of their shares, which were three blocks and two."""
    assert [int(found[rank]["stopped-calls"]) for rank in (0, 1)] == [1, 1]
    assert str(found[1]["stopped-said"]) == "ValueError: broken"
    assert str(found[0]["stopped-said"]) == "RunError: process 1: broken"
