"""The ImageNet-1k class names, in the usual order (WordNet ids ascending)."""

import json
from functools import cache
from pathlib import Path


@cache
def imagenet_names() -> tuple[str, ...]:
    """1000 names: the first lemma of each synset, made unique by its second or its WordNet id where needed."""
    path = Path(__file__).resolve().parent.parent / "assets" / "imagenet_classes.json"
    return tuple(json.loads(path.read_text(encoding="utf-8")))
