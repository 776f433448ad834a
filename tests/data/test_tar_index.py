"""Archives as files: which are read, changed and truncated ones, and the index that is saved for the next start."""

import gzip
import os
from pathlib import Path

import pytest
from data.archives import greys, labels, open_tars, pack, samples, wheres
from data.hostile_tars import PNG

from ldit.config.sections import DataConfig
from ldit.data.formats import tar_index
from ldit.data.formats.recognise import has_tars
from ldit.data.formats.tar_index import kept_index, read_tars
from ldit.data.source import keep_index, open_run_data
from ldit.errors import DataError, RunError


def test_an_archive_that_changes_is_noticed(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", samples(2))
    data = open_tars(tmp_path)
    os.utime(path, ns=(0, 0))
    with pytest.raises(RunError, match=r"^cannot read image .*a\.tar/0000\.png: .*a\.tar has changed"):
        data[0]
    data = open_tars(tmp_path)
    assert data[0][1] == 0
    os.truncate(path, 600)
    with pytest.raises(RunError, match=r"a\.tar/0001\.png: the archive has become shorter"):
        data[1]
    path.unlink()
    assert data[0][1] == 0  # still open
    with pytest.raises(RunError, match=r"a\.tar/0000\.png: cannot open .*a\.tar: No such file"):
        open_tars(tmp_path, index=data.index)[0]


def test_an_archive_that_ends_too_early_is_truncated(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", [("a.cls", b"0"), ("a.png", PNG)])
    whole = path.read_bytes()
    end = whole.index(PNG) + len(PNG)
    assert end % 512
    for cut in (end, end + 1):  # within the padding
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"^{path}: .*truncated.*unexpected end of data"):
            open_tars(tmp_path)
    path.write_bytes(whole[: end - 1])
    with pytest.raises(DataError, match=rf"claims {len(PNG)} bytes, but the archive ends {len(PNG) - 1} later"):
        open_tars(tmp_path)
    path.write_bytes(whole[: end + -end % 512])
    with pytest.raises(DataError, match="without an end mark"):
        open_tars(tmp_path)


def test_a_kept_index_is_read_instead_of_the_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second start reads no header: the same set, images, fingerprint. Nothing is written but into the folder."""
    root, kept = tmp_path / "set", tmp_path / "run"
    root.mkdir(), kept.mkdir()
    pack(root / "a.tar", samples(3))
    pack(root / "b.tar", samples(3, base=50))
    (root / "classes.txt").write_text("cat\ndog")
    before = sorted(os.listdir(root))
    first = open_tars(root)
    first.index.keep(root, kept)
    assert sorted(os.listdir(root)) == before and os.listdir(kept) == [kept_index(root, kept).name]
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "members", lambda *_: pytest.fail("an archive's headers were read"))
        second = open_tars(root, index=read_tars(root, kept))
    assert second.names == ("cat", "dog") and wheres(second) == wheres(first) and greys(second) == greys(first)
    assert labels(second) == labels(first) and second.fingerprint() == first.fingerprint()
    other = tmp_path / "other"
    other.mkdir()
    pack(other / "a.tar", samples(2))
    assert len(read_tars(other, kept).members) == 2  # another set's index is not this one's


@pytest.mark.parametrize("change", ["size", "time", "one more", "class names", "damaged", "truncated"])
def test_a_kept_index_that_is_not_true_any_more(change: str, tmp_path: Path) -> None:
    root, kept = tmp_path / "set", tmp_path / "run"
    root.mkdir(), kept.mkdir()
    path = pack(root / "a.tar", samples(3))
    read_tars(root).keep(root, kept)
    status, file = path.stat(), kept_index(root, kept)
    match change:
        case "size":
            pack(path, samples(40))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        case "time":
            path.write_bytes(path.read_bytes().replace(b"0002", b"0009"))  # breaks the header's checksum
            os.utime(path, ns=(0, status.st_mtime_ns + 1))
        case "one more":
            pack(root / "b.tar", samples(2))
        case "class names":
            (root / "classes.txt").write_text("cat\ndog")
        case "damaged":
            file.write_bytes(b"x" * file.stat().st_size)
        case "truncated":
            os.truncate(file, file.stat().st_size // 2)
    if change == "time":
        with pytest.raises(DataError, match="no tar header"):
            read_tars(root, kept)
        return
    index, fresh = read_tars(root, kept), read_tars(root)
    assert index.names == fresh.names and len(index.members) == len(fresh.members) == len(index.labels)
    index.keep(root, kept)
    assert len(read_tars(root, kept).members) == len(fresh.members)


def test_a_folder_that_takes_no_index_is_no_error(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", samples(2))
    read_tars(path).keep(path, tmp_path / "none")
    assert sorted(os.listdir(tmp_path)) == ["a.tar"] and len(read_tars(path, tmp_path / "none").members) == 2


def test_packed_archives_are_named(tmp_path: Path) -> None:
    plain = pack(tmp_path / "a.tar", samples(2)).read_bytes()
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(plain))
    assert has_tars(tmp_path) and has_tars(tmp_path / "b.tar.gz")
    for root in (tmp_path, tmp_path / "b.tar.gz"):
        with pytest.raises(DataError, match=r"b\.tar\.gz is packed: random access needs a plain tar"):
            open_tars(root)
    (tmp_path / "b.tar.gz").rename(tmp_path / "b.tar")
    with pytest.raises(DataError, match=r"b\.tar is packed \(gzip\): random access needs a plain tar"):
        open_tars(tmp_path)


def test_where_there_are_tars(tmp_path: Path) -> None:
    assert not has_tars(tmp_path) and not has_tars(tmp_path / "none.tar")
    (tmp_path / "._a.tar").touch()
    (tmp_path / "tar").touch()
    assert not has_tars(tmp_path) and not has_tars(tmp_path / "tar")
    with pytest.raises(DataError, match=r"no \*\.tar in"):
        open_tars(tmp_path)
    with pytest.raises(DataError, match=r"no folder or tar file .*none\.tar"):
        open_tars(tmp_path / "none.tar")
    (tmp_path / "A.TAR").touch()
    assert has_tars(tmp_path) and has_tars(tmp_path / "A.TAR")


def test_a_run_keeps_the_index_and_its_next_start_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a set whose labels a run does not use; nothing is kept of sets without an index."""
    root, run = tmp_path / "set", tmp_path / "run"
    root.mkdir(), run.mkdir()
    pack(root / "a.tar", samples(4))
    (root / "heldout.txt").write_text("0003\n")
    config = DataConfig(str(root), 4)
    first, _ = open_run_data(config, 0, index_dir=run)
    assert os.listdir(run) == []
    keep_index(first, run)
    assert os.listdir(run) == [kept_index(root, run).name]
    monkeypatch.setattr(tar_index, "members", lambda *_: pytest.fail("an archive's headers were read"))
    train, heldout = open_run_data(config, 2, index_dir=run)
    assert heldout is not None and (len(train), len(heldout), train.names) == (3, 1, ("0", "1"))
    (root / "a.tar").rename(tmp_path / "a.tar")
    (root / "0.png").write_bytes(PNG)
    (root / "heldout.txt").unlink()
    keep_index(open_run_data(config, 0, index_dir=run)[0], run)
    assert len(os.listdir(run)) == 1
