"""The data of a run: opened, and fitted to the model, with classes, captions or aspect buckets."""

from contextlib import suppress
from pathlib import Path

from ldit.config.experiment import Experiment
from ldit.config.model import TextModelConfig
from ldit.config.run import RunConfig
from ldit.data.buckets import Bucketed, bucket_sizes, images_of
from ldit.data.images.decoding import orientation_of
from ldit.data.samples import Captioned, Samples, fit_classes
from ldit.data.source import decoding_of, open_run_data
from ldit.errors import ConfigError, DataError
from ldit.log import logger
from ldit.parallel.world import World

TURNED_LOOKED_AT = 64  # images whose EXIF orientation is looked at


def warn_of_turned(data: Samples) -> None:
    """Warn of images that a viewer turns by their EXIF orientation and this run does not: cameras lie on their side."""
    images = images_of(data)
    if images is None:
        return
    count = min(len(images), TURNED_LOOKED_AT)
    turned = 0
    for i in range(count):
        with suppress(DataError):  # a bad image is told of when it is read
            source = images.source(i * len(images) // count)
            turned += source is not None and orientation_of(source) != 1
    if turned:
        logger.warning(
            "%d of %d images looked at are turned by EXIF in viewers; --data.exif turns them here", turned, count
        )


def open_training_data(experiment: Experiment, out: Path, world: World) -> tuple[Samples, Samples | None]:
    """(training, held-out or None): the user's own data set, or what data.path names."""
    config = experiment.config
    model = config.model if isinstance(config, RunConfig) else None
    has_captions = isinstance(model, TextModelConfig)
    classes = None
    if model is not None and not isinstance(model, TextModelConfig) and not config.data.fit_model:
        classes = model.num_classes
    if experiment.data is None:
        # Each rank verifies its share of the shards of a latent cache.
        train, heldout = open_run_data(config.data, classes, (world.rank, world.size), out, has_captions)
        if isinstance(config, RunConfig) and config.data.buckets:
            sizes = bucket_sizes(config.data.image_size, config.codec.factor * config.model.side_unit)
            train = Bucketed(train, sizes, config.data.workers)
        return train, heldout
    if config.data.buckets:
        raise ConfigError("data.buckets: is for sets of image files, not for an object")
    from ldit.data.user_set import open_user_set

    samples = open_user_set(experiment.data, config.data.image_size, decoding_of(config.data))
    if has_captions:
        return Captioned(samples), None
    return samples if classes is None else fit_classes(samples, classes), None
