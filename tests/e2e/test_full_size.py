"""Full-size folders. 600M in the original's layout: memory while loading, and the original's command through it. 3B in
ours: memory while loading and sampling, whole and with its blocks on the host."""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldit.checkpoint.export import CONFIG
from ldit.config.presets import preset
from ldit.config.spec import AutoencoderConfig, DDPMConfig, ModelSpec
from ldit.nn.build import parameter_shapes
from ldit.storage import manifest
from ldit.storage.shards import ShardWriter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30

# Watches the peak of anonymous memory in a thread.
WATCHED = """
import json, sys, threading, time
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(l for l in lines if l.startswith("RssAnon")).split()[1]) * 1024
import torch, ldit
import ldit.pipeline.load
before = peak = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
"""
LOAD = (
    WATCHED
    + """\
started = time.perf_counter()
pipe = ldit.load(sys.argv[1], "cpu", torch.bfloat16)
seconds = time.perf_counter() - started
done = True; thread.join()
size = sum(p.numel() * p.element_size() for p in pipe.model.parameters())
print(json.dumps({"before": before, "peak": peak, "final": anonymous(), "weights": size, "seconds": seconds}))
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("600m")
    generator = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(preset("DiT_Llama_600M_patch2", qk_norm=True))
    state = {name: torch.rand(shape, generator=generator).sub_(0.5).mul_(0.05) for name, shape in shapes.items()}
    torch.save(state, base / "consolidated_ema.00-of-01.pth")
    args = argparse.Namespace(
        model="DiT_Llama_600M_patch2", image_size=256, num_classes=1000, vae="ema", qk_norm=True, precision="bf16"
    )
    torch.save(args, base / "model_args.pth")
    return base


def test_loading_in_bf16_needs_little_more_than_the_weights(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOAD, folder], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    print(report)
    assert report["weights"] == 2 * 609_836_576
    assert report["peak"] <= report["final"] + GIB


def test_the_originals_command(folder: Path, tmp_path: Path) -> None:
    latents = tmp_path / "z.safetensors"
    command = [sys.executable, "-u", str(ROOT / "sample.py"), "--ckpt", str(folder), "--precision", "fp32"]
    few = ["--num_sampling_steps", "2"]
    subprocess.run([*command, *few, "--latents-out", str(latents)], check=True)
    z = load_file(latents)["latents"]
    assert z.shape == (8, 4, 32, 32) and z.isfinite().all()

    stopped = subprocess.run([*command, *few], capture_output=True, text=True, check=False)
    assert stopped.returncode == 2
    assert len(stopped.stderr.splitlines()) == 1 and "stabilityai/sd-vae-ft-ema" in stopped.stderr
    assert not list(folder.glob("*.png"))


def test_the_originals_command_decodes_through_the_published_autoencoder(folder: Path, tmp_path: Path) -> None:
    """ROOT/stabilityai/sd-vae-ft-ema: random weights of the true architecture, 83.7M parameters."""
    from ldit.codecs.kl_network import build_network
    from ldit.config.autoencoder import AutoencoderModelConfig
    from ldit.storage.tensors import write_safetensors

    vae = tmp_path / "stabilityai" / "sd-vae-ft-ema"
    vae.mkdir(parents=True)
    stated = AutoencoderModelConfig().to_diffusers()
    torch.manual_seed(0)
    network = build_network(stated)
    assert round(sum(p.numel() for p in network.parameters()) / 1e5) == 837
    (vae / "config.json").write_text(json.dumps(stated))
    write_safetensors(vae / "diffusion_pytorch_model.safetensors", network.state_dict().items())
    command = [sys.executable, "-u", str(ROOT / "sample.py"), "--ckpt", str(folder), "--num_sampling_steps", "2",
               "--class_labels", "207", "360", "--local_diffusers_model_root", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(folder / "sample_ema.png") as grid:
        assert grid.size == (2 * 256 + 3 * 2, 256 + 2 * 2)


SAMPLE = (
    WATCHED
    + """\
started = time.perf_counter()
pipe = ldit.load(sys.argv[1], "cpu", sys.argv[2], offload=sys.argv[3] == "offload")
seconds = {"load": time.perf_counter() - started}
loading, final = peak, anonymous()
started = time.perf_counter()
latents = pipe.sample_latents([207], steps=2, seed=0)
seconds["sample"] = time.perf_counter() - started
done = True; thread.join()
print(json.dumps({"before": before, "loading": loading, "final": final, "peak": peak, "seconds": seconds,
                  "shape": list(latents.shape), "finite": bool(latents.isfinite().all())}))
"""
)


@pytest.fixture(scope="module")
def folder_3b(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Numbers from one random pool, each matrix from another place of it: 4.2 billion fresh ones take minutes."""
    base = tmp_path_factory.mktemp("3b")
    if shutil.disk_usage(base).free < 12 * GIB:
        pytest.skip("needs 12 GB of disk")
    model = preset("DiT_Llama_3B_patch2", qk_norm=True)
    spec = ModelSpec(model, DDPMConfig(), AutoencoderConfig("stabilityai/sd-vae-ft-ema"))
    (base / CONFIG).write_text(json.dumps(spec.to_json()))
    shapes = parameter_shapes(model)
    generator = torch.Generator().manual_seed(0)
    pool = torch.rand(1 << 26, generator=generator).sub_(0.5).mul_(0.05).bfloat16()
    with ShardWriter(base / "model.safetensors", [(n, torch.bfloat16, s) for n, s in shapes.items()]) as writer:
        for shape in shapes.values():
            count = torch.Size(shape).numel()
            start = int(torch.randint(len(pool) - count, (), generator=generator))
            writer.add(pool[start : start + count].view(shape))
    known = {"model.safetensors": writer.record}
    (base / manifest.NAME).write_text(json.dumps(manifest.build(base, known)))
    yield base
    shutil.rmtree(base)


@pytest.mark.parametrize(("dtype", "how"), [("bf16", "whole"), ("fp32", "offload")])
def test_3b_samples_in_little_memory(folder_3b: Path, dtype: str, how: str) -> None:
    """Whole in bf16 it may need the 8.5 GB of its weights, and needs none of them where they stay the file's own pages;
    with its blocks on the host and in fp32, whose weights are 17 GB, one block of 0.45 GB and what is no block."""
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE, str(folder_3b), dtype, how], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    print(report)
    assert report["shape"] == [1, 4, 32, 32] and report["finite"]
    assert report["peak"] <= (10 * GIB if how == "whole" else report["before"] + GIB)
    assert report["loading"] <= report["final"] + GIB
