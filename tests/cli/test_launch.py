"""`ldit launch slurm`: the script is sound bash, issues the command asked for, and queues itself again on 138."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ldit.cli.main import main
from ldit.cli.train import parse_arguments
from ldit.config.requests.launch import SlurmRequest

AWKWARD = '/data/a b/it\'s $HOME; `id` "quoted" *'


def written(folder: Path, *arguments: str) -> Path:
    file = folder / "job.sbatch"
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    assert main(["launch", "slurm", *before, "--file", str(file), *arguments[len(before) :]]) == 0
    return file


def submitted(script: Path, code: int) -> tuple[int, dict[str, list[list[str]]], dict[str, str]]:
    """Exit code, what `srun` and `scontrol` were called with, and srun's environment, with stubs in their place."""
    folder = script.parent
    stubs = folder / "bin"
    stubs.mkdir(exist_ok=True)
    record = (
        f"#!{sys.executable}\nimport json, os, sys\n"
        "name = os.path.basename(sys.argv[0])\n"
        "with open(os.environ['RECORD'], 'a') as file:\n"
        "    print(json.dumps([name, sys.argv[1:], dict(os.environ)]), file=file)\n"
        "if name == 'scontrol' and sys.argv[1] == 'show':\n"
        "    print('\\n'.join(f'node{i:05d}' for i in range(20000)))\n"
        "sys.exit(int(os.environ['CODE']) if name == 'srun' else 0)\n"
    )
    for name in ("srun", "scontrol"):
        (stubs / name).write_text(record)
        (stubs / name).chmod(0o755)
    log = folder / f"record-{code}"
    env = {"PATH": f"{stubs}:/usr/bin:/bin", "RECORD": str(log), "CODE": str(code), "SLURM_JOB_ID": "1234567",
           "SLURM_JOB_NODELIST": "node[00000-19999]"}  # fmt: skip
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, cwd=folder)
    assert done.stderr == ""
    calls: dict[str, list[list[str]]] = {"srun": [], "scontrol": []}
    seen: dict[str, str] = {}
    for name, arguments, environment in map(json.loads, log.read_text().splitlines()):
        calls[name].append(arguments)
        if name == "srun":
            seen = environment
    return done.returncode, calls, seen


def test_the_command_is_the_one_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--train.lr", "1e-3", "--data.path", AWKWARD, "--train.batch_size=16"]
    script = written(
        tmp_path, "tiny-cpu", "--out", "my runs/it's", "--gpus-per-node", "4", "--nodes", "2", "--", *flags
    )
    assert capsys.readouterr().out == f"sbatch {script}\n"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    code, calls, seen = submitted(script, 0)
    expected = ["python", "-u", "-m", "ldit", "train", "tiny-cpu", "--out", "my runs/it's", *flags]
    assert (code, calls["srun"]) == (0, [["--wait=60", *expected]])
    assert calls["scontrol"] == [["show", "hostnames", "node[00000-19999]"]]
    assert (seen["MASTER_ADDR"], seen["MASTER_PORT"]) == ("node00000", str(10000 + 1234567 % 20000))
    parsed = parse_arguments(expected[5:])
    assert (parsed.out, parsed.config.data.path) == (Path("my runs/it's"), AWKWARD)


@pytest.mark.parametrize(
    ("ended", "code", "again"), [(0, 0, False), (138, 0, True), (2, 2, False), (1, 1, False), (143, 143, False)]
)
def test_only_138_queues_again(ended: int, code: int, again: bool, tmp_path: Path) -> None:
    got, calls, _ = submitted(written(tmp_path, "tiny-cpu"), ended)
    assert (got, ["requeue", "1234567"] in calls["scontrol"]) == (code, again)


