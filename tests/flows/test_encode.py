"""`ldit encode`: what is written, by how many processes, what goes on after a stop, and what is refused."""

import errno
import json
import logging
import os
import re
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
from flows.encoding import (
    KEPT,
    SIZE,
    TRAIN,
    FakeCodec,
    contents,
    encode,
    expected,
    job,
    pictures,
    refused,
    widened,
)

from ldit.checkpoint import manifest
from ldit.cli import encode as cli
from ldit.data.cache_writer import Making
from ldit.data.latents import open_cache, open_latents
from ldit.data.source import open_data
from ldit.errors import ConfigError, DataError, RunError, SourceError
from ldit.flows import encode as flow


@pytest.fixture
def source(tmp_path: Path) -> Path:
    pictures(tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    return lambda one, codec=None, rank=0, world=1: encode(monkeypatch, one, codec, rank, world)


def whole(source: Path, out: Path, run: Callable[..., bool], **options: Any) -> dict[str, bytes]:
    """The files of an undisturbed cache."""
    assert run(job(source, out, **options))
    return contents(out)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_picture_and_its_mirror_image(tmp_path: Path, run: Callable[..., bool], dtype: str) -> None:
    """fp32 to the bit, bf16 the nearest, halves to even; labels and order of the set; held-out pictures apart."""
    pixels = pictures(tmp_path / "set")
    assert run(job(tmp_path / "set", tmp_path / "out", dtype=dtype))
    parts = open_cache(tmp_path / "out")
    names = sorted(list(pixels)[:TRAIN]), sorted(list(pixels)[TRAIN:])
    for latents, listed in zip(parts, names, strict=True):
        assert latents is not None and len(latents) == len(listed) and latents.shape == (4, 2, 2)
        assert latents.names == ("a", "b")
        for index, name in enumerate(listed):
            wanted = np.concatenate(expected(pixels[name]), axis=1)
            for flip in (False, True):
                found = np.full(latents.shape, np.nan, np.float32)
                assert latents.read(index, flip, found) == "ab".index(name[0])
                exact = wanted[int(flip)]
                assert np.array_equal(found, exact if dtype == "fp32" else widened(exact)), (name, flip)
    assert (widened(wanted) != wanted).any()


def test_mirrored_is_what_the_set_calls_mirrored(source: Path, tmp_path: Path, run: Callable[..., bool]) -> None:
    """Pictures are read once: the mirror image of the tensor is that of the picture."""
    assert run(job(source, tmp_path / "out", dtype="fp32"))
    train, _ = open_data(str(source), SIZE)
    image, found = np.empty(train.shape, np.float32), np.empty((4, 2, 2), np.float32)
    train.read(3, True, image)
    open_latents(tmp_path / "out").read(3, True, found)
    moments = FakeCodec().moments(torch.from_numpy(image)[None])
    assert np.array_equal(found, torch.cat(moments, dim=1)[0].numpy())


def test_the_layout_is_the_contracts(source: Path, tmp_path: Path, run: Callable[..., bool]) -> None:
    out = tmp_path / "out"
    files = whole(source, out, run)
    shards = [f"shard-{i:05d}.safetensors" for i in range(3)]
    assert files.keys() == {"manifest.json", *shards, "heldout/manifest.json", "heldout/shard-00000.safetensors"}
    manifest.verify(out)
    manifest.verify(out / "heldout")
    cache = json.loads(files["manifest.json"])["cache"]
    assert cache["shards"] == [
        {"file": shards[0], "first": 0, "last": 4, "rows": 4},
        {"file": shards[1], "first": 4, "last": 8, "rows": 4},
        {"file": shards[2], "first": 8, "last": 10, "rows": 2},
    ]
    train, kept = open_data(str(source), SIZE)
    assert kept is not None
    assert cache["codec"] == {"fingerprint": FakeCodec().fingerprint(), "name": "fake", "factor": 4, "channels": 2,
                              "scale": 2.0, "shift": 0.5}  # fmt: skip
    decoding = {"exif": False, "background": [255, 255, 255], "max_pixels": 1 << 26}
    assert cache["source"] == {"pictures": TRAIN, "sha256": train.fingerprint(), "decoding": decoding}
    assert cache["heldout"] == {"pictures": KEPT, "sha256": kept.fingerprint()}
    said = {key: cache[key] for key in ("version", "crop", "size", "flips", "dtype", "shape", "names", "skipped")}
    assert said == {"version": 1, "crop": "adm-center", "size": SIZE, "flips": ["plain", "flipped"], "dtype": "bf16",
                    "shape": [2, 2, 2, 2], "names": ["a", "b"], "skipped": []}  # fmt: skip
    assert str(tmp_path) not in files["manifest.json"].decode()


@pytest.mark.parametrize("world", [2, 4, 7])
def test_the_number_of_processes_changes_nothing(
    source: Path, tmp_path: Path, run: Callable[..., bool], world: int
) -> None:
    """Four shards in all; in any order of the processes, and with reading threads."""
    alone = whole(source, tmp_path / "alone", run)
    out = tmp_path / "shared"
    ended = [run(job(source, out, workers=2), rank=rank, world=world) for rank in reversed(range(world))]
    assert ended[-1] and not ended[0] and contents(out) == alone


def test_a_codec_that_falls_back_to_fp32_does_so_within_a_shard(
    source: Path, tmp_path: Path, run: Callable[..., bool]
) -> None:
    """A picture that overflows fp16 makes the codec compute in fp32 from then on. The next shard is in fp16 again, as
    another process would make it."""

    class Half(FakeCodec):
        dtype = torch.float16

        def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if (images == overflowing).flatten(1).all(1).any():
                self.dtype = torch.float32
            mean, logvar = super().moments(images)
            return mean + (self.dtype is torch.float32), logvar

    overflowing = torch.empty(3, SIZE, SIZE)
    open_data(str(source), SIZE)[0].read(1, False, overflowing.numpy())
    assert run(job(source, tmp_path / "alone"), Half())
    for rank in range(4):
        run(job(source, tmp_path / "out"), Half(), rank, 4)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    whole(source, tmp_path / "plain", run)
    different = [
        name for name, data in contents(tmp_path / "out").items() if data != contents(tmp_path / "plain")[name]
    ]
    assert sorted(different) == ["manifest.json", "shard-00000.safetensors"]


@pytest.mark.parametrize("stop", range(12))
def test_it_goes_on_where_it_failed(source: Path, tmp_path: Path, run: Callable[..., bool], stop: int) -> None:
    """The codec fails at its n-th call; the same command makes what is missing, nothing twice, to the same bytes."""

    class Failing(FakeCodec):
        def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if self.calls == stop:
                raise RuntimeError("injected")
            return super().moments(images)

    undisturbed = FakeCodec()
    assert run(job(source, tmp_path / "alone"), undisturbed)
    assert undisturbed.calls == 12  # batches of 3 + 1, 3 + 1, 2 and 3, plain and mirrored
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="injected"):
        run(job(source, out), Failing())
    assert not list(out.rglob("*.tmp-*"))
    again = FakeCodec()
    standing = len(list(out.rglob("shard-*.json")))
    assert run(job(source, out), again) and contents(out) == contents(tmp_path / "alone")
    assert again.calls == [12, 8, 4, 2][standing]


