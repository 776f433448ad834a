"""Our layout in shards as the Hub's tools write them, and indices at fault."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import shard, write_index
from safetensors.torch import save_file

from ldit.checkpoint.open import open_source
from ldit.pipeline.load import load_model

Fault = Callable[..., str]


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
