"""Arrays in .npz files: what numpy and we write is read, what is damaged or lies is one line and costs nothing."""

import io
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldit.errors import EvaluationError, RunError
from ldit.storage import npz
from ldit.storage.npz import Images, members, read_array, write_member, write_npz

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (11, 4, 6, 3), dtype=np.uint8)
SAVE: list[Callable[..., None]] = [np.savez, np.savez_compressed]


def save(path: Path, save: Callable[..., None] = np.savez, **arrays: Any) -> Path:
    save(path, **arrays)
    return path


def images(path: Path) -> Images:
    return Images(members(path)["arr_0"])


def npy(header: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """A member with whatever header."""
    text = header.encode("latin1") + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + data


def packed(path: Path, method: int = zipfile.ZIP_STORED, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(f"{name}.npy", data)
    return path


def read_all(path: Path) -> dict[str, np.ndarray]:
    return {key: read_array(member) for key, member in members(path).items()}


def refused(path: Path, pattern: str) -> None:
    """One line that names the file, whatever is asked of it."""
    with pytest.raises(EvaluationError, match=pattern) as caught:
        read_all(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


@pytest.mark.parametrize("saver", SAVE)
def test_what_numpy_writes(tmp_path: Path, saver: Callable[..., None]) -> None:
    arrays = {
        "a": RNG.standard_normal((3, 5)), "b": np.asfortranarray(RNG.standard_normal((4, 5)).astype("f4")),
        "c": np.arange(7, dtype=">i4"), "d": np.float64(3.5), "e": np.empty((0, 3), np.uint8),
        "f": np.array(["é", "bc"]),
    }  # fmt: skip
    found = members(save(tmp_path / "x.npz", saver, **arrays))
    assert list(found) == list("abcdef")
    for key, member in found.items():
        value = read_array(member)
        assert np.array_equal(value, arrays[key]) and value.dtype.isnative and value.shape == member.shape


@pytest.mark.parametrize("saver", SAVE)
@pytest.mark.parametrize("size", [1, 4, 11, 100])
def test_images_in_batches_from_anywhere(tmp_path: Path, saver: Callable[..., None], size: int) -> None:
    found = images(save(tmp_path / "x.npz", saver, mu=np.zeros(3), arr_0=IMAGES, z=np.ones(9)))
    assert len(found) == 11 and found.shape == (4, 6, 3)
    for start, stop in ((0, None), (0, 5), (3, None), (3, 9), (10, 11), (0, 99), (5, 5), (11, None)):
        batches = list(found.batches(size, start, stop))
        expected = IMAGES[start:stop]
        assert all(batch.dtype == np.uint8 and 1 <= len(batch) <= size for batch in batches)
        assert len(batches) == -(-len(expected) // size)
        assert np.array_equal(np.concatenate([IMAGES[:0], *batches]), expected)


@pytest.mark.parametrize("saver", SAVE)
def test_memory_is_that_of_a_batch(tmp_path: Path, saver: Callable[..., None]) -> None:
    """Of 32 MiB."""
    path = save(tmp_path / "x.npz", saver, arr_0=np.zeros((512, 128, 170, 3), np.uint8))
    tracemalloc.start()
    try:
        for start in (0, 300):
            assert sum(len(batch) for batch in images(path).batches(8, start)) == 512 - start
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()


def test_stored_images_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not through those before them."""
    found = images(save(tmp_path / "x.npz", arr_0=IMAGES))
    monkeypatch.setattr(npz.zipfile, "ZipFile", None)
    assert np.array_equal(np.concatenate(list(found.batches(2, 4))), IMAGES[4:])


@pytest.mark.parametrize("array", [
    IMAGES[..., :2], IMAGES[0], IMAGES.astype(np.int8), IMAGES.astype(np.float32), np.asfortranarray(IMAGES),
    np.zeros((2, 0, 3, 3), np.uint8), np.zeros((1, 1, 5000, 3), np.uint8),
])  # fmt: skip
def test_what_are_no_images(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(EvaluationError, match=r"x\.npz: arr_0 (is|holds)"):
        images(save(tmp_path / "x.npz", arr_0=array))


@pytest.mark.parametrize("saver", SAVE)
def test_every_cut_of_a_file(tmp_path: Path, saver: Callable[..., None]) -> None:
    whole = save(tmp_path / "x.npz", saver, mu=np.zeros(3), arr_0=IMAGES[:2]).read_bytes()
    for length in {*range(0, len(whole), 5), *range(len(whole) - 80, len(whole))}:
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        refused(tmp_path / "cut.npz", "cut.npz")


@pytest.mark.parametrize("saver", SAVE)
def test_every_byte_turned(tmp_path: Path, saver: Callable[..., None]) -> None:
    """Read as it was, or refused in one line: checksums cover the numbers, whatever the rest may say."""
    arrays = {"mu": RNG.standard_normal(3), "arr_0": IMAGES[:2]}
    whole = save(tmp_path / "x.npz", saver, **arrays).read_bytes()
    path, said = tmp_path / "turned.npz", []
    for place in range(len(whole)):
        turned = whole[place] ^ (0x01, 0xFF)[place % 2]
        path.write_bytes(whole[:place] + bytes([turned]) + whole[place + 1 :])
        try:
            found = read_all(path)
            batches = [batch for key in found if key == "arr_0" for batch in images(path).batches(1)]
        except EvaluationError as error:
            said.append(str(error))
        else:
            assert all(np.array_equal(found[key], arrays[key]) for key in found if key in arrays), place
            assert not batches or np.array_equal(np.concatenate(batches), arrays["arr_0"]), place
    assert len(said) > len(whole) // 2 and all("\n" not in line and "turned.npz" in line for line in said)


def test_what_is_no_zip(tmp_path: Path) -> None:
    for data in (
        b"",
        b"no zip",
        b"PK\x03\x04" + bytes(60),
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': ()}"),
    ):
        (tmp_path / "x.npz").write_bytes(data)
        refused(tmp_path / "x.npz", r"x\.npz is damaged(: it is empty| or no \.npz file: )")
    refused(tmp_path / "none.npz", r"cannot read .*none\.npz: No such file or directory")
    (tmp_path / "folder.npz").mkdir()
    refused(tmp_path / "folder.npz", r"cannot read .*folder\.npz: Is a directory")


def test_python_objects_are_not_read(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", a=np.array([{}, None], dtype=object))
    refused(path, "a holds Python objects, which are not read")
    refused(save(path, a=np.zeros(1, [("x", "O")])), r"header of a\.npy is damaged, or of no plain array")


HEAD = "{{'descr': '{}', 'fortran_order': False, 'shape': {}}}"


@pytest.mark.parametrize(("member", "pattern"), [
    (npy(HEAD.format("<f8", "(1000000000000, 1000)"), bytes(80)), r"x states float64 \(1000000000000, 1000\) but"),
    (npy(HEAD.format("<f8", "(-1, -10)"), bytes(80)), r"x states float64 \(-1, -10\) but has 80 bytes"),
    (npy(HEAD.format("<f8", "(9,)"), bytes(80)), r"x states float64 \(9,\) but has 80"),
    (npy(HEAD.format("<f8", "(11,)"), bytes(80)), r"x states float64 \(11,\) but has 80"),
    (npy(HEAD.format("<f8", f"({2**62}, {2**62}, 4)"), bytes(80)), "x states float64"),
    *((npy(text, bytes(80)), "the header of x.npy is damaged, or of no plain array") for text in (
        HEAD.format("<f8", "('a',)"), HEAD.format("<f8", "[10]"), HEAD.format("<f8", "(True, 10)"),
        HEAD.format("<q9", "(10,)"), HEAD.format("f8,f8", "(5,)"), HEAD.format("<f8", "(10,)").replace("False", "0"),
        "__import__('os')", "(" * 3000, "[" * 150 + "]" * 150, "{}", "{" + " " * 20000 + "}", "[1, 2", "'''''a",
        "{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (10,)}", "9" * 5000, "b'" + "\\x" * 9,
    )),
    (npy(HEAD.format("<f8", "(10,)"), bytes(80), (3, 0)), r"x\.npy is no array in version 1\.0 or 2\.0"),
    *((data, r"x\.npy is no array in version") for data in (b"", b"\x93NUMPY", b"\x93NUMPY\x01", bytes(200))),
    *((b"\x93NUMPY" + data, "the header of x.npy is damaged") for data in (
        b"\x01\x00", b"\x01\x00\x09", b"\x02\x00\xff\xff\xff\xff" + bytes(80),
    )),
])  # fmt: skip
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_headers_that_lie(tmp_path: Path, member: bytes, pattern: str, method: int) -> None:
    refused(packed(tmp_path / "x.npz", method, x=member), pattern)


def test_a_bomb_of_a_header_is_not_unpacked(tmp_path: Path) -> None:
    """A header of 64 MiB in 64 KiB of file; numpy's own reader would make it whole first."""
    path = packed(tmp_path / "x.npz", zipfile.ZIP_DEFLATED, x=npy(" " * (1 << 26), version=(2, 0)))
    assert path.stat().st_size < 1 << 17
    assert peak(lambda: refused(path, r"the header of x\.npy is damaged")) < 4 << 20


def test_a_bomb_of_numbers_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be read whole has a limit; a member of images is unpacked as it is asked for."""
    monkeypatch.setattr(npz, "MOST_BYTES", 1 << 24)
    path = save(tmp_path / "x.npz", np.savez_compressed, x=np.zeros(1 << 25, np.uint8))
    assert peak(lambda: refused(path, r"x has 33554432 bytes; at most 16777216 can be read at once")) < 4 << 20


def peak(work: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_directory_that_claims_more_than_the_file_holds(tmp_path: Path, method: int) -> None:
    """Sizes of the zip's own directory: 3 GB out of a hundred bytes."""
    path = packed(tmp_path / "x.npz", method, x=npy(HEAD.format("|u1", "(3000000000,)"), bytes(100)))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    for claimed in ((24,), (20, 24)):
        for offset in claimed:
            struct.pack_into("<I", data, at + offset, 3_000_000_000 + 74)
        path.write_bytes(data)
        assert peak(lambda: refused(path, "cannot hold the 3000000074 bytes|damaged")) < 4 << 20


def test_ways_of_packing_that_numpy_does_not_use(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        refused(packed(tmp_path / "x.npz", method, x=npy(HEAD.format("|u1", "(2,)"), bytes(2))), "packed in a way")
    path = packed(tmp_path / "x.npz", x=npy(HEAD.format("|u1", "(2,)"), bytes(2)))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    refused(path, "encrypted")


def test_names_that_do_not_belong(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "x.npz", r"is no \.npz file: it holds readme\.txt")
    member = npy(HEAD.format("|u1", "(2,)"), bytes(2))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", member)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", member)
    refused(tmp_path / "x.npz", "x occurs twice")


# ---- writing


ARRAYS = {"mu": RNG.standard_normal(3), "sigma": np.asfortranarray(RNG.standard_normal((3, 3)))}


def test_what_is_written_is_read_by_us_and_by_numpy(tmp_path: Path) -> None:
    path, arrays = tmp_path / "x.npz", {**ARRAYS, "arr_0": IMAGES}
    write_npz(path, arrays)
    with np.load(path, allow_pickle=False) as found:
        assert list(found) == list(arrays)
        assert all(np.array_equal(found[key], value) for key, value in arrays.items())
    assert {key: m.info.compress_type for key, m in members(path).items()} == dict.fromkeys(arrays, 0)
    assert np.array_equal(np.concatenate(list(images(path).batches(3, 1))), IMAGES[1:])
    assert np.array_equal(read_array(members(path)["sigma"]), ARRAYS["sigma"])


def test_the_same_arrays_are_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the day and the name."""
    write_npz(tmp_path / "x.npz", ARRAYS)
    monkeypatch.setattr("time.time", lambda: 2e9)
    write_npz(tmp_path / "y.npz", ARRAYS)
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()


def test_rows_in_parts_are_the_array(tmp_path: Path) -> None:
    write_npz(tmp_path / "whole.npz", {"arr_0": IMAGES})
    with zipfile.ZipFile(tmp_path / "parts.npz", "w") as archive:
        write_member(archive, "arr_0", IMAGES.dtype, IMAGES.shape, (IMAGES[k : k + 2] for k in range(0, 11, 2)))
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "few.npz", "w") as archive, pytest.raises(ValueError, match="bytes fewer than"):
        write_member(archive, "arr_0", IMAGES.dtype, (12, *IMAGES.shape[1:]), [IMAGES])


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(b"before")

    def full(*given: Any, **others: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(npz, "write_member", full)
    with pytest.raises(
        RunError, match=r"x\.npz was not written: No space left on device: it needs [\d,]+ bytes, [\d,]+ are free"
    ):
        write_npz(path, ARRAYS)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"] and path.read_bytes() == b"before"
    with pytest.raises(RunError, match="was not written: No such file or directory"):
        write_npz(tmp_path / "none" / "x.npz", ARRAYS)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    for saver in SAVE:
        path = save(tmp_path / "x.npz", saver, arr_0=RNG.integers(0, 256, (400, 16, 16, 3), dtype=np.uint8))
        found, data = images(path), path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        for start in (0, 1):
            with pytest.raises(EvaluationError, match=r"x\.npz is damaged"):
                list(found.batches(8, start))


MANY = RNG.integers(0, 256, (400, 4, 6, 3), dtype=np.uint8)  # more than the 16 KiB that are read at opening


def damage(path: Path) -> None:
    """A late image of arr_0."""
    info, data = members(path)["arr_0"].info, bytearray(path.read_bytes())
    data[info.header_offset + info.compress_size - 20] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("saver", SAVE)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_damaged_image_is_found_by_a_pass_over_all(tmp_path: Path, saver: Callable[..., None], size: int) -> None:
    damage(save(tmp_path / "x.npz", saver, arr_0=MANY))
    found = images(tmp_path / "x.npz")
    with pytest.raises(EvaluationError, match=r"x\.npz is damaged"):
        list(found.batches(size))


@pytest.mark.parametrize("saver", SAVE)
def test_a_checksum_of_its_own(tmp_path: Path, saver: Callable[..., None]) -> None:
    """Of 32 MiB, none of which is held; a byte that no batch was asked for counts too."""
    array = np.zeros((512, 128, 170, 3), np.uint8)
    found = images(save(tmp_path / "x.npz", saver, arr_0=array))
    assert peak(found.verify) < 10 << 20
    path = save(tmp_path / "x.npz", saver, mu=np.zeros(3), arr_0=MANY, z=np.ones(9))
    images(path).verify()
    damage(path)
    found = images(path)
    with pytest.raises(EvaluationError, match=r"x\.npz is damaged"):
        found.verify()


def test_buffers_of_io_are_not_needed(tmp_path: Path) -> None:
    """A member is read to its end in whatever pieces."""
    buffer = io.BytesIO()
    np.save(buffer, IMAGES)
    path = packed(tmp_path / "x.npz", zipfile.ZIP_DEFLATED, arr_0=buffer.getvalue())
    assert np.array_equal(np.concatenate(list(images(path).batches(5, 2, 9))), IMAGES[2:9])
