"""Latent caches that are refused: made by something else, damaged, or with descriptions that contradict themselves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import sign
from data.caches import CODEC, FACTOR, SIDE, body, seal, tensors
from safetensors.torch import save_file

from ldit.data.latent_cache.reader import open_latents
from ldit.errors import DataError


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
