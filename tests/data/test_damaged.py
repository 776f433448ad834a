"""Row D1 of the reliability table: 400 damaged files among good ones; exactly those are found, by training and by
`ldit data check`. Damage is by construction: the full decode by Pillow alone raises, or a stated size rule fails."""

import os
import warnings
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from data.image_files import claims
from PIL import Image

from ldit.data.formats.image_folder import ImageFolder
from ldit.data.images.decoding import BadImage, Decoding, open_image
from ldit.data.scan import scan_folder
from ldit.errors import DataError, RunError

SIZE = 12
KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "PPM": "ppm", "TIFF": "tiff", "GIF": "gif"}
TEXT = b"<html><body>404: this picture is gone</body></html>\n" * 5


def whole(kind: str, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """A good file of SIZE x SIZE and its pixels, as Pillow alone decodes them."""
    file = BytesIO()
    pixels = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    pixels.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue(), np.asarray(Image.open(file).convert("RGB"))


def decodes(data: bytes) -> bool:
    """Whether Pillow alone makes an image of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Image.open(BytesIO(data)).load()
        except Exception:
            return False
    return True


def truncated(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut at a random place where Pillow alone notices."""
    while True:
        cut = data[: rng.integers(1, len(data))]
        if not decodes(cut):
            return cut


def zipped() -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("picture.jpg", TEXT)
    return file.getvalue()


def long_image(kind: str, width: int, height: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (width, height), (1, 2, 3)).save(file, kind)
    assert decodes(file.getvalue()) and max(width, height) > 64 * min(width, height)
    return file.getvalue()


def damaged(kind: str, rng: np.random.Generator, number: int) -> bytes:
    """Damage `number` of a kind of image."""
    whole_file = whole(kind, rng)[0]
    others = [
        b"",
        TEXT,
        zipped(),
        b"\0" * 500,
        b"\xff" * 500,
        whole_file[1:],
        b"\xef\xbb\xbf" + whole_file,
        claims(kind, 16000, 16000),
        claims(kind, 8193, 8192),
        long_image(kind, 1, 5000),
        long_image(kind, 5000, 1),
        long_image(kind, 3, 193),
    ]
    return others[number] if number < len(others) else truncated(whole_file, rng)


def test_exactly_the_damaged_files_are_bad(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bad, good = set(), {}
    for at, (kind, suffix) in enumerate(KINDS.items()):
        folder = tmp_path / kind.lower()
        folder.mkdir()
        for number in range(58 if at == 0 else 57):
            name = f"{kind.lower()}/{number:03d}-bad.{suffix}"
            (tmp_path / name).write_bytes(damaged(kind, rng, number))
            bad.add(name)
        for number in range(0, 57, 5):
            name = f"{kind.lower()}/{number:03d}-good.{suffix.upper() if number % 2 else suffix}"
            data, good[name] = whole(kind, rng)
            (tmp_path / name).write_bytes(data)
    assert len(bad) == 400
    pictures = ImageFolder(tmp_path, SIZE)
    found = set()
    for index in range(len(pictures)):
        name = pictures.where(index)
        try:
            pixels, label = pictures[index]
        except DataError as error:
            message = str(error)
            assert message.startswith(f"cannot read image {tmp_path / name}: ") and len(message) < 400
            found.add(name)
        else:
            assert np.array_equal(pixels, good[name]) and pictures.names[label] == name.split("/")[0]
    assert found == bad and len(pictures) == len(bad) + len(good)
    report = scan_folder(tmp_path, Decoding())
    assert {name for name, _ in report.bad} == bad and all(reason for _, reason in report.bad)
    assert report.total == len(pictures) and sum(report.formats.values()) == len(good)


def test_what_is_no_file_is_bad(tmp_path: Path) -> None:
    """Folders, pipes (that would never answer), circles of links, links to nothing."""
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "nothing.png").symlink_to("gone.png")
    (tmp_path / "loop.png").symlink_to(".")
    for name, said in (
        ("folder", "not a file"),
        ("pipe", "not a file"),
        ("circle", "symbolic links"),
        ("nothing", "No such file"),
        ("loop", "not a file"),
    ):
        with pytest.raises(BadImage, match=said):
            open_image(tmp_path / f"{name}.png", Decoding())
    Image.new("L", (4, 4)).save(tmp_path / "ok.png")
    (tmp_path / "c").mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(tmp_path / "c" / path.name)
    pictures = ImageFolder(tmp_path, 4)
    assert [pictures.where(i) for i in range(len(pictures))] == [
        f"c/{n}.png" for n in ("circle", "nothing", "ok", "pipe")
    ]
    for index in (0, 1, 3):
        with pytest.raises(DataError, match="cannot read image"):
            pictures[index]


def test_files_without_permission(tmp_path: Path) -> None:
    """Not bad: a network's permissions run out and come back, and the file is whole."""
    path = tmp_path / "a.png"
    Image.new("L", (4, 4)).save(path)
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(RunError, match=r"cannot read image .*a\.png: Permission denied"):
            open_image(path, Decoding())
    finally:
        if root:
            os.seteuid(0)
