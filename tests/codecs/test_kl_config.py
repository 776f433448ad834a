"""config.json of an autoencoder: strict and bounded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldit.codecs.kl_config import KLConfig, kl_config, read_kl_config
from ldit.codecs.kl_network import build_network
from ldit.errors import CodecError

GOOD: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def test_the_widely_used_one() -> None:
    config = kl_config(GOOD)
    assert (config.factor, config.latent_channels, config.scaling) == (8, 4, (0.18215, 0.0))
    with torch.device("meta"):
        network = build_network(GOOD)
    assert sum(parameter.numel() for parameter in network.parameters()) == 83_653_863  # the published file's count
    assert next(network.parameters()).is_meta


def test_scales_of_the_folder() -> None:
    assert kl_config({**GOOD, "scaling_factor": 0.36, "shift_factor": 0.11}).scaling == (0.36, 0.11)
    statistics = {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [2.0, 4.0, 8.0, 1.0], "scaling_factor": 0.5}
    assert kl_config({**GOOD, **statistics}).scaling == ((0.25, 0.125, 0.0625, 0.5), (1.0, 2.0, 3.0, 4.0))


def test_our_defaults_are_those_of_diffusers() -> None:
    from diffusers import AutoencoderKL

    ours = KLConfig()
    theirs = {key: value for key, value in AutoencoderKL().config.items() if not key.startswith("_")}
    assert theirs["scaling_factor"] == ours.scaling[0]
    assert build_network({"_class_name": "AutoencoderKL"}).config == theirs
    assert {**theirs, "scaling_factor": None} == {key: getattr(ours, key) for key in theirs}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name: expected AutoencoderKL, got 'AutoencoderTiny'"),
        ({"_class_name": None}, "_class_name"),
        ({"use_tricks": True}, "unknown key 'use_tricks'"),
        ({"block_out_channels": [10**9] * 4}, "block_out_channels: must be 1 to 8192, got 1000000000"),
        ({"block_out_channels": [0, 32, 32, 32]}, "block_out_channels"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"block_out_channels": [32] * 12}, "block_out_channels"),
        ({"block_out_channels": [128, 256, 512]}, "down_block_types: 4 for 3 block_out_channels"),
        ({"block_out_channels": [100, 256, 512, 512]}, "norm_num_groups: 32 groups do not divide 100"),
        ({"layers_per_block": 10**9}, "layers_per_block: must be 1 to 16, got 1000000000"),
        ({"layers_per_block": 2.0}, "layers_per_block: expected an integer, got 2.0"),
        ({"layers_per_block": True}, "layers_per_block"),
        ({"latent_channels": -4}, "latent_channels"),
        ({"norm_num_groups": 0}, "norm_num_groups: must be 1 to"),
        ({"in_channels": 4}, "in_channels: images have 3 channels, got 4"),
        ({"out_channels": 10**9}, "out_channels"),
        ({"down_block_types": ["DownBlock2D"] * 4}, "down_block_types"),
        ({"up_block_types": "UpDecoderBlock2D"}, "up_block_types: expected a list"),
        ({"act_fn": "__import__"}, "act_fn"),
        ({"sample_size": 10**9}, "sample_size"),
        ({"scaling_factor": 0}, "scaling_factor: must not be 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor"),
        ({"latents_std": [1.0]}, "latents_std: 1 values for 4"),
    ],
)
def test_refused_in_one_line(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(CodecError) as caught:
        build_network({**GOOD, **keys}, "there/config.json")
    assert str(caught.value).startswith("there/config.json: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_in_bounds_that_make_too_much() -> None:
    """456 billion parameters: counted where nothing is allocated."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 11, "up_block_types": ["UpDecoderBlock2D"] * 11}
    with torch.device("meta"), pytest.raises(CodecError, match="455957299303 parameters, more than"):
        build_network({**GOOD, **blocks, "block_out_channels": [8192] * 11, "layers_per_block": 16})


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", "null", '"x"', "\ud800", "{}" + " " * (1 << 20)])
def test_damaged_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CodecError, match=str(path)):
        read_kl_config(tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CodecError, match=r"config\.json is missing"):
        read_kl_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert read_kl_config(tmp_path) == kl_config(GOOD)
