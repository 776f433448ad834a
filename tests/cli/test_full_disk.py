"""A full disk: each command that ends in a file names it and the bytes, and leaves an older file as it was.

The disk is stood in for by the process's limit on the size of a file, which gives the same error at the same place.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from eval.evaluation import folder, noise
from folders import make_folder, over

from ldit.commands.train import run as train
from ldit.training import hooks

RUNNER = """
import contextlib, io, json, resource, sys
import ldit.cli.main
from ldit.eval import evaluate
from eval.evaluation import Stub
evaluate.open_named = lambda name, weights, device, protocol=None: Stub()
commands, said = json.load(sys.stdin), []
resource.setrlimit(resource.RLIMIT_FSIZE, (90, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for arguments in commands:
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = ldit.cli.main.main(arguments)
    said.append([code, error.getvalue()])
print(json.dumps(said))
"""
SAMPLE = ["sample", "--ckpt", "RUN", "--class-labels", "0", "1", "--steps", "1", "--device", "cpu"]
COMMANDS = {
    "grid.png": [*SAMPLE, "--image-save-path", "FILE"],
    "grid.jpg": [*SAMPLE, "--image-save-path", "FILE"],
    "singles": [*SAMPLE, "--image-save-path", "OTHER.png", "--out", "FILE"],
    "latents.npy": [*SAMPLE, "--latents-out", "FILE"],
    "latents.pt": [*SAMPLE, "--latents-out", "FILE"],
    "latents.safetensors": [*SAMPLE, "--latents-out", "FILE"],
    "set": ["sample", "--ckpt", "RUN", "--num", "2", "--steps", "1", "--out", "FILE"],
    "set.npz": ["sample", "--ckpt", "RUN", "--num", "2", "--steps", "1", "--out", "FILE"],
    "curves.png": ["plot", "RUN", "--out", "FILE"],
    "curves.svg": ["plot", "RUN", "--out", "FILE"],
    "report.json": ["evaluate", "IMAGES", "--reference", "IMAGES", "--extractor", "stub", "--json", "FILE"],
    "chart.png": ["evaluate", "IMAGES", "--reference", "IMAGES", "--extractor", "stub", "--figure", "FILE"],
    "stats.npz": ["stats", "IMAGES", "--extractor", "stub", "--out", "FILE"],
    "export": ["convert", "RUN", "FILE"],
    "average": ["ema", "RUN", "FILE", "--sigma-rel", "0.07"],
    "job.sbatch": ["launch", "slurm", "tiny-cpu", "--file", "FILE"],
    "trained": ["train", "tiny-cpu", "--train.steps", "1", "--out", "FILE"],
    "bench.json": ["bench", "train", "--size", "tiny", "--batch", "2", "--steps", "1", "--rounds", "1", "--variants",
                   "fused", "--precision", "fp32", "--json", "FILE"],
}  # fmt: skip
MADE_ANEW = ("singles", "set", "export", "average", "trained", "job.sbatch", "set.npz")  # never replaced


@pytest.mark.skipif(sys.platform == "win32", reason="limits of processes")
def test_each_command_says_so_and_loses_nothing(tmp_path: Path) -> None:
    values = {"ema.power": (0.05, 0.1), "ema.snapshot_every": 1}
    assert train(over(make_folder(tmp_path / "data"), values), tmp_path / "run") == 0
    images = folder(tmp_path / "images", noise(6, 0))
    # Older files, which these commands may replace.
    for name in COMMANDS.keys() - set(MADE_ANEW):
        (tmp_path / name).write_bytes(b"" if name in ("report.json", "chart.png", "stats.npz") else b"older")
    words = {"RUN": str(tmp_path / "run"), "IMAGES": str(images), "OTHER.png": str(tmp_path / "grid.png")}
    lines = [[{**words, "FILE": str(tmp_path / n)}.get(w, w) for w in line] for n, line in COMMANDS.items()]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(lines), capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for name, (code, text) in zip(COMMANDS, json.loads(done.stdout), strict=True):
        last = text.splitlines()[-1]
        assert code == 1 and last.startswith("ldit: ") and "was not written: " in last, (name, text)
        assert str(tmp_path / name) in last and " are free" in last, (name, text)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    new = {path.relative_to(tmp_path).as_posix() for path in after.keys() - before.keys()}
    assert {path: after.get(path) for path in before} == before
    # What is left: the beginnings of jobs that the same command continues, nothing that has the name of a result.
    assert all(name.startswith(("set/", "set.npz.", "trained/")) for name in new), new


def test_no_fault_of_a_grid_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of its drawing nor of its writing; the next grid is tried again."""
    drawn = []

    def refuse(*arguments: object, **named: object) -> None:
        drawn.append(arguments)
        raise ValueError("can't measure length of multiline text")

    monkeypatch.setattr("ldit.commands.train_hooks.labelled_grid", refuse)
    config = over(make_folder(tmp_path / "data"), {"train.sample_every": 1})
    assert train(config, tmp_path / "run") == 0 and len(drawn) == 2
    monkeypatch.undo()
    monkeypatch.setattr(hooks, "put", refuse)
    assert train(config, tmp_path / "other") == 0 and len(drawn) == 4
    assert not list(tmp_path.rglob("step-*.png"))


def test_free_space_is_looked_at_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldit.checkpoint import save
    from ldit.errors import RunError

    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(
        RunError, match=r"checkpoints was not written: .*a checkpoint needs [\d,]+ bytes, 1,000 are free"
    ):
        train(over(make_folder(tmp_path / "data")), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
