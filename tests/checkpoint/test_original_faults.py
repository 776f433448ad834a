"""The original's folders with parts, tensors and settings at fault: one line that names the file."""

import argparse
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TABLE, TRAINING

from ldit.checkpoint.layouts import original
from ldit.checkpoint.open import open_source
from ldit.pipeline.load import load_model

Fault = Callable[..., str]
Make = Callable[..., Path]


def test_missing_ema_is_an_error_unless_raw_is_asked_for(
    make_original: Make, tiny: Any, same: Callable[..., bool], fault: Fault
) -> None:
    folder = make_original()
    (folder / "consolidated_ema.00-of-01.pth").unlink()
    source = open_source(folder)
    assert not source.has_ema() and source.has_raw()
    message = fault(load_model, source, ema=True)
    assert "consolidated_ema.00-of-01.pth" in message and "ema=False" in message
    assert same(load_model(source, ema=False).state_dict(), tiny.raw)


def test_missing_raw_weights(make_original: Make, tiny: Any, same: Callable[..., bool], fault: Fault) -> None:
    folder = make_original()
    (folder / "consolidated.00-of-01.pth").unlink()
    source = open_source(folder)
    assert same(load_model(source, ema=True).state_dict(), tiny.ema)
    assert "consolidated.00-of-01.pth" in fault(load_model, source, ema=False)


def test_missing_parts_of_the_folder(make_original: Make, fault: Fault) -> None:
    folder = make_original()
    (folder / "model_args.pth").unlink()
    assert fault(open_source, folder) == f"{folder / 'model_args.pth'} is missing"
    folder = make_original(name="args only")
    for path in folder.glob("consolidated*"):
        path.unlink()
    assert "consolidated" in fault(open_source, folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("layers.1.attention.wo.weight"), ["missing 1", "layers.1.attention.wo.weight"]),
        (lambda w: w.update(stray=torch.zeros(1)), ["unknown 1", "stray"]),
        (lambda w: w.update({"x_embedder.bias": torch.zeros(3)}), ["x_embedder.bias", "(3,)", "(64,)"]),
        (lambda w: w.update({"layers.0.attention.q_norm.bias": torch.zeros(64)}), ["unknown 1", "q_norm"]),
        (lambda w: w.update({3: torch.zeros(1)}), []),
        (lambda w: w.update({"two\nlines": torch.zeros(1)}), []),
        (lambda w: w.update(step=3), []),
        (lambda w: w.update({TABLE: torch.zeros(11, 64, dtype=torch.int64)}), [TABLE]),
        (lambda w: w.update({TABLE: torch.zeros(11, 64, dtype=torch.complex64)}), []),
        (lambda w: w.update({TABLE: torch.zeros(11, 64, device="meta")}), []),
        (lambda w: w.update({TABLE: torch.zeros(11, 64).to_sparse()}), []),
        (lambda w: w.update({TABLE: torch.zeros(())}), [TABLE]),
        (lambda w: w.update({TABLE: torch.zeros(1).expand(11, 64)}), []),
        (lambda w: w.update({"\x1b[2Jstray": torch.zeros(1)}), []),
    ],
    ids=[
        "missing",
        "extra",
        "shape",
        "q/k norm not in the Namespace",
        "number as name",
        "name of two lines",
        "number as tensor",
        "integers",
        "complex",
        "meta",
        "sparse",
        "scalar",
        "one number spread out",
        "terminal controls",
    ],
)
def test_tensors_at_fault(
    make_original: Make, tiny: Any, change: Callable[[dict[Any, Any]], Any], said: list[str], fault: Fault
) -> None:
    weights = dict(tiny.raw)
    change(weights)
    folder = make_original(weights, weights)
    message = fault(lambda: load_model(open_source(folder), dtype=torch.float32))
    assert str(folder) in message
    for word in said:
        assert word in message


@pytest.mark.parametrize(
    "content", [{"model": "DiT_Llama_600M_patch2"}, ["x"], 3, None, "DiT_Llama_600M_patch2", torch.zeros(3)]
)
def test_model_args_that_are_no_namespace(make_original: Make, content: Any, fault: Fault) -> None:
    folder = make_original()
    torch.save(content, folder / "model_args.pth")
    message = fault(open_source, folder)
    assert str(folder / "model_args.pth") in message and "Namespace" in message


