"""Reading a latent cache that was not written by the code that writes them; damage of every kind is found."""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import sign
from safetensors.torch import save_file

from ldit.data.latent_cache import reader
from ldit.data.latent_cache.reader import LatentSamples, open_cache, open_latents
from ldit.data.loader import load_batch
from ldit.errors import DataError, LditError, RunError

CHANNELS, SIDE, FACTOR = 3, 2, 4
ROWS, LAST = (4, 0, 3), (4, 6, 9)  # of three shards; the second lost both of its images
CODEC, SOURCE = "c0de" * 16, "50ce" * 16


def body(dtype: str = "bf16", **changes: Any) -> dict[str, Any]:
    """The description of the cache below."""
    codec = {"name": "some/vae", "fingerprint": CODEC, "factor": FACTOR, "channels": CHANNELS,
             "scale": [1.0, 2.0, 3.0], "shift": 0}  # fmt: skip
    names = [f"shard-{i:05d}.safetensors" for i in range(3)]
    shards = [{"file": name, "first": first, "last": last, "rows": rows}
              for name, first, last, rows in zip(names, (0, *LAST), LAST, ROWS, strict=False)]  # fmt: skip
    return {
        "version": 1, "codec": codec, "crop": "adm-center", "size": SIDE * FACTOR, "flips": ["plain", "flipped"],
        "dtype": dtype, "precision": "fp32", "shape": [2, CHANNELS, SIDE, SIDE], "names": ["cat", "dog"],
        "source": {"pictures": 9, "sha256": SOURCE, "decoding": {"exif": False}}, "heldout": None, "shard_size": 4,
        "skipped": [["a/4.png", "empty"], ["a/5.png", "empty"]], "shards": shards, **changes,
    }  # fmt: skip


def tensors(dtype: str) -> list[dict[str, torch.Tensor]]:
    """Random bits that are numbers, so that bf16 is full width."""
    generator = torch.Generator().manual_seed(0)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    made = []
    for rows in ROWS:
        shape = (rows, 2, CHANNELS, SIDE, SIDE)
        mean, logvar = (torch.randn(shape, generator=generator).to(kind) for _ in range(2))
        made.append({"mean": mean, "logvar": logvar, "label": torch.arange(rows) % 2})
    return made


def seal(root: Path, cache: dict[str, Any]) -> None:
    """Write the manifest, true for what lies there."""
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and p.name != "manifest.json")
    files = {}
    for name in names:
        data = (root / name).read_bytes()
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (root / "manifest.json").write_text(json.dumps(sign({"format": 1, "files": files, "cache": cache})))


def build(root: Path, dtype: str = "bf16") -> Path:
    root.mkdir(parents=True)
    for number, shard in enumerate(tensors(dtype)):
        save_file(shard, root / f"shard-{number:05d}.safetensors")
    seal(root, body(dtype))
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return build(tmp_path / "cache")


