"""manifest.json finds every change of a folder: C6 and C7 of the reliability promises."""

import errno
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import sign

from ldit.errors import RunError
from ldit.storage import manifest

FILES = {"a.bin": bytes(range(64)), "config.json": b'{"format": 1}\n', "state/trainer.json": b'{"step": 3}\n'}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "step" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "step" / manifest.NAME).write_text(json.dumps(manifest.build(tmp_path / "step"), indent=1) + "\n")
    return tmp_path / "step"


def test_content_is_what_the_contract_says(folder: Path) -> None:
    data = json.loads((folder / manifest.NAME).read_text())
    files = {name: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in FILES.items()}
    assert data == sign({"format": 1, "files": files})
    manifest.verify(folder)
    assert manifest.build(folder) == data, "a manifest that stands is no part of the next"


def test_large_files_are_hashed_whole(tmp_path: Path) -> None:
    """Longer than the reading chunk, and not a multiple of it."""
    content = random.Random(0).randbytes((1 << 20) * 2 + 17)
    (tmp_path / "big").write_bytes(content)
    assert manifest.sha256_file(tmp_path / "big") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", [*FILES, manifest.NAME])
def test_every_single_bit_flip_is_found(folder: Path, name: str, fault: Callable[..., str]) -> None:
    """All of them, not a sample: the files are small."""
    path = folder / name
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert str(path) in fault(manifest.verify, folder), f"bit {bit}"
    path.write_bytes(good)
    manifest.verify(folder)


@pytest.mark.parametrize("length", [0, 1, 7, 40, 100, 200, -40, -2])
@pytest.mark.parametrize("name", ["a.bin", manifest.NAME])
def test_truncated(folder: Path, name: str, length: int, fault: Callable[..., str]) -> None:
    path = folder / name
    good = path.read_bytes()
    path.write_bytes(good[:length] if length < len(good) else good[:-3])
    assert str(path) in fault(manifest.verify, folder)


@pytest.mark.parametrize("name", [*FILES, manifest.NAME])
def test_missing(folder: Path, name: str, fault: Callable[..., str]) -> None:
    (folder / name).unlink()
    assert fault(manifest.verify, folder) == f"{folder / name} is missing"


@pytest.mark.parametrize("name", ["extra", "state/extra", "state/manifest.json", ".hidden"])
def test_extra(folder: Path, name: str, fault: Callable[..., str]) -> None:
    (folder / name).write_bytes(b"")
    assert fault(manifest.verify, folder) == f"{folder / name} is not in the manifest"


def test_two_files_swapped(folder: Path, fault: Callable[..., str]) -> None:
    one, other = folder / "config.json", folder / "state/trainer.json"
    one_content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(one_content)
    assert str(one) in fault(manifest.verify, folder)


def test_same_size_other_content_is_damage(folder: Path, fault: Callable[..., str]) -> None:
    (folder / "a.bin").write_bytes(bytes(64))
    assert "content" in fault(manifest.verify, folder)


def test_names_checked_alone(folder: Path, fault: Callable[..., str]) -> None:
    """Damage elsewhere is not looked at, a name the manifest does not list is an error."""
    (folder / "a.bin").write_bytes(b"")
    (folder / "extra").write_bytes(b"")
    manifest.verify(folder, ["config.json"])
    assert "a.bin" in fault(manifest.verify, folder, ["config.json", "a.bin"])
    assert fault(manifest.verify, folder, ["extra"]) == f"{folder / 'extra'} is not in the manifest"


def test_newer_format_is_named_even_when_the_body_is_unknown(folder: Path, fault: Callable[..., str]) -> None:
    body = {"format": 2, "files": {}, "compression": "zstd"}
    (folder / manifest.NAME).write_text(json.dumps(sign(body)))
    message = fault(manifest.verify, folder)
    assert "format 2 is newer than 1" in message and str(folder / manifest.NAME) in message


def test_body_rewritten_without_its_checksum(folder: Path, fault: Callable[..., str]) -> None:
    data = json.loads((folder / manifest.NAME).read_text())
    (folder / "a.bin").write_bytes(b"other")
    data["files"]["a.bin"] = {"size": 5, "sha256": hashlib.sha256(b"other").hexdigest()}
    (folder / manifest.NAME).write_text(json.dumps(data))
    assert "its own checksum" in fault(manifest.verify, folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "[]",
        "null",
        '"manifest"',
        "{}",
        '{"format": 1, "files": {}}',
        '{"format": 1, "sha256": ""}',
        "\ufeff{}",
        '{"format": ' + "9" * 5000 + "}",
        '{"format": 1, "files": {"\\ud800": {}}, "sha256": "x"}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_not_a_manifest(folder: Path, text: str, fault: Callable[..., str]) -> None:
    (folder / manifest.NAME).write_text(text)
    assert str(folder / manifest.NAME) in fault(manifest.verify, folder)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"format": 1, "files": ["a.bin"]}, id="files a list"),
        pytest.param({"format": 1, "files": {"a.bin": "abc"}}, id="entry a string"),
        pytest.param({"format": 1, "files": {"a.bin": {}}}, id="entry empty"),
        pytest.param({"format": 1, "files": {"a.bin": {"size": 64}}}, id="entry without checksum"),
        pytest.param({"format": None}, id="format null"),
        pytest.param({"format": "2"}, id="format a string"),
    ],
)
def test_hostile_manifest_with_a_true_checksum(folder: Path, body: dict[str, Any], fault: Callable[..., str]) -> None:
    """The checksum keeps accidents out, not malice: the types are checked too."""
    for name in FILES:
        if name != "a.bin":
            (folder / name).unlink()
    content = FILES["a.bin"]
    files = {"a.bin": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    (folder / manifest.NAME).write_text(json.dumps(sign({"files": files, **body})))
    assert str(folder / manifest.NAME) in fault(manifest.verify, folder)


@pytest.mark.parametrize("name", ["../outside", "{root}/outside"])
def test_hostile_manifest_lists_a_file_outside(folder: Path, name: str, fault: Callable[..., str]) -> None:
    """Names that leave the folder are refused, not looked up."""
    outside = folder.parent / "outside"
    outside.write_bytes(b"secret")
    entry = {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    files = {**manifest.build(folder)["files"], name.format(root=folder.parent): entry}
    (folder / manifest.NAME).write_text(json.dumps(sign({"format": 1, "files": files})))
    fault(manifest.verify, folder)


def test_unreadable_file_is_a_source_error(
    folder: Path, fault: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing disk is damage too, and so a reason to fall back."""

    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(manifest, "sha256_file", broken)
    assert "a.bin" in fault(manifest.verify, folder)


def test_a_file_that_cannot_be_read_for_now_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale handle of a network file system must not make a run fall back behind a sound step."""

    def stale(path: Path) -> str:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(manifest, "sha256_file", stale)
    with pytest.raises(RunError, match=r"a\.bin cannot be read"):
        manifest.verify(folder)


@pytest.mark.parametrize("lost", FILES)
def test_a_file_that_was_written_and_is_lost_is_named(folder: Path, lost: str) -> None:
    """Written, hashed on the way, and not there when the manifest is made: no manifest without it."""
    known = {name: manifest.Record(len(content), "0" * 64) for name, content in FILES.items()}
    assert manifest.build(folder, known)["files"] == {name: record._asdict() for name, record in known.items()}
    (folder / lost).unlink()
    with pytest.raises(RunError, match=rf"^{folder / lost} was written and has disappeared$"):
        manifest.build(folder, known)
    assert manifest.build(folder, {})["files"].keys() == FILES.keys() - {lost}
