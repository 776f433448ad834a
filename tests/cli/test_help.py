"""Help is complete, quick, and imports no torch."""

import os
import resource
import subprocess
import sys

import pytest

from ldit.cli.commands import NAMES, PLANNED
from ldit.cli.main import main

LIMIT = 0.5  # seconds, the contract's


def run(code: str) -> tuple[float, str]:
    """Seconds of processor time, which other work on the machine does not change, and stdout."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"}
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "",
        "train",
        "sample",
        "info",
        "convert",
        "ema",
        "bench train",
        "bench sample",
        "train emoji64-class-xs",
        "train emoji64-vae",
        "train extractor-small",
        "encode",
        "data check",
    ],
)
def test_help_is_quick_and_torch_free(command: str) -> None:
    code = (
        "import sys\nfrom ldit.cli.main import main\n"
        f"try:\n    main({[*command.split(), '--help']!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print('TORCH' if 'torch' in sys.modules else 'free')"
    )
    attempts = [run(code) for _ in range(3)]
    assert all(out.rstrip().endswith("free") for _, out in attempts)
    assert min(seconds for seconds, _ in attempts) <= LIMIT


def test_help_names_everything() -> None:
    _, top = run("from ldit.cli.main import main; main(['--help'])")
    assert all(name in top for name in (*NAMES, *PLANNED))
    code = "from ldit.cli.main import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass"
    _, text = run(code)
    fixed = (
        "data.path data.image-size data.flip train.steps train.batch-size train.micro-batch-size train.lr train.seed "
        "train.precision train.grad-clip train.log-every train.checkpoint-every train.sample-every ema.decay optim.kind"
    )
    assert [flag for flag in fixed.split() if f"--{flag}" not in text] == []
    assert "imagenet256-7b" in text and "tiny-cpu" in text


@pytest.mark.parametrize("name", PLANNED)
def test_planned_commands_say_so(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert capsys.readouterr().err == f"ldit: ldit {name} is not built yet\n"
