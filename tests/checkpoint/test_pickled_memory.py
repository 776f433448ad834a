"""Files of torch.save take no more memory than they are long: S1 of the reliability promises."""

import contextlib
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pickles import Guard, call, hostile, record_span, repack

from ldit.errors import SourceError
from ldit.storage.pickled import load_pickled

Fault = Callable[..., str]
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")


def peak_of(path: Path) -> int:
    tracemalloc.start()
    try:
        with contextlib.suppress(SourceError):
            load_pickled(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", ["raw with protocol", "zip"])
def test_a_small_pickle_cannot_ask_for_much_memory(tmp_path: Path, form: str, guard: Guard) -> None:
    """bytearray(n) is on torch's own list of allowed calls."""
    hostile(tmp_path / "x.pth", call("builtins", "bytearray", b"J" + struct.pack("<i", 64 << 20)), form)
    assert peak_of(tmp_path / "x.pth") < 4 << 20


@pytest.mark.parametrize("name", ["DATA.PKL", "Data.pkl"])
def test_the_pickle_is_found_under_any_case(tmp_path: Path, name: str, guard: Guard) -> None:
    """torch looks records up without regard to case."""
    path = tmp_path / "x.pth"
    hostile(path, call("builtins", "bytearray", b"J" + struct.pack("<i", 64 << 20)), "zip")
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for record, data in records.items():
            archive.writestr(record.replace("data.pkl", name), data)
    assert peak_of(path) < 4 << 20


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_records_of_one_name_are_no_way_around_the_check(tmp_path: Path, order: tuple[int, int]) -> None:
    """Readers of archives differ in which of the two they take."""
    path = tmp_path / "x.pth"
    bomb = b"\x80\x02" + call("builtins", "bytearray", b"J" + struct.pack("<i", 64 << 20)) + b"."
    pickles = (bomb, b"\x80\x02}.")
    torch.save({"x": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as archive:
        rest = {i.filename: archive.read(i) for i in archive.infolist() if not i.filename.endswith("data.pkl")}
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for which in order:
            archive.writestr("x/data.pkl", pickles[which])
        for name, data in rest.items():
            archive.writestr(name, data)
    assert peak_of(path) < 4 << 20


@pytest.mark.parametrize(
    "body",
    [
        call("torch", "FloatTensor", b"J\x00\x00\x01\x00", b"J\x00\x00\x01\x00"),
        call("torch", "Tensor", b"J\x00\x00\x01\x00", b"J\x00\x00\x01\x00"),
        call("torch.storage", "UntypedStorage", b"J\x00\x00\x00\x40"),
    ],
    ids=["FloatTensor", "Tensor", "UntypedStorage"],
)
def test_constructors_of_unfilled_tensors_are_refused(tmp_path: Path, body: bytes, fault: Fault) -> None:
    """A few bytes that would take 1 to 16 GiB of address space, and whose content would be whatever was there."""
    hostile(tmp_path / "x.pth", body, "zip")
    fault(load_pickled, tmp_path / "x.pth")


def test_a_compressed_record_is_not_inflated_into_memory(tmp_path: Path, guard: Guard, fault: Fault) -> None:
    """torch stores its records as they are; a compressed one is a bomb."""
    path = tmp_path / "x.pth"
    hostile(path, b"N0" * (16 << 20) + b"N", "zip")
    repack(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    assert peak_of(path) < 8 << 20


def test_compressed_tensors_are_refused(tmp_path: Path, fault: Fault) -> None:
    """Mapping them would take compressed bytes for numbers."""
    torch.save({"x": torch.zeros(1000)}, tmp_path / "x.pth")
    repack(tmp_path / "x.pth", lambda name, data: data, zipfile.ZIP_DEFLATED)
    for check in (True, False):
        fault(load_pickled, tmp_path / "x.pth", check)


def test_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    """In memory they lie as far apart as in the file; writing to them does not reach it."""
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(4 << 20), "b": torch.ones(3)}, path)
    assert peak_of(path) < 12 << 20  # the pieces of the checksum
    state = load_pickled(path)
    assert (
        state["b"].data_ptr() - state["a"].data_ptr()
        == record_span(path, "data/1").start - record_span(path, "data/0").start
    )
    state["a"].zero_()
    assert load_pickled(path)["a"].sum() == 4 << 20


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path, fault: Fault) -> None:
    torch.save({"x": torch.arange(8.0)}, tmp_path / "x.pth")

    def widen(name: str, data: bytes) -> bytes:
        return data.replace(b"K\x08\x85", b"M\xff\xff\x85") if name.endswith("data.pkl") else data

    before = (tmp_path / "x.pth").read_bytes()
    repack(tmp_path / "x.pth", widen)
    assert (tmp_path / "x.pth").read_bytes() != before
    fault(load_pickled, tmp_path / "x.pth")
