"""How far all processes are: what stands in the files, whoever made it, and what this one has under way."""

import pytest
from folders import said

from ldit.storage import progress
from ldit.storage.progress import Progress


def test_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one in 30 seconds; files are looked at again after 2; of a rate since the start of this process."""
    clock, standing = [100.0], [100]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with said() as lines:
        bar = Progress(5000, lambda: standing[0], True, "images")
        clock[0] += 1
        bar.begun(4)
        clock[0] += 30
        standing[0] = 400  # others were at work
        bar.begun(6)
        assert lines.pop() == "410 of 5,000 images  10.00 a second  left 0:07:39"
        clock[0] += 1
        standing[0] = 1000
        bar.advance(10)
        assert not lines
        clock[0] += 30
        bar.begun(0)
        assert lines.pop() == "1,000 of 5,000 images  14.52 a second  left 0:04:35"
        clock[0] += 40
        standing[0] = 4999
        bar.begun(9)
        assert lines.pop().startswith("5,000 of 5,000 images") and not lines
        bar.close()


def test_others_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with said() as lines:
        bar = Progress(10, lambda: 0, False, "images")
        clock[0] += 100
        bar.advance(5)
        bar.close()
    assert not lines
