"""The study of q/k norms: its runs differ as they say, and its table counts what failed."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import stability  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))  # some scripts have the names of folders of tests

from ldit.nn.build import build_model  # noqa: E402


def test_the_grid() -> None:
    runs = list(stability.grid())
    assert len(set(runs)) == len(runs) == 3 * 3 * 6 * 3
    models = [stability.configured(run).model for run in runs]
    assert {model.qk_norm for model in models} == {False, True, "head"}
    assert all(stability.configured(run).train.lr == run.rate for run in runs)


def test_emulated_half_precision() -> None:
    """Every linear layer and norm gives numbers of fp16; gradients are those of what was computed."""
    model = build_model(stability.configured(stability.Run("fp16 emulated", "full", 1e-3, 0)).model)
    seen: list[torch.Tensor] = []
    layer = model.layers[0].feed_forward.w1
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    inputs = torch.randn(1, 3, 32, 32), torch.tensor([5.0]), torch.tensor([0])
    exact = model(*inputs)
    stability.emulate_half(model)
    out = model(*inputs)
    assert not torch.equal(seen[0], seen[0].half().float())
    assert torch.equal(out, out.half().float()) and 0 < (out - exact).abs().max() < 0.05 * exact.abs().max()
    out.square().mean().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_a_run_and_its_place_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stability, "STEPS", 4)
    monkeypatch.setattr(stability, "LOOK", 2)
    monkeypatch.setattr(stability, "BATCH", 4)
    monkeypatch.setattr(stability, "grid", lambda: iter([stability.Run("bf16", "head", 1e-3, 0)]))
    args = argparse.Namespace(results=tmp_path / "s.jsonl", seeds=[0], markdown=None, figure=tmp_path / "s.png")
    stability.run(args)
    stability.run(args)  # it is there already
    (row,) = stability.known(args.results).values()
    assert row["steps"] == 4 and len(row["logits"]) == 2 and 0 < row["logits"][0] < 100
    assert stability.failed(row) and not stability.failed({"fault": "", "last": 0.4})  # four steps teach nothing
    assert stability.failed({"fault": "nonfinite", "last": None})
    capsys.readouterr()
    stability.table(args)
    assert "| bf16 | head | - | 1 of 1 |" in capsys.readouterr().out and args.figure.stat().st_size > 10_000
