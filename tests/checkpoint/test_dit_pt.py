"""facebookresearch/DiT files: bare, or as its train.py writes them; what shapes tell and what they cannot."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import FOLDER, assert_close, golden
from safetensors.torch import load_file
from torch import Tensor

from ldit.checkpoint.layouts import dit_pt
from ldit.checkpoint.open import open_source
from ldit.commands.convert import convert
from ldit.config.assets import imagenet_names
from ldit.config.model import OriginalDiTConfig
from ldit.config.spec import AutoencoderConfig, ClassConditionerConfig, DDPMConfig, ModelSpec
from ldit.nn.build import parameter_count, parameter_shapes
from ldit.pipeline.load import load_model
from ldit.storage.pickled import load_pickled

Fault = Callable[..., str]
HEADS = 4
TABLE = "y_embedder.embedding_table.weight"


@pytest.fixture(scope="module")
def raw() -> dict[str, Tensor]:
    return load_file(FOLDER / "dit_tiny.weights.safetensors")


@pytest.fixture(scope="module")
def ema(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t if name == "pos_embed" else t * 0.5 for name, t in raw.items()}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(content: Any, name: str = "dit.pt") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


def trained(raw: Any, ema: Any) -> dict[str, Any]:
    """What its train.py saves, optimiser state and Namespace included."""
    opt = {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    args = argparse.Namespace(model="DiT-S/2", image_size=256, num_classes=10, data_path="/x", vae="ema")
    return {"model": raw, "ema": ema, "opt": opt, "args": args}


@pytest.mark.parametrize("name", ["DiT-XL-2-256x256.pt", "weights.pth"])
def test_bare_state_dict_gives_its_own_numbers(
    save: Callable[..., Path], raw: dict[str, Tensor], name: str, same: Callable[..., bool]
) -> None:
    case = golden("dit_tiny")
    source = open_source(save(raw, name), heads=HEADS)
    assert source.kind == "dit-pt"
    assert source.spec == ModelSpec(
        case.config,
        DDPMConfig(),
        AutoencoderConfig("stabilityai/sd-vae-ft-mse", 0.18215, 0.0, 8),
        ClassConditionerConfig(),
    )
    model = load_model(source)
    assert same(model.state_dict(), raw)
    assert same(load_model(source, ema=False).state_dict(), raw), "the only weights there are"
    assert_close(model(case.io["in.x"], case.io["in.t"], case.cond), case.io["out.forward"])
    assert not source.has_ema() and source.has_raw()
    source.verify()


def test_a_checkpoint_of_its_training(
    save: Callable[..., Path], raw: dict[str, Tensor], ema: dict[str, Tensor], same: Callable[..., bool]
) -> None:
    source = open_source(save(trained(raw, ema)), heads=HEADS)
    assert same(load_model(source, ema=True).state_dict(), ema)
    assert same(load_model(source, ema=False).state_dict(), raw)
    assert source.shapes(ema=True)["pos_embed"] == ((1, 16, 64), "fp32")
    source.verify()


def test_a_checkpoint_of_its_training_keeps_ema_apart(
    save: Callable[..., Path], raw: dict[str, Tensor], ema: dict[str, Tensor]
) -> None:
    """Who converts it must not lose the EMA weights."""
    source = open_source(save(trained(raw, ema)), heads=HEADS)
    assert source.has_ema() and source.has_raw()


@pytest.mark.parametrize(
    ("vae", "name"),
    [("ema", "ft-ema"), ("mse", "ft-mse"), ("xl", "ft-mse"), (None, "ft-mse"), (3, "ft-mse"), (["ema"], "ft-mse")],
)
@pytest.mark.parametrize("kind", [argparse.Namespace, dict])
def test_the_autoencoder_of_its_settings(
    save: Callable[..., Path], raw: dict[str, Tensor], vae: Any, name: str, kind: Any
) -> None:
    """One of the two that its train.py offers; else that of the published weights."""
    source = open_source(save({"model": raw, "ema": raw, "args": kind(vae=vae)}), heads=HEADS)
    assert source.spec.codec == AutoencoderConfig(f"stabilityai/sd-vae-{name}")


@pytest.mark.parametrize("vae", ["ema", "mse"])
@pytest.mark.parametrize("ema_only", [False, True])
def test_the_autoencoder_goes_there_and_back(
    save: Callable[..., Path],
    raw: dict[str, Tensor],
    ema: dict[str, Tensor],
    tmp_path: Path,
    same: Callable[..., bool],
    vae: str,
    ema_only: bool,
) -> None:
    """What a bare file cannot say is said in its train.py's layout, whose readers look for the EMA weights first."""
    before = save({"model": raw, "ema": ema, "args": argparse.Namespace(vae=vae)})
    out = convert(before, tmp_path / "out.pt", "pt", ema_only=ema_only, heads=HEADS)
    source, content = open_source(out, heads=HEADS), load_pickled(out)
    assert source.spec == open_source(before, heads=HEADS).spec
    assert same(load_model(source).state_dict(), ema)
    if ema_only:
        assert same(content["ema"] if vae == "ema" else content, ema)
    else:
        assert same(content["ema"], ema) and same(content["model"], raw)


def test_ema_alone(save: Callable[..., Path], ema: dict[str, Tensor], same: Callable[..., bool], fault: Fault) -> None:
    source = open_source(save({"ema": ema}), heads=HEADS)
    assert same(load_model(source).state_dict(), ema)
    message = fault(load_model, source, ema=False)
    assert "'model'" in message or "raw" in message


def test_ema_alone_verifies(save: Callable[..., Path], ema: dict[str, Tensor]) -> None:
    source = open_source(save({"ema": ema}), heads=HEADS)
    assert source.has_ema() and not source.has_raw()
    source.verify()


