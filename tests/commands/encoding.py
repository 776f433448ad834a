"""Tiny image sets, a codec whose moments anybody can work out, and jobs that encode the one with the other."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldit.commands import encode as flow
from ldit.config.requests.encode import EncodeRequest
from ldit.config.spec import AutoencoderConfig
from ldit.errors import LditError

SIZE, FACTOR, CHANNELS = 8, 4, 2
TRAIN, KEPT = 10, 3


class FakeCodec:
    """Each latent is one pixel's value times something: exact, and different for an image and its mirror image."""

    factor, channels, dtype = FACTOR, CHANNELS, torch.float32

    def __init__(self, name: str = "fake", pause: float = 0.0) -> None:
        self.config = AutoencoderConfig(name=name, scale=2.0, shift=0.5, factor=FACTOR)
        self.name, self.pause = name, pause
        self.calls = 0

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        time.sleep(self.pause)
        return images[:, :2, ::4, 1::4] * 3, images[:, 1:, 2::4, ::4] - 1

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def fingerprint(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()


def expected(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """mean and logvar, fp32 (2, C, h, w), of a uint8 (S, S, 3) image, plain and mirrored."""
    both = np.stack([image, image[:, ::-1]]).transpose(0, 3, 1, 2)
    x = both.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return x[:, :2, ::4, 1::4] * np.float32(3), x[:, 1:, 2::4, ::4] - np.float32(1)


def write_images(root: Path) -> dict[str, np.ndarray]:
    """Two class folders of random images, of which three are held out; their pixels by name."""
    rng, made = np.random.default_rng(0), {}
    for number in range(TRAIN + KEPT):
        name = f"{'ab'[number % 2]}/{number:02d}.png"
        made[name] = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(made[name]).save(root / name)
    (root / "heldout.txt").write_text("".join(f"{name}\n" for name in list(made)[TRAIN:]))
    return made


def job(source: Path, out: Path, **options: Any) -> EncodeRequest:
    """Shards of four images, batches of three."""
    common: dict[str, Any] = {"image_size": SIZE, "shard_size": 4, "batch_size": 3, "workers": 0, "device": "cpu"}
    return EncodeRequest(str(source), out, **{**common, **options})


def encode(
    monkeypatch: pytest.MonkeyPatch, one: EncodeRequest, codec: FakeCodec | None = None, rank: int = 0, world: int = 1
) -> bool:
    """Run one process's part of a job with a fake codec."""
    with monkeypatch.context() as patch:
        patch.setattr(flow, "open_autoencoder", lambda job, device: codec or FakeCodec())
        if world > 1:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(world))
        return flow.make_cache(one)


def refused(monkeypatch: pytest.MonkeyPatch, one: EncodeRequest, codec: FakeCodec | None = None) -> str:
    """The one line by which a job is refused."""
    with pytest.raises(LditError) as caught:
        encode(monkeypatch, one, codec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(out: Path) -> dict[str, bytes]:
    """Every file below a folder, and every empty folder."""
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    return files | {f"{p.relative_to(out)}/": b"" for p in out.rglob("*") if p.is_dir() and not any(p.iterdir())}


def widened(values: np.ndarray) -> np.ndarray:
    """fp32 rounded to bf16, to nearest, halves to even, and back, by integers."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return rounded.astype(np.uint32).view(np.float32).reshape(values.shape)


def whole(source: Path, out: Path, run: Callable[..., bool], **options: Any) -> dict[str, bytes]:
    """The files of an undisturbed cache."""
    assert run(job(source, out, **options))
    return contents(out)
