"""Tar archives: what is a sample, how archives are read, lists and caps, threads, open files."""

import hashlib
import io
import os
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data.archives import PLAIN, greys, labels, open_tars, pack, samples, wheres
from data.hostile_tars import END, PNG, header, long_name, member, pax, png, record
from PIL import Image

from ldit.data.formats import tars
from ldit.data.formats.tar_index import read_tars
from ldit.data.formats.tars import TarImages
from ldit.errors import DataError


def test_shards_in_byte_order_of_their_names(tmp_path: Path) -> None:
    pack(tmp_path / "b.tar", samples(3, base=100))
    pack(tmp_path / "Z.tar", samples(2))
    pack(tmp_path / "ä.tar", samples(2, base=200))
    pack(tmp_path / ".hidden.tar", [])
    (tmp_path / "README.md").write_text("not an archive")
    data = open_tars(tmp_path)
    assert (len(data), data.num_before_cap, data.root, data.size, data.names) == (7, 7, tmp_path, 4, ("0", "1"))
    assert wheres(data)[:3] == ["Z.tar/0000.png", "Z.tar/0001.png", "b.tar/0000.png"]
    assert greys(data) == [0, 1, 100, 101, 102, 200, 201] and labels(data) == [0, 1, 0, 1, 0, 0, 1]
    assert type(data[0][1]) is int


def test_one_archive_is_a_set_too(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", samples(4))
    alone, folder = open_tars(path), open_tars(tmp_path)
    assert alone.root == path and wheres(alone) == wheres(folder) == [f"a.tar/{i:04}.png" for i in range(4)]
    assert alone.fingerprint() == folder.fingerprint() and greys(alone) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_the_standard_library(tmp_path: Path, kind: int) -> None:
    """Offsets and sizes are those that tarfile finds."""
    folder = "d" * 80
    names = ["a.png", f"{folder}/{'n' * 90}.png", f"{folder}/{folder}/x.png"]
    if kind != tarfile.USTAR_FORMAT:
        names += ["/".join([folder] * 12) + "/y.png", "ünï/cödé.png", "x" * 101 + ".png"]
    path = pack(tmp_path / "a.tar", [(name, png(i)) for i, name in enumerate(names)], kind)
    data = open_tars(path)
    assert wheres(data) == [f"a.tar/{name}" for name in names] and greys(data) == list(range(len(names)))
    with tarfile.open(path) as archive:
        expected = [(entry.offset_data, entry.size) for entry in archive]
    assert list(zip(data.index.offsets.tolist(), data.index.sizes.tolist(), strict=True)) == expected


def test_headers_by_hand(tmp_path: Path) -> None:
    """Old archives without a magic, GNU's magic, sums of signed bytes, folders, numbers in base 256, pax sizes."""
    big = b"\x80" + len(PNG).to_bytes(11, "big")
    padded = PNG + bytes(-len(PNG) % 512)
    parts = [
        header(b"./", 0, b"5"),
        header(b"old/", 0, b"\0", magic=b""),
        member(b"old/1.png", kind=b"\0", magic=b""),
        member(b"gnu/2.png", magic=b"ustar  \0"),
        member("3-ä.png".encode(), signed=True),
        member(b"4.png", kind=b"7"),
        header(b"5.png", big) + padded,
        pax(record(b"comment", b"x" * 90), b"g"),
        pax(record(b"path", b"6.png") + record(b"size", b"%d" % len(PNG)) + record(b"mtime", b"1.5")),
        header(b"other", 0) + padded,
        long_name(b"l" * 300 + b"/7.png"),
        member(b"l" * 100),
        member(b"8.png", prefix=b"pre/fix"),
        member(b"notes.txt", b"x" * 20000),
        member(b"././9.PNG"),
    ]
    (tmp_path / "a.tar").write_bytes(b"".join(parts) + bytes(512))
    data = open_tars(tmp_path)
    names = ["old/1.png", "gnu/2.png", "3-ä.png", "4.png", "5.png", "6.png", "l" * 300 + "/7.png", "pre/fix/8.png"]
    assert wheres(data) == [f"a.tar/{name}" for name in [*names, "9.PNG"]]
    assert data.names == () and greys(data) == [0] * 9


def test_a_sample_is_what_agrees_up_to_the_first_dot(tmp_path: Path) -> None:
    """Members need not be neighbours; other endings, hidden names and names without a dot are passed over."""
    files = [
        ("b.cls", b"1"),
        ("x/a.png", png(1)),
        ("b.seg.png", png(9)),
        ("b.txt", b"?"),
        ("b.JPG", png(2)),
        ("x/README", b""),
    ]
    files += [("._b.jpg", b"apple"), ("x/a.cls", b"0"), (".png", b""), ("x/.cls", b"7"), ("only.json", b'{"label": 9}')]
    files += [("x.y/a.b/c.png", png(3)), ("x.y/a.b/c.json", b'{"cls": 1}')]
    pack(tmp_path / "a.tar", files)
    data = open_tars(tmp_path)
    assert wheres(data) == ["a.tar/x/a.png", "a.tar/b.JPG", "a.tar/x.y/a.b/c.png"]
    assert greys(data) == [1, 2, 3] and labels(data) == [0, 1, 1]


FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "ppm": "PPM"}
FORMATS |= {"tif": "TIFF", "tiff": "TIFF", "gif": "GIF"}


