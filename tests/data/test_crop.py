"""ADM's centre crop: while the short side is at least 2s halve by BOX to (w//2, h//2); BICUBIC to (round(w·s/short),
round(h·s/short)); from ((W-s)//2, (H-s)//2) take s x s."""

import numpy as np
import pytest
from PIL import Image

from ldit.data.images.transforms import center_crop

S = 16
SIDES = [
    (S, S), (S, S + 1), (S + 1, S), (7, 7), (5, 31), (40, 9), (2 * S - 1, 2 * S - 1), (2 * S - 1, 3 * S),
    (2 * S, 2 * S), (2 * S, 77), (77, 2 * S), (2 * S + 1, 2 * S + 1), (4 * S - 1, 90), (4 * S, 4 * S),
    (4 * S + 1, 4 * S + 1), (4 * S + 1, 131), (131, 4 * S + 1), (8 * S + 3, 150), (1, 1), (1, 64), (63, 1),
]  # fmt: skip


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def defined(array: np.ndarray, s: int) -> np.ndarray:
    """The definition, on arrays; Pillow resizes."""
    h, w = array.shape[:2]
    while (w if w < h else h) >= 2 * s:
        w, h = w // 2, h // 2
        array = np.asarray(Image.fromarray(array).resize((w, h), Image.Resampling.BOX))
    scale = s / (w if w < h else h)
    wide, high = round(w * scale), round(h * scale)
    array = np.asarray(Image.fromarray(array).resize((wide, high), Image.Resampling.BICUBIC))
    x, y = (wide - s) // 2, (high - s) // 2
    return array[y : y + s, x : x + s]


def halved(array: np.ndarray) -> np.ndarray:
    """Means of two columns, then of two rows, each rounded to 8 bits, halves up: what BOX is for even sides."""
    whole = array.astype(int)
    wide = (whole[:, ::2] + whole[:, 1::2] + 1) // 2
    return ((wide[::2] + wide[1::2] + 1) // 2).astype(np.uint8)


@pytest.mark.parametrize(("width", "height"), SIDES)
def test_is_the_definition(width: int, height: int) -> None:
    array = noise(width, height)
    got = np.asarray(center_crop(Image.fromarray(array), S))
    assert got.shape == (S, S, 3) and np.array_equal(got, defined(array, S))
    grey = np.ascontiguousarray(array[:, :, 0])
    assert np.array_equal(center_crop(Image.fromarray(grey), S), defined(grey, S))


@pytest.mark.parametrize("power", [1, 2, 3])
def test_halving_is_the_mean_of_four(power: int) -> None:
    """Squares of s·2^n are halved n times and resized no further."""
    array = noise(S << power, S << power)
    wanted = array
    for _ in range(power):
        wanted = halved(wanted)
    assert np.array_equal(center_crop(Image.fromarray(array), S), wanted)


def test_the_centre_is_taken_and_odd_rests_go_right_and_down() -> None:
    array = noise(S + 5, S)
    assert np.array_equal(center_crop(Image.fromarray(array), S), array[:, 2 : S + 2])
    array = noise(S, S + 9)
    assert np.array_equal(center_crop(Image.fromarray(array), S), array[4 : S + 4])
    assert np.array_equal(center_crop(Image.fromarray(noise(S, S)), S), noise(S, S))
