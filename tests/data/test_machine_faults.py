"""Faults of the machine are no bad images: `data.bad skip` passes over the one and ends at the other."""

import errno
import os
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from ldit.data.formats.image_folder import ImageFolder
from ldit.data.formats.tars import TarImages
from ldit.data.images import decoding as module
from ldit.data.images.decoding import BadImage, Decoding, examine, open_image
from ldit.data.loader import Loader, load_batch
from ldit.data.samples import Samples
from ldit.errors import LditError, RunError

PASSING = ("ESTALE", "ETIMEDOUT", "EAGAIN", "ENOMEM", "EMFILE", "ENFILE", "EIO", "EINTR", "EACCES", "EREMOTEIO")
ABSENT = ("ENOENT", "ENOTDIR", "ELOOP", "ENAMETOOLONG")
KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "PPM": "ppm", "TIFF": "tiff", "GIF": "gif"}
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def skipping(data: Samples, workers: int = 0) -> Any:
    """The first batch of four of a run that leaves bad images out."""
    return next(Loader(data, 4, 0, False, workers, bad="skip").from_step(0, 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set" / "a").mkdir(parents=True)
    for number in range(4):
        Image.fromarray(NOISE).save(tmp_path / "set" / "a" / f"{number}.png")
    return tmp_path / "set"


@pytest.fixture
def archive(folder: Path, tmp_path: Path) -> Path:
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(4):
            tar.add(folder / "a" / f"{number}.png", f"{number}.png")
    return tmp_path / "a.tar"


class Failing:
    """A file on a disk of which a read fails: the first that goes beyond byte `at`."""

    name = "disk/a.png"

    def __init__(self, data: bytes, at: int, number: int) -> None:
        self.file = BytesIO(data)
        self.seek, self.tell = self.file.seek, self.file.tell
        self.at, self.number, self.failed = at, number, False

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        if self.tell() > self.at:
            self.failed = True
            raise OSError(self.number, os.strerror(self.number))
        return data


@pytest.mark.parametrize("name", PASSING)
def test_a_file_that_does_not_open_for_now(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    number = getattr(errno, name)
    data, opens = ImageFolder(folder, 4), Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "2.png":
            raise OSError(number, os.strerror(number), str(path))
        return opens(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    for workers in (0, 2):
        with pytest.raises(RunError, match=rf"^cannot read image {folder}/a/2\.png: {os.strerror(number)}$"):
            skipping(data, workers)


@pytest.mark.parametrize("name", ABSENT)
def test_a_file_that_is_not_there_is_bad(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    number = getattr(errno, name)
    data, looks = ImageFolder(folder, 4), Path.stat

    def refuse(path: Path, **options: Any) -> Any:
        if path.name == "2.png":
            raise OSError(number, os.strerror(number), str(path))
        return looks(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    (fault,) = skipping(data).faults
    assert fault.where == "a/2.png" and fault.reason.endswith(os.strerror(number))


def test_a_image_deleted_under_the_run_is_bad(folder: Path) -> None:
    data = ImageFolder(folder, 4)
    (folder / "a" / "1.png").unlink()
    (fault,) = skipping(data).faults
    assert fault.where == "a/1.png" and "No such file" in fault.reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_read_that_fails_at_any_place(kind: str, number: int) -> None:
    """Pillow's readers take many errors for the end of the image, or for damage."""
    file = BytesIO()
    Image.fromarray(NOISE).save(file, kind)
    whole, failed = file.getvalue(), 0
    places = [0, 1, 15, 16, 17, 40, 100, *range(200, len(whole), len(whole) // 9), len(whole) - 1]
    for at in places:
        source = Failing(whole, at, number)
        error = outcome(lambda source=source: examine(cast(BinaryIO, source), Decoding()))  # type: ignore[misc]
        said = f"cannot read image disk/a.png: {os.strerror(number)}"
        assert (isinstance(error, RunError) and str(error) == said) if source.failed else error is None
        failed += source.failed
    assert failed > len(places) // 2


def test_large_tiffs_of_little_image(tmp_path: Path) -> None:
    """What lies behind the first page is no part of the header, however long."""
    path = tmp_path / "a.tiff"
    Image.fromarray(NOISE).save(path, compression="tiff_lzw")
    with path.open("ab") as file:
        file.truncate(70 << 20)
    assert open_image(path, Decoding()).size == (64, 64)


@pytest.mark.parametrize("where", ["load", "_finish"])
def test_no_memory_is_no_fault_of_the_image(folder: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def refuse(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(*((module, where) if where == "_finish" else (ImageFile.ImageFile, where)), refuse)
    with pytest.raises(RunError, match=r"^cannot read image .*/a/\d\.png: MemoryError$"):
        skipping(ImageFolder(folder, 4))


def test_a_decoder_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's code for it (-9) comes as an OSError without number."""
    from PIL.ImageFile import _get_oserror

    file = BytesIO()
    Image.fromarray(NOISE).save(file, "PNG")
    for code, kind in ((-9, RunError), *((code, BadImage) for code in (-1, -2, -3, -8))):
        monkeypatch.setattr(
            module, "_finish", lambda *_, code=code: (_ for _ in ()).throw(_get_oserror(code, encoder=False))
        )
        with pytest.raises(kind):
            open_image(file, Decoding())


@contextmanager
def few_files() -> Iterator[None]:
    """No descriptor is left to this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(map(int, os.listdir("/proc/self/fd"))), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def outcome(work: Callable[[], Any]) -> LditError | None:
    try:
        work()
    except LditError as error:
        return error
    return None


def test_no_descriptor_left(folder: Path, archive: Path) -> None:
    sets: list[Samples] = [ImageFolder(folder, 4), TarImages(archive, 4, Decoding())]
    with few_files():
        errors = [outcome(lambda data=data: skipping(data)) for data in sets]  # type: ignore[misc]
    for error, name in zip(errors, (str(folder / "a"), str(archive)), strict=True):
        assert isinstance(error, RunError) and error.code == 1
        assert str(error).startswith(f"cannot read image {name}/") and "Too many open files" in str(error)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_archive_that_is_another_one_now(archive: Path, workers: int) -> None:
    data = TarImages(archive, 4, Decoding())
    os.utime(archive, ns=(0, 0))
    with pytest.raises(
        RunError, match=r"^cannot read image .*a\.tar/\d\.png: .*a\.tar has changed since it was opened$"
    ):
        skipping(data, workers)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOENT])
def test_an_archive_that_does_not_open_for_now(archive: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    data = TarImages(archive, 4, Decoding())

    def refuse(*arguments: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(RunError, match=rf"a\.tar/\d\.png: cannot open {archive}: {os.strerror(number)}$"):
            skipping(data)
    assert not skipping(data).faults  # passed
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", refuse)
        with pytest.raises(RunError, match=rf"a\.tar/\d\.png: cannot read {archive}: {os.strerror(number)}$"):
            skipping(data)
        patch.setattr(os, "pread", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(RunError, match=r"a\.tar/\d\.png: no memory for its \d+ bytes$"):
            skipping(data)
    assert not skipping(data).faults


def test_a_image_of_an_archive_is_named_when_memory_ends(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_finish", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(RunError, match=rf"^cannot read image {archive}/\d\.png: MemoryError$"):
        skipping(TarImages(archive, 4, Decoding()))


def test_a_global_flag_of_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(
        RunError, match=r"^cannot read image .*/a/\d\.png: PIL\.ImageFile\.LOAD_TRUNCATED_IMAGES is set"
    ):
        skipping(ImageFolder(folder, 4))


def test_what_the_bytes_say_is_bad_all_the_same(folder: Path) -> None:
    """Offsets that no file can have are the file's fault."""
    whole = BytesIO()
    Image.fromarray(NOISE).save(whole, "TIFF")
    for offset in (b"\xff" * 4, (1 << 31).to_bytes(4, "little")):
        (folder / "a" / "2.png").write_bytes(whole.getvalue()[:4] + offset + whole.getvalue()[8:])
        with pytest.raises(BadImage):
            open_image(folder / "a" / "2.png", Decoding())
    tags = [(256, 4), (257, 4), (258, 8), (259, 1), (262, 1), (273, 1 << 62), (278, 4), (279, 16)]
    far = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, len(tags))
    far += b"".join(struct.pack("<HHQQ", tag, 16, 1, value) for tag, value in tags) + bytes(8)
    (folder / "a" / "2.png").write_bytes(far)
    with pytest.raises(BadImage, match="truncated"):
        open_image(folder / "a" / "2.png", Decoding())
    (folder / "a" / "2.png").write_bytes(b"II+\0\x08\0\0\0" + (1 << 62).to_bytes(8, "little") + b"\0" * 64)
    (folder / "a" / "3.png").write_bytes(b"")
    batch = load_batch(ImageFolder(folder, 4), range(4), range(4), None, "skip")
    assert [fault.where for fault in batch.faults] == ["a/2.png", "a/3.png"]
    assert torch.equal(batch.inputs[0], batch.inputs[1])
