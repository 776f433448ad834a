"""The original's folders, written here by hand from its description: what the model is."""

import argparse
import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import FOLDER, assert_close, golden
from models import TABLE, TRAINING
from safetensors.torch import load_file

from ldit.checkpoint.layouts import original
from ldit.checkpoint.open import open_source
from ldit.config.assets import imagenet_names
from ldit.config.model import ClassModelConfig, TextModelConfig
from ldit.config.presets import preset
from ldit.config.spec import (
    AutoencoderConfig,
    ClassConditionerConfig,
    DDPMConfig,
    TextConditionerConfig,
)
from ldit.errors import SourceError
from ldit.nn.build import parameter_count
from ldit.pipeline.load import load_model

Fault = Callable[..., str]
Make = Callable[..., Path]


def test_class_model(make_original: Make, tiny: Any, same: Callable[..., bool]) -> None:
    source = open_source(make_original())
    assert source.kind == "original"
    assert source.spec == replace(tiny.spec, conditioner=ClassConditionerConfig())
    assert source.has_ema() and source.has_raw()
    assert same(load_model(source, ema=True).state_dict(), tiny.ema)
    assert same(load_model(source, ema=False).state_dict(), tiny.raw)
    assert source.shapes(ema=True) == {name: (tuple(t.shape), "fp32") for name, t in tiny.ema.items()}
    bf16 = {name: t.to(torch.bfloat16) for name, t in tiny.ema.items()}
    assert same(load_model(source, dtype=torch.bfloat16).state_dict(), bf16)
    source.verify()


@pytest.mark.parametrize(
    ("name", "dim", "layers", "hidden", "parameters", "normed"),
    [
        ("DiT_Llama_600M_patch2", 1536, 16, 4096, 609_738_272, 609_836_576),
        ("DiT_Llama_3B_patch2", 3072, 32, 8192, 4_237_430_816, 4_237_824_032),
        ("DiT_Llama_7B_patch2", 4096, 32, 11008, 7_293_295_648, 7_293_819_936),
    ],
)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_registered_names(
    tmp_path: Path, name: str, dim: int, layers: int, hidden: int, parameters: int, normed: int, qk_norm: bool
) -> None:
    """The published sizes from the name alone; nothing is allocated."""
    torch.save(argparse.Namespace(model=name, **{**TRAINING, "qk_norm": qk_norm}), tmp_path / "model_args.pth")
    spec = original.read_spec(tmp_path, {TABLE: (1001, 1024)})
    model = spec.model
    assert isinstance(model, ClassModelConfig)
    assert (model.dim, model.n_layers, model.n_heads, model.ffn_hidden) == (dim, layers, 32, hidden)
    assert (model.input_size, model.num_classes, model.class_dropout_prob) == (32, 1000, 0.1)
    assert model.qk_norm is qk_norm and model.learn_sigma and model.patch_size == 2
    assert parameter_count(model) == (normed if qk_norm else parameters)
    assert spec.process == DDPMConfig()
    assert spec.codec == AutoencoderConfig("stabilityai/sd-vae-ft-ema", 0.18215, 0.0, 8)
    assert spec.conditioner == ClassConditionerConfig(imagenet_names())


def test_names_of_imagenet_are_said_to_be_assumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ldit").propagate = True
    caplog.set_level(logging.INFO, "ldit")
    for names, said in ((None, ["ImageNet's names are assumed"]), (tuple(map(str, range(1000))), [])):
        args = argparse.Namespace(model="DiT_Llama_600M_patch2", num_classes=1000, class_names=names)
        torch.save(args, tmp_path / "model_args.pth")
        caplog.clear()
        assert original.read_spec(tmp_path, {}).class_names == (names or imagenet_names())
        assert [message.rpartition(": ")[2] for message in caplog.messages] == said


