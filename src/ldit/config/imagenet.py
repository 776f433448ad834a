"""The ImageNet-1k class names, in the usual order (WordNet ids ascending)."""

import json
from functools import cache

from ldit.config.assets import ASSETS


@cache
def imagenet_names() -> tuple[str, ...]:
    """1000 names: the first lemma of each synset, made unique by its second or its WordNet id where needed."""
    return tuple(json.loads((ASSETS / "imagenet_classes.json").read_text(encoding="utf-8")))
