"""How tests/golden/files was made, once, by the version that its README names: the commands, and readers of results.

`python tests/e2e/older_files.py NEW_FOLDER` makes such files with the version that is installed. test_older_files.py
reruns the same commands and compares with the same readers.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CLASSIFIER = "stopped/classifier/checkpoints/step-00000007"
_NETWORK = "--model.dim 8 --model.n-layers 2 --model.n-heads 2 --model.multiple-of 8"
_STEPS = "--train.batch-size 8 --train.log-every 1 --train.warmup 0 --train.cooldown 0 --data.workers 0"
_FLOW = "--data.image-size 16 --data.max-per-class 20 --model.input-size 16 --model.patch-size 4"
_SET = (
    "sample --ckpt exports/ldit --num 20 --steps 3 --solver heun --guidance 2 --labels random --seed 7 --batch-size 3"
)

# Name -> arguments of `ldit`, run inside the folder; the first run of those in STOPPED was stopped by a signal.
COMMANDS = {
    "classifier": f"train extractor-small {_STEPS} --data.path emoji64 --data.image-size 32 --data.max-per-class 20 "
    "--model.widths 4 8 --model.norm-num-groups 2 --train.steps 12 --train.checkpoint-every 6 --train.keep 1 "
    "--heldout.every 6 --heldout.num 16 --train.no-async-save --out stopped/classifier",
    "statistics": f"stats emoji64@heldout --num 40 --image-size 32 --extractor {CLASSIFIER} --out statistics.npz",
    "adamw": f"train tiny-cpu {_NETWORK} {_STEPS} --train.steps 24 --train.checkpoint-every 12 --train.keep 1 "
    "--train.sample-every 18 --train.attention-every 12 --heldout.every 12 --heldout.num 16 --eval.every 12 "
    f"--eval.num 18 --eval.extractor {CLASSIFIER} --eval.reference statistics.npz --out stopped/adamw",
    "muon": f"train emoji64-class-xs {_NETWORK} {_STEPS} {_FLOW} --model.qk-norm head --process.prediction v "
    "--optim.kind muon --optim.weight-decay 0.01 --train.lr 0.01 --train.precision bf16 --train.steps 16 "
    "--train.checkpoint-every 6 --train.sample-every 8 --train.keep 1 --train.attention-every 0 --data.flip "
    "--ema.more 0.9 --ema.power 0.05 0.1 --ema.snapshot-every 8 --heldout.every 8 --heldout.num 16 --out stopped/muon",
    "autoencoder": f"train emoji64-vae {_STEPS} --data.image-size 16 --train.precision fp32 --train.steps 12 "
    "--data.max-per-class 20 --model.latent-channels 2 --model.block-out-channels 2 4 "
    "--model.layers-per-block 1 --model.norm-num-groups 2 "
    "--train.checkpoint-every 6 --train.sample-every 9 --train.keep 1 --heldout.every 6 --heldout.num 16 "
    "--out stopped/autoencoder",
    "cache": "encode emoji64 --codec emoji64-vae --image-size 16 --max-per-class 2 --heldout heldout_combinations.txt "
    "--batch-size 3 --shard-size 8 --workers 0 --out stopped/cache",
    "latents": f"train emoji64-latent-s {_NETWORK} {_STEPS} --data.path finished/cache --data.image-size 16 "
    "--data.max-per-class 2 --model.input-size 4 --train.precision fp32 --train.steps 4 --train.checkpoint-every 0 "
    "--train.sample-every 0 --heldout.every 4 --out latents",
    "folder": f"{_SET} --out stopped/set",
    "array": f"{_SET} --out stopped/set.npz",
    "average": "ema stopped/muon average --sigma-rel 0.07",
    "evaluation": f"evaluate finished/set.npz --reference statistics.npz --extractor {CLASSIFIER} "
    "--json evaluation.json",
    "codes": "encode emoji64 --codec exports/autoencoder --image-size 16 --max-per-class 1 --heldout '' --dtype fp32 "
    "--workers 0 --out codes",
}

# Name -> (signal, audit event, ending): it came when a file whose name ends so was about to be opened or renamed.
STOPPED = {
    "classifier": ("SIGTERM", "os.rename", "checkpoints/step-00000006"),
    "adamw": ("SIGKILL", "open", "samples/step-00000018.png"),
    "muon": ("SIGINT", "open", "samples/step-00000008.png"),
    "autoencoder": ("SIGKILL", "open", "samples/step-00000009.png"),
    "cache": ("SIGKILL", "os.rename", "heldout/shard-00003.safetensors"),
    "folder": ("SIGKILL", "open", "/000007.png"),
    "array": ("SIGKILL", "os.rename", "/3.npy"),
}
STOPPER = """
import os, signal, sys
number, awaited, end = sys.argv[1:4]
come = False
def hook(event, args):
    global come
    if event == awaited and not come and any(str(name).endswith(end) for name in args[:2]):
        come = True
        os.kill(os.getpid(), signal.Signals[number])