@pytest.fixture
def fault() -> Callable[..., str]:
    """The one line by which a cache is refused."""

    def refused(work: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        with pytest.raises(LditError) as caught:
            work(*arguments, **options)
        assert isinstance(caught.value, DataError) and "\n" not in str(caught.value)
        return str(caught.value)

    return refused


def read(latents: LatentSamples, index: int, flip: bool) -> tuple[torch.Tensor, int]:
    out = torch.full(latents.shape, float("nan"))
    return out, latents.read(index, flip, out.numpy())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_sample_and_its_mirror_image(tmp_path: Path, dtype: str) -> None:
    latents = open_latents(build(tmp_path / "cache", dtype))
    assert (len(latents), latents.num_before_cap, latents.shape) == (7, 7, (2 * CHANNELS, SIDE, SIDE))
    assert latents.names == ("cat", "dog") and latents.root == tmp_path / "cache"
    index = 0
    for number, shard in enumerate(tensors(dtype)):
        for row in range(ROWS[number]):
            assert latents.where(index) == f"shard-{number:05d}.safetensors[{row}]"
            for flip in (False, True):
                out, label = read(latents, index, flip)
                wanted = torch.cat([shard["mean"][row, int(flip)], shard["logvar"][row, int(flip)]])
                assert torch.equal(out, wanted.float()) and label == row % 2
            index += 1
    for outside in (7, -1):
        with pytest.raises(IndexError):
            read(latents, outside, False)


def test_every_bf16_is_widened_exactly(tmp_path: Path) -> None:
    """All 65,536, infinities, NaNs and zeros of both signs too."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    root = tmp_path / "cache"
    root.mkdir()
    mean = bits.reshape(1, 2, 2, 128, 128)
    label = torch.zeros(1, dtype=torch.int64)
    save_file({"mean": mean, "logvar": mean.clone(), "label": label}, root / "shard-00000.safetensors")
    made = body(shape=[2, 2, 128, 128], size=128 * FACTOR, skipped=[], names=None)
    made["codec"]["channels"], made["codec"]["scale"] = 2, 1.0
    made["source"]["pictures"] = 1
    made["shards"] = [{"file": "shard-00000.safetensors", "first": 0, "last": 1, "rows": 1}]
    seal(root, made)
    latents = open_latents(root)
    assert latents.names == ()
    for flip in (False, True):
        out = read(latents, 0, flip)[0].view(torch.int32)
        wanted = torch.arange(int(flip) << 15, (int(flip) + 1) << 15, dtype=torch.int64) << 16
        wanted = wanted.to(torch.int32).reshape(2, 128, 128)
        assert torch.equal(out, torch.cat([wanted, wanted]))


def test_rows_of_a_batch_that_do_not_lie_together(cache: Path) -> None:
    latents = open_latents(cache)
    batch = np.zeros((2, 2 * CHANNELS, SIDE, 2 * SIDE), np.float32)
    latents.read(3, True, batch[1, :, :, ::2])
    assert np.array_equal(batch[1, :, :, ::2], read(latents, 3, True)[0].numpy())
    assert not batch[0].any() and not batch[1, :, :, 1::2].any()


def test_training_and_heldout(cache: Path, fault: Callable[..., str]) -> None:
    assert open_cache(cache)[1] is None
    build(cache / "heldout", "fp32")
    fault(open_latents, cache)  # a folder that the manifest does not know
    seal_with_heldout(cache)
    train, kept = open_cache(cache)
    assert kept is not None and kept.root == cache / "heldout" and train.fingerprint() != kept.fingerprint()
    assert torch.equal(read(kept, 0, False)[0][:CHANNELS], tensors("fp32")[0]["mean"][0, 0])
    other = body("fp32")
    other["names"] = ["dog", "cat"]
    seal(cache / "heldout", other)
    assert str(cache / "heldout/manifest.json") in fault(open_cache, cache, verify=False)
    (cache / "heldout/manifest.json").unlink()
    assert str(cache / "heldout/manifest.json") in fault(open_cache, cache, verify=False)


def seal_with_heldout(cache: Path) -> None:
    made = body(heldout={"pictures": 9, "sha256": SOURCE})
    names = [p for p in cache.rglob("*") if p.is_file() and p != cache / "manifest.json"]
    files = {
        p.relative_to(cache).as_posix(): {
            "size": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in names
    }
    (cache / "manifest.json").write_text(json.dumps(sign({"format": 1, "files": files, "cache": made})))


def test_the_fingerprint_is_the_manifests_own(cache: Path) -> None:
    stated = json.loads((cache / "manifest.json").read_text())["sha256"]
    assert open_latents(cache, verify=False).fingerprint() == stated


def test_another_codec_size_or_crop_is_refused_with_both(cache: Path, fault: Callable[..., str]) -> None:
    description = open_latents(cache).cache
    description.check(cache)
    description.check(cache, CODEC, SIDE * FACTOR, "adm-center")
    said = fault(description.check, cache, "beef" * 16)
    assert str(cache) in said and CODEC[:12] in said and "beefbeefbeef" in said and CODEC[:13] not in said
    assert "size 8, 16 is needed" in fault(description.check, cache, size=16)
    assert "crop adm-center, random is needed" in fault(description.check, cache, crop="random")


def test_every_flipped_bit_is_found(cache: Path, fault: Callable[..., str]) -> None:
    """One in 37, which is each place in a byte, of shards and manifest; the file is named."""
    for path in sorted(cache.iterdir()):
        good = path.read_bytes()
        for bit in range(0, 8 * len(good), 37):
            data = bytearray(good)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            assert str(path) in fault(open_latents, cache), bit
        path.write_bytes(good)
    open_latents(cache)


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_missing_and_extra(cache: Path, fault: Callable[..., str], verify: bool) -> None:
    """Seen without checksums too."""
    for path in sorted(cache.glob("*.safetensors")):
        good = path.read_bytes()
        for length in (0, 7, 100, len(good) - 1):
            path.write_bytes(good[:length])
            assert str(path) in fault(open_latents, cache, verify), length
        path.unlink()
        assert str(path) in fault(open_latents, cache, verify)
        path.write_bytes(good)
    for name in ("shard-00003.safetensors", "notes", "more/"):
        extra = cache / name
        extra.mkdir() if name.endswith("/") else extra.write_bytes(b"")
        assert fault(open_latents, cache, verify) == f"{extra} is not in the manifest"
        extra.rmdir() if name.endswith("/") else extra.unlink()
    for name in ("encode.json", "shard-00001.json", "shard-00002.safetensors.tmp-0123abcd"):
        (cache / name).write_bytes(b"")  # what a killed finisher left: the cache is whole all the same
    open_latents(cache, verify)


def test_a_share_of_the_checksums(cache: Path, fault: Callable[..., str]) -> None:
    """Each shard is verified by exactly one of the processes, and by none where nobody asks."""
    for path in (cache / "shard-00000.safetensors", cache / "shard-00002.safetensors"):
        good = path.read_bytes()
        begin = 8 + int.from_bytes(good[:8], "little")
        path.write_bytes(good[:begin] + bytes([good[begin] ^ 1]) + good[begin + 1 :])
        open_latents(cache, verify=False)
        said = []
        for share in range(2):
            try:
                open_latents(cache, share=(share, 2))
            except DataError as error:
                said.append(str(error))
        assert [str(path) in line for line in said] == [True]
        path.write_bytes(good)


def rewritten(cache: Path, number: int, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """A shard with other tensors, sealed as if that were right."""
    shard = tensors("bf16")[number]
    change(shard)
    path = cache / f"shard-{number:05d}.safetensors"
    path.unlink()
    save_file(shard, path)
    seal(cache, body())


@pytest.mark.parametrize(
    "change",
    [
        lambda shard: shard.update(mean=shard["mean"].float()),
        lambda shard: shard.update(logvar=shard["logvar"].half()),
        lambda shard: shard.update(mean=shard["mean"][:3].clone()),
        lambda shard: shard.update(mean=shard["mean"][:, :, :2].clone()),
        lambda shard: shard.update(mean=shard["mean"].transpose(2, 3).contiguous()),
        lambda shard: shard.update(label=shard["label"].int()),
        lambda shard: shard.update(label=shard["label"] + 1),
        lambda shard: shard.update(label=shard["label"] - 1),
        lambda shard: shard.update(label=shard["label"][:3].clone()),
        lambda shard: shard.pop("logvar"),
        lambda shard: shard.update(more=shard["label"].clone()),
    ],
    ids="mean-fp32 logvar-fp16 short narrow turned int32 label-2 label-minus short-label no-logvar more".split(),  # noqa: SIM905
)
def test_a_shard_that_the_description_does_not_fit(
    cache: Path, fault: Callable[..., str], change: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    """Its checksum is right; it is refused all the same."""
    rewritten(cache, 0, change)
    assert str(cache / "shard-00000.safetensors") in fault(open_latents, cache)


@pytest.mark.parametrize(
    "header",
    [
        b"", b"[]", b"{}", b"null", b'"x"', b"{" * 5000, b'{"mean": 1, "logvar": 2, "label": 3}',
        b'{"mean": {}, "logvar": {}, "label": {}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("length", [None, 1 << 62, (1 << 64) - 1, 1 << 16])
def test_hostile_headers(cache: Path, fault: Callable[..., str], header: bytes, length: int | None) -> None:
    path = cache / "shard-00000.safetensors"
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + bytes(1000))
    seal(cache, body())
    assert str(path) in fault(open_latents, cache)


@pytest.mark.parametrize("begin", [-8, 1 << 40, 1 << 70, "0", None, 1.0, True])
def test_hostile_offsets(cache: Path, fault: Callable[..., str], begin: Any) -> None:
    """Of the right length, outside of the file."""
    path = cache / "shard-00000.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, last = header["mean"]["data_offsets"]
    end = begin + last - first if type(begin) is int else last
    header["mean"]["data_offsets"] = [begin, end]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    seal(cache, body())
    assert str(path) in fault(open_latents, cache)


def set_in(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A description with one value changed; keys joined by points, numbers for places in a list."""
    place: Any = data
    *above, last = key.split(".")
    for name in above:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[int(last) if isinstance(place, list) else last] = value
    return data


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2), ("version", "1"), ("version", None), ("codec", None), ("codec.channels", 4),
        ("codec.scale", "1"), ("codec.factor", 8), ("size", 9), ("size", 1 << 80), ("flips", ["plain"]),
        ("flips", ["flipped", "plain"]), ("dtype", "fp16"), ("shape", [2, 3, 2]), ("shape", [1, 3, 2, 2]),
        ("shape", [2, 3, -2, -2]), ("shape", [2, 3, 0, 0]), ("shape", [2, 3, 1 << 60, 1 << 60]), ("names", "cat"),
        ("source.pictures", 8), ("source.pictures", -1), ("skipped", []), ("skipped", [["a"]]), ("shards", []),
        ("shards.0.file", "../cache/shard-00000.safetensors"), ("shards.0.file", "shard-00001.safetensors"),
        ("shards.0.rows", 3), ("shards.0.rows", -1), ("shards.0.rows", 5), ("shards.1.first", 3),
        ("shards.1.last", 3), ("shards.2.rows", 1 << 50), ("more", 1),
    ],
)  # fmt: skip
def test_hostile_descriptions_with_a_true_checksum(
    cache: Path, fault: Callable[..., str], key: str, value: Any
) -> None:
    made = body()
    seal(cache, {**made, key: value} if "." not in key else set_in(made, key, value))
    said = fault(open_latents, cache)
    assert str(cache / "manifest.json") in said and "cache" in said.removeprefix(str(cache))


