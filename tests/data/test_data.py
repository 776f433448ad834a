"""Order, crop, folders, held-out lists."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldit.config.sections import DataConfig
from ldit.data.formats.heldout import read_list
from ldit.data.formats.image_folder import ImageFolder
from ldit.data.formats.metadata import MetadataImages
from ldit.data.formats.tars import TarImages
from ldit.data.images.decoding import to_rgb
from ldit.data.loader import Loader
from ldit.data.order import EpochOrder
from ldit.data.source import data_root, open_data, open_run_data
from ldit.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, byte order B < a < ä, with 5, 3 and 4 images of distinct grey."""
    grey = 0
    for name, count in (("a", 3), ("B", 5), ("ä", 4)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (20, 10), (grey, grey, grey)).save(tmp_path / name / f"{i}.png")
            grey += 10
    (tmp_path / "notes.txt").write_text("not a class")
    return tmp_path


def test_order_is_the_originals() -> None:
    """randperm(N, seed + epoch), epochs one after another; a step takes its slice across epoch ends."""
    expected = [
        i for e in range(3) for i in torch.randperm(10, generator=torch.Generator().manual_seed(7 + e)).tolist()
    ]
    order = EpochOrder(10, 7)
    assert [order[i] for i in range(30)] == expected
    positions, indices = EpochOrder(10, 7).batch(3, 8)
    assert list(positions) == list(range(24, 32)) and indices[:6] == expected[24:]
    assert order[3] == expected[3]  # backwards too


def test_class_order_and_labels(folder: Path) -> None:
    data = ImageFolder(folder, 8)
    assert data.names == ("B", "a", "ä")
    assert data.labels == [0] * 5 + [1] * 3 + [2] * 4
    image, label = data[5]
    assert label == 1 and image.shape == (8, 8, 3) and (image == 0).all()


def test_heldout_and_caps(folder: Path) -> None:
    (folder / "held.txt").write_text("# a comment\n\nB/0.png\na/2.png\n")
    train, heldout = open_data(str(folder), 8, "held.txt")
    assert heldout is not None
    assert (len(train), len(heldout)) == (10, 2)
    assert sorted(p.relative_to(folder).as_posix() for p in heldout.paths) == ["B/0.png", "a/2.png"]
    assert not set(train.paths) & set(heldout.paths)
    capped = ImageFolder(folder, 8, max_per_class=2)
    assert capped.labels == [0, 0, 1, 1, 2, 2]
    assert capped.paths == ImageFolder(folder, 8, max_per_class=2).paths


def test_faults_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        data_root(str(folder / "missing"))
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images"):
        ImageFolder(folder, 8)
    (folder / "empty" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 20)
    data = ImageFolder(folder, 8)
    with pytest.raises(DataError, match=r"cannot read image .*bad\.png"):
        data[data.labels.index(data.names.index("empty"))]
    with pytest.raises(DataError, match="no held-out list"):
        read_list(folder / "nothing.txt")
    (folder / "flat").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        ImageFolder(folder / "flat", 8)


