"""Fingerprints: the same for the same numbers, another one for one bit."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.config.spec import AutoencoderConfig
from ldit.errors import CodecError

STEM = "diffusion_pytorch_model"
Write = Callable[[dict[str, Tensor]], AutoencoderCodec]


@pytest.fixture
def opened(folder: Path, config: AutoencoderConfig) -> Write:
    """A codec of these tensors."""

    def write(state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> AutoencoderCodec:
        save_file(state, folder / f"{STEM}.safetensors")
        return AutoencoderCodec(config, folder, dtype=dtype)

    return write


def test_by_hand(saved: Path, config: AutoencoderConfig, state: dict[str, Tensor]) -> None:
    """As written down: caches compare it, so that it must not change."""
    content = json.loads((saved / "config.json").read_text())
    keys = [
        "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
        "act_fn", "latent_channels", "norm_num_groups", "use_quant_conv", "use_post_quant_conv",
        "mid_block_add_attention",
    ]  # fmt: skip
    tensors = [
        [name, list(tensor.shape), hashlib.sha256(tensor.numpy().tobytes()).hexdigest()]
        for name, tensor in sorted(state.items())
    ]
    body = {"kind": "autoencoder_kl", "config": {key: content[key] for key in keys}, "tensors": tensors}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    assert AutoencoderCodec(config, saved).fingerprint() == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("form", ["bin", "shards", "old names", "bf16 codec", "other scale", "other settings"])
def test_the_same(
    form: str,
    saved: Path,
    folder: Path,
    config: AutoencoderConfig,
    reference: Any,
    state: dict[str, Tensor],
    edit: Callable[..., None],
) -> None:
    expected = AutoencoderCodec(config, saved).fingerprint()
    dtype = torch.bfloat16 if form == "bf16 codec" else torch.float32
    if form == "bin":
        (folder / f"{STEM}.safetensors").unlink()
        torch.save(state, folder / f"{STEM}.bin")
    elif form == "shards":
        (folder / f"{STEM}.safetensors").unlink()
        reference.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob(f"{STEM}-*-of-*.safetensors"))) > 2
    elif form == "old names":
        save_file({old(name): tensor for name, tensor in state.items()}, folder / f"{STEM}.safetensors")
    elif form == "other scale":
        config = AutoencoderConfig("elsewhere", 0.5, 1.0)
    elif form == "other settings":
        edit(_diffusers_version="0.1", sample_size=99, force_upcast=False, scaling_factor=0.7, latents_mean=[0.0] * 4)
    codec = AutoencoderCodec(config, folder, dtype=dtype)
    assert codec.fingerprint() == expected
    z = torch.ones(1, 4, 2, 2)
    if dtype is torch.float32 and form != "other scale":
        assert torch.equal(codec.decode(z), AutoencoderCodec(config, saved).decode(z))


def old(name: str) -> str:
    for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f".{new}.", f".{before}.")
    return name


def test_one_bit_of_one_number(opened: Write, state: dict[str, Tensor]) -> None:
    first = opened(state).fingerprint()
    name = "decoder.conv_out.bias"
    state[name][1] = torch.nextafter(state[name][1], torch.tensor(9.0))
    second = opened(state).fingerprint()
    state[name] = state[name].flip(0)
    third = opened(state).fingerprint()
    assert len({first, second, third}) == 3
    norms = ("decoder.conv_norm_out.weight", "decoder.conv_norm_out.bias")  # equal shapes, changed names
    state[norms[0]], state[norms[1]] = state[norms[1]], state[norms[0]]
    assert opened(state).fingerprint() not in (first, second, third)


def test_the_configuration_counts(
    saved: Path, folder: Path, config: AutoencoderConfig, edit: Callable[..., None]
) -> None:
    """The same tensors compute something else with another activation or other groups."""
    prints = {AutoencoderCodec(config, saved).fingerprint()}
    for keys in ({"act_fn": "gelu"}, {"norm_num_groups": 2}):
        edit(**keys)
        prints.add(AutoencoderCodec(config, folder).fingerprint())
    assert len(prints) == 3


def test_half_precision_files(opened: Write, state: dict[str, Tensor]) -> None:
    """bf16 numbers are fp32 numbers: the same ones, widened, have the same fingerprint."""
    halves = {name: tensor.bfloat16() for name, tensor in state.items()}
    first = opened(halves).fingerprint()
    assert opened({name: tensor.float() for name, tensor in halves.items()}).fingerprint() == first
    assert opened(state).fingerprint() != first


def test_files_that_change_under_an_open_codec(opened: Write, state: dict[str, Tensor], folder: Path) -> None:
    """The fingerprint would be another network's, and another dtype as well."""
    codec = opened(state, torch.bfloat16)  # type: ignore[call-arg]
    path = folder / f"{STEM}.safetensors"
    save_file(dict(list(state.items())[1:]), path)
    for use in (codec.fingerprint, lambda: codec.to("cpu", torch.float32)):
        with pytest.raises(CodecError, match=f"{folder} changed since it was opened"):
            use()
    path.unlink()
    with pytest.raises(CodecError, match="has neither"):
        codec.fingerprint()


def test_computed_once(saved: Path, config: AutoencoderConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = AutoencoderCodec(config, saved)
    first = codec.fingerprint()
    monkeypatch.setattr("ldit.codecs.autoencoder.fingerprint", None)
    assert codec.fingerprint() == first
