"""Images changed at random: by seed and position alone, within bounds, and in the ways that are named."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldit.training.tasks import augment as room
from ldit.training.tasks.augment import _Draws, augment, keep_mask

POSITIONS = (5, 6, 900)


def pictures(count: int = 3, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_image_is_changed_by_its_seed_and_position_alone() -> None:
    images = pictures()
    found = augment(images, POSITIONS, 1)
    assert torch.equal(found, augment(images, POSITIONS, 1))
    backwards = augment(images.flip(0), POSITIONS[::-1], 1).flip(0)
    alone = torch.cat([augment(images[i : i + 1], POSITIONS[i : i + 1], 1) for i in range(3)])
    # A grid of another batch may be rounded otherwise, 1e-7 of a side of 32 pixels whose neighbours differ by up to 2.
    assert (found - backwards).abs().max() < 1e-5 and (found - alone).abs().max() < 1e-5
    same = augment(images[:1].expand(3, -1, -1, -1), POSITIONS, 1)
    for other in (augment(images, POSITIONS, 2)[0], same[1], same[2]):
        assert (found[0] - other).abs().mean() > 0.05


def test_values_stay_those_of_images_and_the_input_its_own() -> None:
    images = pictures()
    before = images.clone()
    found = augment(images, POSITIONS, 0)
    assert found.shape == images.shape and found.dtype == torch.float32
    assert found.abs().max() <= 1 and torch.equal(images, before)


def test_no_global_generator_is_used() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = augment(pictures(), POSITIONS, 0), keep_mask(POSITIONS, 0, 16, 0.5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    again = augment(pictures(), POSITIONS, 0), keep_mask(POSITIONS, 0, 16, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_every_change_takes_place() -> None:
    """Of grey images: noise in two thirds, no colour but by channel gain. A white one only becomes noisy. A bright
    spot in the middle of a black one moves."""
    count = 60
    positions = range(count)
    white = augment(torch.ones(count, 3, 32, 32), positions, 0)
    noisy = (white.std(dim=(1, 2, 3)) > 1e-3).float().mean().item()
    assert 0.5 < noisy < 0.85  # 2/3, and four deviations of a share of 60 are 0.24
    black = -torch.ones(count, 3, 32, 32)
    grey = augment(black * 0.5, positions, 0).mean(dim=(2, 3))
    assert (grey[:, 0] - grey[:, 1]).abs().max() > 0.1  # gains of a channel
    spots = black.clone()
    spots[:, :, 14:18, 14:18] = 1.0
    mass = (augment(spots, positions, 0).mean(1) + 1).clamp(min=0.8) - 0.8
    places = torch.arange(32) - 15.5
    total = mass.sum(dim=(1, 2)).clamp(min=1e-6)
    down, across = ((mass.sum(d) * places).sum(1) / total for d in (2, 1))
    for shift in (down, across):
        assert shift.abs().max() > 1.0 and shift.abs().max() < 4  # 0.12 of half a side is 2 pixels
        assert shift.min() < -0.5 and shift.max() > 0.5
    area = (mass > 0.4).sum(dim=(1, 2))
    assert area.max() > 1.4 * area.min()  # scale


# What each number leaves an image as it is with, in the order in which they are taken, as shares of their ranges.
STILL = {
    "angle": 0.5, "scale": 0.5, "squeeze": 0.5, "across": 0.5, "down": 0.5, "saturation": 4 / 7,
    "red": 4 / 7, "green": 4 / 7, "blue": 4 / 7, "softness": 1.0, "soft": 1.0, "noise": 0.0,
}  # fmt: skip


def changed(monkeypatch: pytest.MonkeyPatch, images: Tensor, **shares: float) -> Tensor:
    """With the numbers of STILL but for these; noise is 1 everywhere."""

    def chosen(*_: object) -> _Draws:
        draws = object.__new__(_Draws)
        draws._numbers, draws._taken = torch.tensor([list((STILL | shares).values())]), 0
        draws.noise = torch.ones_like(images)
        return draws

    monkeypatch.setattr(room, "_Draws", chosen)
    return augment(images, (0,), 0)


def ramps() -> Tensor:
    """(1, 3, 32, 32): half of each place's distance across and down from the middle, in [-1, 1], and 0. Bilinear
    interpolation of these is exact."""
    places = (torch.arange(32) + 0.5) / 16 - 1
    return 0.5 * torch.stack([places.expand(32, 32), places[:, None].expand(32, 32), torch.zeros(32, 32)])[None]


@pytest.mark.parametrize(
    ("name", "share", "matrix", "shift"),
    [
        ("angle", 1.0, [[math.cos(0.2), -math.sin(0.2)], [math.sin(0.2), math.cos(0.2)]], (0, 0)),
        ("scale", 0.0, [[0.8, 0], [0, 0.8]], (0, 0)),
        ("squeeze", 1.0, [[1.07, 0], [0, 1 / 1.07]], (0, 0)),
        ("across", 1.0, [[1.0, 0], [0, 1]], (0.12, 0)),
        ("down", 0.0, [[1.0, 0], [0, 1]], (0, -0.12)),
    ],
)
def test_each_movement_by_itself(
    name: str, share: float, matrix: list[list[float]], shift: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ramps()
    torch.testing.assert_close(changed(monkeypatch, images), images, rtol=0, atol=1e-5)  # nothing moves
    found = changed(monkeypatch, images, **{name: share})[0, :2]
    expected = (
        torch.einsum("ij,jhw->ihw", torch.tensor(matrix), images[0, :2]) + 0.5 * torch.tensor(shift)[:, None, None]
    )
    inner = slice(6, 26)  # where nothing comes in from outside
    torch.testing.assert_close(found[:, inner, inner], expected[:, inner, inner], rtol=0, atol=1e-5)


def test_each_colour_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(1)
    grey = images.mean(1, keepdim=True)
    found = changed(monkeypatch, images, saturation=0.0)
    torch.testing.assert_close(found, grey + 0.6 * (images - grey), rtol=0, atol=1e-5)
    for channel, name in enumerate(("red", "green", "blue")):
        expected = images.clone()
        expected[:, channel] = 1 - 0.8 * (1 - images[:, channel])
        torch.testing.assert_close(changed(monkeypatch, images, **{name: 0.0}), expected, rtol=0, atol=1e-5)


def test_softness_and_noise_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A box of three by three, mixed in by its share, in three of ten; noise of up to a tenth in two of three."""
    images = pictures(1) * 0.8
    box = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), torch.full((3, 1, 3, 3), 1 / 9), groups=3)
    for softness, share in ((0.0, 0.3), (1.0, 1.0)):
        found = changed(monkeypatch, images, softness=softness, soft=0.29)
        torch.testing.assert_close(found, images + share * (box - images), rtol=0, atol=1e-5)
    torch.testing.assert_close(changed(monkeypatch, images, softness=1.0, soft=0.31), images, rtol=0, atol=1e-5)
    for noise, added in ((0.33, 0.0), (0.5, 0.025), (1.0, 0.1)):
        found = changed(monkeypatch, images, noise=noise)
        torch.testing.assert_close(found, images + added, rtol=0, atol=1e-5)


def test_features_are_left_out_by_position() -> None:
    mask = keep_mask(range(50), 0, 64, 0.25)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((mask == 0).float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 3200) ** 0.5
    assert torch.equal(mask[7:9], keep_mask((7, 8), 0, 64, 0.25)) and not torch.equal(mask[0], mask[1])
    assert not torch.equal(mask, keep_mask(range(50), 1, 64, 0.25))
