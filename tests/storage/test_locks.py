"""Locks on folders and files: waited for, freed by death, and of no use once the folder is gone."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from ldit.storage.locks import held_by_other, hold, locked


def test_one_at_a_time(tmp_path: Path) -> None:
    """A second one waits until the first leaves."""
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with locked(tmp_path) as held:
            assert held
            inside.set()
            leave.wait(60)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60) and held_by_other(tmp_path)
    threading.Timer(0.05, leave.set).start()
    with locked(tmp_path):
        order.append("second")
    thread.join()
    assert order == ["first", "second"] and not held_by_other(tmp_path)


def test_a_folder_that_was_removed_while_it_was_waited_for(tmp_path: Path) -> None:
    """The lock of what is no more keeps nobody out: it is not had. The same where another stands in its place."""
    for again in (False, True):
        folder, failed = tmp_path / "folder", threading.Event()
        folder.mkdir()

        def wait(folder: Path = folder, failed: threading.Event = failed) -> None:
            with pytest.raises(FileNotFoundError), locked(folder):
                raise AssertionError("had the lock")
            failed.set()

        with locked(folder):
            thread = threading.Thread(target=wait)
            thread.start()
            thread.join(0.1)
            assert thread.is_alive()
            os.rename(folder, tmp_path / "aside")
            if again:
                folder.mkdir()
        thread.join(60)
        assert failed.is_set()
        shutil.rmtree(tmp_path / "aside")
    with pytest.raises(FileNotFoundError), locked(tmp_path / "nothing"):
        pass
    assert not held_by_other(tmp_path / "nothing")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_dead_holder_holds_nothing(kind: str, tmp_path: Path) -> None:
    """Though it never let go."""
    place = tmp_path / kind
    place.mkdir() if kind == "folder" else place.touch()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        hold(place)
        os.write(write, b"x")
        threading.Event().wait(60)
        os._exit(0)
    assert os.read(read, 1) == b"x" and held_by_other(place)
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert not held_by_other(place)
    os.close(read)
    os.close(write)
