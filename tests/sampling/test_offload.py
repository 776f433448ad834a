"""Blocks on the host: the same numbers as the model moved whole, little memory, one line for files at fault."""

import gc
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldit.checkpoint.export import CONFIG
from ldit.checkpoint.open import open_source
from ldit.config.model import ClassModelConfig, ModelConfig, OriginalDiTConfig, TextModelConfig
from ldit.config.spec import AutoencoderConfig, DDPMConfig, ModelSpec
from ldit.errors import SourceError
from ldit.nn.build import build_model, parameter_shapes
from ldit.nn.conditioning import TextCondition
from ldit.pipeline.load import load_model
from ldit.sampling.fast import offload as module
from ldit.sampling.fast.offload import offload
from ldit.sampling.fast.options import is_offloaded
from ldit.storage.shards import ShardWriter, shard_name, write_index
from ldit.storage.tensors import assign

CLASS = ClassModelConfig(dim=64, n_layers=3, n_heads=4, num_classes=5, input_size=8, qk_norm=True, multiple_of=32)
SWITCHED = replace(CLASS, shared_adaln=True, class_tokens=2, value_residual=True, fine_layers=1, mid_layer=1)
TEXT = TextModelConfig(dim=64, n_layers=2, n_heads=4, cap_feat_dim=24, max_seq_len=24, multiple_of=32)
BASELINE = OriginalDiTConfig(hidden_size=64, depth=3, num_heads=4, num_classes=5, input_size=8)
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
          (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]  # fmt: skip


