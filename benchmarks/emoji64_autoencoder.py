"""Quality of an autoencoder on the held-out images of emoji64, and a page of reconstructions.

    python benchmarks/emoji64_autoencoder.py [--codec emoji64-vae] [--page F.png] [--json F]

PSNR of 8-bit RGB (10·log10(255²/mse), mean over images) of the reconstruction from the posterior's mean, against
BICUBIC down and up again to the side whose RGB values are the first not fewer than the latent's values. The last line
of stdout is one JSON object.
"""

import argparse
import json
import math
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.codecs.codec import open_codec
from ldit.codecs.kl_config import read_kl_config
from ldit.codecs.latents import scaled
from ldit.codecs.open import codec_folder
from ldit.codecs.pixels import labelled_grid, to_uint8
from ldit.config.spec import AutoencoderConfig
from ldit.data.source import open_data

SIDE = 64
SHOWN = 12
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="emoji64-vae")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    stated = read_kl_config(codec_folder(arguments.codec))
    codec = open_codec(AutoencoderConfig(arguments.codec, *stated.scaling, stated.factor))
    assert isinstance(codec, AutoencoderCodec)
    _, heldout = open_data("emoji64", SIDE)
    assert heldout is not None
    pictures = np.stack([heldout[i][0] for i in range(len(heldout))])
    made, latents = reconstruct(codec, pictures)
    values = codec.channels * (SIDE // codec.factor) ** 2
    side = math.ceil((values / 3) ** 0.5)
    shrunk = np.stack([bicubic(image, side) for image in pictures])
    report: dict[str, Any] = {
        "benchmark": "emoji64-autoencoder",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "codec": arguments.codec,
        "fingerprint": codec.fingerprint(),
        "pictures": len(pictures),
        "latent_values": values,
        "psnr": psnr(pictures, made),
        "bicubic": {"side": side, "values": 3 * side * side, "psnr": psnr(pictures, shrunk)},
        "scaled_latents": {"mean": latents.mean().item(), "std": latents.std().item()},
    }
    report["above_bicubic"] = report["psnr"]["mean"] - report["bicubic"]["psnr"]["mean"]
    if arguments.page:
        page(pictures, made, shrunk).save(arguments.page)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def reconstruct(codec: AutoencoderCodec, pictures: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """uint8 (N, S, S, 3) from the posteriors' means, and the scaled means."""
    made, latents = [], []
    for first in range(0, len(pictures), BATCH):
        images = torch.from_numpy(pictures[first : first + BATCH]).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, _ = codec.moments(images)
        z = scaled(mean, codec.config)
        latents.append(z)
        made.append(to_uint8(codec.decode(z)).permute(0, 2, 3, 1).numpy())
    return np.concatenate(made), torch.cat(latents)


def bicubic(image: np.ndarray, side: int) -> np.ndarray:
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def psnr(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Mean over images and its standard error, in dB; a perfect image counts as one that is off by 1e-3 levels."""
    error = ((a.astype(np.float64) - b) ** 2).mean(axis=(1, 2, 3))
    ratios = 10 * np.log10(255.0**2 / np.maximum(error, 1e-6))
    return {"mean": ratios.mean(), "standard_error": ratios.std(ddof=1) / len(ratios) ** 0.5, "least": ratios.min()}


def page(pictures: np.ndarray, made: np.ndarray, shrunk: np.ndarray) -> Image.Image:
    """Held-out images, what the autoencoder makes of them, and what bicubic does, side by side."""
    shown = [i * len(pictures) // SHOWN for i in range(SHOWN)]
    rows = [Image.fromarray(part[i]) for i in shown for part in (pictures, made, shrunk)]
    return labelled_grid(rows, ["held-out image", "autoencoder", "bicubic"] * SHOWN, columns=6, scale=2)


if __name__ == "__main__":
    main()
