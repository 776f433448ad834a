"""`ldit data check` where a read does not come back: the file is named, the others are looked at, the process ends."""

import json
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldit.cli.main import dispatch
from ldit.data import scan as check
from ldit.data.images.decoding import Decoding, Facts
from ldit.data.scan import MOST_HUNG, Reading, scan_folder
from ldit.errors import RunError

COUNT = 12
PATIENCE = 1.0  # far above what a small image takes on a busy machine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set" / "a").mkdir(parents=True)
    for i in range(COUNT):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "set" / "a" / f"{i:02d}.png")
    return tmp_path / "set"


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names of files whose reading does not come back before the test ends."""
    names: set[str] = set()
    ended, examine = threading.Event(), check.examine

    def hang(source: Any, decoding: Decoding) -> Facts:
        if Path(source.name).name in names:
            ended.wait()
        return examine(source, decoding)

    monkeypatch.setattr(check, "examine", hang)
    yield names
    ended.set()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_file_is_bad_and_the_others_are_read(folder: Path, hanging: set[str], workers: int) -> None:
    """Also with one thread, and with both at once."""
    hanging |= {"03.png", "04.png"}
    report = scan_folder(folder, Decoding(), reading=Reading(workers, PATIENCE))
    assert [name for name, _ in report.bad] == ["a/03.png", "a/04.png"]
    assert all(reason.startswith("thread check-") and "has been at it for" in reason for _, reason in report.bad)
    assert report.total == COUNT and len(report.digests) == COUNT - 2 and report.formats["PNG"] == COUNT - 2


def test_listed_images_too(folder: Path, hanging: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(folder / "0.tar", "w") as archive:
        for path in sorted((folder / "a").iterdir()):
            archive.add(path, path.name)
    hanging.add("05.png")
    assert dispatch("data", ["check", str(folder / "0.tar"), "--json", "--timeout", str(PATIENCE)]) == 1
    report = json.loads(capsys.readouterr().out)
    (bad,) = report["bad"]
    assert bad["file"] == "0.tar/05.png" and "has been at it for" in bad["reason"] and report["total"] == COUNT


def test_a_disk_that_hangs_ends_the_check(folder: Path, hanging: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hanging |= {f"{i:02d}.png" for i in range(COUNT)}
    monkeypatch.setattr(check, "MOST_HUNG", 3)
    assert 3 < MOST_HUNG < COUNT
    with pytest.raises(RunError, match=r"a/02\.png cannot be read: thread .*\(--timeout\), and 2 before it hang"):
        scan_folder(folder, Decoding(), reading=Reading(2, PATIENCE))


@pytest.mark.parametrize("interrupted", [True, False])
def test_the_process_ends(folder: Path, interrupted: bool) -> None:
    """By itself, and by SIGINT, though a thread is left behind."""
    code = (
        # A shell's background jobs ignore SIGINT, and so do their children.
        "import signal, sys, threading\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from ldit.cli.main import main\nfrom ldit.data import scan as check\n"
        "def hang(source, decoding):\n"
        "    print('hangs', file=sys.stderr, flush=True)\n    threading.Event().wait()\n"
        "check.examine = hang\nsys.exit(main(sys.argv[1:]))"
    )
    for path in sorted((folder / "a").iterdir())[1:]:
        path.unlink()
    arguments = ["data", "check", str(folder), "--json", "--timeout", "3600" if interrupted else str(PATIENCE)]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stderr is not None and child.stderr.readline() == "hangs\n"
        if interrupted:
            child.send_signal(signal.SIGINT)
        out, errors = child.communicate(timeout=120)
    finally:
        child.kill()
    if interrupted:
        assert child.returncode == 130 and "interrupted" in errors
    else:
        assert child.returncode == 1 and json.loads(out)["bad"][0]["file"] == "a/00.png"
