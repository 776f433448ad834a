"""What data costs: images from a folder, and latents encoded in the step or before.

    python benchmarks/data.py {folder,latents} [--device cpu|cuda] [--size s|b|tiny] [--rounds N] [--json F]
                              [--precision fp32|bf16] [--codec-precision fp32|bf16]

folder:  images/s from JPEG files to tensors of 256 px with 0, 1 and 2 threads, and the share that decoding alone takes.
latents: a training step from cached latents against one that encodes its images (256 px) with the widely used
         autoencoder's architecture (83.7M parameters, random weights), beside the ratio that their FLOPs predict.

The last line of stdout is one JSON object.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldit.bench.ceiling import device_name, timed
from ldit.bench.train_step import bench_config
from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.config.autoencoder import AutoencoderModelConfig
from ldit.config.presets import preset
from ldit.config.spec import AutoencoderConfig, ModelSpec
from ldit.data.batch import Batch
from ldit.data.formats.image_folder import ImageFolder
from ldit.data.loader import Loader
from ldit.nn.build import forward_flops
from ldit.parallel.world import World
from ldit.precision import DTYPES
from ldit.rng import generator
from ldit.storage.tensors import write_safetensors
from ldit.training.step import fill_fresh, new_state, train_step
from ldit.training.tasks.diffusion import DiffusionTask
from ldit.training.tasks.inputs import CachedInputs, EncodedInputs, Inputs

NETWORKS = {"s": "S", "b": "B", "tiny": "XS"}
WIDTHS = {"s": (128, 256, 512, 512), "b": (128, 256, 512, 512), "tiny": (32, 32, 32, 32)}
SIDES = {"s": 256, "b": 256, "tiny": 32}  # pixels
BATCHES = {"s": 8, "b": 4, "tiny": 2}
IMAGE = (500, 375)  # about ImageNet's mean size
SIDE = 256


def make_images(folder: Path, count: int) -> int:
    """JPEGs of smooth noise, quality 90; returns their mean number of bytes."""
    random, sizes = np.random.default_rng(0), []
    for index in range(count):
        path = folder / f"class{index % 4}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(IMAGE, Image.Resampling.BICUBIC)
        grain = random.normal(0, 6, (IMAGE[1], IMAGE[0], 3))
        Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
        sizes.append(path.stat().st_size)
    return sum(sizes) // count


def folder(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Images/s of whole batches, median over rounds; every image is read anew."""
    size, rounds = arguments.size, arguments.rounds
    count = 32 if size == "tiny" else 256
    with tempfile.TemporaryDirectory() as place:
        mean = make_images(Path(place), count)
        data = ImageFolder(Path(place), SIDE)
        data._memory = None  # as for sets that do not fit
        paths = [Path(place) / name for name in data.files]

        def decode() -> None:
            for path in paths:
                with Image.open(path) as image:
                    image.load()

        def load(workers: int) -> None:
            for _ in Loader(data, 32, 0, True, workers).from_step(0, count // 32):
                pass

        seconds: dict[str, list[float]] = {"decode": [], "0": [], "1": [], "2": []}
        load(2)
        for _ in range(rounds):
            seconds["decode"].append(timed(decode, device))
            for workers in (0, 1, 2):
                seconds[str(workers)].append(timed(lambda workers=workers: load(workers), device))  # type: ignore[misc]
    best = {name: median(values) for name, values in seconds.items()}
    return {
        "pictures": count,
        "picture_size": list(IMAGE),
        "mean_bytes": mean,
        "images_per_second": {name: count / value for name, value in best.items() if name != "decode"},
        "decode_images_per_second": count / best["decode"],
        "decode_share": best["decode"] / best["0"],
        "rounds": rounds,
    }


def latents(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of a step, in turn. FLOPs of the encoder are those of its convolutions and products, as they run."""
    size, rounds = arguments.size, arguments.rounds
    side, batch = SIDES[size], BATCHES[size]
    model = preset(NETWORKS[size], input_size=side // 8, qk_norm=True)
    config = replace(bench_config("imagenet256-600m", batch, arguments.precision), model=model)
    with tempfile.TemporaryDirectory() as place:
        codec = random_codec(Path(place), WIDTHS[size], config.codec, device, DTYPES[arguments.codec_precision])
        images = torch.rand(batch, 3, side, side, generator=generator(0, "bench")) * 2 - 1
        encoder = counted(codec, images[:1])
        moments = torch.cat(codec.moments(images), dim=1).cpu()
        online = step(config, EncodedInputs(codec, 0), images, device)
        cached = step(config, CachedInputs(codec.config, 0), moments, device)
        seconds: dict[str, list[float]] = {"online": [], "cached": []}
        for turn in range(rounds + 1):
            a, b = timed(online, device), timed(cached, device)
            if turn:
                seconds["online"].append(a)
                seconds["cached"].append(b)
    flops = 3.0 * forward_flops(model, side // 8, side // 8)
    best = {name: median(values) for name, values in seconds.items()}
    predicted, measured = (flops + encoder) / flops, best["online"] / best["cached"]
    return {
        "size": size,
        "batch": batch,
        "image_size": side,
        "precision": {"train": arguments.precision, "codec": arguments.codec_precision},
        "seconds": best,
        "train_flops_per_image": flops,
        "encode_flops_per_image": encoder,
        "predicted_ratio": predicted,
        "measured_ratio": measured,
        "of_predicted": measured / predicted,
        "rounds": rounds,
    }


def random_codec(
    folder: Path, widths: tuple[int, ...], config: Any, device: torch.device, dtype: torch.dtype
) -> AutoencoderCodec:
    """An autoencoder of that architecture with random weights, through files as any other."""
    from ldit.codecs.kl_network import build_network

    assert isinstance(config, AutoencoderConfig)
    stated = AutoencoderModelConfig(4, widths, 2 if widths[0] > 32 else 1, 32).to_diffusers()
    torch.manual_seed(0)
    network = build_network(stated)
    (folder / "config.json").write_text(json.dumps(stated))
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", network.state_dict().items())
    return AutoencoderCodec(replace(config, name=str(folder)), folder, device, dtype)


def counted(codec: AutoencoderCodec, image: Tensor) -> float:
    """FLOPs of encoding one image, 1 MAC = 2 FLOPs."""
    total = 0

    def convolution(module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        total += 2 * out.numel() * module.weight[0].numel()

    kinds = (nn.Conv2d, nn.Linear)
    handles = [m.register_forward_hook(convolution) for m in codec._network.modules() if isinstance(m, kinds)]
    codec.moments(image)
    for handle in handles:
        handle.remove()
    tokens = (image.shape[-1] // codec.factor) ** 2  # scores and values of the middle's attention
    return float(total + 4 * tokens * tokens * codec.network_config.block_out_channels[-1])


def step(config: Any, inputs: Inputs, values: Tensor, device: torch.device) -> Callable[[], object]:
    task = DiffusionTask(config, ModelSpec(config.model, config.process, config.codec), inputs)
    state = new_state(config, task, World(device))
    fill_fresh(state, task)
    batch = Batch(values, torch.arange(len(values)), tuple(range(len(values))))
    return lambda: train_step(state, task, batch)


THEMES = {"folder": folder, "latents": latents}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("theme", choices=list(THEMES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=list(NETWORKS), default="s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the training step")
    parser.add_argument("--codec-precision", choices=["fp32", "bf16"], default="fp32", help="of the encoder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    report = {
        "benchmark": f"data-{arguments.theme}",
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        **THEMES[arguments.theme](arguments, device),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
