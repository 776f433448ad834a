"""Folders of the Hugging Face Hub by id, downloaded or from the local cache."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ldit.errors import SourceError

MODEL_FILES = ("*.json", "*.safetensors", "*.pth", "*.pt", "*.txt")
_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?$")


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form org/name[/sub/folder]."""
    return bool(_ID.match(text)) and not text.startswith((".", "/")) and ".." not in text.split("/")


def from_hub(text: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """The local folder of org/name[/sub/folder], with the files that match the patterns `files`. HF_HUB_OFFLINE is
    honoured.

    SourceError when the Hub does not provide it, or has no such folder.
    """
    from huggingface_hub import snapshot_download

    org, name, *rest = text.split("/", 2)
    folder = rest[0] if rest else ""
    patterns = [f"{folder}/{file}" for file in files] if folder else list(files)
    try:
        root = snapshot_download(f"{org}/{name}", allow_patterns=patterns, ignore_patterns=["*optimizer*"])
    except Exception as error:  # the client raises many types
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise SourceError(
            f"no file or folder {text!r}, and the Hub did not give it{offline}: {type(error).__name__}"
        ) from None
    path = Path(root) / folder
    if not path.is_dir():
        raise SourceError(f"{org}/{name} on the Hub has no folder {folder!r}")
    return path


def cached_models() -> tuple[Path, list[str]]:
    """The folder of the local cache, and the ids of the models in it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = sorted(path.name for path in Path(HF_HUB_CACHE).glob("models--*"))
    return Path(HF_HUB_CACHE), [name.removeprefix("models--").replace("--", "/") for name in folders]
