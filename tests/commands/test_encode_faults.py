"""What befalls `ldit encode`: damage, bad images, reads that hang, others at the same work, full disks, signals."""

import errno
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands.encoding import (
    SIZE,
    TRAIN,
    FakeCodec,
    contents,
    encode,
    job,
    refused,
    whole,
    widened,
    write_images,
)

from ldit.cli.main import dispatch
from ldit.commands import encode as flow
from ldit.data.formats.image_folder import ImageFolder
from ldit.data.latent_cache.reader import open_cache, open_latents
from ldit.data.latent_cache.writer import CacheJob
from ldit.data.source import open_data
from ldit.errors import RunError


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped": flipped, "truncated": lambda path: os.truncate(path, 100), "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
}  # fmt: skip


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "shard-00000.json"])
@pytest.mark.parametrize("way", DAMAGE)
def test_what_was_damaged_in_between_is_made_again(
    source: Path, tmp_path: Path, run: Callable[..., bool], caplog: pytest.LogCaptureFixture, name: str, way: str
) -> None:
    alone = whole(source, tmp_path / "alone", run)
    out = tmp_path / "out"
    assert not run(job(source, out), world=2)
    DAMAGE[way](out / name)
    logging.getLogger("ldit").propagate = True
    assert run(job(source, out)) and contents(out) == alone
    assert ("made again" in caplog.text) == ((name, way) != ("shard-00000.json", "missing"))


def test_damage_of_another_process_shard_is_not_sealed(source: Path, tmp_path: Path, run: Callable[..., bool]) -> None:
    """The process that comes last does not read the others' shards again, but a missing or short one it notices."""
    alone = whole(source, tmp_path / "alone", run)
    out = tmp_path / "out"
    assert not run(job(source, out), rank=1, world=2)
    os.truncate(out / "shard-00001.safetensors", 64)
    assert not run(job(source, out), rank=0, world=2)
    assert not (out / "manifest.json").exists()
    assert run(job(source, out), rank=1, world=2) and contents(out) == alone


