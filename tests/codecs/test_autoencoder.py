"""The codec against diffusers' own class with the same weights."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldit.codecs import autoencoder
from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.codecs.kl_network import build_network
from ldit.codecs.latents import draw, unscaled
from ldit.config.spec import AutoencoderConfig
from ldit.errors import CodecError
from ldit.precision import products

STEM = "diffusion_pytorch_model"
# Between memory formats sums are taken in another order: about 40 layers, each rounding sums of up to 144 products by
# sqrt(144) units of 2^-24, relative to the largest value.
ROUNDING = 40 * 12 * 2**-24


def close(found: Tensor, expected: Tensor, bound: float) -> None:
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert (found - expected).abs().max() <= bound * expected.abs().max()


def test_moments_are_those_of_diffusers(saved: Path, config: AutoencoderConfig, reference: Any, images: Tensor) -> None:
    codec = AutoencoderCodec(config, saved)
    assert (codec.factor, codec.channels) == (8, 4)
    mean, logvar = codec.moments(images.clone().requires_grad_())
    posterior = reference.encode(images).latent_dist
    assert mean.shape == (3, 4, 4, 6) and not mean.requires_grad
    close(mean, posterior.mean, ROUNDING)
    close(logvar, posterior.logvar, ROUNDING)


def test_bit_equal_in_the_same_memory_format(
    saved: Path, config: AutoencoderConfig, reference: Any, images: Tensor
) -> None:
    theirs = type(reference).from_pretrained(saved).to(memory_format=torch.channels_last)
    codec = AutoencoderCodec(config, saved)
    mean, logvar = codec.moments(images)
    with torch.no_grad():
        posterior = theirs.encode(images.to(memory_format=torch.channels_last)).latent_dist
        assert torch.equal(mean, posterior.mean) and torch.equal(logvar, posterior.logvar)
        raw = unscaled(mean, config).to(memory_format=torch.channels_last)
        assert torch.equal(codec.decode(mean), theirs.decode(raw).sample)


@pytest.mark.parametrize(
    ("scale", "shift"), [(0.18215, 0.0), (2.0, 0.5), ((0.5, 1.0, 2.0, 4.0), (0.1, 0.0, -1.0, 2.0))]
)
def test_decode_undoes_scale_and_shift(saved: Path, reference: Any, scale: Any, shift: Any) -> None:
    codec = AutoencoderCodec(AutoencoderConfig("codec", scale, shift), saved)
    z = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(2))
    per_channel = [torch.tensor(v).expand(4).view(1, 4, 1, 1) for v in (scale, shift)]
    pictures = codec.decode(z)
    assert pictures.shape == (2, 3, 40, 24) and pictures.is_contiguous()
    close(pictures, reference.decode(z / per_channel[0] + per_channel[1]).sample, ROUNDING)


def test_the_network_to_train(saved: Path, reference: Any, images: Tensor) -> None:
    """Same parameter names; one call encodes, draws and decodes, with gradients."""
    network = build_network(json.loads((saved / "config.json").read_text()))
    network.load_state_dict(reference.state_dict())
    noise = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = network.eval()(images, noise)
    posterior = reference.encode(images).latent_dist
    assert torch.equal(found.mean, posterior.mean) and torch.equal(found.logvar, posterior.logvar)
    assert torch.equal(found.images, reference.decode(draw(posterior.mean, posterior.logvar, noise)).sample)
    network.train()(images, noise).images.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(saved: Path, config: AutoencoderConfig, images: Tensor, dtype: torch.dtype) -> None:
    exact, rounded = AutoencoderCodec(config, saved), AutoencoderCodec(config, saved, dtype=dtype)
    assert next(rounded._network.parameters()).dtype is dtype
    bound = 40 * 2 * torch.finfo(dtype).eps  # about 40 layers, each rounding values and weights once
    for mine, theirs in zip(rounded.moments(images), exact.moments(images), strict=True):
        assert not torch.equal(mine, theirs)
        close(mine, theirs, bound)


def test_to_reads_anew_so_that_nothing_is_rounded_twice(saved: Path, config: AutoencoderConfig, images: Tensor) -> None:
    codec = AutoencoderCodec(config, saved, dtype=torch.bfloat16)
    back = codec.to("cpu", torch.float32)
    assert back is codec and torch.equal(codec.moments(images)[0], AutoencoderCodec(config, saved).moments(images)[0])


def test_nothing_of_nothing(saved: Path, config: AutoencoderConfig) -> None:
    codec = AutoencoderCodec(config, saved)
    assert codec.moments(torch.empty(0, 3, 16, 8))[1].shape == (0, 4, 2, 1)
    assert codec.decode(torch.empty(0, 4, 2, 1)).shape == (0, 3, 16, 8)


def test_shapes_that_do_not_fit(saved: Path, config: AutoencoderConfig) -> None:
    codec = AutoencoderCodec(config, saved)
    with pytest.raises(CodecError, match=r"multiples of 8, got \(3, 30, 32\)"):
        codec.moments(torch.zeros(1, 3, 30, 32))
    with pytest.raises(CodecError, match="4 channels, got 3"):
        codec.decode(torch.zeros(1, 3, 4, 4))


def test_slices_of_the_batch(
    saved: Path, config: AutoencoderConfig, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = AutoencoderCodec(config, saved)
    whole = codec.moments(images)[0]
    seen: list[int] = []
    codec._network.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(autoencoder, "_PIXELS_CPU", 2 * 32 * 48 + 1)
    close(codec.moments(images)[0], whole, ROUNDING)
    assert seen == [2, 1]


@pytest.fixture
def overflowing(folder: Path) -> Path:
    """Activations above 65504, which the next norm brings back; and a weight that is not fp16's."""
    path = folder / f"{STEM}.safetensors"
    state = load_file(path)
    for name in ("decoder.conv_in.weight", "encoder.conv_in.weight"):
        state[name] = state[name] * 1e5  # far enough from 65504 for kernels that add weights up (Winograd)
    save_file(state, path)
    return folder


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_fp16_falls_back(
    overflowing: Path, config: AutoencoderConfig, images: Tensor, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    def run(codec: AutoencoderCodec) -> Tensor:
        return (
            codec.moments(images)[0]
            if part == "encode"
            else codec.decode(images[:, :1].repeat(1, 4, 1, 1)[..., :4, :4])
        )

    half, full = (AutoencoderCodec(config, overflowing, dtype=dtype) for dtype in (torch.float16, torch.float32))
    expected = run(full)
    with caplog.at_level(logging.WARNING, "ldit"):
        assert expected.isfinite().all() and torch.equal(run(half), expected)
        assert half.dtype is torch.float16 and torch.equal(run(half), expected)
    assert [record.getMessage().count("fp16") for record in caplog.records] == [1]


def test_what_overflows_changes_nothing_else(overflowing: Path, config: AutoencoderConfig, images: Tensor) -> None:
    """What becomes of an image depends on that image alone: not on one that overflowed before it, nor beside it."""
    faint = images[:1] * 1e-6  # the only image here that fits into fp16
    alone = AutoencoderCodec(config, overflowing, dtype=torch.float16).moments(faint)[0]
    full = AutoencoderCodec(config, overflowing).moments(torch.cat([images, faint]))[0]
    codec = AutoencoderCodec(config, overflowing, dtype=torch.float16)
    both = codec.moments(torch.cat([images, faint]))[0]
    assert torch.equal(codec.moments(faint)[0], alone) and not torch.equal(alone, full[-1:])
    close(both[-1:], alone, 2**-10 * ROUNDING / 2**-24)
    close(both[:-1], full[:-1], ROUNDING)


def test_numbers_that_are_not_finite_are_nobodys_overflow(
    saved: Path, folder: Path, config: AutoencoderConfig, caplog: pytest.LogCaptureFixture
) -> None:
    codec = AutoencoderCodec(config, saved, dtype=torch.float16)
    assert codec.decode(torch.full((1, 4, 2, 2), float("nan"))).isnan().all()
    assert codec.dtype is torch.float16 and not caplog.records
    path = folder / f"{STEM}.safetensors"
    save_file({name: torch.full_like(t, float("nan")) for name, t in load_file(path).items()}, path)
    assert AutoencoderCodec(config, folder).decode(torch.zeros(1, 4, 2, 2)).isnan().all()


def test_scaling_comes_from_the_model(
    folder: Path, edit: Callable[..., None], config: AutoencoderConfig, caplog: pytest.LogCaptureFixture
) -> None:
    z = torch.ones(1, 4, 2, 2)
    expected = AutoencoderCodec(config, folder).decode(z)
    edit(shift_factor=0.0)
    AutoencoderCodec(config, folder)
    edit(scaling_factor=None, shift_factor=None)
    AutoencoderCodec(replace(config, scale=0.7), folder)  # the folder says nothing of it
    assert not caplog.records
    edit(scaling_factor=0.5, shift_factor=0.25)
    codec = AutoencoderCodec(config, folder, dtype=torch.bfloat16)
    assert torch.equal(codec.to("cpu", torch.float32).decode(z), expected)
    (record,) = caplog.records
    assert all(number in record.getMessage() for number in ("0.5", "0.25", "0.18215", "0.0"))
    AutoencoderCodec(replace(config, scale=(0.5,) * 4, shift=0.25), folder)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factor": 16}, "a latent pixel is 8 pixels wide, the model's codec.factor is 16"),
        ({"scale": (1.0, 2.0)}, "codec.scale has 2 values"),
        ({"shift": (1.0,) * 16}, "latents of 4 channels, codec.shift has 16 values"),
        ({"scale": 0.0}, "codec.scale: must not be 0"),
        ({"scale": (1.0, 0.0, 1.0, 1.0)}, "codec.scale: must not be 0"),
    ],
)
def test_a_model_that_does_not_fit(saved: Path, config: AutoencoderConfig, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CodecError, match=said):
        AutoencoderCodec(replace(config, **changes), saved)


def test_fp32_is_not_rounded_to_tf32(saved: Path, config: AutoencoderConfig, images: Tensor) -> None:
    """Whatever the trainer allows around it; what was set before is back afterwards, after a fault too."""
    codec, seen = AutoencoderCodec(config, saved), []

    def flags() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    for module in codec._network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_pre_hook(lambda *_: seen.append(flags()))
    with products("tf32"):
        assert flags() == (True, "high")
        codec.decode(codec.moments(images)[0])
        assert flags() == (True, "high")
        with pytest.raises(CodecError):
            codec.moments(images[:, :, :3])
        with pytest.raises(RuntimeError):
            codec.moments(torch.full_like(images, 1, device="meta"))
        assert flags() == (True, "high")
    assert set(seen) == {(False, "highest")} and flags() == (True, "highest")