@pytest.mark.parametrize("content", [[torch.zeros(1)], torch.zeros(1), argparse.Namespace(x=1), {"a": 1}])
def test_weights_that_are_no_state_dict(make_original: Make, content: Any, fault: Fault) -> None:
    folder = make_original()
    for path in folder.glob("consolidated*"):
        torch.save(content, path)
    assert "consolidated" in fault(open_source, folder)


@pytest.mark.parametrize("name", ["DiT_Llama_13B_patch2", "DiT-XL/2", None, "", "two\nlines"])
def test_unknown_model_name(tmp_path: Path, name: str | None, fault: Fault) -> None:
    torch.save(argparse.Namespace(model=name, **TRAINING), tmp_path / "model_args.pth")
    message = fault(original.read_spec, tmp_path, {})
    assert repr(name) in message and "DiT_Llama_600M_patch2" in message


def test_a_namespace_without_a_name(tmp_path: Path, fault: Fault) -> None:
    torch.save(argparse.Namespace(), tmp_path / "model_args.pth")
    assert "model" in fault(original.read_spec, tmp_path, {})


CYCLE = argparse.Namespace()
CYCLE.model = CYCLE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dim", 64.0),
        ("dim", "64"),
        ("dim", torch.tensor(64)),
        ("n_layers", True),
        ("n_layers", 10**7),
        ("n_heads", 0),
        ("n_heads", None),
        ("norm_eps", "x"),
        ("norm_eps", float("nan")),
        ("norm_eps", 10**400),
        ("learn_sigma", "yes"),
        ("qk_norm", torch.ones(3)),
        ("qk_norm", "no"),
        ("num_classes", [10]),
        ("num_classes", "many"),
        ("num_classes", 10**400),
        ("image_size", {}),
        ("image_size", float("inf")),
        ("ffn_dim_multiplier", -1.0),
        ("patch_size", 0),
        ("n_kv_heads", 3),
        ("vae", "../../../somewhere"),
        ("vae", ["ema"]),
        ("model", ["DiT_Llama"]),
        ("model", CYCLE),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_hostile_settings(make_original: Make, name: str, value: Any, fault: Fault) -> None:
    """Wrong types and values in the Namespace are one line that names the file and the setting."""
    folder = make_original(**{name: value})
    message = fault(open_source, folder)
    assert str(folder / "model_args.pth") in message and name in message


def test_a_setting_is_shown_in_bounded_memory(make_original: Make, fault: Fault) -> None:
    """A list of lists of itself is small in a pickle and endless in print."""
    value: Any = [1]
    for _ in range(6):
        value = [value] * 10
    folder = make_original(dim=value)
    tracemalloc.start()
    try:
        assert "dim" in fault(open_source, folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20


@pytest.mark.parametrize("word", ["consolidated", "model_args"])
def test_the_refusal_of_a_torn_file_names_it(make_original: Make, word: str, fault: Fault) -> None:
    folder = make_original()
    path = next(folder.glob(f"{word}*"))
    path.write_bytes(path.read_bytes()[:500])
    assert str(path) in fault(lambda: load_model(open_source(folder), ema="ema" in path.name))


@pytest.mark.parametrize(("name", "value"), [("max_text_tokens", "x"), ("max_seq_len", "x"), ("max_seq_len", 64.5)])
def test_hostile_settings_of_text_models(tmp_path: Path, name: str, value: Any, fault: Fault) -> None:
    args = argparse.Namespace(model="DiT_Llama_600M_patch2", **{**TRAINING, name: value})
    torch.save(args, tmp_path / "model_args.pth")
    assert name in fault(original.read_spec, tmp_path, {"cap_embedder.1.weight": (1024, 48)})


def test_hostile_shape_of_the_text_projection(tmp_path: Path, fault: Fault) -> None:
    torch.save(argparse.Namespace(model="DiT_Llama_600M_patch2", **TRAINING), tmp_path / "model_args.pth")
    assert "cap_embedder.1.weight" in fault(original.read_spec, tmp_path, {"cap_embedder.1.weight": (1024,)})
