"""The names of classes of files that state none."""

from pathlib import Path

from ldit.config.assets import imagenet_names
from ldit.log import logger


def assumed_names(where: Path, classes: int) -> tuple[str, ...] | None:
    """ImageNet's names for a model of 1000 classes, which the log says; None for others."""
    if classes != len(imagenet_names()):
        return None
    logger.info("%s names none of its 1000 classes: ImageNet's names are assumed", where)
    return imagenet_names()