def test_model_without_ema(save: Callable[..., Path], raw: dict[str, Tensor], same: Callable[..., bool]) -> None:
    source = open_source(save({"model": raw}), heads=HEADS)
    assert same(load_model(source, ema=True).state_dict(), raw)


def test_files_of_the_old_format(save: Callable[..., Path], raw: dict[str, Tensor], same: Callable[..., bool]) -> None:
    """Not a zip archive: torch before 1.6."""
    path = save(raw)
    torch.save(raw, path, _use_new_zipfile_serialization=False)
    assert same(load_model(open_source(path, heads=HEADS)).state_dict(), raw)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "parameters"),
    [(384, 12, 6, None), (768, 12, 12, None), (1024, 24, 16, None), (1152, 28, 16, 675_129_632)],
    ids=["S", "B", "L", "XL"],
)
def test_heads_of_the_published_sizes(width: int, depth: int, heads: int, parameters: int | None) -> None:
    """From the shapes of DiT-*/2 at 256 pixels; nothing is allocated."""
    config = OriginalDiTConfig(hidden_size=width, depth=depth, num_heads=heads)
    spec = dit_pt.spec_from_shapes(Path("x.pt"), parameter_shapes(config), None)
    assert spec.model == config
    assert spec.class_names == imagenet_names()
    assert parameters is None or parameter_count(config) == parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"input_size": 64},
        {"patch_size": 4},
        {"patch_size": 8},
        {"in_channels": 16},
        {"learn_sigma": False},
        {"num_classes": 7},
        {"mlp_ratio": 2.0},
        {"num_heads": 8},
        {"depth": 3},
        {"hidden_size": 28, "num_heads": 7, "mlp_ratio": 244.5 / 28},
    ],
)
def test_what_shapes_tell(changes: dict[str, Any]) -> None:
    config = replace(OriginalDiTConfig(hidden_size=64, depth=2, num_heads=4), **changes)
    shapes = parameter_shapes(config)
    spec = dit_pt.spec_from_shapes(Path("x.pt"), shapes, config.num_heads)
    assert parameter_shapes(spec.model) == shapes
    if "mlp_ratio" not in changes:
        assert spec.model == config


def test_unlisted_sizes_need_heads(save: Callable[..., Path], raw: dict[str, Tensor], fault: Fault) -> None:
    path = save(raw)
    message = fault(open_source, path)
    assert "width 64 and depth 2" in message and "--heads" in message
    for heads in (3, -4, 128):
        assert "heads" in fault(open_source, path, heads)
    assert open_source(path, heads=8).spec.model.num_heads == 8


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1],
        3,
        None,
        torch.zeros(3),
        argparse.Namespace(model={}),
        {"model": None},
        {"model": [1], "ema": 3},
        {"ema": {}},
        {"state_dict": {"pos_embed": torch.zeros(1, 16, 64)}},
        {"pos_embed": 1, "x_embedder.proj.weight": 2},
        {"pos_embed": torch.zeros(1, 16, 64), "x_embedder.proj.weight": torch.zeros(64, 4, 2, 2)},
    ],
)
def test_not_a_dit_file(save: Callable[..., Path], content: Any, fault: Fault) -> None:
    path = save(content)
    assert str(path) in fault(open_source, path, HEADS)


@pytest.mark.parametrize(
    "change",
    [
        {"pos_embed": torch.zeros(1, 15, 64)},
        {"pos_embed": torch.zeros(16)},
        {"x_embedder.proj.weight": torch.zeros(64, 16)},
        {"x_embedder.proj.weight": torch.zeros(64, 4, 0, 0)},
        {"x_embedder.proj.weight": torch.zeros(0, 4, 2, 2)},
        {TABLE: torch.zeros(())},
        {TABLE: torch.zeros(0, 64)},
        {TABLE: torch.zeros(11, 64, dtype=torch.int64)},
        {"blocks.0.mlp.fc1.weight": torch.zeros(())},
        {"final_layer.linear.weight": torch.zeros(())},
        {"final_layer.linear.weight": torch.zeros(33, 64)},
        {"blocks.1.attn.proj.weight": torch.zeros(64, 63)},
        {3: torch.zeros(1)},
        {"stray": torch.zeros(1)},
    ],
    ids=lambda change: "-".join(f"{k} {tuple(v.shape)}".replace(" ()", "") for k, v in change.items()),
)
def test_tensors_at_fault(
    save: Callable[..., Path], raw: dict[str, Tensor], change: dict[Any, Any], fault: Fault
) -> None:
    path = save({**raw, **change})
    assert str(path) in fault(lambda: load_model(open_source(path, HEADS), dtype=torch.float32))


def test_positions_that_are_no_square(save: Callable[..., Path], raw: dict[str, Tensor], fault: Fault) -> None:
    path = save({**raw, "pos_embed": torch.zeros(1, 15, 64)})
    assert "15 positions are not a square" in fault(open_source, path, HEADS)


def test_depth_comes_from_blocks_that_are_there(
    save: Callable[..., Path], raw: dict[str, Tensor], fault: Fault
) -> None:
    """One name must not make a reader build a billion blocks."""
    path = save({**raw, "blocks.3000.attn.proj.bias": torch.zeros(64)})
    assert "blocks" in fault(open_source, path, HEADS)


def test_a_missing_tensor_is_named(save: Callable[..., Path], raw: dict[str, Tensor], fault: Fault) -> None:
    path = save({name: t for name, t in raw.items() if name != "blocks.1.mlp.fc2.bias"})
    assert "missing 1 entries (blocks.1.mlp.fc2.bias)" in fault(lambda: load_model(open_source(path, HEADS)))
