"""Folders appear whole or not at all, whatever goes wrong and wherever: C3 of the reliability promises."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import steps

from ldit.storage import atomic as commit
from ldit.storage import manifest
from ldit.storage.atomic import committed, remove_leftovers, write_json_atomic

OPERATIONS = ["open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir"]


class Death(BaseException):
    """Stands for SIGKILL: no clean-up after it can touch the disk."""


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, at: int, kind: type[BaseException]) -> Iterator[dict[str, int]]:
    """The `at`-th disk operation raises `kind` instead of happening; after a Death so does every later one."""
    count = {"done": 0}

    def guard(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            count["done"] += 1
            if count["done"] == at or (kind is Death and count["done"] > at):
                raise kind(28, "No space left on device") if kind is OSError else kind()
            return real(*arguments, **options)

        return operation

    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, guard(getattr(os, name)))
        patch.setattr(commit, "write_json", guard(commit.write_json))
        yield count


def write(final: Path, content: str) -> None:
    with committed(final) as folder:
        (folder / "a").write_text(content)
        (folder / "b").write_text(content)


def test_new_folder_stands_with_a_true_manifest(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "er" / "final"
    with committed(final) as folder:
        assert not final.exists()
        assert folder.parent == final.parent
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
    assert (final / "sub" / "x").read_text() == "1"
    assert manifest.read(final).keys() == {"sub/x"}
    manifest.verify(final)
    assert [p.name for p in final.parent.iterdir()] == ["final"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("existing", [False, True])
def test_an_exception_leaves_nothing_new(tmp_path: Path, error: type[BaseException], existing: bool) -> None:
    final = tmp_path / "final"
    if existing:
        write(final, "old")

    def fail() -> None:
        with committed(final) as folder:
            (folder / "a").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == (["final"] if existing else [])
    if existing:
        assert (final / "a").read_text() == "old"
        manifest.verify(final)


def test_an_existing_folder_is_replaced_whole(tmp_path: Path) -> None:
    """No file of the old one stays behind in the new one."""
    final = tmp_path / "final"
    with committed(final) as folder:
        (folder / "only in the old").write_text("old")
    write(final, "new")
    assert {p.name for p in final.iterdir()} == {"a", "b", manifest.NAME}
    assert (final / "a").read_text() == "new"
    manifest.verify(final)
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_files_are_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of every file, of the manifest and of the folder, then rename, then fsync of the parent."""
    happened: list[str] = []
    synced, renamed = commit.fsync, os.rename
    monkeypatch.setattr(commit, "fsync", lambda path: (happened.append(Path(path).name), synced(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (happened.append("rename"), renamed(a, b)))
    with committed(tmp_path / "final") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
    before, after = happened[: happened.index("rename")], happened[happened.index("rename") + 1 :]
    assert set(before) == {"sub", "x", manifest.NAME, folder.name}
    assert after == [tmp_path.name]


def test_a_json_file_is_on_disk_before_it_replaces_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    synced, replaced = commit.fsync, os.replace
    monkeypatch.setattr(commit, "fsync", lambda path: (happened.append(Path(path).name), synced(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (happened.append("replace"), replaced(a, b)))
    write_json_atomic(tmp_path / "config.json", {})
    assert happened[0].startswith("config.json.") and happened[1:] == ["replace", tmp_path.name]


def test_every_folder_above_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name that was made, in the folder above it and before what it leads to; those that stood are left alone."""
    happened: list[str] = []
    synced, made = commit.fsync, os.mkdir

    def make(path: Any, *mode: int) -> None:
        if tmp_path in Path(path).parents:  # torch makes folders of its own when it is first asked for this and that
            happened.append(f"make {Path(path).name}")
        made(path, *mode)

    monkeypatch.setattr(commit, "fsync", lambda path: (happened.append(Path(path).name), synced(path)))
    monkeypatch.setattr(os, "mkdir", make)
    commit.make_folder(tmp_path / "a" / "b")
    assert happened == ["make a", tmp_path.name, "make b", "a"]
    commit.make_folder(tmp_path / "a" / "b")
    assert len(happened) == 4
    write(tmp_path / "a" / "c" / "d" / "final", "new")
    assert happened[4:8] == ["make c", "a", "make d", "c"]
    del happened[:]
    steps.save(tmp_path / "run", 1)
    assert happened[:4] == ["make run", tmp_path.name, "make checkpoints", "run"]


def outcome(final: Path) -> str:
    """What stands: one of the two contents, true to its manifest, or nothing."""
    if not final.exists():
        return "nothing"
    manifest.verify(final)
    assert (final / "a").read_text() == (final / "b").read_text()
    return (final / "a").read_text()


@pytest.mark.parametrize("kind", [OSError, Death])
@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "replaced"])
def test_failure_at_every_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], existing: bool
) -> None:
    """Old or new, never neither; after a failure nothing but that, after a death at most what the sweep removes."""
    seen = set()
    for at in range(1, 200):
        parent = tmp_path / str(at)
        parent.mkdir()
        final = parent / "final"
        if existing:
            write(final, "old")
        failed = False
        with failing(monkeypatch, at, kind) as count:
            try:
                write(final, "new")
            except kind:
                failed = True
        if kind is OSError and existing:
            assert outcome(final) in ("old", "new"), "an error is mended at once, without waiting for the sweep"
        remove_leftovers(parent)
        found = outcome(final)
        seen.add(found)
        assert found in (("old", "new") if existing else ("nothing", "new")), f"operation {at}: {found}"
        assert [p.name for p in parent.iterdir()] == (["final"] if found != "nothing" else []), f"operation {at}"
        if count["done"] < at:
            assert found == "new" and not failed
            break
    else:
        pytest.fail("the write never came to its end")
    assert seen == ({"old", "new"} if existing else {"nothing", "new"})
    assert at > 8


def test_a_failed_write_cleans_up_behind_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk full: the partial folder is gone without waiting for the next start."""
    for at in range(2, 6):
        with failing(monkeypatch, at, OSError), pytest.raises(OSError, match="No space"):
            write(tmp_path / "final", "new")
        assert list(tmp_path.iterdir()) == []


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "step-00000001", "kept")
    (tmp_path / "step-00000002.tmp-0123abcd" / "state").mkdir(parents=True)
    (tmp_path / "step-00000002.tmp-0123abcd" / "state" / "x").write_text("half")
    (tmp_path / "config.json.tmp-89abcdef").write_text("half")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.tmp").write_text("mine")
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000001", "config.json", "notes.tmp"}


@pytest.mark.parametrize("name", ["samples.old-january", "samples.tmp-mine", "samples.old-", "other.old-2024"])
def test_names_that_only_look_like_leftovers_are_the_users(tmp_path: Path, name: str) -> None:
    """A backup somebody made in the run's folder is neither deleted, nor renamed, nor a reason to fail."""
    (tmp_path / "samples").mkdir()
    (tmp_path / name).mkdir()
    (tmp_path / name / "x").write_text("mine")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / f"config.json{Path(name).suffix}").write_text("mine too")
    remove_leftovers(tmp_path)
    assert (tmp_path / name / "x").read_text() == "mine"
    assert (tmp_path / f"config.json{Path(name).suffix}").read_text() == "mine too"


@pytest.mark.parametrize("kind", [OSError, Death])
def test_a_json_file_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]) -> None:
    path = tmp_path / "config.json"
    for at in range(1, 20):
        write_json_atomic(path, {"is": "old"})
        failed = False
        with failing(monkeypatch, at, kind) as count:
            try:
                write_json_atomic(path, {"is": "new"})
            except kind:
                failed = True
        assert json.loads(path.read_text()) in ({"is": "old"}, {"is": "new"})
        remove_leftovers(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
        if count["done"] < at:
            assert not failed
            break
    assert json.loads(path.read_text()) == {"is": "new"} and at > 3
