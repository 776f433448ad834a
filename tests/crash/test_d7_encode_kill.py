"""Row D7: kills while latents are cached, in 1, 2 and 4 processes; the same command goes on to the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from counts import count
from crash.processes import HERE, PATIENCE, ROOT, Job, Server, until
from PIL import Image

from ldit.data.latent_cache.reader import open_cache
from ldit.storage import manifest

pytestmark = [pytest.mark.crash, pytest.mark.timeout(900)]

KILLS = 3  # in a case, at least; cases take turns with 1, 2 and 4 processes
IMAGES, KEPT = 116, 12
FLAGS = ["--image-size", "16", "--shard-size", "8", "--batch-size", "4", "--device", "cpu"]


class EncodeServer(Server):
    """The fork server of encode_server.py."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT / "src"), str(HERE)])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "encode_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> Iterator[EncodeServer]:
    one = EncodeServer()
    yield one
    one.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of random images, and a damaged one in each part."""
    root, rng, listed = tmp_path_factory.mktemp("set"), np.random.default_rng(0), []
    for number in range(IMAGES + KEPT):
        name = f"{'ab'[number % 2]}/{number:03d}.png"
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(root / name)
        if number >= IMAGES:
            listed.append(name)
    (root / "heldout.txt").write_text("\n".join(listed))
    for name in ("a/040.png", listed[3]):
        (root / name).write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def undisturbed(encoder: EncodeServer, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    base = tmp_path_factory.mktemp("undisturbed")
    with Job(encoder, argv(source, base / "cache"), base / "said") as job:
        assert job.wait() == [0], job.said()
    train, kept = open_cache(base / "cache")
    assert kept is not None and (len(train), len(kept)) == (IMAGES - 1, KEPT - 1)
    return contents(base / "cache")


def argv(source: Path, out: Path) -> list[str]:
    return [str(source), "--out", str(out), "--bad", "skip", *FLAGS]


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def sidecars(out: Path) -> list[Path]:
    """In their places; those in work folders, which come and go, are not looked at."""
    return [*out.glob("shard-*.json"), *out.glob("heldout/shard-*.json")]


def stands(out: Path) -> int:
    return len(sidecars(out))


def strike(job: Job, out: Path, rng: random.Random) -> int:
    """Kill some of the processes, or all: at any time of their start, or some shards after where the job stood; how
    many were there to be killed."""
    goal = stands(out) + rng.randint(0, 3)
    if rng.random() < 0.75:
        until(lambda: stands(out) >= goal or not job.alive(), PATIENCE, job.said)
    time.sleep(rng.uniform(0.0, 0.06))
    victims = rng.sample(job.ranks, rng.randint(1, len(job.ranks)))
    return sum(one.send(signal.SIGKILL) for one in victims)


@pytest.mark.parametrize("case", range(-(-count(25, 100) // KILLS)))
def test_d7_killed_at_random_it_ends_the_same(
    case: int, encoder: EncodeServer, source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Every kill is gone on from, in the same or another number of processes. In between what stands is true, and in
    the end all files are byte-equal to those of a job that nobody killed; those whom nobody killed ended well."""
    rng, world, kills, attempt = random.Random(case), (1, 2, 4)[case % 3], 0, 0
    while kills < KILLS:
        out, attempt = tmp_path / f"cache{attempt}", attempt + 1
        assert attempt < 20, "the jobs were done before they could be killed"
        while kills < KILLS and not (out / "manifest.json").exists():
            with Job(encoder, argv(source, out), tmp_path / "said", world) as job:
                kills += strike(job, out, rng)
                codes = job.wait()
            assert set(codes) <= {0, -signal.SIGKILL}, job.said()
            if out.exists():
                true_so_far(out)
        size = rng.choice([1, 2, 4])
        with Job(encoder, argv(source, out), tmp_path / "said", size) as job:
            assert job.wait() == [0] * size, job.said()
        assert contents(out) == undisturbed
        open_cache(out)


def true_so_far(out: Path) -> None:
    """Each sidecar is true of its shard; a manifest of all that it lists."""
    for sidecar in sidecars(out):
        body = manifest.read_body(sidecar.parent, sidecar.name)
        for name, record in body["files"].items():
            assert manifest.sha256_file(sidecar.parent / name) == record["sha256"], name
    if (out / "manifest.json").exists():
        manifest.verify(out, [*manifest.read(out)])


@pytest.mark.parametrize("case", range(count(4, 20)))
def test_d7_signals_end_it_with_their_codes(
    case: int, encoder: EncodeServer, source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """No temporary file is left; the same command goes on."""
    rng, out = random.Random(case), tmp_path / "cache"
    number, code = ((signal.SIGTERM, 143), (signal.SIGINT, 130))[case % 2]
    with Job(encoder, argv(source, out), tmp_path / "said", 2) as job:
        goal = rng.randint(1, 5)
        until(lambda: stands(out) >= goal, PATIENCE, job.said)
        hit = [one.send(number) for one in job.ranks]
        codes = job.wait()
    assert any(hit) and all(found == (code if sent else 0) for found, sent in zip(codes, hit, strict=True)), job.said()
    assert not list(out.rglob(".work-*")) and "Traceback" not in job.said()
    with Job(encoder, argv(source, out), tmp_path / "said") as job:
        assert job.wait() == [0], job.said()
    assert contents(out) == undisturbed


def test_d7_two_jobs_at_once_and_another_codec(
    encoder: EncodeServer, source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """The same command twice at the same time ends well twice; another size is refused while they run, and after."""
    out = tmp_path / "cache"
    other = [*argv(source, out), "--image-size", "24"]
    with (
        Job(encoder, argv(source, out), tmp_path / "said") as one,
        Job(encoder, argv(source, out), tmp_path / "x") as two,
    ):
        until(lambda: stands(out) >= 1, PATIENCE, one.said)
        with Job(encoder, other, tmp_path / "other") as third:
            assert third.wait() == [2], third.said()
        assert one.wait() == [0] and two.wait() == [0], one.said() + two.said()
    assert contents(out) == undisturbed
    with Job(encoder, other, tmp_path / "other2") as third:
        assert third.wait() == [2] and "size 16, this command has 24" in third.said()
    assert contents(out) == undisturbed