@pytest.mark.parametrize(("size", "shape", "channels"), [(0, [2, 3, 0, 0], 3), (8, [2, 0, 2, 2], 0)])
def test_samples_without_values(
    cache: Path, fault: Callable[..., str], size: int, shape: list[int], channels: int
) -> None:
    """Sizes that fit together, of nothing."""
    made = body(size=size, shape=shape)
    made["codec"]["channels"] = channels
    seal(cache, made)
    assert "cache.shape" in fault(open_latents, cache)


def test_other_manifests_are_none_of_ours(cache: Path, fault: Callable[..., str]) -> None:
    (cache / "manifest.json").write_text(json.dumps(sign({"format": 1, "files": {}})))
    assert "is not that of a latent cache" in fault(open_latents, cache)
    (cache / "manifest.json").write_text("[" * 100_000)
    assert str(cache / "manifest.json") in fault(open_latents, cache)
    assert str(cache / "none/manifest.json") in fault(open_latents, cache / "none")


def test_from_many_threads_with_few_open_files(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one descriptor every thread takes the others' away; none may read another's file."""
    monkeypatch.setattr(reader, "MOST_OPEN", 1)
    latents = open_latents(cache)
    wanted = [read(latents, index, flip)[0] for index in range(7) for flip in (False, True)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for place in rng.integers(0, 14, 400).tolist():
            if not torch.equal(read(latents, place // 2, bool(place % 2))[0], wanted[place]):
                wrong.append(place)

    before = len(os.listdir("/proc/self/fd"))
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(os.listdir("/proc/self/fd")) <= before


def test_opening_holds_no_file(cache: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    latents = open_latents(cache)
    assert len(os.listdir("/proc/self/fd")) == before
    read(latents, 0, False)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del latents
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_shrinks_or_goes_while_it_is_read(cache: Path) -> None:
    """An error that names it, where mapped memory would end the process; of no sample, so nothing passes over it."""
    latents = open_latents(cache)
    read(latents, 0, False)
    path = cache / "shard-00000.safetensors"
    os.truncate(path, 200)
    with pytest.raises(RunError, match=rf"^{path} has become shorter: it ends before sample 3$"):
        read(latents, 3, False)
    path = cache / "shard-00002.safetensors"
    path.unlink()
    with pytest.raises(RunError, match=rf"^cannot read {path}: No such file or directory$"):
        load_batch(latents, [0], [6], None, "skip")
