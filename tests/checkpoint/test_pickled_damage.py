"""Files of torch.save that are damaged are found: C6 and C7 of the reliability promises."""

import argparse
import contextlib
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pickles import record_span
from torch import Tensor

from ldit.checkpoint.open import open_source
from ldit.errors import SourceError
from ldit.pipeline.load import load_model
from ldit.storage.pickled import check_archive, load_pickled

Fault = Callable[..., str]
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")


@pytest.fixture
def good() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(16, 16, generator=generator),
        "b": torch.randn(5, generator=generator),
        "args": argparse.Namespace(model="DiT_Llama_3B_patch2", qk_norm=True),
    }


def equal(one: Any, other: Any) -> bool:
    if not isinstance(one, dict) or one.keys() != other.keys():
        return False
    return all(
        isinstance(one[k], Tensor) and one[k].dtype == v.dtype and one[k].shape == v.shape and torch.equal(one[k], v)
        if isinstance(v, Tensor)
        else one[k] == v
        for k, v in other.items()
    )


def refusal(path: Path) -> str | None:
    """The SourceError's message, or None; any other exception passes through."""
    try:
        load_pickled(path)
    except SourceError as error:
        return str(error)
    return None


def test_what_is_saved_comes_back(tmp_path: Path, good: dict[str, Any]) -> None:
    torch.save(good, tmp_path / "x.pth")
    assert equal(load_pickled(tmp_path / "x.pth"), good)
    check_archive(tmp_path / "x.pth")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
def test_truncated(tmp_path: Path, good: dict[str, Any], share: float, fault: Fault) -> None:
    path = tmp_path / "x.pth"
    torch.save(good, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    for check in (True, False):
        assert str(path) in fault(load_pickled, path, check)


@pytest.mark.parametrize("cut", [1, 2, 22, 100])
def test_the_last_bytes_missing(tmp_path: Path, good: dict[str, Any], cut: int, fault: Fault) -> None:
    path = tmp_path / "x.pth"
    torch.save(good, path)
    path.write_bytes(path.read_bytes()[:-cut])
    assert str(path) in fault(load_pickled, path)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"PK\x05\x06" + b"\0" * 18, b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_not_a_torch_file(tmp_path: Path, content: bytes, fault: Fault) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    assert str(tmp_path / "x.pth") in fault(load_pickled, tmp_path / "x.pth")


def test_missing_and_folder(tmp_path: Path, fault: Fault) -> None:
    assert fault(load_pickled, tmp_path / "x.pth") == f"{tmp_path / 'x.pth'} is missing"
    fault(load_pickled, tmp_path)


@pytest.mark.parametrize("ending", ["data.pkl", "data/0", "data/1", "byteorder", "version"])
def test_a_flipped_bit_in_a_record_is_always_found(
    tmp_path: Path, good: dict[str, Any], ending: str, flip: Callable[[Path, int], None], fault: Fault
) -> None:
    path = tmp_path / "x.pth"
    torch.save(good, path)
    span = record_span(path, ending)
    rng = random.Random(ending)
    for bit in {rng.randrange(8 * span.start, 8 * span.stop) for _ in range(12)} | {8 * span.start, 8 * span.stop - 1}:
        flip(path, bit)
        message = fault(load_pickled, path)
        assert str(path) in message and ending in message
        flip(path, bit)
    assert equal(load_pickled(path), good)


@pytest.mark.parametrize("part", ["headers", "directory", "anywhere"])
def test_a_flipped_bit_anywhere_is_found_or_harmless(
    tmp_path: Path, good: dict[str, Any], part: str, flip: Callable[[Path, int], None]
) -> None:
    """A SourceError, or the flip hit what nobody reads and the content is equal; no other exception, ever."""
    path = tmp_path / "x.pth"
    torch.save(good, path)
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
        headers = [i.header_offset + n for i in archive.infolist() for n in range(30 + len(i.filename))]
    places = {"headers": headers, "directory": range(directory, size), "anywhere": range(size)}[part]
    rng = random.Random(part)
    found = 0
    for _ in range(80):
        bit = 8 * rng.choice(places) + rng.randrange(8)
        flip(path, bit)
        message = refusal(path)
        if message is None:
            assert equal(load_pickled(path), good), f"bit {bit}"
        else:
            assert str(path) in message and len(message.splitlines()) == 1
            found += 1
        with contextlib.suppress(SourceError):
            load_pickled(path, check=False)
        flip(path, bit)
    assert found >= 20


def test_damaged_weights_of_a_folder_are_found_before_use(
    make_original: Callable[..., Path], flip: Callable[[Path, int], None], fault: Fault
) -> None:
    folder = make_original()
    for name in ("consolidated_ema.00-of-01.pth", "consolidated.00-of-01.pth"):
        path = folder / name
        bit = 8 * record_span(path, "data/3").start + 5
        flip(path, bit)
        assert str(path) in fault(lambda name=name: load_model(open_source(folder), ema="ema" in name))
        assert str(path) in fault(lambda: open_source(folder).verify())
        flip(path, bit)
    open_source(folder).verify()


def test_opening_spares_reading_the_weights(
    make_original: Callable[..., Path], flip: Callable[[Path, int], None]
) -> None:
    """The spec and shapes of a damaged file are still told; only its content is not given."""
    folder = make_original()
    flip(folder / "consolidated.00-of-01.pth", 8 * record_span(folder / "consolidated.00-of-01.pth", "data/3").start)
    source = open_source(folder)
    assert source.shapes(ema=False)["x_embedder.weight"] == ((64, 16), "fp32")


@pytest.mark.parametrize("body", [b"cos\nsystem\n.", b"cbuiltins\nbytearray\n."])
def test_numbers_of_the_old_format_are_not_taken_for_a_pickle(tmp_path: Path, body: bytes) -> None:
    """99 numbers: their count begins with the byte of the instruction GLOBAL, and raw numbers follow it."""
    numbers = torch.tensor(list(body.ljust(99, b".")), dtype=torch.uint8)
    assert len(numbers) == ord("c")
    torch.save({"x": numbers}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_pickled(tmp_path / "x.pth")["x"], numbers)


def test_old_format_flips_raise_nothing_else(tmp_path: Path, flip: Callable[[Path, int], None]) -> None:
    path = tmp_path / "x.pth"
    torch.save({"w": torch.zeros(16)}, path, _use_new_zipfile_serialization=False)
    rng = random.Random(0)
    for _ in range(100):
        bit = rng.randrange(8 * os.path.getsize(path))
        flip(path, bit)
        message = refusal(path)
        assert message is None or len(message.splitlines()) == 1
        flip(path, bit)
