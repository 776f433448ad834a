"""The original's layout as we write it: read back, read by the original, or refused in words."""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import golden
from models import TABLE, weights_of
from torch import Tensor

from ldit.checkpoint.layouts import original
from ldit.checkpoint.layouts.original import check_original, write_original
from ldit.checkpoint.open import open_source
from ldit.config.model import ClassModelConfig, TextModelConfig
from ldit.config.presets import preset, text_preset
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
from ldit.nn.build import parameter_shapes
from ldit.pipeline.load import load_model

Fault = Callable[..., str]
Make = Callable[..., Path]


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
