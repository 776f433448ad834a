"""Our layout: written, read back, sharded, and refused with the key, file or tensor at fault."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldit.checkpoint.export import read_spec, write_export
from ldit.checkpoint.open import open_source
from ldit.config.model import BaselineConfig, ClassModelConfig, TextModelConfig
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
from ldit.errors import SourceError
from ldit.flows.pipeline import load_model
from ldit.nn.build import parameter_shapes

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
        BaselineConfig(input_size=8, hidden_size=16, depth=1, num_heads=2, num_classes=3),
        FlowConfig(time_scale=1.0, data_at=1),
        AutoencoderConfig(),
    ),
}


def weights_of(spec: ModelSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(s, generator=generator) for name, s in parameter_shapes(spec.model).items()}


@pytest.mark.parametrize("name", SPECS)
def test_round_trip(tmp_path: Path, name: str, same: Callable[..., bool]) -> None:
    spec, weights = SPECS[name], weights_of(SPECS[name])
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


# ---------------------------------------------------------------- shards


def shard(folder: Path, weights: dict[str, torch.Tensor], parts: int = 3) -> dict[str, str]:
    """Replace model.safetensors by shards as the Hub's tools write them."""
    (folder / "model.safetensors").unlink()
    table = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        names = list(weights)[part::parts]
        save_file({n: weights[n] for n in names}, folder / name, metadata={"format": "pt"})
        table.update(dict.fromkeys(names, name))
    write_index(folder, table)
    return table


def write_index(folder: Path, table: Any) -> None:
    data = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(data))


def test_shards(make_export: Callable[..., Path], tiny: Any, same: Callable[..., bool]) -> None:
    folder = make_export(ema=False, with_manifest=False)
    shard(folder, tiny.raw)
    source = open_source(folder)
    assert source.has_raw() and not source.has_ema()
    assert same(load_model(source).state_dict(), tiny.raw)
    assert source.shapes(ema=True).keys() == tiny.raw.keys()
    source.verify()


def test_shards_of_the_raw_weights_beside_ema(
    make_export: Callable[..., Path], tiny: Any, same: Callable[..., bool]
) -> None:
    folder = make_export(with_manifest=False)
    shard(folder, tiny.raw)
    assert same(load_model(open_source(folder), ema=True).state_dict(), tiny.ema)
    assert same(load_model(open_source(folder), ema=False).state_dict(), tiny.raw)


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "sub/../good.safetensors",
        "weights.bin",
        "sub/x.safetensors",
        "{root}/evil.safetensors",
        "..",
        "",
        "config.json",
        "good.safetensors/",
        "absent.safetensors",
        "x\0.safetensors",
        "two\nlines.safetensors",
        pytest.param("m" * 300 + ".safetensors", id="longer than a file name"),
    ],
)
def test_index_naming_what_is_not_a_weight_file_beside_it(
    make_export: Callable[..., Path], tiny: Any, name: str, fault: Fault
) -> None:
    """Even where such a file stands outside, it is not read."""
    folder = make_export(ema=False, with_manifest=False)
    (folder / "sub").mkdir()
    last = {"x_embedder.bias": tiny.raw["x_embedder.bias"]}
    for place in ("../evil.safetensors", "sub/x.safetensors", "weights.bin", "good.safetensors"):
        save_file(last, folder / place)
    table = shard(folder, {n: t for n, t in tiny.raw.items() if n not in last})
    write_index(folder, {**table, "x_embedder.bias": "good.safetensors"})
    load_model(open_source(folder))
    write_index(folder, {**table, "x_embedder.bias": name.format(root=folder.parent)})
    fault(lambda: load_model(open_source(folder)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": null}}',
        pytest.param('{"weight_map": ' + "[" * 100_000, id="deep"),
        "\x00",
    ],
)
def test_damaged_index(make_export: Callable[..., Path], tiny: Any, text: str, fault: Fault) -> None:
    folder = make_export(ema=False, with_manifest=False)
    shard(folder, tiny.raw)
    (folder / "model.safetensors.index.json").write_text(text)
    assert "index.json" in fault(lambda: load_model(open_source(folder)))


def test_shard_missing(make_export: Callable[..., Path], tiny: Any, fault: Fault) -> None:
    folder = make_export(ema=False, with_manifest=False)
    shard(folder, tiny.raw)
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = fault(lambda: load_model(open_source(folder)))
    assert message == f"{folder / 'model-00002-of-00003.safetensors'} is missing"


def test_two_shards_with_the_same_tensor(make_export: Callable[..., Path], tiny: Any, fault: Fault) -> None:
    """The index decides, or the file is refused; never whichever happens to be read last."""
    folder = make_export(ema=False, with_manifest=False)
    table = shard(folder, tiny.raw)
    save_file({"x_embedder.bias": torch.zeros(64), "x": torch.zeros(1)}, folder / "z.safetensors")
    write_index(folder, {**table, "x": "z.safetensors"})
    assert "x_embedder.bias" in fault(lambda: load_model(open_source(folder)))


# ---------------------------------------------------------------- config.json


def configured(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(data) or data))


def section(name: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data[name].update(values)


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


# ---------------------------------------------------------------- tensors


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


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


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


# ---------------------------------------------------------------- no source


@pytest.mark.parametrize("name", ["folder", "file.txt", "absent", "", "x\0y", "x\ny", "~no_such_user_/x"])
def test_not_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: Fault) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("x")
    fault(open_source, name)


def test_a_source_longer_than_a_file_name(fault: Fault) -> None:
    fault(open_source, "a" * 5000)


def test_a_hub_id_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    monkeypatch.chdir(tmp_path)
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    message = fault(open_source, "some-org/some-model")
    assert "'some-org/some-model'" in message and "HF_HUB_OFFLINE" in message