def test_a_registered_name_outweighs_other_settings(tmp_path: Path) -> None:
    args = argparse.Namespace(model="DiT_Llama_600M_patch2", dim=64, n_layers=1, n_heads=1, norm_eps=1e-6)
    torch.save(args, tmp_path / "model_args.pth")
    assert original.read_spec(tmp_path, {}).model == preset("DiT_Llama_600M_patch2", norm_eps=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("DiT_Llama_600M_patch2", 814_459_936),
        ("DiT_Llama_3B_patch2", 5_046_643_744),
        ("DiT_Llama_7B_patch2", 8_371_142_688),
    ],
)
def test_registered_names_of_text_models(tmp_path: Path, name: str, parameters: int) -> None:
    """The width of the text's features is read off the weights; a Namespace without max_seq_len means 288."""
    args = argparse.Namespace(model=name, **TRAINING, lm="/models/llama", tokenizer_path="/models/llama-tokenizer")
    torch.save(args, tmp_path / "model_args.pth")
    spec = original.read_spec(tmp_path, {"cap_embedder.1.weight": (1024, 4096)})
    assert isinstance(spec.model, TextModelConfig)
    assert (spec.model.cap_feat_dim, spec.model.max_seq_len, spec.model.rope_scaling_factor) == (4096, 288, 1.0)
    assert parameter_count(spec.model) == parameters
    assert isinstance(spec.conditioner, TextConditionerConfig) and spec.conditioner.encoder == "/models/llama"


def test_512_pixels_mse_and_other_classes(make_original: Make, tiny: Any) -> None:
    spec = open_source(make_original(image_size=512, vae="mse")).spec
    assert spec.model == replace(tiny.spec.model, input_size=64)
    assert spec.codec == AutoencoderConfig("stabilityai/sd-vae-ft-mse")
    assert spec.class_names is None


def test_a_model_without_a_null_class(make_original: Make, tiny: Any) -> None:
    """class_dropout_prob = 0 shows in the label table alone."""
    raw = {**tiny.raw, TABLE: tiny.raw[TABLE][:10]}
    source = open_source(make_original(raw, raw))
    assert source.spec.model == replace(tiny.spec.model, class_dropout_prob=0.0)
    assert load_model(source).y_embedder.embedding_table.weight.shape == (10, 64)


def test_text_model(tmp_path: Path, same: Callable[..., bool]) -> None:
    """The original's own weights and numbers, through its own layout."""
    case = golden("text_qknorm")
    config = json.loads((FOLDER / "text_qknorm.json").read_text())["config"]
    weights = load_file(FOLDER / "text_qknorm.weights.safetensors")
    sizes = {key: value for key, value in config.items() if key != "cap_feat_dim"}
    args = argparse.Namespace(model="DiT_Llama", **sizes, lm="some/llm", tokenizer_path="other", rope_scaling_factor=1)
    torch.save(args, tmp_path / "model_args.pth")
    torch.save(weights, tmp_path / "consolidated_ema.00-of-01.pth")
    source = open_source(tmp_path)
    assert source.spec.model == case.config
    assert source.spec.conditioner == TextConditionerConfig("some/llm", tokenizer="other")
    assert source.has_ema() and not source.has_raw()
    model = load_model(source)
    assert same(model.state_dict(), weights)
    assert_close(model(case.io["in.x"], case.io["in.t"], case.cond), case.io["out.forward"])


def test_golden_class_models(tmp_path: Path) -> None:
    """Grouped heads without q/k norm, from the Namespace's extra attributes."""
    case = golden("class_plain_gqa")
    config = json.loads((FOLDER / "class_plain_gqa.json").read_text())["config"]
    config["image_size"] = config.pop("input_size") * 8
    torch.save(argparse.Namespace(model="DiT_Llama", **config), tmp_path / "model_args.pth")
    torch.save(case.model.state_dict(), tmp_path / "consolidated.00-of-01.pth")
    model = load_model(open_source(tmp_path), ema=False)
    assert_close(model(case.io["in.x"], case.io["in.t"], case.cond), case.io["out.forward"])


@pytest.mark.parametrize(
    ("text", "folder", "step"),
    [
        ("1350000\n", "ckpt", 1350000),
        (" 20 ", "ckpt", 20),
        (None, "0050000", 50000),
        ("7", "0050000", 7),
        (None, "ckpt", None),
        ("soon", "ckpt", None),
        ("", "ckpt", None),
        ("-3", "ckpt", None),
    ],
)
def test_training_step(make_original: Make, text: str | None, folder: str, step: int | None) -> None:
    path = make_original(name=folder)
    if text is not None:
        (path / "resume_step.txt").write_text(text)
    assert open_source(path).spec.training == (None if step is None else {"step": step})


@pytest.mark.parametrize("content", [b"9" * 5000, b"\xff\xfe1\x00", "٣".encode() * 3], ids=["long", "utf-16", "arabic"])
def test_a_strange_resume_step_raises_nothing_else(make_original: Make, content: bytes) -> None:
    path = make_original()
    (path / "resume_step.txt").write_bytes(content)
    with contextlib.suppress(SourceError):
        assert open_source(path).spec.model.dim == 64
