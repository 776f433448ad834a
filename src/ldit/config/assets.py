"""Files that come with the package, and the ImageNet class names."""

import json
from functools import cache
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EMOJI_CLASSES = 9  # number of classes of the data set emoji64


@cache
def imagenet_names() -> tuple[str, ...]:
    """1000 ImageNet-1k names in the usual order (WordNet ids ascending): the first lemma of each synset, made unique by
    its second or its WordNet id where needed."""
    return tuple(json.loads((ASSETS / "imagenet_classes.json").read_text(encoding="utf-8")))
