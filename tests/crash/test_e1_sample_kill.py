"""Row E1: kills while a set of images is made, in 1, 2 and 4 processes; the same command ends in the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from counts import count
from crash.processes import HERE, PATIENCE, ROOT, Job, Server, until
from PIL import Image
from pipeline.sets import contents, described, exported

pytestmark = [pytest.mark.crash, pytest.mark.timeout(900)]

KILLS = count(2, 3)  # in a case, at least; cases take turns with 1, 2 and 4 processes, and with folders and arrays
IMAGES = count(200, 1000)
BATCH = 4
KINDS = ("set", "set.npz")


class SampleServer(Server):
    """The fork server of sample_server.py."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT / "src"), str(HERE)])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "sample_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip


@pytest.fixture(scope="module")
def sampler() -> Iterator[SampleServer]:
    one = SampleServer()
    yield one
    one.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def undisturbed(
    sampler: SampleServer, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    base = tmp_path_factory.mktemp("undisturbed")
    for kind in KINDS:
        with Job(sampler, argv(source, base / kind), base / "said") as job:
            assert job.wait() == [0], job.said()
    found = {kind: contents(base / kind) for kind in KINDS}
    assert len(found["set"]) == IMAGES + 2 and len(set(found["set"].values())) == IMAGES + 2
    return found


def argv(source: Path, out: Path, cores: int = 1) -> list[str]:
    flags = [
        "--num",
        str(IMAGES),
        "--batch-size",
        str(BATCH),
        "--steps",
        "3",
        "--labels",
        "random",
        "--device",
        "cpu",
    ]
    return [str(cores), "--ckpt", str(source), "--out", str(out), *flags]


def stands(out: Path) -> int:
    """Blocks so far."""
    if out.suffix == ".npz":
        return len(list(out.with_name(f"{out.name}.parts").glob("block-*")))
    return len(list(out.glob("*.png"))) // BATCH


def complete(out: Path) -> bool:
    return out.exists() if out.suffix == ".npz" else (out / "samples.json").exists() and described(out)["complete"]


def strike(job: Job, out: Path, rng: random.Random) -> int:
    """Kill some of the processes, or all: at any time of their start, or some blocks after where the job stood; how
    many were there to be killed."""
    goal = stands(out) + rng.randint(0, IMAGES // BATCH // 4)
    if rng.random() < 0.75:
        until(lambda: stands(out) >= goal or not job.alive(), PATIENCE, job.said)
    time.sleep(rng.uniform(0.0, 0.06))
    victims = rng.sample(job.ranks, rng.randint(1, len(job.ranks)))
    return sum(one.send(signal.SIGKILL) for one in victims)


@pytest.mark.parametrize("case", range(count(4, 24)))
def test_e1_killed_at_random_it_ends_the_same(
    case: int, sampler: SampleServer, source: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Every kill is gone on from, in the same or another number of processes, of one core or two. In between what
    stands is true, and in the end all files are byte-equal to those of a set that nobody killed; those whom nobody
    killed ended well."""
    rng, world, kind = random.Random(case), (1, 2, 4)[case % 3], KINDS[case % 2]
    kills = attempt = 0
    while kills < KILLS:
        out, attempt = tmp_path / str(attempt) / kind, attempt + 1
        assert attempt < 20, "the sets were complete before they could be killed"
        while kills < KILLS and not complete(out):
            with Job(sampler, argv(source, out, rng.choice([1, 2])), tmp_path / "said", world) as job:
                kills += strike(job, out, rng)
                codes = job.wait()
            assert set(codes) <= {0, -signal.SIGKILL}, job.said()
            true_so_far(out, undisturbed[kind])
        size = rng.choice([1, 2, 4])
        with Job(sampler, argv(source, out), tmp_path / "said", size) as job:
            assert job.wait() == [0] * size, job.said()
        assert contents(out) == undisturbed[kind]


def true_so_far(out: Path, wanted: dict[str, bytes]) -> None:
    """Each image under its final name is whole and the right one; an array is there whole or not at all."""
    if out.suffix == ".npz":
        assert not out.exists() or out.read_bytes() == wanted[""]
        return
    for path in out.glob("*.png"):
        assert path.read_bytes() == wanted[f"/{path.name}"], path


@pytest.mark.parametrize("case", range(count(2, 10)))
def test_e1_signals_end_it_with_their_codes(
    case: int, sampler: SampleServer, source: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Nothing half written is left; the same command goes on."""
    rng, kind = random.Random(case), KINDS[case % 2]
    out, (number, code) = tmp_path / kind, ((signal.SIGTERM, 143), (signal.SIGINT, 130))[case % 2]
    with Job(sampler, argv(source, out, 2), tmp_path / "said", 2) as job:
        goal = rng.randint(1, 20)
        until(lambda: stands(out) >= goal, PATIENCE, job.said)
        hit = [one.send(number) for one in job.ranks]
        codes = job.wait()
    assert any(hit) and all(found == (code if sent else 0) for found, sent in zip(codes, hit, strict=True)), job.said()
    assert not list(tmp_path.rglob(".work-*")) and "Traceback" not in job.said()
    with Job(sampler, argv(source, out), tmp_path / "said") as job:
        assert job.wait() == [0], job.said()
    assert contents(out) == undisturbed[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_e1_two_at_once_and_another_set(
    kind: str, sampler: SampleServer, source: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """The same command twice at the same time ends well twice; another seed is refused while they run, and after."""
    out = tmp_path / kind
    other = [*argv(source, out), "--seed", "1"]
    with (
        Job(sampler, argv(source, out), tmp_path / "one") as one,
        Job(sampler, argv(source, out), tmp_path / "two") as two,
    ):
        until(lambda: stands(out) >= 1, PATIENCE, one.said)
        with Job(sampler, other, tmp_path / "other") as third:
            assert third.wait() == [2], third.said()
        assert one.wait() == [0] and two.wait() == [0], one.said() + two.said()
    assert contents(out) == undisturbed[kind]
    with Job(sampler, other, tmp_path / "other2") as third:
        assert third.wait() == [2] and "made with seed 0, this command has 1" in third.said()
    assert contents(out) == undisturbed[kind]
    if kind == "set":
        with Image.open(out / "000007.png") as image:
            assert image.size == (8, 8)
