"""Finds the weight file of the Inception network, and checks that it is the published one.

Nothing is downloaded unless it is asked for (`--fetch`). Two packages publish the same file, and whoever has computed
an FID probably has it in a cache.
"""

import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.log import logger
from ldit.storage.manifest import sha256_file
from ldit.storage.outputs import whole
from ldit.storage.pickled import open_state
from ldit.storage.tensors import read_safetensors

NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
"""The file's names in pytorch-fid and torch-fidelity."""
SIZE = 95_628_359
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAMES[0]}"
VARIABLE = "LDIT_INCEPTION_WEIGHTS"
FLAG = "--inception-weights"
TIMEOUT = 60.0  # seconds without an answer


def find_weights(given: Path | None = None) -> Path:
    """The weight file: `given`, else the value of LDIT_INCEPTION_WEIGHTS, else a published name in torch.hub's folder
    or in the Hugging Face cache. The first two may also be a folder that holds the file.

    EvaluationError says what is missing, where it is published, and where to put it.
    """
    if given is not None:
        return _in(given.expanduser(), "no such file")
    if value := os.environ.get(VARIABLE):
        return _in(Path(value).expanduser(), f"{VARIABLE} names it, but there is no such file")
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    places = [*(hub / name for name in NAMES), *_hugging_face()]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise EvaluationError(
            f"the Inception weights were not found: {NAMES[0]} ({SIZE:,} bytes, sha256 {SHA256}), published at {URL}; "
            f"put it into {hub} (--fetch does), or name it with {FLAG} or {VARIABLE}"
        )
    return path


def fetch_weights() -> Path:
    """The published file, downloaded into torch.hub's folder unless it is there; the log says from where and where to.
    EvaluationError when it cannot be downloaded, or is another file than the published one."""
    target = Path(torch.hub.get_dir()) / "checkpoints" / NAMES[0]
    if target.is_file():
        return target
    logger.info("downloading %s bytes from %s", f"{SIZE:,}", URL)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target, SIZE) as temporary:
        try:
            with urllib.request.urlopen(URL, timeout=TIMEOUT) as answer, temporary.open("wb") as file:
                shutil.copyfileobj(answer, file)
        except urllib.error.URLError as error:
            raise EvaluationError(f"{URL} cannot be downloaded: {error.reason}") from None
        check_weights(temporary)
    logger.info("the Inception weights are in %s", target)
    return target


def _in(place: Path, otherwise: str) -> Path:
    """The file `place`, or a published name in the folder `place`."""
    if place.is_dir():
        path = next((place / name for name in NAMES if (place / name).is_file()), None)
        if path is None:
            raise EvaluationError(f"{place}: a folder with neither {NAMES[0]} nor {NAMES[1]}")
        return path
    if not place.is_file():
        raise EvaluationError(f"{place}: {otherwise}")
    return place


def _hugging_face() -> Iterator[Path]:
    """The file in snapshots of the Hub's cache, which is found by the variables of the Hub's client."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    home = Path(os.environ.get("HF_HOME") or cache)
    root = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    for name in NAMES:
        yield from sorted(root.glob(f"*/snapshots/*/{name}"))


def check_weights(path: Path) -> str:
    """The file's sha256; EvaluationError if it is not the published file."""
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file")
    digest = sha256_file(path)
    if digest != SHA256:
        raise EvaluationError(
            f"{path} is not the published {NAMES[0]}: {path.stat().st_size:,} bytes with sha256 {digest}, "
            f"expected {SIZE:,} with {SHA256}"
        )
    return digest


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth file opened weights-only; SourceError for any other content."""
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path))
    return open_state(path)
