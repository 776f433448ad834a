"""Sets of tensors in safetensors files: written as a stream, read whole or in parts, and refused by name."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import shards
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldit.storage.shards import (
    PartReader,
    ShardWriter,
    has_set,
    index_name,
    read_set,
    set_files,
    shard_name,
    write_index,
)

Same = Callable[..., bool]
Fault = Callable[..., str]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape).sub(7.5).to(dtype)


TENSORS = {
    "a.weight": numbers(5, 3),
    "b.bf16": numbers(2, 2, 7, dtype=torch.bfloat16),
    "step": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "none": torch.empty(0),
    "half": numbers(9, dtype=torch.float16),
    "count": torch.tensor([1 << 40, -5]),
    "größe": numbers(3000),
    "last": torch.tensor(-0.0),
}


def announced(tensors: dict[str, Tensor]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def write(path: Path, tensors: dict[str, Tensor]) -> ShardWriter:
    with ShardWriter(path, announced(tensors)) as writer:
        for tensor in tensors.values():
            writer.add(tensor)
    return writer


def test_files_are_what_other_tools_read(tmp_path: Path, same: Same) -> None:
    """Every dtype, scalars and empty tensors, bit for bit (the sign of -0.0 too)."""
    path = tmp_path / "x.safetensors"
    write(path, TENSORS)
    found = load_file(path)
    assert same(found, TENSORS) and torch.signbit(found["last"])
    assert same(read_set(tmp_path, "x"), TENSORS)


def test_the_file_is_laid_out_as_the_format_says(tmp_path: Path) -> None:
    """Eight bytes of length, a header padded with blanks to eight, then the tensors without gaps in the order given."""
    path = tmp_path / "x.safetensors"
    write(path, TENSORS)
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8 : 8 + size])
    assert size % 8 == 0 and list(table) == list(TENSORS)
    end = 0
    for name, entry in table.items():
        tensor = TENSORS[name]
        assert entry["data_offsets"] == [end, end + tensor.nbytes] and entry["shape"] == list(tensor.shape)
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert data[8 + size + end : 8 + size + end + tensor.nbytes] == raw
        end += tensor.nbytes
    assert len(data) == 8 + size + end


@pytest.mark.parametrize("tensors", [TENSORS, {}, {"x": torch.tensor(1.0)}, {"x": torch.empty(0)}], ids=len)
def test_the_record_is_the_files_size_and_digest(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """What the manifest takes over without reading the file again."""
    path = tmp_path / "x.safetensors"
    record = write(path, tensors).record
    assert record == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert load_file(path).keys() == tensors.keys()


def test_views_are_written_as_they_look(tmp_path: Path, same: Same) -> None:
    """Transposed, strided, with gradient: the numbers in order, not the memory behind them."""
    base = numbers(6, 8)
    tensors = {"t": base.T, "s": base[::2, 1::3], "g": base[1].requires_grad_(), "e": base[0, :1].expand(4)}
    write(tmp_path / "x.safetensors", tensors)
    assert same(load_file(tmp_path / "x.safetensors"), {name: t.detach().contiguous() for name, t in tensors.items()})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (numbers(5, 3).T, r"a: torch.float32 \(3, 5\) was announced as torch.float32 \(5, 3\)"),
        (numbers(15), r"\(15,\)"),
        (numbers(5, 3, dtype=torch.bfloat16), "torch.bfloat16"),
        (None, "a was announced and never came"),
    ],
)
def test_what_was_not_announced_is_refused(tmp_path: Path, given: Tensor | None, said: str) -> None:
    writer = ShardWriter(tmp_path / "x.safetensors", announced({"a": numbers(5, 3)}))

    def use() -> None:
        with writer:
            if given is not None:
                writer.add(given)

    with pytest.raises(ValueError, match=said):
        use()
    assert writer.record == (0, ""), "a file that was not finished has no record"


def test_a_record_comes_after_the_bytes_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr("os.fsync", lambda descriptor: sizes.append((tmp_path / "x.safetensors").stat().st_size))
    record = write(tmp_path / "x.safetensors", TENSORS).record
    assert sizes == [record.size]


# ---------------------------------------------------------------- parts


def split(folder: Path, parts: int) -> Path:
    shards.write_sharded(folder, "x", TENSORS, parts)
    return folder


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_shards_hold_the_set(tmp_path: Path, parts: int, same: Same) -> None:
    split(tmp_path, parts)
    files = set_files(tmp_path, "x")
    assert files == [shard_name("x", i, parts) for i in range(parts)] and has_set(tmp_path, "x")
    assert same(read_set(tmp_path, "x"), TENSORS)
    table = json.loads((tmp_path / "x.safetensors.index.json").read_text())
    assert table["metadata"] == {"total_size": sum(t.nbytes for t in TENSORS.values())}
    for name, file in table["weight_map"].items():
        assert name in load_file(tmp_path / file)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_part_equals_the_slice(tmp_path: Path, parts: int, same: Same) -> None:
    """Every pair of bounds of both axes, empty ones too."""
    split(tmp_path, parts)
    reader = PartReader(tmp_path, "x")
    assert reader.names() == set(TENSORS)
    full = TENSORS["a.weight"]
    for low in range(6):
        for high in range(low, 6):
            for left, right in ((0, 3), (1, 3), (1, 2), (2, 2)):
                part = (slice(low, high), slice(left, right))
                found = reader.read("a.weight", (5, 3), part)
                assert found.shape == full[part].shape and torch.equal(found, full[part]), part


@pytest.mark.parametrize("name", TENSORS)
def test_the_whole_is_a_part(tmp_path: Path, name: str, same: Same) -> None:
    """Scalars have no axis to slice; empty tensors and bf16 come back as such."""
    split(tmp_path, 3)
    full = TENSORS[name]
    found = PartReader(tmp_path, "x").read(name, tuple(full.shape), tuple(slice(0, size) for size in full.shape))
    assert found.shape == full.shape and torch.equal(found, full)
    assert found.dtype == full.dtype or not full.numel()


def test_an_empty_part_is_of_the_tensors_type(tmp_path: Path) -> None:
    """A process that holds nothing of a bf16 tensor holds nothing of bf16."""
    write(tmp_path / "x.safetensors", {"b": numbers(4, 2, dtype=torch.bfloat16)})
    found = PartReader(tmp_path, "x").read("b", (4, 2), (slice(4, 4), slice(0, 2)))
    assert found.shape == (0, 2) and found.dtype == torch.bfloat16


def test_parts_at_fault_name_the_tensor(tmp_path: Path, fault: Fault) -> None:
    reader = PartReader(split(tmp_path, 3), "x")
    assert fault(reader.read, "stray", (1,), (slice(0, 1),)) == f"{tmp_path}: x has no stray"
    message = fault(reader.read, "a.weight", (5, 4), (slice(0, 1), slice(0, 4)))
    assert "a.weight has shape (5, 3), the run needs (5, 4)" in message and str(tmp_path / "x-0") in message


# ---------------------------------------------------------------- faults

ELSEWHERE = [
    "../x.safetensors",
    "/etc/x.safetensors",
    "sub/x.safetensors",
    "..",
    "a\\b.safetensors",
    "x.bin",
    "\0.safetensors",
]


@pytest.mark.parametrize("stem", ["x", "state/optimizer"])
def test_no_set_is_an_error_with_both_names(tmp_path: Path, stem: str, fault: Fault) -> None:
    assert not has_set(tmp_path, stem)
    for call in (set_files, lambda *a: list(read_set(*a)), PartReader):
        message = fault(call, tmp_path, stem)
        assert f"{stem}.safetensors" in message and index_name(Path(stem).name) in message


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
        "a\\b.safetensors",
        "model.bin",
        "\0.safetensors",
    ],
)
@pytest.mark.parametrize("stem", ["x", "state/optimizer"])
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path: Path, stem: str, name: str, fault: Fault) -> None:
    """Such a file may stand there and be sound; it is not looked at."""
    folder = tmp_path / "folder"
    (folder / "state" / "sub").mkdir(parents=True)
    (folder / "sub").mkdir()
    tensor = {"a": numbers(2)}
    for place in (tmp_path, folder, folder / "sub", folder / "state" / "sub"):
        write(place / "x.safetensors", tensor)
    (folder / "x.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / index_name(stem)).write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    for call in (set_files, lambda *a: list(read_set(*a)), PartReader):
        assert index_name(Path(stem).name) in fault(call, folder, stem) or name.startswith("\0")


@pytest.mark.parametrize(
    "table", ["", "{", "3", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_named(tmp_path: Path, table: str, fault: Fault) -> None:
    split(tmp_path, 3)
    (tmp_path / "x.safetensors.index.json").write_text(table)
    for call in (set_files, lambda *a: list(read_set(*a)), PartReader):
        assert str(tmp_path / "x.safetensors.index.json") in fault(call, tmp_path, "x")


def test_an_index_of_a_set_below_finds_its_files_beside_it(tmp_path: Path, same: Same) -> None:
    """state/x-….safetensors: the index holds plain names."""
    (tmp_path / "state").mkdir()
    tensors = {"a": numbers(3), "b": numbers(4)}
    for i, name in enumerate(tensors):
        write(tmp_path / shard_name("state/x", i, 2), {name: tensors[name]})
    write_index(tmp_path, "state/x", {name: shard_name("state/x", i, 2) for i, name in enumerate(tensors)}, 28)
    text = (tmp_path / "state" / "x.safetensors.index.json").read_text()
    assert "state" not in text
    assert set_files(tmp_path, "state/x") == [shard_name("state/x", i, 2) for i in range(2)]
    assert same(read_set(tmp_path, "state/x"), tensors)
    assert torch.equal(PartReader(tmp_path, "state/x").read("b", (4,), (slice(1, 3),)), tensors["b"][1:3])


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: b"", lambda d: d[:40], lambda d: b"\xff" * 8 + d[8:]])
def test_a_damaged_shard_is_named(tmp_path: Path, change: Callable[[bytes], bytes], fault: Fault) -> None:
    split(tmp_path, 3)
    path = tmp_path / shard_name("x", 1, 3)
    path.write_bytes(change(path.read_bytes()))
    for call in (lambda *a: list(read_set(*a)), PartReader):
        assert str(path) in fault(call, tmp_path, "x")


def test_a_missing_shard_is_named(tmp_path: Path, fault: Fault) -> None:
    split(tmp_path, 3)
    (tmp_path / shard_name("x", 1, 3)).unlink()
    for call in (set_files, PartReader):
        assert fault(call, tmp_path, "x") == f"{tmp_path / shard_name('x', 1, 3)} is missing"