def test_a_whole_cache_is_left_alone(
    source: Path, tmp_path: Path, run: Callable[..., bool], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is encoded again; what a killed finisher left over goes."""
    out, again = tmp_path / "out", FakeCodec()
    before = whole(source, out, run)
    for name in ("encode.json", "shard-00001.json", "shard-00001.safetensors.tmp-01234567", "heldout/shard-00000.json"):
        (out / name).write_text("{}")
    with caplog.at_level(logging.INFO, "ldit"):
        logging.getLogger("ldit").propagate = True
        assert run(job(source, out), again)
    assert again.calls == 0 and contents(out) == before and "nothing is left to do" in caplog.text


def other_size(one: dict[str, Any]) -> None:
    one["image_size"] = 12


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"image_size": 12}, "size 8, this command has 12"),
    ({"dtype": "fp32"}, "dtype bf16, this command has fp32"),
    ({"precision": "bf16"}, "precision fp32, this command has bf16"),
    ({"shard_size": 5}, "shard_size 4, this command has 5"),
    ({"exif": True}, "source.decoding.exif False, this command has True"),
    ({"heldout": ""}, "source.pictures 10, this command has 13"),
]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("options", "message"), OTHERS, ids=[str(o) for o, _ in OTHERS])
def test_another_job_is_refused(
    source: Path,
    tmp_path: Path,
    run: Callable[..., bool],
    monkeypatch: pytest.MonkeyPatch,
    finished: bool,
    options: dict[str, Any],
    message: str,
) -> None:
    out = tmp_path / "out"
    assert run(job(source, out), world=1 if finished else 2) == finished
    before = contents(out)
    assert message in refused(monkeypatch, job(source, out, **options))
    assert contents(out) == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_codec_is_refused_with_both_fingerprints(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    out = tmp_path / "out"
    assert run(job(source, out), world=1 if finished else 2) == finished
    said = refused(monkeypatch, job(source, out), FakeCodec("other"))
    digits = [FakeCodec(name).fingerprint()[:12] for name in ("fake", "other")]
    assert re.search(".*".join(digits), said) and FakeCodec().fingerprint() not in said


def test_other_pictures_are_refused_with_both_fingerprints(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert not run(job(source, out), world=2)
    before = open_data(str(source), SIZE)[0].fingerprint()
    os.rename(source / "a/00.png", source / "a/77.png")
    after = open_data(str(source), SIZE)[0].fingerprint()
    assert re.search(f"source.sha256 {before[:12]}, .*{after[:12]}", refused(monkeypatch, job(source, out)))


def test_a_codec_that_was_moved_is_the_same(source: Path, tmp_path: Path, run: Callable[..., bool]) -> None:
    """By its fingerprint; the name that it had first is kept, so that the bytes are the same."""

    class Moved(FakeCodec):
        def __init__(self) -> None:
            super().__init__()
            self.config = type(self.config)(name="elsewhere", scale=2.0, shift=0.5, factor=4)

    alone = whole(source, tmp_path / "alone", run)
    assert not run(job(source, tmp_path / "out"), world=2)
    assert run(job(source, tmp_path / "out"), Moved()) and contents(tmp_path / "out") == alone


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


def test_a_bad_picture_stops_or_is_left_out(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped first, then gone on with under the other policy: the rows before and after it are its neighbours'."""
    (source / "a/04.png").write_bytes(b"no picture")
    (source / "b/01.png").write_bytes(b"")
    out = tmp_path / "out"
    said = refused(monkeypatch, job(source, out))
    assert said.startswith(f"cannot read picture {source / 'a/04.png'}: ")
    assert run(job(source, out, bad="skip", workers=2))
    latents, _ = open_cache(out)
    assert len(latents) == TRAIN - 2 and [shard.rows for shard in latents.description.shards] == [3, 3, 2]
    skipped = latents.description.skipped
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
    """Of the mirror image too; the picture is named, or left out."""

    class Infinite(FakeCodec):
        def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mean, logvar = super().moments(images)
            if self.calls % 4 == 2:  # the mirror images of a shard's first batch
                logvar = logvar.clone()
                logvar[1, 0, 0, 0] = float("inf")
            return mean, logvar

    out = tmp_path / "out"
    name = names(source)[1]
    assert f"picture {source / name}: its latents are not finite" in refused(monkeypatch, job(source, out), Infinite())
    assert run(job(source, out, bad="skip"), Infinite())
    assert open_latents(out).description.skipped[0] == (name, "its latents are not finite")


def test_nothing_but_bad_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = pictures(tmp_path / "set")
    for name in pixels:
        (tmp_path / "set" / name).write_bytes(b"")
    said = refused(monkeypatch, job(tmp_path / "set", tmp_path / "out", bad="skip", heldout=""))
    assert "none of its 13 pictures" in said and not (tmp_path / "out/manifest.json").exists()


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
    out, publish = tmp_path / "out", Making._publish

    def late(self: Making, part: Any, number: int, temporary: Path, standing: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Making, "_publish", publish)
            assert encode(patch, job(source, out))
        temporary.write_bytes(b"other bits")
        publish(self, part, number, temporary, standing)

    monkeypatch.setattr(Making, "_publish", late)
    assert run(job(source, out)) and contents(out) == alone


def test_a_living_writers_file_is_not_swept(source: Path, tmp_path: Path, run: Callable[..., bool]) -> None:
    """A process that begins removes the remains of the dead, not what another is writing."""
    out = tmp_path / "out"
    assert not run(job(source, out), rank=0, world=2)
    dead = out / "shard-00001.safetensors.tmp-0123abcd"
    dead.write_bytes(b"half")
    beside = Making(out, open_job(out), None)
    with beside._temporary(out / "shard-00001.safetensors") as living:
        assert run(job(source, out), rank=0, world=3) is False
        assert living.exists() and not dead.exists()
    assert not living.exists()


def open_job(out: Path) -> Any:
    from ldit.config.serial import from_dict
    from ldit.data.cache import CacheDescription

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
    assert "shard-00001.safetensors was not written: no space left: it needs 800 bytes" in said
    assert "500 are free" in said and (out / "shard-00000.json").exists()
    assert run(job(source, out)) and contents(out) == alone


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_costs_one_shard(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    from ldit.checkpoint.sets import ShardWriter

    def add(self: ShardWriter, tensor: torch.Tensor) -> None:
        raise OSError(fault, os.strerror(fault))

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", add)
        with pytest.raises(RunError, match=rf"shard-00000.*{os.strerror(fault)}"):
            run(job(source, tmp_path / "out"))
    assert contents(tmp_path / "out").keys() == {"encode.json", "heldout/"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_cleanly(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    """In the middle of writing a shard: no half file stays, the handlers of before are back."""
    from ldit.checkpoint.sets import ShardWriter

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
        assert cli.run([str(source), "--out", str(out), *options]) == code
    assert seen == [True] and [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert contents(out).keys() == {"encode.json", "heldout/", "shard-00000.json", "shard-00000.safetensors"}
    assert run(job(source, out)) and contents(out) == alone


def test_places_that_are_no_place(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    before = whole(source, cache, run)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/shard-00000.safetensors").write_text("somebody's")
    for place, word in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "full", "notes.txt"),
        (tmp_path / "shards", "shard-00000"),
        (cache / "inside", "sealed"),
        (cache / "heldout/inside", "sealed"),
        (cache / "heldout", "sealed"),
        (source / "cache", "lies inside"),
        (source, "lies inside"),
    ):
        assert word in refused(monkeypatch, job(source, place)), place
    assert contents(cache) == before and contents(tmp_path / "full") == {"notes.txt": b"mine"}
    assert sorted(p.name for p in source.iterdir()) == ["a", "b", "heldout.txt"]
    (cache / "manifest.json").write_text("{")
    assert "sealed" in refused(monkeypatch, job(source, cache))


def test_a_cache_is_no_source(source: Path, tmp_path: Path, run: Callable[..., bool]) -> None:
    whole(source, tmp_path / "cache", run)
    with pytest.raises(DataError, match="is a latent cache"):
        run(job(tmp_path / "cache", tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"image_size": 10}, "--image-size: 10 is not a multiple"),
        ({"image_size": 0}, "--image-size"),
        ({"shard_size": 0}, "--shard-size"),
        ({"batch_size": 0}, "--batch-size"),
        ({"workers": -1}, "--workers"),
        ({"scale": 0.0}, "--scale"),
        ({"scale": (1.0, 0.0)}, "--scale"),
        ({"shift": float("nan")}, "--shift"),
        ({"background": (0, 0, 256)}, "--background"),
        ({"device": "abacus"}, "--device"),
    ],
)
def test_numbers_that_cannot_be(
    source: Path, tmp_path: Path, run: Callable[..., bool], options: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(word)):
        run(job(source, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_damaged_job_is_named(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert not run(job(source, out), world=2)
    text = (out / "encode.json").read_text()
    (out / "encode.json").write_text(text.replace('"adm-center"', '"adm-centre"'))
    with pytest.raises(SourceError, match=r"encode\.json is damaged"):
        run(job(source, out))


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny autoencoder with its own scale, as diffusers writes it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=3,
        scaling_factor=0.7, shift_factor=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("root") / "tiny/vae"
    network.save_pretrained(folder)
    return folder


def test_the_command_with_a_real_autoencoder(
    source: Path, tmp_path: Path, autoencoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exactly what the codec gives for the same batches; the folder's own scale and shift, or those of the flags."""
    from ldit.codecs.open import open_codec
    from ldit.config.spec import AutoencoderConfig

    options = [str(source), "--codec", "tiny/vae", "--local-diffusers-model-root", str(autoencoder.parents[1]),
               "--image-size", "8", "--shard-size", "4", "--batch-size", "4", "--dtype", "fp32",
               "--device", "cpu"]  # fmt: skip
    out = tmp_path / "out"
    assert cli.run([*options, "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    latents = open_latents(out)
    codec = open_codec(AutoencoderConfig(name=str(autoencoder), scale=0.7, shift=0.1, factor=2))
    record = latents.description.codec
    assert (record.name, record.scale, record.shift, record.factor, record.channels) == ("tiny/vae", 0.7, 0.1, 2, 3)
    assert record.fingerprint == codec.fingerprint()  # type: ignore[union-attr]
    latents.description.check(out, codec.fingerprint(), 8)  # type: ignore[union-attr]
    train, _ = open_data(str(source), 8)
    for first in range(0, TRAIN, 4):
        rows = range(first, min(first + 4, TRAIN))
        images, found = torch.empty(len(rows), *train.shape), torch.empty(len(rows), *latents.shape)
        for flip in (False, True):
            for row, index in enumerate(rows):
                train.read(index, flip, images[row].numpy())
                latents.read(index, flip, found[row].numpy())
            assert torch.equal(found, torch.cat(codec.moments(images), dim=1))  # type: ignore[union-attr]
    other = tmp_path / "other"
    assert cli.run([*options, "--out", str(other), "--scale", "1", "2", "3", "--shift", "0.5"]) == 0
    record = open_latents(other).description.codec
    assert (record.scale, record.shift) == ((1.0, 2.0, 3.0), 0.5)
    with pytest.raises(ConfigError, match="--scale: 2 values for 3 channels"):
        cli.run([*options, "--out", str(tmp_path / "none"), "--scale", "1", "2"])
