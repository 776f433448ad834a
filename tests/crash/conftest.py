"""The fork server and undisturbed runs to compare with, once a test process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash.processes import RUN, Server, finished


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.close()


@pytest.fixture(scope="session")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run of RUN that nobody disturbs, by its number of processes."""
    made: dict[int, Path] = {}

    def run(size: int) -> Path:
        if size not in made:
            base = tmp_path_factory.mktemp(f"undisturbed-{size}")
            finished(server, [*RUN, "--out", str(base / "run")], base / "said", size)
            made[size] = base / "run"
        return made[size]

    return run
