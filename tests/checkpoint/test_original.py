"""The original's folders, written here by hand from its description, and written by us and read back."""

import argparse
import contextlib
import json
import math
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import FOLDER, assert_close, golden
from safetensors.torch import load_file
from torch import Tensor

from ldit.checkpoint import original
from ldit.checkpoint.open import open_source
from ldit.checkpoint.original import check_original, write_original
from ldit.config.imagenet import imagenet_names
from ldit.config.model import ClassModelConfig, TextModelConfig, preset, text_preset
from ldit.config.spec import (
    AutoencoderConfig,
    ClassConditionerConfig,
    DDPMConfig,
    FlowConfig,
    ModelSpec,
    PixelCodecConfig,
    TextConditionerConfig,
)
from ldit.errors import SourceError
from ldit.flows.pipeline import load_model
from ldit.nn.build import parameter_count, parameter_shapes

Fault = Callable[..., str]
Make = Callable[..., Path]
TABLE = "y_embedder.embedding_table.weight"

# What its train.py leaves in the Namespace beside the model's own settings.
TRAINING = {
    "data_path": "/data/imagenet",
    "results_dir": "results",
    "image_size": 256,
    "num_classes": 1000,
    "global_batch_size": 256,
    "lr": 1e-4,
    "vae": "ema",
    "precision": "bf16",
    "grad_precision": None,
    "local_diffusers_model_root": None,
    "no_auto_resume": False,
    "qk_norm": True,
}


def weights_of(config: ClassModelConfig | TextModelConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config).items()}


# ---------------------------------------------------------------- reading: what the model is


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
    assert source.spec.conditioner == TextConditionerConfig("some/llm")
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


# ---------------------------------------------------------------- reading: what is wrong


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


# ---------------------------------------------------------------- model-parallel parts


def split_axis(name: str) -> int | None:
    """The original's table of splits; None = whole on every rank. Written from its description alone."""
    linear, _, kind = name.rpartition(".")
    last = linear.split(".")[-1]
    if last in ("wq", "wk", "wv", "w1", "w3", "wk_y", "wv_y", "x_embedder") or name.endswith("attention.gate"):
        return 0
    if re.search(r"(t_embedder\.mlp\.0|adaLN_modulation\.1|final_layer\.linear|cap_embedder\.1)$", linear):
        return 0
    if last in ("wo", "w2", "embedding_table") or (linear == "t_embedder.mlp.2" and kind == "weight"):
        return 1
    return None