def test_a_bad_image_stops_or_is_left_out(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped first, then gone on with under the other policy: the rows before and after it are its neighbours'."""
    (source / "a/04.png").write_bytes(b"no picture")
    (source / "b/01.png").write_bytes(b"")
    out = tmp_path / "out"
    said = refused(monkeypatch, job(source, out))
    assert said.startswith(f"cannot read image {source / 'a/04.png'}: ")
    assert run(job(source, out, bad="skip", workers=2))
    latents, _ = open_cache(out)
    assert len(latents) == TRAIN - 2 and [shard.rows for shard in latents.cache.shards] == [3, 3, 2]
    skipped = latents.cache.skipped
    assert [where for where, _ in skipped] == ["a/04.png", "b/01.png"] and all(reason for _, reason in skipped)
    assert str(tmp_path) not in (out / "manifest.json").read_text()
    found, image = np.empty(latents.shape, np.float32), np.empty((3, SIZE, SIZE), np.float32)
    good = [i for i, name in enumerate(names(source)) if name not in dict(skipped)]
    train, _ = open_data(str(source), SIZE)
    for row, index in enumerate(good):
        label = train.read(index, False, image)
        assert latents.read(row, False, found) == label
        wanted = torch.cat(FakeCodec().moments(torch.from_numpy(image)[None]), dim=1)[0].numpy()
        assert np.array_equal(found, widened(wanted))
    assert whole(source, tmp_path / "again", run, bad="skip") == contents(out)


def names(source: Path) -> list[str]:
    train, _ = open_data(str(source), SIZE)
    return [train.where(index) for index in range(len(train))]


def test_latents_that_are_not_finite(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the mirror image too; the image is named, or left out."""

    class Infinite(FakeCodec):
        def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mean, logvar = super().moments(images)
            infinite = (images == mirrored).flatten(1).all(1)[:, None, None, None]
            return mean, torch.where(infinite, float("inf"), logvar)

    out, mirrored = tmp_path / "out", torch.empty(3, SIZE, SIZE)
    name = names(source)[1]
    open_data(str(source), SIZE)[0].read(1, True, mirrored.numpy())
    assert f"image {source / name}: its latents are not finite" in refused(monkeypatch, job(source, out), Infinite())
    assert run(job(source, out, bad="skip"), Infinite())
    assert open_latents(out).cache.skipped[0] == (name, "its latents are not finite")


def test_nothing_but_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_images(tmp_path / "set")
    for name in pixels:
        (tmp_path / "set" / name).write_bytes(b"")
    said = refused(monkeypatch, job(tmp_path / "set", tmp_path / "out", bad="skip", heldout=""))
    assert "none of its 13 images" in said and not (tmp_path / "out/manifest.json").exists()


def test_two_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., bool]) -> None:
    """The same command twice: both do everything, both end well, and what stands is what one makes."""
    alone = whole(source, tmp_path / "alone", run)
    for attempt in range(5):
        out, ended = tmp_path / f"out{attempt}", []
        monkeypatch.setattr(flow, "open_autoencoder", lambda job, device: FakeCodec(pause=0.002))
        threads = [
            threading.Thread(target=lambda out=out, ended=ended: ended.append(flow.encode(job(source, out))))  # type: ignore[misc]
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ended == [True] * 3 and contents(out) == alone


def test_who_comes_late_leaves_the_cache_alone(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that writes a shard while another finishes: its shard, whose bits may differ, does not replace the one
    that is sealed, and it leaves nothing behind."""
    alone = whole(source, tmp_path / "alone", run)
    out, publish = tmp_path / "out", CacheJob._publish

    def late(self: CacheJob, part: Any, shard: int, half: Path, sidecar: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(CacheJob, "_publish", publish)
            assert encode(patch, job(source, out))
        half.parent.mkdir()  # which the one that finished removed
        half.write_bytes(b"other bits")
        publish(self, part, shard, half, sidecar)

    monkeypatch.setattr(CacheJob, "_publish", late)
    assert run(job(source, out)) and contents(out) == alone


def test_a_living_writers_file_is_not_swept(source: Path, tmp_path: Path, run: Callable[..., bool]) -> None:
    """A process that begins removes the remains of the dead, not what another is writing."""
    out = tmp_path / "out"
    assert not run(job(source, out), rank=0, world=2)
    dead = out / ".work-0123abcd/shard-00001.safetensors"
    dead.parent.mkdir()
    dead.write_bytes(b"half")
    (out / "shard-00001.safetensors.tmp-0123abcd").write_bytes(b"half")  # as older versions left it
    beside = CacheJob(out, open_job(out), None)
    beside.description = json.loads((out / "encode.json").read_text())["cache"]
    assert beside.begin()
    (half := beside._half("shard-00001.safetensors")).write_bytes(b"half")
    assert run(job(source, out), rank=0, world=3) is False
    assert half.exists() and not dead.exists()
    beside.close()
    assert not half.exists() and not list(out.glob(".work-*"))
    assert run(job(source, out)) and not list(out.glob("*.tmp-*"))


def open_job(out: Path) -> Any:
    from ldit.config.serial import from_dict
    from ldit.data.latent_cache.description import CacheDescription

    return from_dict(CacheDescription, json.loads((out / "encode.json").read_text())["cache"])


def test_a_full_disk_says_what_is_needed(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of four is 4·(2·16·2 + 8) bytes and a header, about 512."""
    alone = whole(source, tmp_path / "alone", run)
    out, room = tmp_path / "out", iter([1 << 30, 500])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(room, 500)))
        said = refused(patch, job(source, out))
    assert "shard-00001.safetensors was not written: no space left: it needs about 800 bytes" in said
    assert "500 are free" in said and (out / "shard-00000.json").exists()
    assert run(job(source, out)) and contents(out) == alone


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_costs_one_shard(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    from ldit.storage.shards import ShardWriter

    def add(self: ShardWriter, tensor: torch.Tensor) -> None:
        raise OSError(fault, os.strerror(fault))

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", add)
        with pytest.raises(RunError, match=rf"shard-00000.*{os.strerror(fault)}"):
            run(job(source, tmp_path / "out"))
    assert contents(tmp_path / "out").keys() == {"encode.json"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_cleanly(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    """In the middle of writing a shard: no half file stays, the handlers of before are back."""
    from ldit.storage.shards import ShardWriter

    alone = whole(source, tmp_path / "alone", run)
    sound, out, seen = ShardWriter.add, tmp_path / "out", []

    def add(self: ShardWriter, tensor: torch.Tensor) -> None:
        if "00001" in self.path.name:
            seen.append(self.path.exists())
            os.kill(os.getpid(), number)
        sound(self, tensor)

    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", add)
        patch.setattr(flow, "open_autoencoder", lambda job, device: FakeCodec())
        options = ["--image-size", "8", "--shard-size", "4", "--batch-size", "3", "--workers", "2", "--device", "cpu"]
        assert dispatch("encode", [str(source), "--out", str(out), *options]) == code
    assert seen == [True] and [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert contents(out).keys() == {"encode.json", "shard-00000.json", "shard-00000.safetensors"}
    assert run(job(source, out)) and contents(out) == alone


@pytest.mark.parametrize("workers", [1, 3])
def test_d5_a_read_that_hangs_is_named(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Row D5, the encoder's part: a thread that hangs in a file system's call is left behind; what stands is kept."""
    alone, out, gate = whole(source, tmp_path / "alone", run), tmp_path / "out", threading.Event()
    sound = ImageFolder.read

    def read(self: ImageFolder, index: int, flip: bool, values: np.ndarray) -> int:
        if self.where(index) == "b/03.png":
            gate.wait(60)
        return sound(self, index, flip, values)

    monkeypatch.setattr(ImageFolder, "read", read)
    try:
        with pytest.raises(RunError, match=r"b/03\.png cannot be read: thread encode-\d has been at it for \d+ s"):
            run(job(source, out, workers=workers, timeout=0.2))
    finally:
        gate.set()
    assert (out / "shard-00000.json").exists() and not (out / "shard-00001.json").exists()
    assert run(job(source, out, workers=workers)) and contents(out) == alone
