"""Large files are compared with their checksums once, and again as soon as anything about them has changed."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ldit.errors import SourceError
from ldit.storage import manifest, verified
from ldit.storage.atomic import write_json


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a manifest of a large file and a small one; files count as large from 1 kB on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "LEAST", 1000)
    monkeypatch.setattr(verified, "_SETTLED", 0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/big").write_bytes(np.random.default_rng(0).bytes(3 * (1 << 16) + 77))
    (tmp_path / "model/small").write_bytes(b"small")
    write_json(tmp_path / "model" / manifest.NAME, manifest.build(tmp_path / "model"))
    return tmp_path / "model"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are read for a comparison."""
    names: list[str] = []

    def noting(digest: Callable[[Path], str]) -> Callable[[Path], str]:
        return lambda path: names.append(path.name) or digest(path)  # type: ignore[func-returns-value]

    monkeypatch.setattr(manifest, "sha256_file", noting(manifest.sha256_file))
    monkeypatch.setattr(manifest, "block_digest", noting(manifest.block_digest))
    return names


def flip(path: Path, place: int) -> None:
    """One bit, in place, with size and mtime put back."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def test_a_large_file_is_read_once(folder: Path, read: list[str]) -> None:
    for _ in range(3):
        manifest.verify(folder, ["big", "small"], remembered=True)
    assert sorted(read) == ["big", "small", "small", "small"]
    manifest.verify(folder)  # every byte, whatever is remembered
    assert read.count("big") == 2


@pytest.mark.parametrize("place", [0, 1 << 16, 3 * (1 << 16) + 76])
def test_a_flipped_bit_is_found(folder: Path, place: int) -> None:
    manifest.verify(folder, ["big"], remembered=True)
    time.sleep(0.02)  # longer than a tick of the file system's clock
    flip(folder / "big", place)
    with pytest.raises(SourceError, match="big is damaged"):
        manifest.verify(folder, ["big"], remembered=True)
    with pytest.raises(SourceError, match="big is damaged"):
        manifest.verify(folder)


def test_what_makes_it_read_again(folder: Path, read: list[str]) -> None:
    """A copy, a touched file, another manifest, a lost memory."""
    manifest.verify(folder, ["big"], remembered=True)
    content = (folder / "big").read_bytes()
    (folder / "new").write_bytes(content)
    os.replace(folder / "new", folder / "big")
    manifest.verify(folder, ["big"], remembered=True)
    os.utime(folder / "big")
    manifest.verify(folder, ["big"], remembered=True)
    (verified.cache_folder() / "verified.json").write_text("{broken")
    manifest.verify(folder, ["big"], remembered=True)
    assert read == ["big"] * 4
    files = {"big": manifest.Record(len(content), hashlib.sha256(b"other").hexdigest())}
    write_json(folder / manifest.NAME, manifest.sealed(files))
    with pytest.raises(SourceError, match="big is damaged"):
        manifest.verify(folder, ["big"], remembered=True)


def test_without_a_cache_folder_it_reads_every_time(
    folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        manifest.verify(folder, ["big"], remembered=True)
    assert read == ["big", "big"]


def test_a_file_just_changed_is_not_remembered(folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A change within the same tick of the clock would not show in its times."""
    monkeypatch.setattr(verified, "_SETTLED", 10**12)
    for _ in range(2):
        manifest.verify(folder, ["big"], remembered=True)
    assert read == ["big", "big"]


def test_blocks_notice_every_kind_of_damage(tmp_path: Path) -> None:
    """The digest against its definition, and what it must tell apart."""
    content = bytearray(np.random.default_rng(1).bytes(5 * (1 << 16) + 13))
    path = tmp_path / "x"

    def digest(data: bytes | bytearray) -> str:
        path.write_bytes(data)
        return manifest.block_digest(path)

    blocks = [content[i : i + (1 << 16)] for i in range(0, 5 << 16, 1 << 16)]
    sums = [sum(int.from_bytes(b[i : i + 8], "little") for i in range(0, 1 << 16, 8)) % (1 << 64) for b in blocks]
    plain = b"".join(s.to_bytes(8, "little") for s in sums) + content[5 << 16 :]
    assert digest(content) == hashlib.sha256(plain).hexdigest()
    seen = {digest(content)}
    exchanged = blocks[1] + blocks[0] + content[2 << 16 :]
    for other in (exchanged, content[:-1], content + b"\0", bytes(1 << 16) + content[1 << 16 :], b""):
        seen.add(digest(other))
    for place in (0, 12345, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 128
        seen.add(digest(changed))
    assert len(seen) == 9


def test_all_parts_of_a_sharded_model_are_remembered(
    folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are verified in threads, which write to one file; reading it takes a while."""
    names = [f"part-{k}" for k in range(6)]
    for k, name in enumerate(names):
        (folder / name).write_bytes(np.random.default_rng(k).bytes(2000))
    write_json(folder / manifest.NAME, manifest.build(folder))
    read.clear()
    sound = verified._read
    monkeypatch.setattr(verified, "_read", lambda: (sound(), time.sleep(0.01))[0])  # type: ignore[func-returns-value]
    manifest.verify(folder, names, remembered=True)
    assert sorted(read) == names
    manifest.verify(folder, names, remembered=True)
    assert sorted(read) == names
