"""`ldit encode`: what is written, by how many processes, and what goes on after a stop."""

import json
import logging
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from commands.encoding import (
    KEPT,
    SIZE,
    TRAIN,
    FakeCodec,
    contents,
    expected,
    job,
    whole,
    widened,
    write_images,
)
from PIL import Image
from smallrun import one_thread

from ldit.cli.main import dispatch
from ldit.commands import encode as flow
from ldit.config.recipes.registry import diffusion_recipe
from ldit.config.requests.encode import EncodeRequest
from ldit.data.latent_cache.description import read_description
from ldit.data.latent_cache.reader import open_cache, open_latents
from ldit.data.source import open_data
from ldit.storage import manifest


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_image_and_its_mirror_image(tmp_path: Path, run: Callable[..., bool], dtype: str) -> None:
    """fp32 to the bit, bf16 the nearest, halves to even; labels and order of the set; held-out images apart."""
    pixels = write_images(tmp_path / "set")
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
    """Images are read once: the mirror image of the tensor is that of the image."""
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
    assert cache["source"] == {"pictures": TRAIN, "sha256": train.fingerprint(), "decoding": decoding,
                               "max_per_class": 0}  # fmt: skip
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


@pytest.mark.parametrize("stop", range(0, 26, 2))
def test_it_goes_on_where_it_failed(source: Path, tmp_path: Path, run: Callable[..., bool], stop: int) -> None:
    """The codec fails at its n-th image; the same command makes what is missing, nothing twice, to the same bytes."""

    class Failing(FakeCodec):
        def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if self.calls == stop:
                raise RuntimeError("injected")
            return super().moments(images)

    undisturbed = FakeCodec()
    assert run(job(source, tmp_path / "alone"), undisturbed)
    assert undisturbed.calls == 26  # thirteen images in shards of 4, 4, 2 and 3, plain and mirrored
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="injected"):
        run(job(source, out), Failing())
    assert not list(out.rglob(".work-*"))
    again = FakeCodec()
    standing = len(list(out.rglob("shard-*.json")))
    assert run(job(source, out), again) and contents(out) == contents(tmp_path / "alone")
    assert again.calls == [26, 18, 10, 6][standing]


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


def test_a_codec_that_was_moved_is_the_same(source: Path, tmp_path: Path, run: Callable[..., bool]) -> None:
    """By its fingerprint; the name that it had first is kept, so that the bytes are the same."""

    class Moved(FakeCodec):
        def __init__(self) -> None:
            super().__init__()
            self.config = type(self.config)(name="elsewhere", scale=2.0, shift=0.5, factor=4)

    alone = whole(source, tmp_path / "alone", run)
    assert not run(job(source, tmp_path / "out"), world=2)
    assert run(job(source, tmp_path / "out"), Moved()) and contents(tmp_path / "out") == alone


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
    """Exactly what the codec gives for each image alone on one core; the folder's scale and shift are recorded."""
    from ldit.codecs.codec import open_codec
    from ldit.config.spec import AutoencoderConfig

    options = [str(source), "--codec", "tiny/vae", "--local-diffusers-model-root", str(autoencoder.parents[1]),
               "--image-size", "8", "--shard-size", "4", "--batch-size", "4", "--dtype", "fp32",
               "--device", "cpu"]  # fmt: skip
    out = tmp_path / "out"
    assert dispatch("encode", [*options, "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    latents = open_latents(out)
    codec = open_codec(AutoencoderConfig(name=str(autoencoder), scale=0.7, shift=0.1, factor=2))
    record = latents.cache.codec
    assert (record.name, record.scale, record.shift, record.factor, record.channels) == ("tiny/vae", 0.7, 0.1, 2, 3)
    assert record.fingerprint == codec.fingerprint()  # type: ignore[union-attr]
    latents.cache.check(out, codec.fingerprint(), 8)  # type: ignore[union-attr]
    train, _ = open_data(str(source), 8)
    image, found = torch.empty(1, *train.shape), torch.empty(1, *latents.shape)
    with one_thread():
        for index, flip in product(range(TRAIN), (False, True)):
            train.read(index, flip, image[0].numpy())
            latents.read(index, flip, found[0].numpy())
            assert torch.equal(found, torch.cat(codec.moments(image), dim=1))  # type: ignore[union-attr]


@pytest.mark.parametrize("threads", [2, 3])
def test_latents_do_not_depend_on_the_number_of_cores(tmp_path: Path, threads: int) -> None:
    """Nor on the size of batches: one process on many cores, and many processes on one each, make the same bytes."""
    rng = np.random.default_rng(0)
    for number in range(4):
        (tmp_path / "set/a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(tmp_path / f"set/a/{number}.png")
    before, made = torch.get_num_threads(), []
    try:
        for number, batch in ((1, "2"), (threads, "3")):
            torch.set_num_threads(number)
            out = tmp_path / f"out{number}"
            options = ["--codec", "emoji64-vae", "--image-size", "128", "--batch-size", batch, "--device", "cpu"]
            assert dispatch("encode", [str(tmp_path / "set"), "--out", str(out), "--dtype", "fp32", *options]) == 0
            assert torch.get_num_threads() == number
            made.append(contents(out))
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1]


def test_a_recipe_gives_the_defaults(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its run takes the cache; what is given stays. A recipe in pixels has no autoencoder to give."""
    config = diffusion_recipe("emoji64-latent-s")
    asked = EncodeRequest("emoji64", tmp_path / "cache").with_recipe(config)
    assert (asked.image_size, asked.max_per_class, asked.codec) == (64, 300, "emoji64-vae")
    given = EncodeRequest("emoji64", tmp_path / "cache", image_size=32, max_per_class=5).with_recipe(config)
    assert (given.image_size, given.max_per_class, given.codec) == (32, 5, "emoji64-vae")
    pixels = EncodeRequest("x", tmp_path / "cache").with_recipe(diffusion_recipe("finetune-small"))
    assert (pixels.exif, pixels.heldout, pixels.codec) == (True, "0.1", EncodeRequest("x", tmp_path).codec)
    monkeypatch.setattr(flow, "open_autoencoder", lambda request, device: FakeCodec())
    out = tmp_path / "cache"
    assert dispatch("encode", [str(source), "--out", str(out), "--recipe", "tiny-cpu", "--max-per-class", "3"]) == 0
    made, _ = read_description(out)
    assert (made.size, made.source.max_per_class) == (16, 3)
