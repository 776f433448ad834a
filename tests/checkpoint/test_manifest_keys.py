"""Further keys of a manifest, and manifests of another name: covered by the manifest's own checksum."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import sign

from ldit.storage import manifest
from ldit.storage.manifest import Record


def test_further_keys_are_part_of_the_body(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    files = {"a": {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}}
    wanted = sign({"format": 1, "files": files, "cache": {"rows": [1, 2], "name": None}})
    built = manifest.build(tmp_path, extra={"cache": {"rows": [1, 2], "name": None}})
    assert built == wanted == manifest.sealed({"a": Record(**files["a"])}, {"cache": {"rows": [1, 2], "name": None}})
    for name in (manifest.NAME, "other.json"):
        (tmp_path / name).write_text(json.dumps(built))
        assert manifest.read_body(tmp_path, name) == wanted
    assert manifest.read(tmp_path) == files
    (tmp_path / "other.json").unlink()
    manifest.verify(tmp_path)


@pytest.mark.parametrize("name", [manifest.NAME, "other.json"])
def test_a_changed_further_key_is_damage(tmp_path: Path, fault: Callable[..., str], name: str) -> None:
    built = manifest.sealed({}, {"cache": {"rows": 1}})
    built["cache"]["rows"] = 2
    (tmp_path / name).write_text(json.dumps(built))
    assert str(tmp_path / name) in fault(manifest.read_body, tmp_path, name)
