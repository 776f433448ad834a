"""Tiles: where they lie, how they are blended, and how far they are from the whole."""

import copy
from itertools import pairwise
from math import pi
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.codecs.tiles import Cell, Tiling, apply_tiled, starts
from ldit.config.spec import AutoencoderConfig

SMALL = Tiling(limit=32 * 32, side=32, overlap=8)


@pytest.mark.parametrize("overlap", [1, 3, 7])
def test_tiles_cover_and_overlap(overlap: int) -> None:
    side = 8
    for length in range(1, 60):
        found = starts(length, side, overlap)
        assert found[0] == 0 and found[-1] == max(0, length - side)
        steps = [b - a for a, b in pairwise(found)]
        assert all(1 <= step <= side - overlap for step in steps)
        assert len(found) == 1 or (len(found) - 2) * (side - overlap) + side < length  # one less would not do


def smooth(height: int, width: int) -> Tensor:
    y, x = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 5, width)
    return torch.stack([torch.sin(x + y), torch.cos(2 * x - y), torch.sin(y) * torch.cos(x)])[None].repeat(3, 1, 1, 1)


@pytest.mark.parametrize("size", [(32, 32), (32, 40), (40, 24), (104, 72), (8, 136), (512, 8)])
def test_local_networks_do_not_notice(size: tuple[int, int]) -> None:
    """What depends on one cell alone comes out the same whatever the tiles: blended values are equal ones. Weights of
    up to four tiles are summed and divided by: a few units of 2^-24."""
    x = smooth(*size) * torch.arange(1.0, 4.0).view(3, 1, 1, 1)
    down = apply_tiled(lambda rows: F.avg_pool2d(rows, 8), x, Cell(8, 1), SMALL, 1)
    torch.testing.assert_close(down, F.avg_pool2d(x, 8), rtol=1e-6, atol=1e-6)
    up = apply_tiled(lambda rows: F.interpolate(rows, scale_factor=8), down, Cell(1, 8), SMALL, 10**9)
    torch.testing.assert_close(up, F.interpolate(down, scale_factor=8), rtol=1e-6, atol=1e-6)


def test_blending_is_linear() -> None:
    """Two tiles of constants 1 and 2 that share four cells: 1 + (k + ½)/4 over them."""
    values = iter([1.0, 2.0])
    x = torch.zeros(1, 1, 1, 12)
    out = apply_tiled(lambda rows: torch.full_like(rows, next(values)), x, Cell(1, 1), Tiling(4, 8, 4), 10**9)
    assert out.flatten().tolist() == [1.0] * 4 + [1.125, 1.375, 1.625, 1.875] + [2.0] * 4


def test_pixels_at_a_time_are_bounded() -> None:
    seen: list[tuple[int, ...]] = []

    def network(rows: Tensor) -> Tensor:
        seen.append(tuple(rows.shape))
        return rows

    apply_tiled(network, torch.zeros(5, 1, 200, 300), Cell(1, 1), SMALL, 2 * 32 * 32)
    assert {shape[-2:] for shape in seen} == {(32, 32)} and {shape[0] for shape in seen} == {1, 2}
    seen.clear()
    apply_tiled(
        network, torch.zeros(5, 1, 32, 32), Cell(1, 1), SMALL, 1
    )  # at the limit: whole, and never less than one
    assert seen == [(1, 1, 32, 32)] * 5


def waves(height: int, width: int, period: float) -> Tensor:
    """Smooth, and everywhere alike, as far as a tile's norms go."""
    y, x = torch.arange(height)[:, None] * 2 * pi / period, torch.arange(width) * 2 * pi / period
    return torch.stack([torch.sin(x + y / 2), torch.cos(x - y), torch.sin(y) * torch.cos(x)])[None]


def test_small_images_are_untouched(saved: Path) -> None:
    codec = AutoencoderCodec(AutoencoderConfig("codec"), saved)
    image = waves(64, 96, 32)
    codec.tiling = Tiling(10**9, 10**9, 128)
    mean, logvar = codec.moments(image)
    decoded = codec.decode(mean)
    codec.tiling = Tiling(64 * 96, 32, 8)
    assert torch.equal(codec.moments(image)[0], mean) and torch.equal(codec.moments(image)[1], logvar)
    assert torch.equal(codec.decode(mean), decoded)
    codec.tiling = Tiling(64 * 96 - 1, 32, 8)
    assert not torch.equal(codec.moments(image)[0], mean) and not torch.equal(codec.decode(mean), decoded)


def test_large_images_are_close(saved: Path, reference: Any) -> None:
    """A tile's norms and attention see the tile alone, so that the error depends on how alike the tiles are. Measured
    with these random weights, 256 x 320 pixels, tiles of 192 that share 64, as a part of the values' own deviation:
    mean 0.05, log-variance 0.05, decoding 0.29; with diffusers' tiling of the same settings 0.08, 0.08, 0.32."""
    codec = AutoencoderCodec(AutoencoderConfig("codec", scale=1.0), saved)
    image = waves(256, 320, 32)
    coarse = torch.randn(1, 4, 8, 10, generator=torch.Generator().manual_seed(0))
    latents = F.interpolate(coarse, scale_factor=4, mode="bicubic")
    whole = (*codec.moments(image), codec.decode(latents))
    codec.tiling = Tiling(limit=1, side=192, overlap=64)
    ours = (*codec.moments(image), codec.decode(latents))
    theirs = copy.deepcopy(reference)
    theirs.enable_tiling()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size, theirs.tile_overlap_factor = 192, 24, 1 / 3
    posterior = theirs.encode(image).latent_dist
    compared = (posterior.mean, posterior.logvar, theirs.decode(latents).sample)
    for found, other, value, bound in zip(ours, compared, whole, (0.1, 0.1, 0.4), strict=True):
        assert found.shape == value.shape
        error, their_error = ((result - value).std() / value.std() for result in (found, other))
        assert error < bound and error < their_error