@pytest.mark.parametrize(("name", "format"), FORMATS.items())
def test_every_kind_of_image(tmp_path: Path, name: str, format: str) -> None:
    """A flat image stays flat; JPEG and WebP may miss its grey by their colour transform's rounding."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (77,) * 3).save(out, format)
    pack(tmp_path / "a.tar", [(f"k.{name}", out.getvalue())])
    assert abs(greys(open_tars(tmp_path))[0] - 77) <= (1 if format in ("JPEG", "WEBP") else 0)


def test_a_label_file_stands_before_an_object(tmp_path: Path) -> None:
    for order in ((0, 1, 2), (2, 1, 0)):
        files = [("a.cls", b"0"), ("a.png", PNG), ("a.json", b"{broken")]
        pack(tmp_path / "a.tar", [files[i] for i in order])
        assert labels(open_tars(tmp_path)) == [0]
    pack(tmp_path / "a.tar", files[1:])
    with pytest.raises(DataError, match=r"a\.tar: member 'a\.json' cannot be used: broken JSON"):
        open_tars(tmp_path)


def test_nothing_is_lost_without_a_word(tmp_path: Path) -> None:
    for files, name in [
        ([("a.png", PNG), ("b.v2.png", PNG)], "b.v2.png' would be lost"),
        ([("a.png", PNG), ("a.cls", b"0"), ("b.cls", b"0")], "b.cls' is the label of no image"),
        ([("a.png", PNG), ("a.json", b'{"label": 0, "x": "%s"}' % (b"x" * (1 << 20)))], "a.json' has 1048597 bytes"),
        ([("a.png", PNG), ("a.cls", b"0" * 4097)], "a.cls' has 4097 bytes"),
    ]:
        pack(tmp_path / "a.tar", files)
        with pytest.raises(DataError, match=rf"a\.tar: member '{name}"):
            open_tars(tmp_path)


def test_lists_hold_paths_or_bare_keys(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", samples(3, prefix="p/"))
    pack(tmp_path / "b.tar", samples(3, prefix="p/", base=10))
    listed = ["a.tar/p/0001.png", "p/0002", "nothing", "p/0000.png", "0000"]
    kept = ["a.tar/p/0001.png", "a.tar/p/0002.png", "b.tar/p/0002.png"]
    index = read_tars(tmp_path)
    train, heldout = open_tars(tmp_path, exclude=listed, index=index), open_tars(tmp_path, only=listed, index=index)
    assert wheres(heldout) == kept and greys(heldout) == [1, 2, 12] and labels(heldout) == [1, 0, 0]
    assert sorted(wheres(train) + kept) == sorted(wheres(open_tars(tmp_path))) and greys(train) == [0, 10, 11]
    assert heldout.names == train.names == ("0", "1") and (train.num_before_cap, heldout.num_before_cap) == (3, 3)
    with pytest.raises(DataError, match="no images left"):
        open_tars(tmp_path, exclude=["p/0000", "p/0001", "p/0002"])
    for only in (["nothing"], []):
        with pytest.raises(DataError, match=f"none of the {len(only)} images of the held-out list is there"):
            open_tars(tmp_path, only=only)


def test_caps_keep_a_fixed_part_of_each_class(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", samples(20))
    data = open_tars(tmp_path, max_per_class=4)
    assert (len(data), data.num_before_cap) == (8, 20) and sorted(labels(data)) == [0] * 4 + [1] * 4
    assert wheres(data) == sorted(wheres(data)) and wheres(data) == wheres(open_tars(tmp_path, max_per_class=4))
    assert wheres(data) != wheres(open_tars(tmp_path))[:8]
    assert wheres(open_tars(tmp_path, max_per_class=10)) == wheres(open_tars(tmp_path))
    assert all(greys(data)[i] % 2 == label for i, label in enumerate(labels(data)))
    # Each image's place in the draw is its own: without one that was drawn, the others stay drawn.
    gone = wheres(data)[0]
    assert set(wheres(data)) - {gone} < set(wheres(open_tars(tmp_path, exclude=[gone], max_per_class=4)))
    pack(tmp_path / "a.tar", [file for file in samples(20) if file[0].endswith("png")])
    assert len(open_tars(tmp_path, max_per_class=3)) == 3


def test_names_in_no_code_are_escaped(tmp_path: Path) -> None:
    parts = [member(b"\xff%d.png" % i) for i in range(3)]
    (tmp_path / "a.tar").write_bytes(b"".join(parts) + END)
    data = open_tars(tmp_path, max_per_class=2)
    assert len(data) == 2 and set(wheres(data)) < {f"a.tar/\\xff{i}.png" for i in range(3)} and data.fingerprint()


def test_fingerprint_is_of_paths_classes_and_sizes(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", samples(4))
    sizes = [len(png(i)) for i in range(4)]
    lines = [f"a.tar/{i:04}.png\0{i % 2}\0{sizes[i]}\n" for i in range(4)]
    assert open_tars(tmp_path).fingerprint() == hashlib.sha256("".join(lines).encode()).hexdigest()
    chosen = open_tars(tmp_path, exclude=["0001"])
    assert chosen.fingerprint() == hashlib.sha256((lines[0] + lines[2] + lines[3]).encode()).hexdigest()


def test_threads_read_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads than archives may be open, more archives than that: none is closed under a reader."""
    monkeypatch.setattr(tars, "MOST_OPEN", 2)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    for shard in range(6):
        files = []
        for i in range(shard * 10, shard * 10 + 10):
            out = io.BytesIO()
            Image.fromarray(pictures[i]).save(out, "PNG")
            files.append((f"{i}.png", out.getvalue()))
        pack(tmp_path / f"{shard}.tar", files)
    before = len(os.listdir("/proc/self/fd"))
    data = TarImages(tmp_path, 16, PLAIN)
    assert len(os.listdir("/proc/self/fd")) == before
    start = threading.Barrier(8)

    def read(seed: int) -> bool:
        start.wait()
        order = np.random.default_rng(seed).permutation(60).tolist()
        return all((data[i][0] == pictures[i]).all() for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", [("x/good.png", PNG), ("x/bad.png", b"no picture"), ("x/none.png", b"")])
    data = open_tars(tmp_path)
    assert data[0][0].shape == (4, 4, 3)
    for index, name in ((1, "bad"), (2, "none")):
        with pytest.raises(DataError, match=rf"^cannot read image {tmp_path}/a\.tar/x/{name}\.png: \S"):
            data[index]
