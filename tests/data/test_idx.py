"""IDX files: what they hold, how they are found, every way in which one can be wrong."""

import gzip
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldit.data.formats import idx
from ldit.data.formats.idx import IdxImages, read_idx
from ldit.data.loader import Loader
from ldit.data.source import open_data
from ldit.errors import DataError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 28, 28), dtype=np.uint8)
LABELS = np.array([7, 0, 9, 7, 7, 3, 1, 1, 7, 2, 4, 7], np.uint8)


def packed(array: np.ndarray) -> bytes:
    """The file of a uint8 array."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(root: Path, part: str = "train", images: Any = IMAGES, labels: Any = LABELS, gz: bool = True) -> Path:
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        data = packed(array)
        path = root / f"{part}-{name}-ubyte{'.gz' if gz else ''}"
        path.write_bytes(gzip.compress(data) if gz else data)
    return root


def test_images_are_grey_on_three_channels(tmp_path: Path) -> None:
    train, heldout = open_data(str(write(tmp_path)), 28)
    assert heldout is None and isinstance(train, IdxImages)
    assert (len(train), train.num_before_cap, train.root, train.size) == (12, 12, tmp_path, 28)
    assert train.names == tuple("0123456789")
    for i in range(12):
        image, label = train[i]
        assert image.shape == (28, 28, 3) and image.dtype == np.uint8 and type(label) is int
        assert label == LABELS[i] and all((image[:, :, c] == IMAGES[i]).all() for c in range(3))


@pytest.mark.parametrize("size", [64, 16, 8])
def test_other_sizes_are_cut_as_images_are(tmp_path: Path, size: int) -> None:
    """28 to 64 and to 16: one bicubic; to 8: halved by box first."""
    step = Image.fromarray(IMAGES[3])
    if size == 8:
        step = step.resize((14, 14), Image.Resampling.BOX)
    expected = np.asarray(step.resize((size, size), Image.Resampling.BICUBIC))
    image, _ = IdxImages(write(tmp_path), size)[3]
    assert image.shape == (size, size, 3) and all((image[:, :, c] == expected).all() for c in range(3))


def test_oblong_images(tmp_path: Path) -> None:
    data = IdxImages(write(tmp_path, images=RNG.integers(0, 256, (12, 4, 10), dtype=np.uint8)), 8)
    assert data[0][0].shape == (8, 8, 3)


def test_spellings_and_packings_are_the_same_set(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("gz", "plain", "dots", "dots.gz")]
    for folder in folders:
        folder.mkdir()
        write(folder, gz=folder.name.endswith("gz"))
    for folder in folders[2:]:
        for path in list(folder.iterdir()):
            path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    prints = {open_data(str(folder), 28)[0].fingerprint() for folder in folders}
    assert len(prints) == 1
    other = LABELS.copy()
    other[5] = 4
    changed = IMAGES.copy()
    changed[11, 27, 27] ^= 1
    write(folders[0], labels=other)
    write(folders[1], images=changed, gz=False)
    prints |= {open_data(str(folder), 28)[0].fingerprint() for folder in folders[:2]}
    assert len(prints) == 3


def test_heldout_is_t10k(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, "t10k", IMAGES[:5], LABELS[:5])
    train, heldout = open_data(str(tmp_path), 28, max_per_class=1)
    assert heldout is not None and (len(train), len(heldout)) == (7, 5)  # held-out sets are whole
    assert open_data(str(tmp_path), 28, "")[1] is None
    with pytest.raises(DataError, match=r"data\.heldout.*t10k.*'list\.txt'"):
        open_data(str(tmp_path), 28, "list.txt")
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="no t10k-labels-idx1-ubyte"):
        open_data(str(tmp_path), 28)


def test_caps_take_a_fixed_part_of_each_class(tmp_path: Path) -> None:
    whole, capped = IdxImages(write(tmp_path), 28), IdxImages(tmp_path, 28, max_per_class=2)
    labels = [capped[i][1] for i in range(len(capped))]
    assert labels == [0, 1, 1, 2, 3, 4, 7, 7, 9] and capped.num_before_cap == 12
    assert IdxImages(tmp_path, 28, max_per_class=2).fingerprint() == capped.fingerprint() != whole.fingerprint()
    sevens = [
        i for i in range(12) if LABELS[i] == 7 and any((IMAGES[i] == capped[k][0][:, :, 0]).all() for k in (6, 7))
    ]
    assert len(sevens) == 2
    longer = np.concatenate([LABELS, [7]]).astype(np.uint8)  # another seven changes the choice by one at most
    more = IdxImages(write(tmp_path, images=IMAGES[[*range(12), 0]], labels=longer), 28, max_per_class=2)
    kept = [any((IMAGES[i] == more[k][0][:, :, 0]).all() for k in range(len(more))) for i in sevens]
    assert any(kept)


@pytest.mark.parametrize("name", ["labels.txt", "classes.txt"])
def test_names_beside_the_files(tmp_path: Path, name: str) -> None:
    names = [f"kind {i}" for i in range(10)]
    (tmp_path / name).write_text("\n".join(names) + "\n\n")
    assert open_data(str(write(tmp_path)), 28)[0].names == tuple(names)
    for text, said in (
        ("a\nb\n", "label 7 of image 0 for 2 classes"),
        ("a\na\n", "occurs twice"),
        ("\n", "1 to 256"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=said):
            open_data(str(tmp_path), 28)
    (tmp_path / name).write_text("\ufeff" + "\n".join(names), encoding="utf-8")
    assert open_data(str(tmp_path), 28)[0].names == tuple(names)
    (tmp_path / name).write_text("Cat\ncat\n" + "\n".join(names))
    with pytest.raises(DataError, match="'Cat' and 'cat' differ in case alone"):
        open_data(str(tmp_path), 28)
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=name):
        open_data(str(tmp_path), 28)


def test_of_two_names_files_the_same_counts_as_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("not\nread\n")
    (tmp_path / "classes.txt").write_text("\n".join(f"kind {i}" for i in range(10)))
    assert open_data(str(write(tmp_path)), 28)[0].names[9] == "kind 9"


IMAGES_FILE, LABELS_FILE = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
FAULTS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "truncated": (IMAGES_FILE, lambda b: b[:-1], "holds 9407 bytes.*says 9408"),
    "too long": (IMAGES_FILE, lambda b: b + b"x", "more than 9408"),
    "labels truncated": (LABELS_FILE, lambda b: b[:-3], "holds 9 bytes"),
    "empty": (IMAGES_FILE, lambda b: b"", "begins with nothing"),
    "half a header": (IMAGES_FILE, lambda b: b[:9], "ends within its header"),
    "magic": (IMAGES_FILE, lambda b: b"\1" + b[1:], "begins with 01000803"),
    "floats": (IMAGES_FILE, lambda b: b"\0\0\x0d\3" + b[4:], "begins with 00000d03"),
    "labels for images": (IMAGES_FILE, lambda b: packed(LABELS), "3 axes"),
    "images for labels": (LABELS_FILE, lambda b: packed(IMAGES), "1 axes"),
    "no images": (IMAGES_FILE, lambda b: packed(IMAGES[:0]), "0 x 28 x 28"),
    "no rows": (IMAGES_FILE, lambda b: packed(IMAGES[:, :0]), "12 x 0 x 28"),
    "absurd count": (IMAGES_FILE, lambda b: b[:4] + b"\xff" * 4 + b[8:], "4294967295 x 28 x 28; sides go to"),
    "absurd sides": (IMAGES_FILE, lambda b: b[:8] + b"\0\0\x10\x01" + b[12:], "12 x 4097 x 28; sides go to"),
    "overflowing": (IMAGES_FILE, lambda b: b[:4] + b"\x80\0\0\0" * 2 + b"\0\0\0\4", "2147483648 x 2147483648 x 4"),
    "fewer labels": (LABELS_FILE, lambda b: packed(LABELS[:11]), "11 labels for 12 images"),
    "more labels": (LABELS_FILE, lambda b: packed(np.tile(LABELS, 2)), "24 labels for 12 images"),
    "label 10": (LABELS_FILE, lambda b: b[:10] + b"\x0a" + b[11:], "label 10 of image 2 for 10 classes"),
}


@pytest.mark.parametrize("gz", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_the_file(tmp_path: Path, fault: str, gz: bool) -> None:
    name, change, said = FAULTS[fault]
    write(tmp_path, gz=gz)
    path = tmp_path / (name + ".gz" * gz)
    data = change(gzip.decompress(path.read_bytes()) if gz else path.read_bytes())
    path.write_bytes(gzip.compress(data) if gz else data)
    with pytest.raises(DataError, match=said) as caught:
        open_data(str(tmp_path), 28)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-9],  # cut within the data
        lambda b: b[:-2],  # cut within the trailer
        lambda b: b[: len(b) // 2] + b"\0" * 40 + b[len(b) // 2 + 40 :],
        lambda b: b[:-6] + bytes([b[-6] ^ 1]) + b[-5:],  # checksum
        lambda b: b[:10] + b"\xff" * 50,  # no deflate stream
        lambda b: b"x" + b[1:],
        lambda b: b + b"rubbish",
    ],
)
@pytest.mark.parametrize("name", [IMAGES_FILE, LABELS_FILE])
def test_damaged_gzip_names_the_file(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path) / f"{name}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=f"cannot read .*{name}"):
        open_data(str(tmp_path), 28)


@pytest.mark.parametrize("gz", [True, False], ids=["gz", "plain"])
def test_memory_follows_the_file_not_its_header(tmp_path: Path, gz: bool) -> None:
    """A header of 2 GiB over ten bytes, and a gzip bomb behind a header of ten: neither costs 8 MiB."""
    short = packed(IMAGES)[:4] + struct.pack(">III", 1 << 17, 128, 128) + b"0123456789"
    path = tmp_path / f"short{'.gz' * gz}"
    path.write_bytes(gzip.compress(short) if gz else short)
    bomb = tmp_path / f"bomb{'.gz' * gz}"
    data = packed(np.arange(10, dtype=np.uint8)) + bytes(1 << 26)
    bomb.write_bytes(gzip.compress(data, 1) if gz else data)
    del data
    tracemalloc.start()
    for file, axes, said in ((path, 3, "holds 10 bytes"), (bomb, 1, "more than 10")):
        with pytest.raises(DataError, match=said):
            read_idx(file, axes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_files_have_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setattr(idx, "MOST_BYTES", IMAGES.size - 1)
    with pytest.raises(DataError, match="files to 9407 bytes"):
        open_data(str(tmp_path), 28)


def test_one_file_alone_says_which_is_missing(tmp_path: Path) -> None:
    (write(tmp_path) / f"{IMAGES_FILE}.gz").unlink()
    with pytest.raises(DataError, match=f"no {IMAGES_FILE}"):
        open_data(str(tmp_path), 28)


def test_the_loader_takes_them(tmp_path: Path) -> None:
    data, _ = open_data(str(write(tmp_path)), 28)
    (batch,) = Loader(data, 12, 1, flip=False).from_step(0, 1)
    order = Loader(data, 12, 1, flip=False).order.between(0, 12)
    assert batch.labels.tolist() == LABELS[order].tolist()
    assert torch.equal(batch.inputs[:, 1], torch.from_numpy(IMAGES[order]).float() / 127.5 - 1.0)