def test_data_path_is_looked_at(tmp_path: Path) -> None:
    """A list stands before tars and class folders; a list or archive is read once for both sets."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "png")
    (tmp_path / "a").mkdir()
    for name in ("a/1.png", "a/2.png"):
        (tmp_path / name).write_bytes(image.getvalue())
    (tmp_path / "heldout.txt").write_text("a/2.png\nx.tar/2.png\n")
    assert [type(data) for data in open_data(str(tmp_path), 8)] == [ImageFolder] * 2
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a/1.png"}\n{"file_name": "a/2.png"}\n')
    train, heldout = open_data(str(tmp_path), 8)
    assert isinstance(train, MetadataImages) and heldout is not None and (len(train), len(heldout)) == (1, 1)
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(tmp_path / "a/1.png", "1.png")
        tar.add(tmp_path / "a/2.png", "2.png")
    assert isinstance(open_data(str(tmp_path), 8)[0], MetadataImages)
    for name in ("metadata.jsonl", "a/1.png", "a/2.png"):
        (tmp_path / name).unlink()
    train, heldout = open_data(str(tmp_path), 8)
    assert isinstance(train, TarImages) and heldout is not None and heldout.where(0) == "x.tar/2.png"
    only, _ = open_data(str(tmp_path / "x.tar"), 8, "")
    assert isinstance(only, TarImages) and len(only) == 2 and only[0][0].shape == (8, 8, 3)


def test_a_cache_is_no_set_of_images(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"cache": {}}')
    with pytest.raises(DataError, match="latent cache, images are needed"):
        open_data(str(tmp_path), 8)
    with pytest.raises(DataError, match=r"data\.heldout: .* is a latent cache"):
        open_run_data(DataConfig(str(tmp_path), 8, heldout="x"))


def test_decoding_reaches_the_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a/1.png")
    data, _ = open_run_data(DataConfig(str(tmp_path), 8, background=(51, 0, 255)))
    out = np.empty((3, 8, 8), np.float32)
    data.read(0, False, out)
    assert out[:, 0, 0].tolist() == [np.float32(51 / 127.5) - 1, -1, 1]
    data, _ = open_run_data(DataConfig(str(tmp_path), 8, max_pixels=63))
    with pytest.raises(DataError, match="64 pixels"):
        data.read(0, False, out)


def test_bad_image_stops_the_loader(folder: Path) -> None:
    (folder / "B" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"B/0\.png"):
        list(Loader(ImageFolder(folder, 8), 12, 0, False).from_step(0, 1))


def test_loader_repeats_itself_from_any_step(folder: Path) -> None:
    data = ImageFolder(folder, 8)
    whole = list(Loader(data, 5, 3, flip=True).from_step(0, 6))
    tail = list(Loader(data, 5, 3, flip=True).from_step(4, 6))
    assert all(
        torch.equal(a.inputs, b.inputs) and a.positions == b.positions for a, b in zip(whole[4:], tail, strict=True)
    )
    assert whole[0].inputs.dtype == torch.float32 and whole[0].inputs.min() >= -1 and whole[0].inputs.max() <= 1
    assert [p for batch in whole for p in batch.positions] == list(range(30))


def test_flip_mirrors_about_half(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    array = np.zeros((8, 8, 3), np.uint8)
    array[:, :4] = 255
    Image.fromarray(array).save(tmp_path / "a" / "0.png")
    (batch,) = Loader(ImageFolder(tmp_path, 8), 400, 0, flip=True).from_step(0, 1)
    flipped = (batch.inputs[:, 0, 0, 0] < 0).float().mean().item()
    assert 0.4 < flipped < 0.6


def test_the_global_generator_is_untouched(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(Loader(ImageFolder(folder, 8), 5, 3, flip=True).from_step(0, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_transparency_goes_on_white() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("RGB", (2, 2), (1, 2, 3)).quantize()
    assert to_rgb(palette).mode == "RGB"
    assert to_rgb(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_emoji64_is_whole() -> None:
    """Counts, the split by whole concepts, captions."""
    import json

    root = data_root("emoji64")
    train, heldout = open_data("emoji64", 64, "heldout.txt")
    assert heldout is not None
    assert len(train) + len(heldout) == 3388 and len(heldout) == 324
    names = ("activities", "animals", "flags", "food", "objects", "people", "smileys", "symbols", "travel")
    assert train.names == heldout.names == names
    captions = {entry["path"]: entry["prompt"] for entry in json.loads((root / "captions.json").read_text())}
    assert len(captions) == 3388
    toned = {path: text for path, text in captions.items() if "skin tone" in text}
    concept = {path: (path.split("/")[0], text.rsplit(", ", 1)[0]) for path, text in toned.items()}
    held = {p.relative_to(root).as_posix() for p in heldout.paths}
    toned_held = {concept[path] for path in held if path in concept}
    assert toned_held and not toned_held & {c for path, c in concept.items() if path not in held}
    assert "firefighter, dark skin tone" in captions.values() and "flag of japan" in captions.values()
    combinations = read_list(root / "heldout_combinations.txt")
    assert len(combinations) == 54 and not set(combinations) & held
