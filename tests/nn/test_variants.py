"""Switches that the golden files do not cover, against the independent implementation in reference.py."""

from typing import Any

import pytest
import reference
import torch

from ldit.config.model import ClassModelConfig, OriginalDiTConfig, TextModelConfig
from ldit.nn.build import build_model
from ldit.nn.conditioning import TextCondition, TrainingInputs
from ldit.nn.dit import DiT, init_weights
from ldit.nn.layers import dropped
from ldit.nn.rope import GridScale, raster_table, rotate_complex, rotate_real
from ldit.nn.tokens import rope_table

TINY: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 16}
TOLERANCE = 3e-6  # fp32 against float64; times are small because the angles themselves are fp32 by definition


def filled(config: ClassModelConfig | TextModelConfig) -> DiT:
    """Random weights everywhere, also where a fresh model has zeros."""
    torch.manual_seed(0)
    model = build_model(config)
    assert isinstance(model, DiT)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3
            p.copy_(torch.randn_like(p) * spread + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval().requires_grad_(False)


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True, "n_kv_heads": 2},
        {"qk_norm": "head", "n_kv_heads": 1},
        {"rope": "2d"},
        {"ffn_dim_multiplier": 1.3, "norm_eps": 1e-3},
        {"class_dropout_prob": 0.0},
        {"learn_sigma": False},
        {"patch_size": 4},
        {"patch_size": 1, "input_size": 4},
        {"in_channels": 3},
        {"dim": 1152, "n_heads": 2, "n_layers": 1, "multiple_of": 256, "patch_size": 4},
        {"shared_adaln": True},
        {"value_residual": True, "n_kv_heads": 2, "n_layers": 3},
        {"class_tokens": 3, "rope": "2d"},
        {"fine_layers": 1, "rope": "2d"},
        {"fine_layers": 1, "n_layers": 3, "class_tokens": 2, "shared_adaln": True, "value_residual": True},
    ],
    ids=str,
)
def test_class_model(changes: dict[str, Any]) -> None:
    config = ClassModelConfig(**{**TINY, "input_size": 8, "num_classes": 5, **changes})
    model = filled(config)
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size)
    t, y = torch.tensor([17.0, 3.5]), torch.tensor([4, 0])
    out = model(x, t, y)
    for i in range(2):
        check(out[i], reference.forward(config, model.state_dict(), x[i], t[i].item(), y=int(y[i])))


@pytest.mark.parametrize(
    "changes",
    [{"mid_layer": 1}, {"mid_layer": 1, "fine_layers": 1}, {"mid_layer": 2, "fine_layers": 2, "class_tokens": 2}],
    ids=str,
)
def test_the_second_head(changes: dict[str, Any]) -> None:
    """In the trunk and among the small patches; the first output is the one without it."""
    config = ClassModelConfig(**{**TINY, "n_layers": 3, "input_size": 8, "num_classes": 5, **changes})
    model = filled(config)
    x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.tensor([1])
    out, mid = model(x, t, y, mid=True)
    assert torch.equal(out, model(x, t, y))
    check(mid[0], reference.forward(config, model.state_dict(), x[0], 3.0, y=1, mid=True))
    assert (mid - out).abs().max() > 0.1


def test_some_tokens_skip_some_blocks() -> None:
    """Each sample has tokens of its own; those of the class never skip."""
    config = ClassModelConfig(**{**TINY, "n_layers": 4}, input_size=8, num_classes=5, class_tokens=2, rope="2d")
    model = filled(config)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 4.0]), torch.tensor([1, 0])
    kept = torch.tensor([[3, 0, 9, 15], [1, 2, 14, 8]])
    out = model(x, t, y, training=TrainingInputs(kept=kept, routed=(1, 3)))
    for i in range(2):
        way = {"kept": kept[i].tolist(), "routed": (1, 3)}
        check(out[i], reference.forward(config, model.state_dict(), x[i], t[i].item(), y=int(y[i]), **way))
    assert (out - model(x, t, y)).abs().max() > 0.1
    every = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(
        model(x, t, y, training=TrainingInputs(kept=every, routed=(1, 3))), model(x, t, y), atol=1e-5, rtol=0
    )


