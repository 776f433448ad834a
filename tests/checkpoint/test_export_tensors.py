"""Our layout with weight files at fault: one line that names the file or the tensor."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import configured, header
from safetensors.torch import load_file, save_file

from ldit.checkpoint.open import open_source
from ldit.pipeline.load import load_model

Fault = Callable[..., str]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("layers.1.ffn_norm.weight"), ["missing 1", "layers.1.ffn_norm.weight"]),
        (lambda w: w.update(stray=torch.zeros(2)), ["unknown 1", "stray"]),
        (
            lambda w: (w.pop("x_embedder.bias"), w.update(stray=torch.zeros(2))),
            ["missing 1", "x_embedder.bias", "unknown 1", "stray"],
        ),
        (lambda w: w.update({"x_embedder.bias": torch.zeros(65)}), ["x_embedder.bias", "(65,)", "(64,)"]),
        (lambda w: w.update({"x_embedder.bias": torch.zeros(64, 1)}), ["x_embedder.bias", "(64, 1)", "(64,)"]),
        (
            lambda w: w.update({"layers.0.attention.q_norm.weight": torch.zeros(64)}),
            ["unknown 1", "layers.0.attention.q_norm.weight"],
        ),
        (lambda w: w.clear() or w.update(a=torch.zeros(1)), ["missing", "unknown 1"]),
        (lambda w: w.update({"two\nlines": torch.zeros(1)}), ["unknown 1"]),
        (lambda w: w.update({"x_embedder.bias": torch.zeros(64, dtype=torch.int64)}), ["x_embedder.bias"]),
        (lambda w: w.update({"x_embedder.bias": torch.zeros(64, dtype=torch.bool)}), ["x_embedder.bias"]),
        (lambda w: w.update({"x_embedder.bias": torch.zeros(64, dtype=torch.complex64)}), ["x_embedder.bias"]),
    ],
    ids=[
        "missing",
        "unknown",
        "missing and unknown",
        "length",
        "dimensions",
        "q/k norm",
        "another model",
        "name of two lines",
        "integers",
        "booleans",
        "complex",
    ],
)
def test_tensors_at_fault(
    make_export: Callable[..., Path], change: Callable[[dict[str, Any]], Any], said: list[str], fault: Fault
) -> None:
    folder = rewrite(make_export(ema=False, with_manifest=False), change)
    message = fault(lambda: load_model(open_source(folder)))
    assert str(folder) in message
    for word in said:
        assert word in message


def test_a_model_of_other_sizes_is_named(make_export: Callable[..., Path], tiny: Any, fault: Fault) -> None:
    folder = make_export(ema=False, with_manifest=False)
    configured(folder, lambda d: replace(tiny.spec, model=replace(tiny.spec.model, n_layers=3)).to_json())
    assert "missing 11 entries (layers.2." in fault(lambda: load_model(open_source(folder)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        b"\x80\x02}q\x00.",
        struct.pack("<Q", 2**60) + b"{}",
        header(b"[" * 100_000),
        header(b'{"x_embedder.bias":{"dtype":"F32","shape":[64],"data_offsets":[0,256]}}', b"\0" * 100),
        header(b'{"x_embedder.bias":{"dtype":"F99","shape":[64],"data_offsets":[0,256]}}', b"\0" * 256),
        header(b'{"x_embedder.bias":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,0]}}'),
        header(b'{"x_embedder.bias":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}'),
    ],
    ids=["empty", "short", "pickle", "huge header", "deep", "truncated", "dtype", "overflow", "negative"],
)
def test_not_safetensors(make_export: Callable[..., Path], content: bytes, fault: Fault) -> None:
    folder = make_export(ema=False, with_manifest=False)
    (folder / "model.safetensors").write_bytes(content)
    source = open_source(folder)
    assert "model.safetensors is damaged" in fault(load_model, source)
    assert "model.safetensors is damaged" in fault(source.shapes, True)


def test_safetensors_of_a_type_torch_lacks(make_export: Callable[..., Path], fault: Fault) -> None:
    folder = make_export(ema=False, with_manifest=False)
    text = b'{"x_embedder.bias":{"dtype":"F6_E2M3","shape":[64],"data_offsets":[0,48]}}'
    (folder / "model.safetensors").write_bytes(header(text, b"\0" * 48))
    assert "model.safetensors" in fault(lambda: load_model(open_source(folder)))


def test_a_pickle_named_safetensors_is_not_unpickled(make_export: Callable[..., Path], fault: Fault) -> None:
    folder = make_export(ema=False, with_manifest=False)
    torch.save({"x": torch.zeros(1)}, folder / "model.safetensors")
    assert "model.safetensors is damaged" in fault(lambda: load_model(open_source(folder)))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "ema.safetensors"])
def test_an_export_with_a_manifest_is_checked(make_export: Callable[..., Path], name: str, fault: Fault) -> None:
    """A changed byte in what is read, valid in itself, is found."""
    folder = make_export()
    content = (folder / name).read_bytes()
    changed = content.replace(b"class 3", b"class 4") if name == "config.json" else content[:-1] + b"\x01"
    assert changed != content
    (folder / name).write_bytes(changed)
    assert str(folder / name) in fault(lambda: load_model(open_source(folder), ema=name != "model.safetensors"))
    assert str(folder / name) in fault(lambda: open_source(folder).verify())


def test_a_lost_ema_file_is_not_silently_replaced_by_raw_weights(
    make_export: Callable[..., Path], fault: Fault
) -> None:
    folder = make_export()
    (folder / "ema.safetensors").unlink()
    assert "ema.safetensors" in fault(lambda: load_model(open_source(folder)))
