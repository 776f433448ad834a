"""Resize rules against the same arithmetic written as loops, and against Pillow's."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldit.eval.extractors.resize import bicubic, tf1_bilinear


def images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


def plain(picture: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's rule for one channel (H, W), number by number in fp32."""
    height, width = picture.shape
    one = np.float32(1) * picture.astype(np.float32)
    scale_y, scale_x = np.float32(height) / np.float32(size), np.float32(width) / np.float32(size)
    out = np.empty((size, size), np.float32)
    for i in range(size):
        y = np.float32(i) * scale_y
        top, below = int(y), min(int(y) + 1, height - 1)
        fy = np.float32(y - np.float32(top))
        for j in range(size):
            x = np.float32(j) * scale_x
            left, right = int(x), min(int(x) + 1, width - 1)
            fx = np.float32(x - np.float32(left))
            upper = one[top, left] + (one[top, right] - one[top, left]) * fx
            lower = one[below, left] + (one[below, right] - one[below, left]) * fx
            out[i, j] = upper + (lower - upper) * fy
    return out


# 26 and 13: i·in/299 is whole at i = 23k, where fp32 may end on either side of the pixel.
@pytest.mark.parametrize(
    ("height", "width", "size"), [(5, 7, 13), (33, 40, 11), (1, 2, 6), (13, 26, 299), (64, 512, 99), (17, 17, 17)]
)
def test_bilinear_as_tensorflow_1(height: int, width: int, size: int) -> None:
    """Bit for bit: each operation is rounded once, in the same order."""
    x = images(2, 2, height, width)
    found = tf1_bilinear(x, size)
    assert found.dtype == torch.float32 and found.shape == (2, 2, size, size)
    for b in range(2):
        assert np.array_equal(found[b, 1].numpy(), plain(x[b, 1].numpy(), size))
    assert torch.equal(tf1_bilinear(x.float(), size), found)


def test_bilinear_has_no_half_pixel_offset() -> None:
    """Doubled, a row keeps its pixels at the even places and repeats its last one."""
    found = tf1_bilinear(torch.tensor([[[[0, 100], [200, 100]]]], dtype=torch.uint8), 4)
    assert found[0, 0].tolist() == [[0, 50, 100, 100], [100, 100, 100, 100], [200, 150, 100, 100], [200, 150, 100, 100]]


def test_bilinear_leaves_its_input_alone() -> None:
    x = images(1, 3, 6, 6).float()
    before = x.clone()
    for size in (6, 12):
        tf1_bilinear(x, size).add_(1.0)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 48), (300, 451), (256, 256)])
def test_bicubic_as_pillow(height: int, width: int) -> None:
    """Pillow's own floating-point resize, clamped. Here places are fp32, 3e-5 of a pixel off at 451, and noise rises by
    255 a pixel; another kernel or none of the antialiasing is tens off."""
    x = images(1, 3, height, width)
    found = bicubic(x, 224)
    assert found.dtype == torch.float32 and float(found.min()) >= 0 and float(found.max()) <= 255
    for channel in range(3):
        image = Image.fromarray(x[0, channel].numpy().astype(np.float32))
        expected = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).clip(0, 255)
        assert np.abs(found[0, channel].numpy() - expected).max() < 0.01


def test_bicubic_keeps_images_of_its_size() -> None:
    x = images(2, 3, 20, 20)
    assert torch.equal(bicubic(x, 20), x.float())
