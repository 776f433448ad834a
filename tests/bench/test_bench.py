"""`ldit bench`: what it refuses before it measures, the order of report and file, the precision it measures in."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldit.bench import ceiling
from ldit.bench import train_step as bench
from ldit.bench.train_step import bench_train
from ldit.cli.main import main
from ldit.config.requests.bench import BenchTrainRequest
from ldit.errors import ConfigError
from ldit.precision import COMPUTE, products

MEASURED = {"fits": True, "images_per_second": 2.0, "first_loss": 1.0}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(what was measured, precision of products then), with figures in place of the measurements."""
    found: list[tuple[str, str]] = []

    def instead(result: Callable[[Any], Any]) -> Callable[..., Any]:
        def measure(what: Any, *_: Any) -> Any:
            found.append((str(what), torch.get_float32_matmul_precision()))
            return result(what)

        return measure

    monkeypatch.setattr(bench, "matrix_ceiling", instead(lambda device: 1e12))
    monkeypatch.setattr(bench, "_free", lambda device: None)
    monkeypatch.setattr(bench, "_measure", instead(lambda name: {"name": name, **MEASURED}))
    return found


@pytest.fixture
def before() -> Iterator[str]:
    """The precision of the process around, which is not torch's own choice."""
    own = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield "medium"
    torch.set_float32_matmul_precision(own)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_products_are_rounded_within_the_block_alone(precision: str, before: str) -> None:
    """And of a block that fails no trace is left."""
    within = "high" if precision == "tf32" else "highest"
    with products(precision):
        assert torch.get_float32_matmul_precision() == within
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(KeyError), products(precision):
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("precision", COMPUTE)
def test_everything_is_measured_in_the_precision(precision: Any, before: str, seen: list[tuple[str, str]]) -> None:
    """The ceiling as well as the variants."""
    within = "high" if precision == "tf32" else "highest"
    report = bench_train(BenchTrainRequest("tiny", precision=precision, device="cpu"))
    expected = [("cpu", within), ("original", within), ("fused", within), ("compiled", within)]
    assert seen == expected
    assert torch.get_float32_matmul_precision() == before and report["precision"] == precision


def test_a_measurement_that_fails_leaves_no_precision_behind(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(bench, "matrix_ceiling", fail)
    with pytest.raises(RuntimeError, match="no"):
        bench_train(BenchTrainRequest("tiny", precision="tf32", device="cpu"))
    assert torch.get_float32_matmul_precision() == before


def test_rates_are_put_in_relation(seen: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rate x FLOPs / ceiling, and nothing where the device has none."""
    report = bench_train(BenchTrainRequest("tiny", variants=("fused",), device="cpu"))
    (row,) = report["variants"]
    assert row["tflops"] == 2.0 * report["train_flops_per_image"] / 1e12
    assert math.isclose(row["of_ceiling"], row["tflops"]) and row["agrees"] and "mfu" not in row
    monkeypatch.setattr(bench, "matrix_ceiling", lambda device, dtype: None)
    report = bench_train(BenchTrainRequest("tiny", variants=("fused",), device="cpu"))
    assert report["ceiling_flops"] is None and "of_ceiling" not in report["variants"][0]


def test_the_micro_batch_is_halved_until_it_fits(seen: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the batch only; a micro-batch that was asked for stays."""
    tried = []

    def small(name: str, config: Any, *_: Any) -> dict[str, Any]:
        tried.append(config.train.micro_batch_size)
        if config.train.micro_batch_size > 3:
            raise torch.cuda.OutOfMemoryError
        return {"name": name, "fits": True, "images_per_second": 2.0, "first_loss": 1.0}

    monkeypatch.setattr(bench, "_measure", small)
    report = bench_train(BenchTrainRequest("tiny", batch=12, variants=("fused",), device="cpu"))
    assert tried == [12, 6, 3] and report["variants"][0]["micro_batch"] == 3
    report = bench_train(BenchTrainRequest("tiny", batch=12, micro=4, variants=("fused",), device="cpu"))
    assert not report["variants"][0]["fits"] and tried[3:] == [4]


def test_the_ceiling_is_the_best_of_a_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 products of 1,024 on a CPU; products that it emulates are none."""
    seconds = iter((3.0, 2.0, 4.0))
    monkeypatch.setattr(ceiling, "timed", lambda call, device: (call(), next(seconds))[1])
    assert ceiling.matrix_ceiling(torch.device("cpu"), torch.float32) == 2.0 * 1024**3 * 3 / 2.0
    assert ceiling.matrix_ceiling(torch.device("cpu"), torch.float16) is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "cuda"], "--device cuda: torch finds no GPU here"),
        (["--variants"], "--variants: name at least one of original, fused, compiled"),
        (["--json", "nowhere/out.json"], "--json: no folder HERE/nowhere"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--batch", "4", "--micro", "3"], "--micro: 3 does not divide the batch 4"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(
    flags: list[str],
    said: str,
    seen: list[tuple[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["bench", "train", "--size", "tiny", *flags]
    with pytest.raises(ConfigError):
        main([*command, "--debug"])
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"ldit: {said.replace('HERE', str(tmp_path))}\n")
    assert seen == [] and list(tmp_path.iterdir()) == []


def test_the_report_is_printed_before_the_file_is_written(
    seen: list[tuple[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that a file that cannot be written, a folder here, costs no measurement."""
    command = ["bench", "train", "--size", "tiny", "--device", "cpu", "--json"]
    assert main([*command, str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "out.json").read_text() == out and json.loads(out)["size"] == "tiny"
    assert main([*command, str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["size"] == "tiny" and f"ldit: {tmp_path} was not written: Is a directory\n" in said.err
