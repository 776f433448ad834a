"""Order, crop, folders, held-out lists."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldit.data.image_folder import ImageFolder, read_list
from ldit.data.loader import Loader
from ldit.data.order import EpochOrder
from ldit.data.source import data_root, open_data
from ldit.data.transforms import center_crop, to_rgb
from ldit.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, byte order B < a < ä, with 5, 3 and 4 pictures of distinct grey."""
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
    picture, label = data[5]
    assert label == 1 and picture.shape == (8, 8, 3) and (picture == 0).all()


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
    with pytest.raises(DataError, match="empty holds no pictures"):
        ImageFolder(folder, 8)
    (folder / "empty" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 20)
    data = ImageFolder(folder, 8)
    with pytest.raises(DataError, match=r"cannot read picture .*bad\.png"):
        data[data.labels.index(data.names.index("empty"))]
    with pytest.raises(DataError, match="no held-out list"):
        read_list(folder / "nothing.txt")
    (folder / "flat").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        ImageFolder(folder / "flat", 8)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("manifest.json", "latent cache"),
        ("metadata.jsonl", "captioned"),
        ("a.tar", "tar"),
    ],
)
def test_kinds_of_data_to_come_say_so(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(DataError, match=said):
        open_data(str(tmp_path), 8)


def test_bad_picture_stops_the_loader(folder: Path) -> None:
    (folder / "B" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"B/0\.png"):
        list(Loader(ImageFolder(folder, 8), 12, 0, False).from_step(0, 1))


def test_loader_repeats_itself_from_any_step(folder: Path) -> None:
    data = ImageFolder(folder, 8)
    whole = list(Loader(data, 5, 3, flip=True).from_step(0, 6))
    tail = list(Loader(data, 5, 3, flip=True).from_step(4, 6))
    assert all(
        torch.equal(a.images, b.images) and a.positions == b.positions for a, b in zip(whole[4:], tail, strict=True)
    )
    assert whole[0].images.dtype == torch.float32 and whole[0].images.min() >= -1 and whole[0].images.max() <= 1
    assert [p for batch in whole for p in batch.positions] == list(range(30))


def test_flip_mirrors_about_half(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    array = np.zeros((8, 8, 3), np.uint8)
    array[:, :4] = 255
    Image.fromarray(array).save(tmp_path / "a" / "0.png")
    (batch,) = Loader(ImageFolder(tmp_path, 8), 400, 0, flip=True).from_step(0, 1)
    flipped = (batch.images[:, 0, 0, 0] < 0).float().mean().item()
    assert 0.4 < flipped < 0.6


def test_the_global_generator_is_untouched(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(Loader(ImageFolder(folder, 8), 5, 3, flip=True).from_step(0, 3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (200, 70), (33, 47), (512, 1000), (16, 16)])
def test_center_crop(width: int, height: int) -> None:
    """The definition, step by step: halvings by box, one bicubic, the centre."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    size = 32
    step = picture
    while min(step.size) >= 2 * size:
        step = step.resize(tuple(side // 2 for side in step.size), Image.Resampling.BOX)
    factor = size / min(step.size)
    step = step.resize(tuple(round(side * factor) for side in step.size), Image.Resampling.BICUBIC)
    array = np.asarray(step)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    assert np.array_equal(np.asarray(center_crop(picture, size)), array[top : top + size, left : left + size])


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
