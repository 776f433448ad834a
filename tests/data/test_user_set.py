"""A data set object of the user's: read as any other set, refused in one line that names what is wrong with it."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldit.data.images.decoding import Decoding
from ldit.data.images.transforms import center_crop
from ldit.data.loader import Loader, load_batch
from ldit.data.order import EpochOrder
from ldit.data.samples import fit_classes
from ldit.data.user_set import UserSet, open_user_set
from ldit.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 14, 20, 3), dtype=np.uint8)


class Mine:
    """Ten images in two classes, every other one a PIL image."""

    names: Any = ("cat", "dog")

    def __init__(self, **wrong: Any) -> None:
        vars(self).update(wrong)

    def __len__(self) -> int:
        return len(PIXELS)

    def fingerprint(self) -> str:
        return "mine-1"

    def read(self, index: int) -> Any:
        return (Image.fromarray(PIXELS[index]) if index % 2 else PIXELS[index]), index % 2


def test_it_is_cut_flipped_and_ordered_as_any_other() -> None:
    data = UserSet(Mine(), 8)
    assert (len(data), data.num_before_cap, data.names, data.shape, data.cache) == (
        10,
        10,
        ("cat", "dog"),
        (3, 8, 8),
        None,
    )
    order = EpochOrder(10, 7)
    batches = list(Loader(data, 5, 7, True, workers=2).from_step(0, 4))
    flipped = 0
    for step, batch in enumerate(batches):
        for row, index in enumerate(order.between(5 * step, 5 * step + 5)):
            square = np.asarray(center_crop(Image.fromarray(PIXELS[index]), 8)).transpose(2, 0, 1)
            expected = square / np.float32(127.5) - np.float32(1)
            got = batch.inputs[row].numpy()
            mirrored = not np.array_equal(got, expected)
            assert not mirrored or np.array_equal(got, expected[:, :, ::-1])
            assert batch.labels[row] == index % 2
            flipped += mirrored
    assert 0 < flipped < 20


def test_images_of_any_mode_become_rgb_by_the_rules_of_files() -> None:
    clear = Image.new("RGBA", (8, 8), (1, 2, 3, 0))
    deep = Image.fromarray(np.full((8, 8), 65535, np.uint16))
    data = UserSet(Mine(read=lambda index: ((clear, deep)[index % 2], 0)), 8, Decoding(background=(9, 8, 7)))
    assert (data[0][0] == (9, 8, 7)).all() and (data[1][0] == 255).all()


def test_a_run_opens_it() -> None:
    data = fit_classes(open_user_set(Mine(), 8), 2)
    assert data.names == ("cat", "dog") and len(data.fingerprint()) == 64
    assert data.fingerprint() == fit_classes(open_user_set(Mine(), 8), 0).fingerprint()
    assert data.fingerprint() != UserSet(Mine(fingerprint=lambda: "mine-2"), 8).fingerprint()
    with pytest.raises(DataError, match=r"Mine has 2 classes.* num_classes 3 .*; the classes are cat, dog"):
        fit_classes(open_user_set(Mine(), 8), 3)
    alone = UserSet(Mine(names=(), read=lambda index: (PIXELS[index], None)), 8)
    assert alone.names == () and alone[3][1] == 0


def test_what_read_raises_is_a_bad_image() -> None:
    def read(index: int) -> Any:
        if index == 3:
            raise OSError("the server\nis gone")
        return PIXELS[index], 0

    data = UserSet(Mine(read=read), 8)
    batch = load_batch(data, range(4), range(4), None, "skip")
    (fault,) = batch.faults
    assert (
        fault.where == "sample 3" and fault.reason == "data: Mine sample 3 cannot be read: OSError: the server is gone"
    )
    with pytest.raises(DataError, match="data: Mine sample 3 cannot be read") as caught:
        load_batch(data, range(4), range(4), None, "stop")
    assert isinstance(caught.value.__cause__, OSError)  # what --debug shows
    first = UserSet(Mine(read=lambda index: 1 / 0), 8)  # the first image may be bad as well
    assert len(load_batch(first, range(2), range(2), None, "skip").faults) == 2


def test_no_memory_is_no_fault_of_a_sample() -> None:
    def read(index: int) -> Any:
        raise MemoryError

    with pytest.raises(MemoryError):
        load_batch(UserSet(Mine(read=read), 8), range(1), range(1), None, "skip")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"names": "cat"}, r"Mine\.names is 'cat', not a tuple of class names"),
        ({"names": ("a", 1)}, r"Mine\.names is \('a', 1\)"),
        ({"names": ("a", "a")}, r"Mine\.names has the same name twice"),
        ({"names": ("a", "A")}, r"Mine\.names: the classes 'a' and 'A' differ in case alone"),
        ({"names": ()}, "Mine sample 0: its label must be None, because names is empty, got 0"),
        ({"fingerprint": lambda: 7}, r"Mine\.fingerprint\(\) returned 7, not a text"),
        ({"fingerprint": lambda: ""}, r"Mine\.fingerprint\(\) returned '', not a text"),
        ({"read": lambda index: PIXELS[0]}, r"Mine sample 0 must be \(image, label\), got ndarray"),
        ({"read": lambda index: (PIXELS[0] / 255, 0)}, r"its image must be .* got array of float64 \(14, 20, 3\)"),
        ({"read": lambda index: (PIXELS[0][..., 0], 0)}, r"its image must be .* got array of uint8 \(14, 20\)"),
        ({"read": lambda index: ("a.png", 0)}, r"its image must be a PIL image or uint8 .* got str"),
        (
            {"read": lambda index: (PIXELS[0], 2)},
            "sample 0: its label must be an int below 2, the length of names, got 2",
        ),
        ({"read": lambda index: (PIXELS[0], -1)}, "sample 0: its label must be an int below 2, .* got -1"),
        ({"read": lambda index: (PIXELS[0], None)}, "its label must be an int below 2, .* got None"),
        ({"read": lambda index: (PIXELS[0], 1.0)}, r"its label must be an int below 2, .* got 1\.0"),
        ({"read": lambda index: (Image.new("L", (65, 1)), 0)}, "sample 0 cannot be read: 65 x 1: the long side"),
    ],
)
def test_mistakes_are_named_before_a_run_begins(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        UserSet(Mine(**wrong), 8)
    assert str(caught.value).count("\n") == 0


def test_an_object_that_is_no_data_set_is_refused() -> None:
    class Empty(Mine):
        def __len__(self) -> int:
            return 0

    with pytest.raises(DataError, match=r"Empty holds no images \(its length is 0\)"):
        UserSet(Empty(), 8)
    with pytest.raises(DataError, match="list has no names; a data set has __len__, names, fingerprint, read"):
        UserSet([1], 8)  # type: ignore[arg-type]
