"""Images and speed of a DiTPipeline folder: diffusers' own pipeline against ours, from the same noise.

    python benchmarks/pipelines.py [--size S] [--steps 20] [--images 4] [--rounds 5] [--json F]

A folder with a random network of 1,000 classes, latents of 32 x 32 and a small autoencoder is written by diffusers, and
opened by both. Each scheduler runs with its default times, which ours are given. A round times both, in alternating
order, and compares their images. The last line of stdout is one JSON object.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import diffusers as package
import torch
from diffusers.pipelines.dit import pipeline_dit
from torch import Tensor

import ldit
from ldit.bench.ceiling import device_name
from ldit.config.presets import ORIGINAL_DIT
from ldit.diffusion import DDPM
from ldit.rng import normal

diffusers: Any = package
SCHEDULERS: dict[str, Any] = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "dpm++2m": (diffusers.DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}),
    "unipc2": (diffusers.UniPCMultistepScheduler, {"final_sigmas_type": "zero"}),
}
GUIDANCE = 4.0


def written(folder: Path, size: str) -> None:
    """A DiTPipeline with random weights, all of one set of embedders, as the published ones are."""
    width, depth, heads = ORIGINAL_DIT[size]
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=4, out_channels=8, num_layers=depth,
        sample_size=32, patch_size=2, num_embeds_ada_norm=1000, activation_fn="gelu-approximate",
        norm_type="ada_norm_zero", norm_elementwise_affine=False, attention_bias=True,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    for block in network.transformer_blocks:
        block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = diffusers.AutoencoderKL(block_out_channels=(16,) * 4, norm_num_groups=4, latent_channels=4, **kinds)
    diffusers.DiTPipeline(network.eval(), vae.eval(), diffusers.DDIMScheduler(clip_sample=False)).save_pretrained(
        folder
    )


def grid_of(scheduler: Any) -> str:
    """The noise times of a scheduler's indices."""
    process = DDPM()
    return ",".join(repr(process.noise_time_of(float(index))) for index in scheduler.timesteps)


def compared(folder: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    labels, shape = list(range(arguments.images)), (4, 32, 32)
    noise = torch.stack([normal(shape, seed, "picture") for seed in labels])
    kind, settings = SCHEDULERS[name]
    theirs = diffusers.DiTPipeline.from_pretrained(folder)
    theirs.scheduler = kind.from_config(theirs.scheduler.config, **settings)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler.set_timesteps(arguments.steps)
    grid = grid_of(theirs.scheduler)
    pipe = ldit.load(folder, device="cpu")
    vars(pipeline_dit)["randn_tensor"] = lambda **options: noise  # ours

    def run_theirs() -> Tensor:
        out = theirs(labels, guidance_scale=GUIDANCE, num_inference_steps=arguments.steps, output_type="pt")
        return 2.0 * out.images - 1.0  # of pixels that are clamped

    def run_ours() -> Tensor:
        steps = {"steps": f"ddim{arguments.steps}"} if name == "ddim" else {"steps": arguments.steps, "grid": grid}
        images: Tensor = pipe.sample(
            class_labels=labels, seeds=labels, solver=name, guidance=GUIDANCE, guidance_channels="all",
            guidance_interval=(0.0, 1.0), output_type="tensor", batch_size=arguments.images, **steps,
        )  # fmt: skip
        return images.clamp(-1.0, 1.0)

    seconds: list[list[float]] = [[], []]
    images: list[Tensor] = [torch.empty(0)] * 2
    runs: list[Callable[[], Tensor]] = [run_ours, run_theirs]
    for number in range(arguments.rounds + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            images[which] = runs[which]()
            if number:  # the first round warms up
                seconds[which].append(time.perf_counter() - began)
    ratios = sorted(b / a for a, b in zip(*seconds, strict=True))
    row = {
        "largest_difference": float((images[0] - images[1]).abs().max()),
        "spread_of_images": float(images[1].std()),
        "ours_s": round(median(seconds[0]), 3),
        "theirs_s": round(median(seconds[1]), 3),
        "times_faster": round(median(ratios), 3),
        "least": round(ratios[0], 3),
        "most": round(ratios[-1], 3),
    }
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=tuple(ORIGINAL_DIT))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name) / "pipeline"
        written(folder, arguments.size)
        rows = {solver: compared(folder, solver, arguments) for solver in SCHEDULERS}
    report = {
        "benchmark": "pipelines",
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": {"ldit": ldit.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "python": platform.python_version(),
        **{key: getattr(arguments, key) for key in ("size", "steps", "images", "rounds")},
        "guidance": GUIDANCE,
        "schedulers": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
