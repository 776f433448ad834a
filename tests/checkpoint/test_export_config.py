"""config.json at fault: one line that names the file and the key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import configured, section

from ldit.checkpoint.export import read_spec, write_export
from ldit.checkpoint.open import open_source
from ldit.config.model import ClassModelConfig
from ldit.config.spec import (
    AutoencoderConfig,
    DDPMConfig,
    ModelSpec,
)
from ldit.errors import SourceError

Fault = Callable[..., str]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(extra=1), "extra"),
        (section("model", widht=3), "model.widht"),
        (section("process", steps=3), "process.steps"),
        (section("codec", path="x"), "codec.path"),
        (section("conditioner", classes=[]), "conditioner.classes"),
        (lambda d: d.update(sampling={"stepz": 3}), "sampling.stepz"),
        (lambda d: {k: v for k, v in d.items() if k != "model"}, "model"),
        (lambda d: {k: v for k, v in d.items() if k != "process"}, "process"),
        (lambda d: {k: v for k, v in d.items() if k != "codec"}, "codec"),
        (lambda d: {k: v for k, v in d.items() if k != "format"}, "format"),
        (lambda d: d.update(format=2), "format 2 is newer than 1"),
        (lambda d: d.update(format=True), "format"),
        (lambda d: d.update(format="1"), "format"),
        (section("model", kind="unet"), "model.kind"),
        (section("model", kind=["class"]), "model.kind"),
        (section("model", kind="text"), "model.input_size"),
        (section("process", kind="edm"), "process.kind"),
        (lambda d: d.update(process="ddpm"), "process.kind"),
        (lambda d: d.update(model=[1]), "model.kind"),
        (section("model", dim="64"), "model.dim"),
        (section("model", dim=64.0), "model.dim"),
        (section("model", dim=True), "model.dim"),
        (section("model", dim=None), "model.dim"),
        (section("model", n_heads=5), "model.n_heads"),
        (section("model", n_heads=0), "model.n_heads"),
        (section("model", n_layers=-1), "model.n_layers"),
        (section("model", n_kv_heads=3), "model.n_kv_heads"),
        (section("model", n_kv_heads=-3), "model.n_kv_heads"),
        (section("model", qk_norm="all"), "model.qk_norm"),
        (section("model", qk_norm=1), "model.qk_norm"),
        (section("model", rope="3d"), "model.rope"),
        (section("model", learn_sigma=0), "model.learn_sigma"),
        (section("model", norm_eps=0), "model.norm_eps"),
        (section("model", norm_eps=float("nan")), "model.norm_eps"),
        (section("model", norm_eps=10**400), "model.norm_eps"),
        (section("model", input_size=7), "model.input_size"),
        (section("model", class_dropout_prob=1.0), "model.class_dropout_prob"),
        (section("model", ffn_dim_multiplier=-1), "model.ffn_dim_multiplier"),
        (section("model", ffn_dim_multiplier=0), "model.ffn_dim_multiplier"),
        (section("model", ffn_dim_multiplier=1e308), "model.ffn_dim_multiplier"),
        (section("model", ffn_dim_multiplier=float("inf")), "model.ffn_dim_multiplier"),
        (section("model", dim=4 * 10**12), "model"),
        (section("model", dim=4 * 10**400), "model"),
        (section("model", n_layers=10**7), "model.n_layers"),
        (section("codec", scale="0.18"), "codec.scale"),
        (section("codec", scale=[0.1, "x"]), "codec.scale"),
        (section("codec", scale=[]), "codec.scale"),
        (section("codec", factor=0), "codec.factor"),
        (section("conditioner", names=["one"]), "conditioner.names"),
        (section("conditioner", names="0123456789"), "conditioner.names"),
        (lambda d: d.update(conditioner=0), "conditioner"),
        (lambda d: d.update(conditioner=[]), "conditioner"),
        (lambda d: d.update(sampling=""), "sampling"),
        (lambda d: d.update(sampling=[250]), "sampling"),
        (lambda d: d.update(sampling={"steps": 2.5}), "sampling.steps"),
        (lambda d: d.update(sampling={"guidance_interval": [0, 1, 2]}), "sampling.guidance_interval"),
        (lambda d: d.update(training=[]), "training"),
        (lambda d: d.update(codec={"kind": "pixels"}), "in_channels"),
        (section("model", **{"two\nlines": 1}), "two\\nlines"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_config_at_fault(
    make_export: Callable[..., Path], change: Callable[[dict[str, Any]], Any], said: str, fault: Fault
) -> None:
    """One line that names the file and the key."""
    folder = make_export(ema=False, with_manifest=False)
    configured(folder, change)
    message = fault(open_source, folder)
    assert said in message and str(folder / "config.json") in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\x80\x02}q\x00.",
        b"\xff\xfe{\x00",
        b"[]",
        b"null",
        b'"x"',
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="deep object"),
        pytest.param(b'{"format": ' + b"1" * 5000 + b"}", id="long number"),
    ],
)
def test_config_is_not_json(make_export: Callable[..., Path], content: bytes, fault: Fault) -> None:
    folder = make_export(ema=False, with_manifest=False)
    (folder / "config.json").write_bytes(content)
    message = fault(open_source, folder)
    assert str(folder / "config.json") in message and len(message) < 1000


@pytest.mark.parametrize(
    "change",
    [
        section("process", kind="x" * 1_000_000),
        lambda d: d.update({"k" * 1_000_000: 1}),
        section("model", dim="1" * 1_000_000),
        lambda d: d.update(sampling=["x" * 1_000_000]),
    ],
    ids=["kind", "key", "value", "section"],
)
def test_messages_stay_short(
    make_export: Callable[..., Path], change: Callable[[dict[str, Any]], Any], fault: Fault
) -> None:
    """A hostile configuration does not flood the terminal."""
    folder = make_export(ema=False, with_manifest=False)
    configured(folder, change)
    assert len(fault(open_source, folder)) < 2000


def test_a_parsed_config_can_be_written_again(make_export: Callable[..., Path], tmp_path: Path) -> None:
    """A lone surrogate passes JSON's parser; it is refused, or survives writing."""
    folder = make_export(ema=False, with_manifest=False)
    configured(folder, section("conditioner", names=["\ud800", *"abcdefghi"]))
    try:
        spec = read_spec(folder)
    except SourceError:
        return
    write_export(tmp_path, spec, [("x", torch.zeros(1))])
    assert read_spec(tmp_path) == spec


def test_absent_sections_and_keys_take_the_defaults(make_export: Callable[..., Path]) -> None:
    folder = make_export(ema=False, with_manifest=False)
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32, "input_size": 8, "num_classes": 10}
    codec = {"kind": "autoencoder_kl"}
    text = json.dumps({"format": 1, "model": sizes, "process": {"kind": "ddpm"}, "codec": codec, "sampling": None})
    (folder / "config.json").write_text(text)
    assert open_source(folder).spec == ModelSpec(ClassModelConfig(**sizes), DDPMConfig(), AutoencoderConfig())