def parts_of(weights: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in weights.items():
        axis = split_axis(name)
        pieces = [tensor] * count if axis is None else tensor.chunk(count, axis)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()
    return parts


def write_parts(folder: Path, weights: dict[str, Tensor], count: int, word: str = "consolidated_ema") -> list[Path]:
    paths = [folder / f"{word}.{rank:02d}-of-{count:02d}.pth" for rank in range(count)]
    for path, part in zip(paths, parts_of(weights, count), strict=True):
        torch.save(part, path)
    return paths


def split_folder(make: Make, weights: dict[str, Tensor], count: int, **settings: Any) -> Path:
    folder = make(model_parallel_size=count, **settings)
    for path in folder.glob("consolidated*"):
        path.unlink()
    write_parts(folder, weights, count)
    return folder


def test_the_splits_cover_what_the_description_lists() -> None:
    """41 names of a text model of one layer: the parts together hold each split value once."""
    config = TextModelConfig(dim=64, n_layers=1, n_heads=4, multiple_of=32, cap_feat_dim=48)
    axes = {name: split_axis(name) for name in parameter_shapes(config)}
    assert axes["t_embedder.mlp.2.bias"] is None and axes["t_embedder.mlp.2.weight"] == 1
    assert {name for name, axis in axes.items() if axis is None} == {
        "eol_token",
        "pad_token",
        "t_embedder.mlp.2.bias",
        "cap_embedder.0.weight",
        "cap_embedder.0.bias",
        "layers.0.attention_norm.weight",
        "layers.0.ffn_norm.weight",
        "layers.0.attention_y_norm.weight",
    }


@pytest.mark.parametrize("count", [2, 4])
def test_parts_join_to_the_same_class_model(
    make_original: Make, tiny: Any, count: int, same: Callable[..., bool]
) -> None:
    source = open_source(split_folder(make_original, tiny.ema, count))
    assert source.spec.model == tiny.spec.model
    assert same(load_model(source).state_dict(), tiny.ema)


def test_parts_join_to_the_same_text_model(make_original: Make, same: Callable[..., bool]) -> None:
    config = TextModelConfig(dim=64, n_layers=2, n_heads=4, multiple_of=32, cap_feat_dim=48, max_seq_len=64)
    weights = weights_of(config)
    source = open_source(split_folder(make_original, weights, 2, max_seq_len=64))
    assert source.spec.model == config
    assert same(load_model(source).state_dict(), weights)


def test_parts_are_joined_by_rank_not_by_listing(
    make_original: Make, tiny: Any, same: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = split_folder(make_original, tiny.ema, 2)
    listed = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: sorted(listed(self, pattern), reverse=True))
    assert same(load_model(open_source(folder)).state_dict(), tiny.ema)


def test_parts_with_qk_norm_are_refused(make_original: Make, fault: Fault) -> None:
    """Each rank normalised its own heads: no single set of weights is that function."""
    weights = weights_of(ClassModelConfig(dim=64, n_layers=1, n_heads=4, multiple_of=32, num_classes=10, qk_norm=True))
    folder = split_folder(make_original, weights, 2, qk_norm=True, n_layers=1)
    message = fault(lambda: load_model(open_source(folder)))
    assert "2 model-parallel parts" in message and "q/k norm" in message


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_part_is_named(make_original: Make, tiny: Any, rank: int, fault: Fault) -> None:
    folder = split_folder(make_original, tiny.ema, 2)
    (folder / f"consolidated_ema.0{rank}-of-02.pth").unlink()
    message = fault(lambda: load_model(open_source(folder)))
    assert message == f"{folder / f'consolidated_ema.0{rank}-of-02.pth'} is missing"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.pop("x_embedder.bias"), "x_embedder.bias"),
        (lambda p: p.update(stray=torch.zeros(1)), "stray"),
        (lambda p: p.update({"x_embedder.weight": torch.zeros(32, 5)}), "x_embedder.weight"),
        (lambda p: p.update({"x_embedder.weight": torch.zeros(32)}), "x_embedder.weight"),
        (lambda p: p.update({"x_embedder.weight": torch.zeros(31, 16)}), "x_embedder.weight"),
    ],
    ids=["lacks one", "one more", "other width", "other rank", "other height"],
)
def test_parts_that_do_not_fit(
    make_original: Make, tiny: Any, change: Callable[[dict[str, Any]], Any], said: str, fault: Fault
) -> None:
    folder = split_folder(make_original, tiny.ema, 2)
    part = parts_of(tiny.ema, 2)[1]
    change(part)
    torch.save(part, folder / "consolidated_ema.01-of-02.pth")
    assert said in fault(lambda: load_model(open_source(folder)))


@pytest.mark.parametrize("name", ["consolidated.00-of-00.pth", "consolidated.05-of-02.pth"])
def test_part_numbers_that_cannot_be(make_original: Make, name: str, fault: Fault) -> None:
    folder = make_original()
    for path in list(folder.glob("consolidated*")):
        path.rename(folder / name)
    assert str(folder) in fault(lambda: load_model(open_source(folder), ema=False))