sys.addaudithook(hook)
from ldit.cli.main import main
sys.exit(main(sys.argv[4:]))
"""
RUNS = ("classifier", "adamw", "muon", "autoencoder")
HEADS = {"exports/dit.pt": 2}
MODELS = ("exports/ldit", "exports/original", "exports/dit.pt")
REPORTED = ("fd_classifier", "num_samples", "num_reference", "labels", "extractor_sha256")
RATES = ("images_per_second", "data_wait", "memory", "mfu")  # of the machine


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    """sha256 of every file below a folder, by its path in it."""
    found = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in found}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in RATES} for line in lines]


def finished(name: str) -> dict[str, Any]:
    """A run below the current folder: its log, the names of its files, the sha256 of its tensor files."""
    run = Path("stopped", name)
    files = [path for path in hashes(run) if not path.startswith(("samples/", "."))]
    return {"metrics": metrics(run), "files": files, "tensors": hashes(run, "*.safetensors")}


def outputs(source: str) -> dict[str, torch.Tensor]:
    """Of a model with EMA weights and with raw ones: outputs for fixed inputs (2, C, H, W), and two sampled latents."""
    import ldit

    found = {}
    for word, ema in (("ema", True), ("raw", False)):
        pipe = ldit.load(source, device="cpu", ema=ema, heads=HEADS.get(source))
        model = pipe.spec.model
        shape = (2, model.in_channels, model.input_size, model.input_size)
        x = (torch.arange(math.prod(shape)) * 37 % 101 / 50 - 1).view(shape)
        with torch.no_grad():
            found[f"{source} {word} output"] = pipe.model(x, torch.tensor([17.0, 801.0]), torch.tensor([1, 4]))
        found[f"{source} {word} latents"] = pipe.sample_latents([0, 3], seed=5, steps=3, solver="euler", guidance=1.5)
    return found


def codes(cache: Path) -> torch.Tensor:
    """Latent means (N, 2, C, h, w) of the first shard of a cache."""
    return load_file(cache / "shard-00000.safetensors")["mean"]


def ldit_command(arguments: list[str], stopped: tuple[str, str, str] | None = None) -> None:
    begin = ["-m", "ldit"] if stopped is None else ["-c", STOPPER, *stopped]
    expected = {None: 0, "SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}
    done = subprocess.run([sys.executable, *begin, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == expected[stopped and stopped[0]], (arguments, done.returncode)


def again(folder: Path, name: str, *others: str) -> Path:
    """Copy `folder`, enter the copy, and run these commands there: a stopped one is finished."""
    copy = shutil.copytree(folder, folder.with_name(f"{folder.name}-{name}"))
    os.chdir(copy)
    for one in (name, *others):
        ldit_command(shlex.split(COMMANDS[one]))
    return copy


def random_state(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    widths = {name: math.prod(shape[1:]) if len(shape) > 1 else 10 for name, shape in shapes.items()}
    return {n: torch.randn(shape, generator=generator) / widths[n] ** 0.5 for n, shape in shapes.items()}


def dit_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Parameters of a facebookresearch/DiT of one block, for latents (4, 8, 8) and 10 classes."""
    linear = {
        "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width),
        "blocks.0.attn.qkv": (3 * width, width), "blocks.0.attn.proj": (width, width),
        "blocks.0.mlp.fc1": (4 * width, width), "blocks.0.mlp.fc2": (width, 4 * width),
        "blocks.0.adaLN_modulation.1": (6 * width, width),
        "final_layer.adaLN_modulation.1": (2 * width, width), "final_layer.linear": (32, width),
        "x_embedder.proj": (width, 4, 2, 2),
    }  # fmt: skip
    shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    return {**shapes, "pos_embed": (1, 16, width), "y_embedder.embedding_table.weight": (11, width)}


def write_models(work: Path) -> None:
    """exports/: of two finished runs, and of random weights in the layouts that these runs cannot be written in."""
    # Our layout, EMA apart, and diffusers' for the autoencoder: from runs that are finished in copies.
    again(work, "muon")
    ldit_command(["convert", "stopped/muon", "exports/ldit"])
    shutil.copytree("exports/ldit", work / "exports" / "ldit")
    again(work, "autoencoder")
    ldit_command(["convert", "stopped/autoencoder", str(work / "exports" / "autoencoder"), "--to", "diffusers"])
    os.chdir(work)
    # A DiT .pt: random weights, read into our layout and written from there.
    dit = {key: random_state(dit_shapes(8), seed) for key, seed in (("model", 0), ("ema", 1))}
    torch.save(dit, "dit.pt")
    ldit_command(["convert", "dit.pt", "dit", "--heads", "2"])
    ldit_command(["convert", "dit", "exports/dit.pt", "--to", "pt"])
    # The original's layout: the shapes are those of the adamw run.
    step = work / "stopped" / "adamw" / "checkpoints" / "step-00000012" / "model.safetensors"
    shapes = {name: tuple(value.shape) for name, value in load_file(step).items()}
    Path("original").mkdir()
    for word, seed in (("consolidated", 2), ("consolidated_ema", 3)):
        torch.save(random_state(shapes, seed), f"original/{word}.00-of-01.pth")
    settings = {
        "model": "DiT_Llama", "dim": 8, "n_layers": 2, "n_heads": 2, "multiple_of": 8, "patch_size": 4, "vae": "ema",
        "in_channels": 3, "learn_sigma": True, "qk_norm": True, "image_size": 128, "num_classes": 9,
    }  # fmt: skip
    torch.save(argparse.Namespace(**settings), "original/model_args.pth")
    ldit_command(["convert", "original", "original-ldit"])
    ldit_command(["convert", "original-ldit", "exports/original", "--to", "original"])
    for left in ("dit.pt", "dit", "original", "original-ldit"):
        shutil.rmtree(left) if Path(left).is_dir() else os.remove(left)


def main(work: Path) -> None:
    sys.path.append(str(Path(__file__).parents[1] / "train"))
    from golden_losses import machine

    torch.set_num_threads(1)
    work.mkdir()
    (work / "exports").mkdir()
    found: dict[str, Any] = {"machine": machine()}
    # What is stopped, and what it needs.
    for name in ("classifier", "statistics", "adamw", "muon", "autoencoder", "cache"):
        os.chdir(work)
        ldit_command(shlex.split(COMMANDS[name]), STOPPED.get(name))
    write_models(work)
    for name in ("folder", "array"):
        ldit_command(shlex.split(COMMANDS[name]), STOPPED[name])
    # The same commands again, each in a copy: what this version comes to.
    (work / "finished").mkdir()
    for name in RUNS:
        shutil.rmtree(work.with_name(f"{work.name}-{name}"), ignore_errors=True)
        again(work, name, *["average"] * (name == "muon"))
        found[name] = finished(name)
    found["average"] = hashes(work.with_name(f"{work.name}-muon") / "average", "*.safetensors")
    shutil.copytree(again(work, "cache") / "stopped" / "cache", work / "finished" / "cache")
    found["folder"] = hashes(again(work, "folder") / "stopped" / "set")
    made = again(work, "array") / "stopped"
    for file in ("set.npz", "set.npz.json"):
        shutil.copy(made / file, work / "finished" / file)
    again(work, "latents")
    found["latents"] = metrics(Path("latents"))
    again(work, "evaluation")
    report = json.loads(Path("evaluation.json").read_text())
    found["evaluation"] = {key: report[key] for key in REPORTED}
    tensors = {"codes": codes(again(work, "codes") / "codes")}
    os.chdir(work)
    for source in MODELS:
        tensors |= outputs(source)
    save_file({name: value.contiguous() for name, value in tensors.items()}, "outputs.safetensors")
    Path("finished.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
