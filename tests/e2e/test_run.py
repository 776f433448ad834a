"""Whole commands in real processes: train, kill, resume, sample, and one line for every mistake."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldit.data.source import open_data

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["train", "tiny-cpu", "--train.checkpoint-every", "5", "--train.sample-every", "0", "--train.steps", "40",
         "--train.log-every", "1"]  # fmt: skip
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def ldit(*arguments: object, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "ldit", *map(str, arguments)], capture_output=True, text=True, env=ENV, check=False
    )
    assert check is None or done.returncode == check, done.stderr
    return done


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ldit", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENV)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    ldit(*TRAIN, "--out", out)
    return out


def final(run: Path, step: int = 40) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    files = ("model", "ema", "state/optimizer")
    return {f"{f}:{k}": v for f in files for k, v in load_file(folder / f"{f}.safetensors").items()}


def losses(run: Path) -> list[tuple[int, float]]:
    """The loss log line by line, so that a step logged twice would show."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records]


def assert_same_run(a: Path, b: Path) -> None:
    left, right = final(a), final(b)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert losses(a) == losses(b)


def test_killed_at_random_it_ends_the_same(undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL, the same command again, until it is done: weights, EMA, optimiser and loss log bit-equal."""
    rng, out, kills = random.Random(0), tmp_path / "run", 0
    while kills < 3:
        process = start(*TRAIN, "--out", out)
        # A run lives about three seconds, most of them imports: wait for a first line, then die soon after.
        assert process.stderr is not None
        process.stderr.readline()
        time.sleep(rng.uniform(0.0, 0.35))
        alive = process.poll() is None
        process.kill()
        process.wait()
        process.stderr.close()
        kills += alive
        if not alive:
            break
    assert kills, "never killed: it was done before"
    ldit(*TRAIN, "--out", out)
    assert_same_run(undisturbed, out)
    assert not list(out.rglob("*.tmp-*"))
    ldit("info", out, "--verify")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_signals_checkpoint_first(number: int, code: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(*TRAIN, "--out", out, "--train.checkpoint-every", "1000", "--train.steps", "4000")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 10/"):
            break
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait() == code, rest
    assert len(list((out / "checkpoints").glob("step-*"))) == 1
    assert next((out / "checkpoints").iterdir()).name >= "step-00000010"


def test_two_runs_in_one_directory(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start(*TRAIN, "--out", out, "--train.steps", "100000")
    assert first.stderr is not None
    first.stderr.readline()
    second = ldit(*TRAIN, "--out", out, check=2)
    assert "in use" in second.stderr and len(second.stderr.splitlines()) == 1
    first.kill()
    first.wait()
    first.stderr.close()


def test_another_configuration_is_refused_with_its_difference(undisturbed: Path) -> None:
    said = ldit(*TRAIN, "--out", undisturbed, "--train.lr", "0.5", check=2).stderr
    assert "train.lr 0.001 -> 0.5" in said and len(said.splitlines()) == 1


def test_other_images_are_refused(tmp_path: Path) -> None:
    data = shutil.copytree(ROOT / "src/ldit/assets/emoji64-styles/3d", tmp_path / "data")
    command = [*TRAIN, "--train.steps", "4", "--data.path", data, "--out", tmp_path / "run"]
    ldit(*command)
    train, _ = open_data(str(data), 16, max_per_class=20)
    train.paths[0].unlink()
    said = ldit(*command, "--train.steps", "6", check=2).stderr
    assert "the training images differ from those of" in said.splitlines()[-1]


def test_flags_take_values_in_any_spelling(tmp_path: Path) -> None:
    flags = ["--train.steps", "1", "--data.flip", "true", "--model.learn_sigma", "False", "--model.qk-norm", "false"]
    ldit("train", "tiny-cpu", "--out", tmp_path / "run", *flags, "--model.class_dropout_prob", "0")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["flip"] is True
    assert config["model"]["learn_sigma"] is False and config["model"]["qk_norm"] is False


def test_finished_runs_say_so(undisturbed: Path) -> None:
    assert "nothing left to do" in ldit(*TRAIN, "--out", undisturbed).stderr


def test_samples_carry_their_settings(undisturbed: Path, tmp_path: Path) -> None:
    grid, folder = tmp_path / "grid.png", tmp_path / "singles"
    arguments = ("--ckpt", undisturbed, "--class-labels", "food", "3", "--seed", "5", "--num_sampling_steps", "4")
    done = ldit("sample", *arguments, "--image_save_path", grid, "--out", folder)
    assert done.stdout.splitlines()[-1] == str(grid)
    with Image.open(grid) as image:
        settings = json.loads(image.text["ldit"])  # type: ignore[attr-defined]
    assert settings["labels"] == [3, 3] and settings["seeds"] == [5, 6] and settings["sampling"]["steps"] == "4"
    singles = sorted(p.name for p in folder.iterdir())
    assert singles == ["00000_food_seed5.png", "00001_food_seed6.png"]
    latents = tmp_path / "z.safetensors"
    ldit("sample", *arguments, "--latents-out", latents)
    assert load_file(latents)["latents"].shape == (2, 3, 16, 16)


def unseal(step: Path) -> None:
    """A committed step as a plain export, which may be edited."""
    (step / "manifest.json").unlink()
    shutil.rmtree(step / "state")


def test_original_sample_command(undisturbed: Path, tmp_path: Path) -> None:
    step = shutil.copytree(undisturbed / "checkpoints" / "step-00000040", tmp_path / "copy")  # valid wherever copied
    command = [sys.executable, "-u", str(ROOT / "sample.py"), "--ckpt", str(step), "--num_sampling_steps", "2"]
    labels = ["--class_labels", "1", "2", "0", "4", "8"]
    subprocess.run([*command, *labels], check=True, env=ENV, capture_output=True, cwd=tmp_path)
    with Image.open(tmp_path / "sample_ema.png") as image:
        assert image.size == (4 * 18 + 2, 2 * 18 + 2)
    ldit("info", step, "--verify")  # a sealed folder gets no file more
    unseal(step)
    subprocess.run([*command, "--no_ema"], check=True, env=ENV, capture_output=True)
    assert (step / "sample.png").exists()


@pytest.fixture(scope="module")
def damaged(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of a committed step with a fault each."""
    base = tmp_path_factory.mktemp("damaged")
    step = undisturbed / "checkpoints" / "step-00000040"
    folders = {}
    for fault in ("truncated", "flipped", "unknown-key", "no-weights", "nonull"):
        folder = folders[fault] = shutil.copytree(step, base / fault)
        weights = folder / "ema.safetensors"
        data = bytearray(weights.read_bytes())
        if fault == "truncated":
            weights.write_bytes(data[: len(data) // 2])
        elif fault == "flipped":
            data[len(data) // 2] ^= 1
            weights.write_bytes(data)
        elif fault == "nonull":
            unseal(folder)
            config = json.loads((folder / "config.json").read_text())
            config["model"]["class_dropout_prob"] = 0
            (folder / "config.json").write_text(json.dumps(config))
        elif fault == "unknown-key":
            unseal(folder)
            config = json.loads((folder / "config.json").read_text())
            config["model"]["colour"] = 1
            (folder / "config.json").write_text(json.dumps(config))
        else:
            weights.unlink()
            (folder / "model.safetensors").unlink()
    return folders


MISTAKES = [
    (["sample", "--ckpt", "nowhere/at-all"], "nowhere"),
    (["sample", "--ckpt", "{run}", "--class-labels", "bird"], "bird"),
    (["sample", "--ckpt", "{run}", "--class-labels", "9"], "9"),
    (["sample", "--ckpt", "{run}", "--height", "18"], "18"),
    (["sample", "--ckpt", "{run}", "--solver", "rk"], "rk"),
    (["sample", "--ckpt", "{run}", "--steps", "2000"], "2000"),
    (["sample", "--ckpt", "{run}", "--guidance", "nan"], "guidance"),
    (["sample", "--ckpt", "{nonull}", "--guidance", "2"], "no null class"),
    (["sample", "--ckpt", "{run}", "--num", "8"], "num 8"),
    (["sample", "--ckpt", "{run}", "--out", "many.npz"], "many.npz"),
    (["sample", "--ckpt", "{run}", "--out", "{tmp}/bad/a/bad.png"], "bad.png"),
    (["sample", "--ckpt", "{run}", "--image-save-path", "{tmp}"], "is a folder"),
    (["sample", "--ckpt", "{run}", "--prompts", "a cat"], "this model takes no text"),
    (["train", "tiny-cpu", "--out", "{tmp}/bad/a/bad.png"], "bad.png"),
    (["train", "tiny-cpu", "--out", "{tmp}/r", "--sampling.solver", "bogus"], "bogus"),
    (["train", "tiny-cpu", "--out", "{tmp}/r", "--optim.beta1", "2"], "optim.beta1"),
    (["train", "tiny-cpu", "--out", "{tmp}/r", "--parallel.tp", "2"], "parallel.tp"),
    (["convert", "{run}", "{tmp}/no/such/x", "--to", "ldit"], "no/such"),
    (["sample", "--ckpt", "{run}", "--latents-out", "z.pkl"], "z.pkl"),
    (["sample", "--ckpt", "{run}", "--image-save-path", "none/there/x.png"], "none"),
    (["sample", "--ckpt", "{run}", "--device", "cuda:77"], "cuda:77"),
    (["sample", "--ckpt", "{run}", "--colour", "red"], "--colour"),
    (["sample", "--ckpt", "{truncated}"], "ema.safetensors"),
    (["sample", "--ckpt", "{flipped}"], "ema.safetensors"),
    (["sample", "--ckpt", "{unknown-key}"], "model.colour"),
    (["sample", "--ckpt", "{no-weights}"], "no-weights"),
    (["info", "{flipped}", "--verify"], "ema.safetensors"),
    (["convert", "{run}", "{tmp}/o", "--to", "original"], "pixels"),
    (["convert", "{run}", "{tmp}/o", "--to", "pt"], "class"),
    (["convert", "{run}", "{run}"], "exists"),
    (["train", "tiny-cpu", "--out", "{tmp}/r", "--data.path", "{tmp}/missing"], "missing"),
    (["train", "tiny-cpu", "--out", "{tmp}/r", "--data.path", "{tmp}/data"], "empty"),
    (["train", "tiny-cpu", "--out", "{tmp}/r", "--data.path", "{tmp}/two"], "2 class"),
    (["train", "tiny-cpu", "--out", "{tmp}/r", "--data.path", "{tmp}/bad",
      "--model.num-classes", "1", "--train.batch-size", "2"], "bad.png"),
    (["train", "tiny-cpu", "--out", "{run}", "--data.path", "{tmp}/renamed"], "class names"),
    (["train", "tiny-cpu", "--out", "{tmp}/r", "--data.heldout", "list.txt"], "list.txt"),
    (["train", "tiny-cpu", "--out", "{tmp}/r", "--model.dim", "65"], "model.n_heads"),
    (["train", "imagenet256-3b", "--out", "{tmp}/r"], "data.path"),
    (["train", "nothing"], "nothing"),
    (["fly"], "fly"),
]  # fmt: skip


def make_folders(tmp: Path) -> None:
    for name, images in {"data/empty": 0, "two/a": 1, "two/b": 1, "bad/a": 1}.items():
        (tmp / name).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (16, 16)).save(tmp / name / f"{i}.png")
    (tmp / "bad/a/bad.png").write_bytes(b"not a picture")
    shutil.copytree(ROOT / "src/ldit/assets/emoji64-styles/3d", tmp / "renamed")
    (tmp / "renamed/travel").rename(tmp / "renamed/journeys")


def test_every_mistake_is_one_line(
    undisturbed: Path, damaged: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Exit code 2, one line on stderr that names the culprit, no image written; in process, for speed."""
    from ldit.cli.main import main

    monkeypatch.chdir(tmp_path)
    make_folders(tmp_path)
    places = {"run": undisturbed, "tmp": tmp_path, **damaged}
    for arguments, named in MISTAKES:
        filled = [a.format_map({k: str(v) for k, v in places.items()}) for a in arguments]
        code = main(filled)
        said = capsys.readouterr().err
        last = [line for line in said.splitlines() if line.startswith("ldit: ")]
        assert code == 2, (arguments, code, said)
        assert len(last) == 1 and named in last[0], (arguments, said)
        assert "Traceback" not in said
    assert not list(tmp_path.glob("*.png"))
    assert not (tmp_path / "o").exists()


def test_a_damaged_newest_step_falls_back_loudly(undisturbed: Path, tmp_path: Path) -> None:
    run = shutil.copytree(undisturbed, tmp_path / "run")
    weights = run / "checkpoints" / "step-00000040" / "ema.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    report = ldit("info", run)
    assert "step-00000035" in report.stdout and "step 40 is skipped" in report.stderr
    ldit(*TRAIN, "--out", run)  # resumes from 35 and makes 40 again
    assert_same_run(undisturbed, run)
