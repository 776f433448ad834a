"""Fixtures of the tests of pipelines."""

from pathlib import Path

import pytest
from pipeline.sets import KINDS, contents, exported, job, made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of undisturbed sets, by their kind."""
    found, base = {}, tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        for kind in KINDS:
            assert made(patch, job(source), base / kind)
            found[kind] = contents(base / kind)
    return found
