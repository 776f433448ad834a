"""A tiny autoencoder with random weights, as diffusers itself writes it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldit.config.spec import AutoencoderConfig

STEM = "diffusion_pytorch_model"
TINY: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


@pytest.fixture(scope="session")
def reference() -> Any:
    """diffusers' own class: what every number is compared with."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(**TINY).eval().requires_grad_(False)
    for parameter in network.parameters():  # norms other than 1 and 0, so that each parameter matters
        parameter += 0.1 * torch.randn_like(parameter)
    return network


@pytest.fixture(scope="session")
def saved(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "vae"
    reference.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "codec"))


@pytest.fixture
def state(reference: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in reference.state_dict().items()}


@pytest.fixture
def config() -> AutoencoderConfig:
    return AutoencoderConfig("codec")


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def edit(folder: Path) -> Callable[..., None]:
    """Change keys of the folder's config.json; None removes one."""

    def change(**keys: Any) -> None:
        path = folder / "config.json"
        content = {**json.loads(path.read_text()), **keys}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub's client, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    cache = tmp_path / "hub-cache"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache
