"""The original's model-parallel folders: parts joined, or refused by name."""

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import weights_of
from torch import Tensor

from ldit.checkpoint.open import open_source
from ldit.config.model import ClassModelConfig, TextModelConfig
from ldit.nn.build import parameter_shapes
from ldit.pipeline.load import load_model

Fault = Callable[..., str]
Make = Callable[..., Path]


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
