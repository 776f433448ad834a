"""Initialisation: the table of `init_weights`, and independence of order."""

import math

import pytest
import torch

from ldit.config.model import ClassModelConfig, OriginalDiTConfig, TextModelConfig
from ldit.nn.build import build_model
from ldit.nn.conditioning import TextCondition
from ldit.nn.dit import init_weights
from ldit.rng import generator

SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32}


def made(config: ClassModelConfig | TextModelConfig | OriginalDiTConfig, seed: int = 0) -> torch.nn.Module:
    model = build_model(config)
    init_weights(model, lambda name: generator(seed, "init", 0, name))
    return model.requires_grad_(False)


def test_class_table() -> None:
    weights = made(ClassModelConfig(**SMALL, input_size=8, num_classes=200, qk_norm=True)).state_dict()
    for name, p in weights.items():
        if "adaLN" in name or name.startswith("final_layer.linear") or name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert p.std() == pytest.approx(0.02, rel=0.05), name
        else:
            bound = math.sqrt(6 / sum(p.shape))
            assert p.abs().max() <= bound and p.abs().max() > 0.97 * bound, name
            assert p.std() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_a_fresh_model_predicts_zero() -> None:
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0])
    y = torch.tensor([0, 1])
    assert not made(ClassModelConfig(**SMALL, input_size=8, num_classes=3))(x, t, y).any()
    text = TextCondition(torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool))
    model = made(TextModelConfig(**SMALL, max_seq_len=24, cap_feat_dim=16))
    assert not model(x, t, text).any() and not model.get_parameter("layers.0.attention.gate").any()
    assert model.get_parameter("eol_token").std() == pytest.approx(0.02, rel=0.3)
    baseline = made(OriginalDiTConfig(input_size=8, hidden_size=64, depth=2, num_heads=4, num_classes=3))
    assert not baseline(x, t, y).any() and baseline.get_parameter("pos_embed").any()


def test_each_parameter_depends_on_its_name_and_the_seed_alone() -> None:
    shallow = made(ClassModelConfig(**{**SMALL, "n_layers": 1}, input_size=8, num_classes=3)).state_dict()
    deep = made(ClassModelConfig(**SMALL, input_size=8, num_classes=3)).state_dict()
    other = made(ClassModelConfig(**SMALL, input_size=8, num_classes=3), seed=1).state_dict()
    assert all(torch.equal(value, deep[name]) for name, value in shallow.items())
    assert not torch.equal(other["x_embedder.weight"], deep["x_embedder.weight"])
