"""Our layout: written and read back."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import weights_of
from safetensors.torch import load_file

from ldit.checkpoint.export import write_export
from ldit.checkpoint.open import open_source
from ldit.config.model import ClassModelConfig, OriginalDiTConfig, TextModelConfig
from ldit.config.spec import (
    AutoencoderConfig,
    ClassConditionerConfig,
    DDPMConfig,
    FlowConfig,
    ModelSpec,
    PixelCodecConfig,
    SamplingConfig,
    TextConditionerConfig,
)
from ldit.pipeline.load import load_model

Fault = Callable[..., str]


SMALL = {"dim": 16, "n_layers": 1, "n_heads": 4, "multiple_of": 8}
SPECS = {
    "class": ModelSpec(ClassModelConfig(**SMALL, input_size=8, num_classes=3), DDPMConfig(), AutoencoderConfig()),
    "class with all set": ModelSpec(
        ClassModelConfig(
            **SMALL,
            input_size=8,
            patch_size=4,
            in_channels=3,
            n_kv_heads=2,
            ffn_dim_multiplier=1.3,
            norm_eps=1e-6,
            class_dropout_prob=0.0,
            num_classes=3,
            learn_sigma=False,
            qk_norm="head",
            rope="2d",
            cond_channels=1,
        ),
        FlowConfig(prediction="x0", time_scale=1.0, data_at=1, shift=3.0),
        PixelCodecConfig(),
        ClassConditionerConfig(("Katze", "猫", 'a "b"')),
        SamplingConfig("heun", 9, 2.5, 3, (0.1, 0.9)),
        {"step": 5, "images": 1280, "note": ["x", None, {"y": 1.5}]},
    ),
    "text": ModelSpec(
        TextModelConfig(**SMALL, max_seq_len=20, cap_feat_dim=12, rope_scaling_factor=2.0, qk_norm=True),
        DDPMConfig(),
        AutoencoderConfig("codec", scale=(0.5, 1.0, 1.5, 2.0), shift=(0.0, 0.1, 0.2, 0.3), factor=16),
        TextConditionerConfig("some/encoder", 77, "nothing"),
    ),
    "dit": ModelSpec(
        OriginalDiTConfig(input_size=8, hidden_size=16, depth=1, num_heads=2, num_classes=3),
        FlowConfig(time_scale=1.0, data_at=1),
        AutoencoderConfig(),
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_round_trip(tmp_path: Path, name: str, same: Callable[..., bool]) -> None:
    spec, weights = SPECS[name], weights_of(SPECS[name].model)
    write_export(tmp_path, spec, weights.items())
    source = open_source(tmp_path)
    assert source.kind == "ldit" and source.path == tmp_path and source.spec == spec
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    model = load_model(source)
    assert same(model.state_dict(), weights)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert source.shapes(ema=True) == {n: (tuple(t.shape), "fp32") for n, t in weights.items()}


def test_files_are_what_other_tools_read(
    make_export: Callable[..., Path], tiny: Any, same: Callable[..., bool]
) -> None:
    folder = make_export()
    assert same(load_file(folder / "model.safetensors"), tiny.raw)
    assert same(load_file(folder / "ema.safetensors"), tiny.ema)
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == 1
    assert config["model"]["kind"] == "class" and config["model"]["multiple_of"] == 32
    assert config["process"] == {"kind": "ddpm"}
    assert config["codec"]["scale"] == 0.18215


def test_ema_picks_the_file(make_export: Callable[..., Path], tiny: Any, same: Callable[..., bool]) -> None:
    source = open_source(make_export())
    assert source.has_ema() and source.has_raw()
    assert same(load_model(source, ema=True).state_dict(), tiny.ema)
    assert same(load_model(source, ema=False).state_dict(), tiny.raw)
    alone = open_source(make_export("alone", ema=False))
    assert not alone.has_ema() and alone.has_raw()
    assert same(load_model(alone, ema=True).state_dict(), tiny.raw)


def test_ema_alone(make_export: Callable[..., Path], tiny: Any, same: Callable[..., bool], fault: Fault) -> None:
    folder = make_export(with_manifest=False)
    (folder / "model.safetensors").unlink()
    source = open_source(folder)
    assert source.has_ema() and not source.has_raw()
    assert same(load_model(source).state_dict(), tiny.ema)
    assert "model.safetensors" in fault(load_model, source, ema=False)
    source.verify()


def test_bf16(make_export: Callable[..., Path], tiny: Any, tmp_path: Path, same: Callable[..., bool]) -> None:
    """On loading, and on writing; each is one rounding of the fp32 weights."""
    rounded = {name: t.to(torch.bfloat16) for name, t in tiny.ema.items()}
    assert same(load_model(open_source(make_export()), dtype=torch.bfloat16).state_dict(), rounded)
    folder = tmp_path / "bf16"
    folder.mkdir()
    write_export(folder, tiny.spec, tiny.raw.items(), tiny.ema.items(), torch.bfloat16)
    assert same(load_file(folder / "ema.safetensors"), rounded)
    source = open_source(folder)
    assert {word for _, word in source.shapes(ema=True).values()} == {"bf16"}
    assert same(load_model(source).state_dict(), rounded)
    assert same(load_model(source, dtype=torch.float32).state_dict(), {n: t.float() for n, t in rounded.items()})


def test_loading_leaves_the_file_alone(make_export: Callable[..., Path]) -> None:
    """Weights are mapped from the file; writing to the model must not reach it."""
    folder = make_export()
    before = (folder / "ema.safetensors").read_bytes()
    model = load_model(open_source(folder))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert (folder / "ema.safetensors").read_bytes() == before


def test_opening_reads_no_weights(make_export: Callable[..., Path]) -> None:
    """The spec and the shapes come from the configuration and the header."""
    folder = make_export(with_manifest=False)
    path = folder / "ema.safetensors"
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    path.write_bytes(data[:header] + b"\xff" * (len(data) - header))
    assert open_source(folder).shapes(ema=True)["x_embedder.weight"] == ((64, 16), "fp32")