def weights(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(config)
    return {name: torch.rand(s, generator=generator).sub_(0.5).mul_(0.4).to(dtype) for name, s in shapes.items()}


def network(config: ModelConfig, state: dict[str, Tensor], dtype: torch.dtype | None) -> nn.Module:
    model = build_model(config, "meta")
    assign(model, state.items(), "here", "cpu", dtype)
    return model.eval().requires_grad_(False)


def inputs(config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, 4, 8, 8, generator=generator).to(dtype), torch.tensor([999.0, 500.0, 3.0])
    if isinstance(config, TextModelConfig):
        features = torch.randn(3, 5, config.cap_feat_dim, generator=generator).to(dtype)
        return x, t, TextCondition(features, torch.ones(3, 5, dtype=torch.bool))
    return x, t, torch.tensor([0, 4, 5])


def in_two_slots(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    """The ring of a CUDA device, with copies that are done at once; `log` takes what happens to which group."""

    class Slot(module._Slot):
        def fill(self, group: module._ParameterGroup) -> None:
            assert not in_use or in_use[-1] is not self.group, "the group in use is overwritten"
            log.append(f"fill {names[group]}")
            super().fill(group)

    names: dict[module._ParameterGroup, int] = {}
    in_use: list[module._ParameterGroup] = []

    def streamer(groups: list[module._ParameterGroup], device: torch.device, dtype: torch.dtype) -> module._Streamer:
        names.update({group: i for i, group in enumerate(groups)})
        size = max(group.size for group in groups)
        return module._Streamer([Slot(size, device, dtype) for _ in range(2)])

    def point(self: module._ParameterGroup, values: list[Tensor]) -> None:
        if values is self.host:
            in_use.pop()
        else:
            in_use.append(self)
            log.append(f"use {names[self]}")
        original(self, values)

    original = module._ParameterGroup.point
    monkeypatch.setattr(module._ParameterGroup, "point", point)
    monkeypatch.setattr(module, "_streamer", streamer)


@pytest.mark.parametrize("config", [CLASS, SWITCHED, TEXT, BASELINE], ids=["class", "switched", "text", "baseline"])
@pytest.mark.parametrize(("stored", "computed"), DTYPES)
@pytest.mark.parametrize("slots", [1, 2])
def test_the_numbers_are_those_of_the_model_moved_whole(
    config: ModelConfig, stored: torch.dtype, computed: torch.dtype, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slots == 2:
        in_two_slots(monkeypatch, [])
    state = weights(config, stored)
    plain = network(config, state, computed)
    model = offload(network(config, state, None), "cpu", computed)
    assert is_offloaded(model) and not is_offloaded(plain)
    arguments = inputs(config, computed)
    expected = plain(*arguments)
    assert expected.abs().mean() > 1e-3
    for _ in range(3):  # the second and third fetch ahead
        assert torch.equal(model(*arguments), expected)


def test_blocks_stay_home_and_the_rest_moves() -> None:
    state = weights(CLASS, torch.bfloat16)
    model = network(CLASS, state, None)
    home = {name: p.data_ptr() for name, p in model.named_parameters()}
    offload(model, "cpu", torch.float32)(*inputs(CLASS, torch.float32))
    for name, p in model.named_parameters():
        block = name.startswith("layers.")
        assert (p.dtype, p.data_ptr() == home[name]) == (torch.bfloat16 if block else torch.float32, block), name
        assert torch.equal(p, state[name].to(p.dtype)), name


def test_what_needs_no_conversion_is_used_where_it_lies() -> None:
    model = network(CLASS, weights(CLASS, torch.bfloat16), None)
    offload(model, "cpu", torch.bfloat16)
    assert "forward" not in vars(model) and is_offloaded(model)


def test_each_group_is_fetched_once_a_call_and_ahead_of_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    in_two_slots(monkeypatch, log)
    model = offload(network(CLASS, weights(CLASS, torch.bfloat16), None), "cpu", torch.float32)
    arguments = inputs(CLASS, torch.float32)
    model(*arguments)
    order = range(6)  # each block after its modulation
    assert log == [f"{word} {i}" for i in order for word in ("fill", "use")]
    log.clear()
    model(*arguments)  # begins before it is known that the first follows the last
    assert log == [f"{word} {i}" for i, n in zip(order, [*order[1:], 0], strict=True)
                   for word, i in (*([("fill", 0)] if i == 0 else []), ("fill", n), ("use", i))]  # fmt: skip
    log.clear()
    model(*arguments)
    assert log == [f"{word} {i}" for i, n in zip(order, [*order[1:], 0], strict=True)
                   for word, i in (("fill", n), ("use", i))]  # fmt: skip


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("place", range(3))
def test_a_call_that_fails_halfway_leaves_the_next_one_right(
    slots: int, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slots == 2:
        in_two_slots(monkeypatch, [])
    state = weights(CLASS, torch.bfloat16)
    model = offload(network(CLASS, state, None), "cpu", torch.float32)
    arguments = inputs(CLASS, torch.float32)
    expected = network(CLASS, state, torch.float32)(*arguments)
    model(*arguments)

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.layers[place].attention.register_forward_hook(fails)  # type: ignore[union-attr, index]
    with pytest.raises(KeyboardInterrupt):
        model(*arguments)
    hook.remove()
    assert all(p.dtype == torch.bfloat16 for p in model.layers.parameters())  # type: ignore[union-attr]
    assert torch.equal(model(*arguments), expected) and torch.equal(model(*arguments), expected)


def test_threads_take_turns() -> None:
    state = weights(CLASS, torch.bfloat16)
    model = offload(network(CLASS, state, None), "cpu", torch.float32)
    arguments = inputs(CLASS, torch.float32)
    expected = network(CLASS, state, torch.float32)(*arguments)
    equal: list[bool] = []

    def call() -> None:
        for _ in range(20):
            equal.append(torch.equal(model(*arguments), expected))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 60


def test_the_model_goes_when_it_is_let_go() -> None:
    """Not at the next collection of cycles: it may hold gigabytes."""
    model = offload(network(CLASS, weights(CLASS, torch.bfloat16), None), "cpu", torch.float32)
    reference = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def write_shards(folder: Path, config: ModelConfig, count: int, make: Callable[[tuple[int, ...]], Tensor]) -> None:
    """A bf16 export of `count` shards, written as a stream."""
    folder.mkdir(exist_ok=True)
    spec = ModelSpec(config, DDPMConfig(), AutoencoderConfig("none"), None)
    (folder / CONFIG).write_text(json.dumps(spec.to_json()))
    shapes = list(parameter_shapes(config).items())
    where: dict[str, str] = {}
    for i in range(count):
        part = shapes[i * len(shapes) // count : (i + 1) * len(shapes) // count]
        name = shard_name("model", i, count)
        with ShardWriter(folder / name, [(n, torch.bfloat16, shape) for n, shape in part]) as writer:
            for _, shape in part:
                writer.add(make(shape))
        where.update({n: name for n, _ in part})
    if count > 1:
        write_index(folder, "model", where, 0)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(("harm", "words"), [(Path.unlink, "is missing"), (cut, "is damaged")])
def test_a_file_at_fault_in_the_middle_is_named_before_anything_is_computed(
    harm: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    write_shards(tmp_path, CLASS, 3, lambda shape: torch.zeros(shape, dtype=torch.bfloat16))
    offload(load_model(open_source(tmp_path), "cpu", None), "cpu", torch.float32)
    middle = tmp_path / shard_name("model", 1, 3)
    harm(middle)
    with pytest.raises(SourceError, match=words) as caught:
        load_model(open_source(tmp_path), "cpu", None)
    assert str(middle) in str(caught.value)


MEMORY = """
import json, sys
import torch
from ldit.checkpoint.open import open_source
from ldit.pipeline.load import load_model
from ldit.sampling.fast.offload import offload
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(l for l in lines if l.startswith("RssAnon")).split()[1]) * 1024
@torch.no_grad()
def call(model):
    for _ in range(2):
        model(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
        seen.append(anonymous())
seen = []
source = open_source(sys.argv[1])
call(load_model(open_source(sys.argv[2]), "cpu", torch.float32))  # what the libraries need
before = anonymous()
model = load_model(source, "cpu", None)
mapped = anonymous() - before
seen.clear(); call(offload(model, "cpu", torch.float32))
streamed = max(seen) - before
del model
seen.clear(); call(load_model(source, "cpu", torch.float32))
print(json.dumps({"mapped": mapped, "streamed": streamed, "whole": max(seen) - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_that_of_one_block(tmp_path: Path) -> None:
    """Five blocks of 19M parameters, bf16 in the file and fp32 at work: 51 MB to convert one (its modulation apart),
    and 16 MB of slack for allocators."""
    config = ClassModelConfig(dim=1024, n_layers=5, n_heads=16, num_classes=5, input_size=8)
    block = 4 * sum(torch.Size(s).numel() for n, s in parameter_shapes(config).items() if n.startswith("layers.0."))
    modulation = 4 * (6 * 1024 * 1024 + 6 * 1024)
    write_shards(tmp_path / "large", config, 2, lambda shape: torch.full(shape, 0.01, dtype=torch.bfloat16))
    write_shards(tmp_path / "small", CLASS, 1, lambda shape: torch.zeros(shape, dtype=torch.bfloat16))
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(found, block)
    assert found["mapped"] < 8 << 20
    assert found["whole"] > 5 * block
    ends = 4 * 1024 * (256 + 1024 + 6 + 2 * 1024 + 64)
    assert found["streamed"] < block - modulation + ends + (16 << 20)