def test_a_huge_part_count_costs_no_memory(make_original: Make, fault: Fault) -> None:
    folder = make_original()
    for path in list(folder.glob("consolidated*")):
        path.rename(folder / "consolidated.00-of-1000000.pth")
    tracemalloc.start()
    try:
        message = fault(open_source, folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "01-of-1000000.pth is missing" in message
    assert peak < 4 << 20


# ---------------------------------------------------------------- writing


def written(folder: Path, spec: ModelSpec, weights: dict[str, Tensor], step: int | None = None) -> Path:
    folder.mkdir()
    write_original(folder, spec, weights.items(), weights.items(), step)
    return folder


@pytest.mark.parametrize(
    "config",
    [
        ClassModelConfig(dim=64, n_layers=2, n_heads=4, multiple_of=32, input_size=8, num_classes=10),
        ClassModelConfig(dim=64, n_layers=2, n_heads=4, qk_norm=True, input_size=8, num_classes=10),
        ClassModelConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, input_size=16, num_classes=3),
        ClassModelConfig(dim=64, n_layers=1, n_heads=4, ffn_dim_multiplier=1.3, norm_eps=1e-6, num_classes=3),
        ClassModelConfig(dim=64, n_layers=1, n_heads=4, class_dropout_prob=0.0, learn_sigma=False, num_classes=3),
        ClassModelConfig(dim=64, n_layers=1, n_heads=4, patch_size=4, in_channels=8, num_classes=3),
        TextModelConfig(dim=64, n_layers=2, n_heads=4, multiple_of=32, cap_feat_dim=48),
        TextModelConfig(
            dim=64, n_layers=1, n_heads=4, cap_feat_dim=48, max_seq_len=1088, rope_scaling_factor=2.0, qk_norm=True
        ),
    ],
    ids=["plain", "q/k norm", "gqa", "ffn", "no null class", "patch 4", "text", "text scaled"],
)
def test_round_trip(tmp_path: Path, config: ClassModelConfig | TextModelConfig, same: Callable[..., bool]) -> None:
    conditioner: Any = TextConditionerConfig("some/llm") if config.kind == "text" else ClassConditionerConfig()
    spec = ModelSpec(config, DDPMConfig(), AutoencoderConfig("stabilityai/sd-vae-ft-mse"), conditioner)
    weights = weights_of(config)
    source = open_source(written(tmp_path / "out", spec, weights, 1234))
    assert source.spec == replace(spec, training={"step": 1234})
    for ema in (True, False):
        assert same(load_model(source, ema=ema).state_dict(), weights)


@pytest.mark.parametrize("name", ["DiT_Llama_600M_patch2", "DiT_Llama_3B_patch2", "DiT_Llama_7B_patch2"])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"n_kv_heads": 8, "norm_eps": 1e-6}, {"input_size": 64}])
def test_registered_sizes_are_written_under_their_names(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    """With the Namespace its own sample.py reads, and nothing of ours where the registered name says it all."""
    spec = ModelSpec(preset(name, **changes), DDPMConfig(), AutoencoderConfig())
    write_original(tmp_path, spec, [], None, None)
    with torch.serialization.safe_globals([argparse.Namespace]):
        args = torch.load(tmp_path / "model_args.pth", weights_only=True)
    assert args.model == name
    assert args.model_parallel_size == 1 and args.vae == "ema" and args.num_classes == 1000
    assert args.image_size == 8 * changes.get("input_size", 32)
    assert args.qk_norm is changes.get("qk_norm", False)
    if changes.keys() <= {"qk_norm", "input_size"}:
        assert not {"dim", "n_layers", "n_heads", "multiple_of", "norm_eps", "patch_size"} & vars(args).keys()
    assert original.read_spec(tmp_path, {}).model == spec.model
    assert not (tmp_path / "resume_step.txt").exists() and not list(tmp_path.glob("consolidated_ema*"))


def test_files_are_what_the_original_reads(tmp_path: Path, tiny: Any, same: Callable[..., bool]) -> None:
    """Plain fp32 state dicts and a plain Namespace, whatever the dtype they came in."""
    half = {name: t.to(torch.bfloat16) for name, t in tiny.raw.items()}
    folder = written(tmp_path / "out", tiny.spec, half, 50)
    assert {p.name for p in folder.iterdir()} == {
        "consolidated.00-of-01.pth",
        "consolidated_ema.00-of-01.pth",
        "model_args.pth",
        "resume_step.txt",
    }
    state = torch.load(folder / "consolidated_ema.00-of-01.pth", weights_only=True)
    assert same(state, {name: t.float() for name, t in half.items()})
    assert int((folder / "resume_step.txt").read_text()) == 50


def test_a_view_of_a_large_tensor_is_written_alone(tmp_path: Path) -> None:
    """torch.save stores whole storages: a row of a big matrix must not drag the matrix along."""
    config = ClassModelConfig(dim=64, n_layers=1, n_heads=4, num_classes=1)
    spec = ModelSpec(config, DDPMConfig(), AutoencoderConfig())
    write_original(tmp_path, spec, [("x", torch.zeros(1000, 1000)[0])], None, None)
    assert (tmp_path / "consolidated.00-of-01.pth").stat().st_size < 20_000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"process": FlowConfig()}, ["process 'flow'"]),
        ({"codec": PixelCodecConfig(), "model": {"in_channels": 3}}, ["codec 'pixels'"]),
        ({"model": {"qk_norm": "head"}}, ["per-head q/k norm"]),
        ({"model": {"rope": "2d"}}, ["2-D RoPE"]),
        ({"model": {"cond_channels": 3}}, ["cond_channels"]),
        (
            {"process": FlowConfig(), "model": {"rope": "2d", "qk_norm": "head"}},
            ["process 'flow'", "2-D RoPE", "per-head q/k norm"],
        ),
    ],
)
def test_impossible_pairs_are_refused_by_name(
    tmp_path: Path, tiny: Any, changes: dict[str, Any], said: list[str], fault: Fault
) -> None:
    model = replace(tiny.spec.model, **changes.get("model", {}))
    spec = replace(tiny.spec, **{k: v for k, v in changes.items() if k != "model"}, model=model)
    for message in (fault(check_original, spec), fault(write_original, tmp_path, spec, [], None, None)):
        for word in said:
            assert word in message
    assert list(tmp_path.iterdir()) == []