def test_the_network_is_told_how_an_image_was_augmented() -> None:
    config = ClassModelConfig(**TINY, input_size=8, num_classes=5, augment_labels=True)
    model = filled(config)
    x, t, y, labels = torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.tensor([1]), torch.randn(1, 9)
    out = model(x, t, y, training=TrainingInputs(augmentation=labels))
    check(out[0], reference.forward(config, model.state_dict(), x[0], 3.0, y=1, augmentation=labels[0]))
    assert torch.equal(model(x, t, y, training=TrainingInputs(augmentation=torch.zeros(1, 9))), model(x, t, y))


def test_dropped_updates() -> None:
    """A hash of (seed, place): the share asked for, the mean kept, the same in any batch; and by hand."""
    x, seeds = torch.ones(3, 40, 64), torch.tensor([5, 6, 1 << 30])
    out = dropped(x, seeds, 0.25)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    shares = (out == 0).float().mean((1, 2))
    assert ((shares - 0.25).abs() < 4 * (0.25 * 0.75 / 2560) ** 0.5).all()
    assert torch.equal(dropped(x[1:], seeds[1:], 0.25), out[1:])
    assert len({tuple(row.flatten().tolist()) for row in out}) == 3

    def hashed(seed: int, place: int) -> int:
        h = (seed ^ (place * 0x9E3779B1)) & 0xFFFFFFFF
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
        return h ^ (h >> 16)

    for place in range(200):
        assert (out[2].flatten()[place] == 0) == (hashed(1 << 30, place) < 2**30)


def test_dropout_changes_only_updates() -> None:
    """With every update dropped but the first, and none: between the two."""
    config = ClassModelConfig(**TINY, input_size=8, num_classes=5)
    model = filled(config)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 4.0]), torch.tensor([1, 0])
    seeds = torch.tensor([11, 12])
    some = model(x, t, y, training=TrainingInputs(seeds=seeds, dropout=0.3))
    assert torch.equal(some, model(x, t, y, training=TrainingInputs(seeds=seeds, dropout=0.3)))
    alone = model(x[1:], t[1:], y[1:], training=TrainingInputs(seeds=seeds[1:], dropout=0.3))
    torch.testing.assert_close(some[1:], alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(x, t, y, training=TrainingInputs(seeds=seeds, dropout=0.0)), model(x, t, y))
    assert (some - model(x, t, y)).abs().max() > 0.1


