"""Positions of images of other sizes over a sampler's noise times: both processes, SiT's reversed time."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldit.config.model import ClassModelConfig, OriginalDiTConfig, TextModelConfig
from ldit.diffusion.ddpm import DDPM
from ldit.diffusion.flow import Flow
from ldit.errors import RequestError
from ldit.nn.build import build_model
from ldit.nn.rope import GridScale
from ldit.nn.tokens import rope_table
from ldit.sampling.guidance import Guided
from ldit.sampling.resolution import SCALINGS, Positioned, positioned, proportion

CONFIG = ClassModelConfig(
    dim=32, n_layers=1, n_heads=2, multiple_of=16, input_size=16, patch_size=2, num_classes=3, rope="2d"
)
RASTER = ClassModelConfig(
    dim=32, n_layers=1, n_heads=2, multiple_of=16, input_size=16, patch_size=2, num_classes=3, rope="raster"
)
PROCESSES = {
    "ddpm": DDPM(),
    "flow": Flow(),
    "scaled flow": Flow(time_scale=1.0),
    "sit": Flow(time_scale=1.0, data_at=1),
    "reversed": Flow(time_scale=1000.0, data_at=1),
}


class Recorder:
    """A network that remembers with which positions it was called."""

    def __init__(self) -> None:
        self.grids: list[GridScale | None] = []

    def __call__(self, x: Tensor, time: Tensor, cond: Any, *, grid: GridScale | None = None) -> Tensor:
        self.grids.append(grid)
        return x


def scale(scaling: str, noise: float, rows: int, columns: int, config: Any = CONFIG, **more: Any) -> GridScale:
    network = positioned(Recorder(), DDPM(), config, rows, columns, scaling, **more)
    assert isinstance(network, Positioned)
    return network.scale(noise)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_noise_time_is_read_from_the_networks_time(process: Any) -> None:
    """For every level a solver may ask for, whatever the network is given; and the network hears of it as positions,
    both halves of guidance alike."""
    network = Recorder()
    scaled = positioned(network, process, CONFIG, 8, 16, "time-aware")
    schedule = process
    for noise in (1.0, 0.75, 0.3, 0.01):
        level = schedule.level(noise)
        assert process.noise_time_of(level.time) == pytest.approx(level.noise_time, abs=1e-12)
        labels, null = torch.tensor([0, 1]), torch.tensor([3, 3])
        Guided(scaled, labels, null, 3.0, 4)(torch.randn(2, 4, 16, 32), level)
        heard = network.grids.pop()
        assert heard is not None and not network.grids
        assert heard.columns == pytest.approx(2.0**level.noise_time, rel=1e-6)  # the network's time is fp32
        assert heard.ntk_columns == pytest.approx(2.0 ** (1 - level.noise_time), rel=1e-6)
        assert heard.rows == heard.ntk_rows == heard.softmax == 1.0 and heard.stride is None


@pytest.mark.parametrize("config", [CONFIG, RASTER], ids=["2d", "raster"])
def test_the_ends_of_time_aware_positions(config: Any) -> None:
    """Linear in noise, NTK in data; the lowest frequency is divided by the stretch all the way, the highest falls."""
    assert scale("time-aware", 1.0, 12, 16, config) == scale("linear", 1.0, 12, 16, config)
    assert scale("time-aware", 0.0, 12, 16, config) == scale("ntk", 0.0, 12, 16, config)
    for noise in (0.0, 0.4, 1.0):
        assert scale("linear", noise, 12, 16, config) == scale("linear", 1.0, 12, 16, config)
        assert scale("ntk", noise, 12, 16, config) == scale("ntk", 1.0, 12, 16, config)
    cpu, last = torch.device("cpu"), []
    for noise in (0.0, 0.3, 0.7, 1.0):
        table = torch.view_as_complex(rope_table("2d", 2, 1, 16, cpu, scale("time-aware", noise, 16, 8)))
        angles = table[1, :4].angle()
        assert angles[-1].item() == pytest.approx(10000 ** (-3 / 4) / 2, rel=1e-6)
        last.append(angles[0].item())
    assert last == pytest.approx([2.0**-noise for noise in (0.0, 0.3, 0.7, 1.0)], rel=1e-6)


def test_each_axis_has_its_own_stretch_and_shorter_ones_none() -> None:
    assert scale("linear", 0.5, 12, 16) == GridScale(rows=1.5, columns=2.0)
    assert scale("ntk", 0.5, 4, 24) == GridScale(ntk_columns=3.0)
    assert scale("time-aware", 0.5, 4, 4) == GridScale()
    assert scale("none", 0.5, 12, 16, proportional=True) == GridScale(softmax=proportion(192, 64))
    assert scale("none", 0.5, 12, 16, RASTER, proportional=True).stride is None  # the published index


def test_raster_rows_keep_the_trained_distance() -> None:
    """Whatever the scaling: their lowest frequencies are slowed, columns are scaled as asked."""
    assert scale("linear", 0.5, 12, 16, RASTER) == GridScale(columns=2.0, ntk_rows=1.5, stride=8)
    assert scale("ntk", 0.5, 12, 16, RASTER) == GridScale(ntk_columns=2.0, ntk_rows=1.5, stride=8)
    half = scale("time-aware", 0.5, 12, 16, RASTER)
    assert half == GridScale(columns=2**0.5, ntk_columns=2**0.5, ntk_rows=1.5, stride=8)


def test_proportional_attention_keeps_the_entropy() -> None:
    """sqrt(log L / log L_train): of logits with a normal spread, as softmax has them, over 64 and 1024 tokens."""
    factor = proportion(1024, 64)
    assert factor == math.sqrt(math.log(1024) / math.log(64)) == pytest.approx(math.sqrt(10 / 6))
    assert proportion(64, 64) == 1.0 and proportion(1, 64) == proportion(64, 1) == 1.0 and proportion(16, 64) < 1.0
    assert scale("ntk", 0.5, 32, 32, proportional=True).softmax == factor

    def share_of_largest_entropy(tokens: int, spread: float) -> float:
        logits = torch.randn(4000, tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * spread
        p = logits.softmax(-1)
        return -(p * p.log()).sum(-1).mean().item() / math.log(tokens)

    # H = log L - spread²/2 for normal logits, so at spread²·f² the share of log L stays.
    trained, plain, scaled = ((64, 1.0), (1024, 1.0), (1024, factor))
    target = share_of_largest_entropy(*trained)
    assert abs(share_of_largest_entropy(*scaled) - target) < 0.2 * abs(share_of_largest_entropy(*plain) - target)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_training_size_is_the_network_itself(scaling: str) -> None:
    network = Recorder()
    assert positioned(network, DDPM(), CONFIG, 8, 8, scaling, True) is network
    assert positioned(network, DDPM(), CONFIG, 8, 9) is network
    dit = OriginalDiTConfig(input_size=16, hidden_size=32, depth=1, num_heads=2)
    assert positioned(network, DDPM(), dit, 8, 8, scaling) is network
    text = TextModelConfig(dim=32, n_layers=1, n_heads=2)
    assert positioned(network, DDPM(), text, 8, 9) is network


def test_what_cannot_be_scaled() -> None:
    with pytest.raises(RequestError, match="rope_scaling: expected none, linear, ntk or time-aware, got 'yarn'"):
        positioned(Recorder(), DDPM(), CONFIG, 8, 8, "yarn")
    text = TextModelConfig(dim=32, n_layers=1, n_heads=2)
    with pytest.raises(RequestError, match="proportional_attention: not for text models"):
        positioned(Recorder(), DDPM(), text, 8, 9, "ntk", True)


@pytest.mark.parametrize("scaling", ["linear", "ntk", "time-aware"])
@pytest.mark.parametrize("config", [CONFIG, RASTER, OriginalDiTConfig(16, 2, 4, 32, 1, 2)], ids=["2d", "raster", "dit"])
def test_networks_take_the_positions(config: Any, scaling: str) -> None:
    """Each real network at 8 x 24 tokens: another output than without, the same for each row whatever its company."""
    torch.manual_seed(0)
    model: Any = build_model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    scaled = positioned(model.eval().requires_grad_(False), DDPM(), config, 8, 24, scaling, True)
    x, time, labels = torch.randn(3, 4, 16, 48), torch.full((3,), 600.0), torch.tensor([0, 1, 2])
    out = scaled(x, time, labels)
    assert out.shape == model(x, time, labels).shape and not torch.equal(out, model(x, time, labels))
    alone = scaled(x[1:2], time[1:2], labels[1:2])
    assert (out[1:2] - alone).abs().max() <= 1e-5 * out.abs().max()
