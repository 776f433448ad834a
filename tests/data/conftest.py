"""Fixtures of the tests of data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data.caches import build

from ldit.errors import DataError, LditError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return build(tmp_path / "cache")


@pytest.fixture
def fault() -> Callable[..., str]:
    """The one line by which a cache is refused."""

    def refused(work: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        with pytest.raises(LditError) as caught:
            work(*arguments, **options)
        assert isinstance(caught.value, DataError) and "\n" not in str(caught.value)
        return str(caught.value)

    return refused