def test_every_update_drops_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed for each of the two updates of each block."""
    config = ClassModelConfig(**{**TINY, "n_layers": 3}, input_size=8, num_classes=5)
    used: list[int] = []
    monkeypatch.setattr("ldit.nn.dit.dropped", lambda x, seeds, rate: (used.append(int(seeds[0])), x)[1])
    training = TrainingInputs(seeds=torch.tensor([70]), dropout=0.5)
    filled(config)(torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.tensor([1]), training=training)
    assert used == [70, 71, 72, 73, 74, 75]


def test_both_levels_keep_the_distance_of_rows() -> None:
    """A row of the trunk has half as many columns, so it moves the position by half the stride."""
    config = ClassModelConfig(**TINY, input_size=8, num_classes=5, fine_layers=1)
    grid = GridScale(rows=1.5, stride=4)
    table = filled(config).positions(torch.zeros(1, 4, 12, 16), grid)
    coarse = rope_table("raster", 3, 4, config.head_dim, "cpu", GridScale(rows=1.5, stride=2))
    fine = rope_table("raster", 6, 8, config.head_dim, "cpu", grid)
    assert torch.equal(table, torch.cat([coarse, fine]))


def test_both_heads_begin_at_zero() -> None:
    config = ClassModelConfig(**TINY, input_size=8, num_classes=5, mid_layer=1)
    model = build_model(config)
    init_weights(model, lambda name: torch.Generator().manual_seed(0))
    out, mid = model(torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.tensor([1]), mid=True)
    assert not out.any() and not mid.any() and all(p.any() for name, p in model.named_parameters() if "wq" in name)


def test_other_sizes_and_null_class() -> None:
    config = ClassModelConfig(**TINY, input_size=8, num_classes=5, rope="2d")
    model = filled(config)
    x, t, y = torch.randn(1, 4, 4, 12), torch.tensor([3.0]), torch.tensor([5])
    check(model(x, t, y)[0], reference.forward(config, model.state_dict(), x[0], 3.0, y=5))


def test_extra_channels_go_in_and_not_out() -> None:
    config = ClassModelConfig(**TINY, input_size=8, num_classes=5, cond_channels=2)
    model = filled(config)
    x, t, y = torch.randn(1, 6, 8, 8), torch.tensor([3.0]), torch.tensor([1])
    out = model(x, t, y)
    assert out.shape == (1, 8, 8, 8)
    check(out[0], reference.forward(config, model.state_dict(), x[0], 3.0, y=1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True, "n_kv_heads": 2},
        {"qk_norm": "head"},
        {"rope_scaling_factor": 2.5},
        {"rope": "2d", "rope_scaling_factor": 2.0},
        {"learn_sigma": False, "in_channels": 3, "patch_size": 1, "max_seq_len": 30},
    ],
    ids=str,
)
def test_text_model(changes: dict[str, Any]) -> None:
    config = TextModelConfig(**{**TINY, "max_seq_len": 24, "cap_feat_dim": 12, **changes})
    model = filled(config)
    images = [torch.randn(config.in_channels, 4, 6), torch.randn(config.in_channels, 6, 4)]
    t = torch.tensor([17.0, 3.0])
    features, mask = torch.randn(2, 5, 12), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    out = model(images, t, TextCondition(features, mask))
    assert isinstance(out, list)
    for i in range(2):
        text = features[i][mask[i]]
        check(out[i], reference.forward(config, model.state_dict(), images[i], t[i].item(), text=text))


def test_sizes_that_do_not_fit() -> None:
    model = filled(ClassModelConfig(**TINY, input_size=8, num_classes=5))
    with pytest.raises(ValueError, match="9x8 is not divisible by the patch size 2"):
        model(torch.randn(1, 4, 9, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    # A text model takes more tokens than it was trained with; without padding the output is the reference's.
    text = filled(TextModelConfig(**TINY, max_seq_len=8, cap_feat_dim=12))
    condition = TextCondition(torch.randn(1, 2, 12), torch.ones(1, 2, dtype=torch.bool))
    x = torch.randn(1, 4, 6, 6)
    longer = TextModelConfig(**TINY, max_seq_len=12, cap_feat_dim=12)
    expected = reference.forward(longer, text.state_dict(), x[0], 0.0, text=condition.features[0])
    check(text(x, torch.zeros(1), condition)[0], expected)


@pytest.mark.parametrize("qk_norm", [False, True, "head"])
@pytest.mark.parametrize("kind", ["class", "text", "dit"])
def test_memory_is_reused_without_changing_anything(kind: str, qk_norm: bool) -> None:
    """Without gradients bricks overwrite their own temporaries: the same bits, and no input or weight is touched."""
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 6.0])
    cond: Any = torch.tensor([0, 1])
    if kind == "text":
        model: Any = filled(TextModelConfig(**TINY, max_seq_len=24, cap_feat_dim=12, qk_norm=qk_norm))
        cond = TextCondition(torch.randn(2, 3, 12), torch.ones(2, 3, dtype=torch.bool))
    elif kind == "class":
        model = filled(ClassModelConfig(**TINY, input_size=8, num_classes=5, qk_norm=qk_norm))
    else:
        model = build_model(OriginalDiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=5))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = x.clone()
    with torch.enable_grad():
        expected = model(x, t, cond).detach()
    with torch.no_grad():
        assert torch.equal(model(x, t, cond), expected)
        assert torch.equal(model(x, t, cond), expected)
    assert torch.equal(x, given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_block_leaves_its_input_alone() -> None:
    model = filled(ClassModelConfig(**TINY, input_size=8, num_classes=5))
    tokens, modulation = torch.randn(2, 16, 32), torch.randn(2, 6, 32)
    given = tokens.clone()
    with torch.no_grad():
        model.layers[0](tokens, rope_table("raster", 4, 4, 8, tokens.device), modulation)
    assert torch.equal(tokens, given)


def test_precomputed_modulations_are_the_same() -> None:
    """What the sampler may compute ahead gives the same image as forward."""
    model = filled(ClassModelConfig(**TINY, input_size=8, num_classes=5))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 6.0]), torch.tensor([0, 1])
    modulations = model.modulations(model.condition(t, y))
    out = model.compute(x, model.positions(x), model.layers, modulations, y)
    assert torch.equal(out, model(x, t, y))


def test_real_and_complex_rotation_agree() -> None:
    """The two forms of the rotation (CPU eager, everything else) to fp32 rounding."""
    pairs, table = torch.randn(2, 7, 3, 4, 2), raster_table(7, 8).unsqueeze(-3)
    real, complex_ = rotate_real(pairs, table), rotate_complex(pairs, table)
    assert (real - complex_).abs().max() <= 4 * torch.finfo(torch.float32).eps * pairs.abs().max()
