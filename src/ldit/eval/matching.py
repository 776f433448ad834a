"""How well images match their captions: the rank of each image's caption among others, by an image-caption matcher.

A matcher embeds features of EfficientNet-Lite0 and of a text encoder into one space (contrastive, Radford et al.
2021). It is small and trained on one kind of images (benchmarks/emoji64_matcher.py): its numbers compare models on such
images, and are no CLIP scores.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.codecs.text import TextEncoder, check_text_encoder
from ldit.config.assets import ASSETS
from ldit.config.serial import from_dict, to_dict
from ldit.config.spec import TextConditionerConfig
from ldit.errors import ConfigError, EvaluationError, SourceError
from ldit.rng import generator
from ldit.storage import manifest
from ldit.storage.atomic import committed, write_json
from ldit.storage.tensors import assign, read_safetensors, write_safetensors

CANDIDATES = 100
"""Captions among which the true one is ranked."""
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class MatcherConfig:
    """Sizes of a matcher, and what its features come from."""

    format: str = "matcher-1"
    extractor: str = "efficientnet-lite0"
    image_width: int = 1280
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    max_tokens: int = 32
    text_width: int = 384
    hidden: int = 256
    width: int = 256


class Matcher(nn.Module):
    """Two small networks, whose outputs are compared by their cosine times a learned scale."""

    def __init__(self, config: MatcherConfig) -> None:
        super().__init__()
        self.config = config
        self.image = _head(config.image_width, config.hidden, config.width)
        self.text = _head(config.text_width, config.hidden, config.width)
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def embed_images(self, features: Tensor) -> Tensor:
        """Pool features (B, D) of the extractor -> unit vectors (B, width)."""
        return F.normalize(self.image(features), dim=1)

    def embed_texts(self, features: Tensor) -> Tensor:
        """Means of text features over tokens (B, F) -> unit vectors (B, width)."""
        return F.normalize(self.text(features), dim=1)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Similarities (B, N) of unit vectors (B, width) and (N, width)."""
        return self.log_scale.exp() * images @ texts.T


def _head(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


def save_matcher(folder: Path, matcher: Matcher, record: dict[str, Any]) -> None:
    """Write a matcher in bf16, with what is known of its training."""
    with committed(folder) as place:
        write_json(place / _CONFIG, {**to_dict(matcher.config), "training": record})
        write_safetensors(place / _WEIGHTS, matcher.state_dict().items(), torch.bfloat16)


def open_matcher(name: str) -> Matcher:
    """A bundled matcher by name, or that of a folder. EvaluationError says what is missing or damaged."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = ASSETS / "models" / name
    if not (folder / _CONFIG).is_file():
        raise EvaluationError(f"matcher: there is no image-caption matcher {name!r:.80} (bundled: emoji64-matcher)")
    try:
        manifest.verify(folder)
        content = json.loads((folder / _CONFIG).read_bytes())
        content.pop("training", None)
        config = from_dict(MatcherConfig, content)
        if config.format != MatcherConfig.format:
            raise ConfigError(f"format {config.format!r}")
        matcher = Matcher(config)
        assign(matcher, read_safetensors(folder / _WEIGHTS), str(folder), "cpu", torch.float32)
    except (SourceError, ConfigError, ValueError, AttributeError) as error:
        raise EvaluationError(f"matcher: {folder}: {error}") from None
    return matcher.eval().requires_grad_(False)


class Matching:
    """A matcher with its text encoder: ranks the captions of images among `others`."""

    def __init__(self, matcher: Matcher, captions: Sequence[str], others: Sequence[str]) -> None:
        """CodecError when the text encoder is missing."""
        self.matcher, config = matcher, matcher.config
        self.captions, self.others = captions, others
        self._text = TextConditionerConfig(config.encoder, config.max_tokens)
        check_text_encoder(self._text, config.text_width)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, width)."""
        encoder = TextEncoder(self._text)
        parts = [texts[first : first + 64] for first in range(0, len(texts), 64)]
        return torch.cat([self.matcher.embed_texts(encoder(part).mean().float()) for part in parts])

    def ranks(self, features: Tensor) -> Tensor:
        """The rank (N,) of each image's caption, 1 = best, among it and up to CANDIDATES - 1 of the others, which
        are drawn for each image apart. `features` (N, D) are the extractor's."""
        texts = list(dict.fromkeys([*self.captions, *self.others]))
        places = {text: place for place, text in enumerate(texts)}
        pool = [places[text] for text in dict.fromkeys(self.others)]
        images, vectors = self.matcher.embed_images(features.float().cpu()), self.embed_texts(texts)
        ranks = []
        for row, caption in enumerate(self.captions):
            own = places[caption]
            drawn = torch.randperm(len(pool), generator=generator(0, "candidates", 0, row)).tolist()
            rivals = [pool[i] for i in drawn[:CANDIDATES] if pool[i] != own][: CANDIDATES - 1]
            scores = vectors[[own, *rivals]] @ images[row]
            # Ties count half, as chance would have it.
            ranks.append(1 + (scores[1:] > scores[0]).sum() + 0.5 * (scores[1:] == scores[0]).sum())
        return torch.stack(ranks)

    def metrics(self, features: Tensor) -> dict[str, float]:
        """`caption_rank`, the mean rank, and `caption_top1`, the share of images whose own caption comes first."""
        ranks = self.ranks(features)
        return {"caption_rank": ranks.mean().item(), "caption_top1": (ranks < 1.5).float().mean().item()}