def test_header(tmp_path: Path) -> None:
    text = written(
        tmp_path, "tiny-cpu", "--nodes", "2", "--gpus-per-node", "4", "--time", "1-12:00:00",
        "--partition", "a100,h100", "--account", "lab@site", "--job-name", "try-1", "--cpus-per-task", "12",
        "--", "--train.batch-size", "32",
    ).read_text()  # fmt: skip
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert options == {
        "job-name": "try-1", "nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "12",
        "time": "1-12:00:00", "partition": "a100,h100", "account": "lab@site", "output": "try-1-%j.log",
        "open-mode": "append", "signal": "USR1@180", "requeue": "",
    }  # fmt: skip
    assert text.startswith("#!/bin/bash\n#SBATCH")
    assert "\nsrun --wait=60 --cpus-per-task=12 python" in text


def test_defaults(tmp_path: Path) -> None:
    text = written(tmp_path, "tiny-cpu").read_text()
    assert "--out runs/tiny-cpu ||" in text and "--ntasks-per-node=8" in text and "--nodes=1\n" in text
    assert not re.search("time|partition|account|cpus", "\n".join(re.findall("^#SBATCH.*", text, re.MULTILINE)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pbs", "tiny-cpu"], "ldit launch needs a subcommand: slurm, not 'pbs'"),
        (["slurm", "tiny"], "unknown recipe 'tiny' (known: "),
        (["slurm", "tiny-cpu", "--nodes", "0"], "--nodes: must be at least 1, got 0"),
        (["slurm", "tiny-cpu", "--gpus-per-node", "-1"], "--gpus-per-node: must be at least 1"),
        (["slurm", "tiny-cpu", "--cpus-per-task", "0"], "--cpus-per-task: must be at least 1"),
        (["slurm", "tiny-cpu", "--job-name", "a\n#SBATCH --uid=0"], "--job-name: only letters"),
        (["slurm", "tiny-cpu", "--partition", "a b"], "--partition: only letters"),
        (["slurm", "tiny-cpu", "--account", "-x"], "--account"),
        (["slurm", "tiny-cpu", "--time", "two days"], "--time: expected HH:MM:SS"),
        (["slurm", "tiny-cpu", "--", "--train.lrr", "1"], "--train.lrr"),
        (["slurm", "tiny-cpu", "--", "--train.lr", "fast"], "fast"),
        (["slurm", "tiny-cpu", "--", "--train.lr", "-1"], "train.lr: must be positive"),
        (["slurm", "tiny-cpu", "--", "--out", "elsewhere"], "--out cannot come after --"),
        (["slurm", "tiny-cpu", "--", "--help"], "--help cannot come after --"),
        (["slurm", "tiny-cpu", "--train.lr", "1"], "--train.lr"),
        (["slurm", "imagenet256-7b"], "data.path: name the folder"),
        (["slurm", "tiny-cpu", "--nodes", "3"], "train.batch_size: 16 cannot be split over 24 processes"),
        (["slurm", "tiny-cpu", "--", "--train.micro-batch-size", "4"], "over 8 processes in passes of 4"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["launch", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ldit: ") and err.count("\n") == 1 and said in err
    assert not os.listdir(tmp_path)


def test_an_existing_file_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.sbatch"
    file.write_text("mine")
    assert main(["launch", "slurm", "tiny-cpu", "--file", str(file)]) == 2
    assert "mine.sbatch exists" in capsys.readouterr().err and file.read_text() == "mine"


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["launch", "--help"])
    assert main(["launch"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("usage: ldit launch slurm") and "needs a subcommand: slurm" in err


def test_the_name_of_a_job_does_not_move_its_run() -> None:
    assert SlurmRequest(recipe="tiny-cpu", job_name="try-1").run == Path("runs/tiny-cpu")
    one, other = SlurmRequest(recipe="a/exp.py:recipe"), SlurmRequest(recipe="b/exp.py:recipe")
    assert (one.run, one.name) == (Path("runs/a-exp.py-recipe"), "a-exp.py-recipe") and one.run != other.run
