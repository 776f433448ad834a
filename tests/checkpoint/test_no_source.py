"""What is no source at all."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ldit.checkpoint.open import open_source

Fault = Callable[..., str]


@pytest.mark.parametrize("name", ["folder", "file.txt", "absent", "", "x\0y", "x\ny", "~no_such_user_/x"])
def test_not_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: Fault) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("x")
    fault(open_source, name)


def test_a_source_longer_than_a_file_name(fault: Fault) -> None:
    fault(open_source, "a" * 5000)


def test_a_hub_id_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    monkeypatch.chdir(tmp_path)
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    message = fault(open_source, "some-org/some-model")
    assert "'some-org/some-model'" in message and "HF_HUB_OFFLINE" in message