def test_the_baseline_is_refused(tmp_path: Path, fault: Fault) -> None:
    assert "'dit'" in fault(write_original, tmp_path, golden("dit_tiny").spec, [], None, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"codec": AutoencoderConfig("someone/another-vae")},
        {"codec": AutoencoderConfig("codec")},
        {"codec": AutoencoderConfig(scale=0.13025)},
        {"codec": AutoencoderConfig(shift=0.1)},
        {"codec": AutoencoderConfig(factor=16)},
        {"class_dropout_prob": 0.2},
    ],
    ids=["other codec", "codec by path", "scale", "shift", "factor", "dropout"],
)
def test_nothing_is_lost_in_silence(tmp_path: Path, tiny: Any, changes: dict[str, Any]) -> None:
    """What the layout cannot hold is refused, never turned into something else."""
    fields = {"model": replace(tiny.spec.model, **changes)} if "codec" not in changes else changes
    spec = replace(tiny.spec, conditioner=None, **fields)
    try:
        folder = written(tmp_path / "out", spec, weights_of(spec.model))
    except SourceError:
        return
    back = open_source(folder).spec
    assert (back.model, back.codec) == (spec.model, spec.codec)


@pytest.mark.parametrize(
    "conditioner", [TextConditionerConfig("some/llm", 77), TextConditionerConfig("some/llm", 128, "nothing")]
)
def test_nothing_is_lost_in_silence_of_text(tmp_path: Path, conditioner: TextConditionerConfig) -> None:
    spec = ModelSpec(text_preset("DiT_Llama_600M_patch2"), DDPMConfig(), AutoencoderConfig(), conditioner)
    try:
        write_original(tmp_path, spec, [], None, None)
    except SourceError:
        return
    assert original.read_spec(tmp_path, {"cap_embedder.1.weight": (1024, 5120)}).conditioner == conditioner


def test_class_names_are_not_replaced_in_silence(tmp_path: Path, fault: Fault) -> None:
    """A thousand classes of one's own must not come back as ImageNet's."""
    names = tuple(f"class {i}" for i in range(1000))
    spec = ModelSpec(
        ClassModelConfig(dim=64, n_layers=1, n_heads=4),
        DDPMConfig(),
        AutoencoderConfig(),
        ClassConditionerConfig(names),
    )
    try:
        write_original(tmp_path, spec, [], None, None)
    except SourceError:
        return
    assert original.read_spec(tmp_path, {TABLE: (1001, 64)}).class_names in (None, names)


def test_meta_shapes_agree_with_the_published_lists() -> None:
    """Entries of the published models: 251 / 187 and 491 / 363, text 352 / 688."""
    counts = [
        len(parameter_shapes(make(f"DiT_Llama_{size}_patch2", qk_norm=norm)))
        for make, size, norm in [
            (preset, "600M", True),
            (preset, "600M", False),
            (preset, "3B", True),
            (preset, "3B", False),
            (text_preset, "600M", True),
            (text_preset, "3B", True),
        ]
    ]
    assert counts == [251, 187, 491, 363, 352, 688]
    assert sum(math.prod(s) for s in parameter_shapes(preset("DiT_Llama_600M_patch2")).values()) == 609_738_272
