"""`ldit evaluate` and `ldit stats` as commands, and the script of the original's table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from flows.evaluation import Stub, folder, noise
from flows.sets import exported

from ldit.cli.arguments import parse
from ldit.cli.evaluate import EvaluateArguments
from ldit.cli.main import main
from ldit.cli.sample import SampleArguments
from ldit.cli.train import parse_arguments
from ldit.config.run import RunConfig
from ldit.config.sections import EvalConfig
from ldit.flows import evaluate as flow

ROOT = Path(__file__).resolve().parents[2]
ROWS = ("3b-256", "7b-256", "7b-256-unguided", "3b-512", "dit-256", "dit-256-unguided", "dit-512")


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    real = flow.open_extractor
    monkeypatch.setattr(
        flow, "open_extractor", lambda name, weights, device: Stub() if name == "stub" else real(name, weights, device)
    )


def test_a_model_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, reference = exported(tmp_path / "model"), folder(tmp_path / "b", noise(9, 1))
    command = [
        "evaluate",
        str(model),
        "--reference",
        str(reference),
        "--extractor",
        "stub",
        "--num",
        "8",
        "--steps",
        "2",
    ]
    assert main([*command, "--labels", "random", "--json", str(tmp_path / "r.json"), "--device", "cpu"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["labels"] == "random" and report["num_samples"] == 8 and report["samples"]["sampling"]["steps"] == "2"
    said = capsys.readouterr().out
    assert all(name in said for name in report["figures"])
    assert main(["stats", str(reference), "--extractor", "stub", "--out", str(tmp_path / "s.npz")]) == 0
    assert f"9 pictures: {tmp_path / 's.npz'}" in capsys.readouterr().out
    assert main(["evaluate", str(reference), "--reference", str(tmp_path / "s.npz"), "--extractor", "stub"]) == 0
    # The same pictures: what is left is the rounding of roots, some 1e-8 of the traces.
    value = float(capsys.readouterr().out.splitlines()[1].split()[1])
    assert value < 1e-8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["emoji64", "--reference", "emoji64", "--extractor", "nonsense"], "expected inception, efficientnet-lite0"),
        (["emoji64", "--reference", "nowhere.npz", "--extractor", "stub"], "nowhere.npz"),
        (["emoji64", "--reference", "emoji64", "--extractor", "stub", "--bootstrap", "9"], "--components"),
        (["nowhere", "--reference", "emoji64", "--extractor", "stub"], "nowhere"),
        (["emoji64", "--reference", "emoji64-class-xs", "--extractor", "stub"], "emoji64-class-xs"),
        (["emoji64"], "reference"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and words in error


def test_absent_inception_weights_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "TORCH_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("LDIT_INCEPTION_WEIGHTS", raising=False)
    assert main(["evaluate", "emoji64", "--reference", "emoji64", "--inception-weights", str(tmp_path / "no.pth")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "no.pth" in error


def test_evaluation_along_the_way_has_its_flags() -> None:
    flags = ["--eval.every", "5", "--eval.num", "9", "--eval.extractor", "stub", "--eval.reference", "r.npz"]
    config = parse_arguments(["tiny-cpu", "--out", "RUN", *flags, "--eval.batch_size", "3"]).config
    assert isinstance(config, RunConfig)
    assert config.eval == EvalConfig(every=5, num=9, reference="r.npz", extractor="stub", batch_size=3)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_the_script_of_the_table(rows: tuple[str, ...], tmp_path: Path) -> None:
    """Every command it gives is one that the command line takes."""
    stub = tmp_path / "torchrun"
    stub.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "L_DIT_3B_512": "/my model", "GUIDANCE": "1.4"}
    script = [str(ROOT / "exps/table.sh"), "/my references", str(tmp_path / "out"), *(rows if len(rows) == 1 else ())]
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    commands = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(commands) == 2 * len(rows)
    for name, sample, evaluate in zip(rows, commands[::2], commands[1::2], strict=True):
        assert sample[:5] == ["--nproc-per-node", "8", "-m", "ldit", "sample"]
        asked = parse(SampleArguments, sample[5:], "ldit sample")
        assert (asked.num, asked.labels, asked.steps, asked.solver) == (50000, "random", "250", "ddpm")
        assert asked.guidance == (1.0 if "unguided" in name else 1.4)
        assert evaluate[3:5] == ["ldit", "evaluate"]
        measured = parse(EvaluateArguments, evaluate[5:], "ldit evaluate")
        assert measured.source == str(asked.out) == str(tmp_path / f"out/{name}.npz")
        assert f"imagenet{'512' if '512' in name else '256'}" in measured.reference
    bare = subprocess.run([script[0]], env=env, capture_output=True, text=True)
    assert bare.returncode == 2 and bare.stderr.startswith("usage: ")
    unknown = subprocess.run([*script[:3], "nonsense"], env=env, capture_output=True, text=True)
    assert unknown.returncode == 2 and "unknown row nonsense" in unknown.stderr
