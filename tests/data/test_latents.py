"""Reading a latent cache that was not written by the code that writes them."""

import gc
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data.caches import CHANNELS, FACTOR, ROWS, SIDE, body, build, read, seal, seal_with_heldout, tensors
from safetensors.torch import save_file

from ldit.data.latent_cache import reader
from ldit.data.latent_cache.reader import open_cache, open_latents
from ldit.data.loader import load_batch
from ldit.errors import RunError


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


def test_the_fingerprint_is_the_manifests_own(cache: Path) -> None:
    stated = json.loads((cache / "manifest.json").read_text())["sha256"]
    assert open_latents(cache, verify=False).fingerprint() == stated


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
    gc.collect()  # closes files that earlier tests left in cycles
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
