"""`ldit bench sample`: what is counted, what it refuses before it measures, and the same latents by every path."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldit.bench import sampling as bench_sample
from ldit.bench.sampling import Chain, needed_flops, random_network
from ldit.bench.train_step import RECIPES
from ldit.cli.main import main
from ldit.config.model import ClassModelConfig
from ldit.config.recipes.registry import diffusion_recipe
from ldit.config.requests.bench import BenchSampleRequest
from ldit.diffusion import DDPM
from ldit.errors import RequestError
from ldit.nn.build import forward_flops
from ldit.rng import normal
from ldit.sampling.fast.options import InferenceOptions
from ldit.sampling.fast.prepare import prepare
from ldit.sampling.grids import build_grid

CPU = torch.device("cpu")


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heun's last of 3 steps needs one evaluation. Every row counts with its FLOPs, but its conditioning once for each
    time and label, the null class among them: of 3 times that are not shared with other rows."""
    monkeypatch.setattr(bench_sample, "matrix_ceiling", lambda *_: 1e12)
    report = bench_sample.bench_sample(BenchSampleRequest("tiny", (1, 2), 3, "heun", rounds=1, device="cpu"))
    assert [row["batch"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        assert (row["evaluations"], row["guided_rows"]) == (5, 5 * row["batch"])
        seconds = row["ms_per_evaluation"] * 5 / 1000
        assert row["images_per_second"] == pytest.approx(row["batch"] / seconds)
        rows, pairs = 10 * row["batch"], 3 * (row["batch"] + 1)
        config = diffusion_recipe(RECIPES["tiny"]).model
        adaln = config.n_layers * 6 * config.dim * config.cond_dim + 2 * config.dim * config.cond_dim
        ahead = 2 * (adaln + config.cond_dim * (256 + config.cond_dim))
        assert row["flops"] == rows * (report["forward_flops_per_row"] - ahead) + pairs * ahead
        assert row["of_ceiling"] == pytest.approx(row["flops"] / seconds / 1e12) and row["peak_bytes"] > 0
    unguided = bench_sample.bench_sample(BenchSampleRequest("tiny", (1,), 2, "ddim", 1.0, rounds=1, device="cpu"))
    assert unguided["rows"][0]["guided_rows"] == 0 and unguided["dtype"] == "fp32"


@pytest.mark.parametrize("solver", ["ddpm", "unipc2"])
def test_paths_agree(solver: str) -> None:
    """A chain of ten steps by the inference copy and by the plain network; the acceptance line is 1e-3."""
    config = ClassModelConfig(dim=64, n_layers=2, n_heads=4, multiple_of=32, input_size=8, num_classes=5, qk_norm=True)
    model = random_network(config, CPU, torch.float32)
    noise = torch.stack([normal((4, 8, 8), k, "picture") for k in range(2)])
    chain = Chain(DDPM(), solver, build_grid(DDPM(), "10"), (3, 1), 5, 4.0, noise, 3)
    with torch.no_grad():
        plain, guided, _ = chain.run(model, torch.float32)
        fast, counted, _ = chain.run(prepare(model, InferenceOptions()), torch.float32)
    assert (plain - fast).abs().max() <= 1e-3 * plain.abs().max() and plain.std() > 0.1
    assert (guided.evaluations, guided.guided_rows) == (counted.evaluations, counted.guided_rows) == (10, 20)


def test_a_plain_network_makes_the_conditioning_of_every_row() -> None:
    config = ClassModelConfig(dim=64, n_layers=2, n_heads=4, multiple_of=32, input_size=8, num_classes=5)
    model, levels = random_network(config, CPU, torch.float32), build_grid(DDPM(), "2")
    chain = Chain(DDPM(), "ddim", levels, (3, 1, 3), 5, 4.0, torch.zeros(3, 4, 8, 8), 3)
    with torch.no_grad():
        _, guided, _ = chain.run(model, torch.float32)
    assert needed_flops(model, config, guided, levels) == 2 * 6 * forward_flops(config, 8, 8)
    assert needed_flops(prepare(model), config, guided, levels) < 2 * 6 * forward_flops(config, 8, 8)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch", "1", "0"], "--batch: must be at least 1, got 0"),
        (["--rounds", "0"], "--rounds: must be at least 1, got 0"),
        (["--solver", "rk45"], "solver: expected one of ddpm, "),
        (["--steps", "1001"], "steps: "),
        (["--device", "cuda"], "--device cuda: torch finds no GPU here"),
        (["--int8", "--compile"], "int8: its products cannot be compiled"),
        (["--graphs", "--device", "cpu"], "graph: CUDA graphs need a GPU, got cpu"),
        (["--int8", "--dtype", "bf16"], "int8: needs an fp32 network on the CPU"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_sample, "matrix_ceiling", lambda *_: 1e12)
    monkeypatch.setattr(Chain, "run", fail)
    assert main(["bench", "sample", "--size", "tiny", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"ldit: {said}") and err.count("\n") == 1


def test_switches_are_checked_before_the_ceiling_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_sample, "matrix_ceiling", lambda *_: pytest.fail("measured"))
    with pytest.raises(RequestError, match="graph: CUDA graphs need a GPU"):
        bench_sample.bench_sample(BenchSampleRequest("tiny", graphs=True, device="cpu"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_sample, "matrix_ceiling", lambda *_: 1e12)
    command = ["bench", "sample", "--size", "tiny", "--batch", "2", "--steps", "2", "--rounds", "1", "--device", "cpu"]
    assert main([*command, "--host-modulation", "--json", str(tmp_path / "out.json")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["switches"]["host_modulation"] is True
    assert (tmp_path / "out.json").read_text() == out and json.loads(out)["benchmark"] == "sample"
    assert bench_sample.COLUMNS in err and main(["bench", "neither"]) == 2
    assert "train or sample, not 'neither'" in capsys.readouterr().err
