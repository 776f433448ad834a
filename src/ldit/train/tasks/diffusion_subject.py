"""A diffusion model to be trained: its codec, its start, its images along the way."""

from dataclasses import replace
from pathlib import Path

from ldit.checkpoint.open import Source, open_source
from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.codecs.conditioners import build_conditioner
from ldit.codecs.open import Codec, find_codec, open_codec, whole_name
from ldit.codecs.pixels import PixelCodec
from ldit.config.kinds import AnySpec
from ldit.config.model import TextModelConfig
from ldit.config.requests.sampling import SamplingRequest
from ldit.config.run import RunConfig
from ldit.config.spec import AutoencoderConfig, ClassConditionerConfig, ModelSpec
from ldit.data.latent_cache.description import CROP, CacheDescription
from ldit.data.samples import Samples
from ldit.errors import CodecError, ConfigError
from ldit.eval.during_training import evaluation_hook
from ldit.log import logger
from ldit.nn.build import forward_flops, parameter_count
from ldit.parallel.world import World
from ldit.pipeline.request import ResolvedRequest, check_request
from ldit.precision import DTYPES
from ldit.train.hooks import attention_hook, heldout_hook, sample_hook
from ldit.train.init_from import StartReport, starting_weights
from ldit.train.step import TrainState, fill_fresh
from ldit.train.tasks.inputs import CachedInputs, EncodedInputs, Inputs, PlainInputs
from ldit.train.tasks.subject import Surroundings
from ldit.train.tasks.task import DiffusionTask
from ldit.train.trainer import Hook

SAMPLES_PER_CLASS = 2


class DiffusionSubject:
    """See `ldit.train.tasks.subject.Subject`. ConfigError, DataError or CodecError when codec, data and model do not
    fit."""

    def __init__(self, config: RunConfig, out: Path, data: Samples, world: World) -> None:
        self.config, self.out = config, out
        self.codec: Codec | None = world.run_on_all(lambda: _codec(config, data, world))
        spec = model_spec(config, data)
        self.request = _request(spec)
        self.spec = spec
        self.inputs = _inputs(config, data, self.codec)
        self.task = DiffusionTask(config, spec, self.inputs)
        side = config.model.input_size
        self.flops_per_image = 3.0 * forward_flops(config.model, side, side)

    def describe(self) -> str:
        return f"{parameter_count(self.config.model):,} parameters"

    def record(self) -> dict[str, str]:
        """The fingerprint of the autoencoder that images go through; that of cached latents is in their manifest."""
        return {"codec": self.inputs.codec.fingerprint()} if isinstance(self.inputs, EncodedInputs) else {}

    def begin(self, state: TrainState) -> None:
        """Fresh weights, or those of another checkpoint where they fit; averages begin as the weights."""
        train, world = self.config.train, state.world
        source = None
        if train.init_from:
            source = world.run_on_all(lambda: open_source(train.init_from, ema=train.init_ema))
        world.run_on_all(lambda: self._fill(state, source))

    def _fill(self, state: TrainState, source: Source | None) -> None:
        weights, train = state.weights, self.config.train
        fill_fresh(state, self.task)
        if source is None:
            return
        theirs, ours, report = source.spec, self.spec, StartReport()
        shapes = {name: layout.shape for name, layout in zip(weights.names, weights.layouts, strict=True)}
        null, their_null = (
            None if isinstance(spec.model, TextModelConfig) else spec.model.null_class for spec in (ours, theirs)
        )
        tensors = source.tensors(train.init_ema)
        for start in starting_weights(tensors, shapes, ours.class_names, theirs.class_names, null, their_null, report):
            weights.put(start.name, start.value, start.rows)
        weights.publish()
        state.averages.start(weights.masters)
        logger.info("starts from %s: %s", train.init_from, report.line())
        _compare(theirs, ours)

    def resumed(self, spec: AnySpec) -> None:
        """Nothing."""

    def hooks(self, around: Surroundings) -> list[Hook]:
        train, heldout = self.config.train, self.config.heldout
        found: list[Hook] = [Hook(train.attention_every, attention_hook(self.task, around.data))]
        if self.codec is not None:
            images = sample_hook(self.spec, self.request, self.codec, self.out, around.watchdog)
            found.append(Hook(train.sample_every, images))
            if self.config.eval.every:
                measure = evaluation_hook(self.config, self.spec, self.request, self.codec, self.out, around)
                found.append(Hook(self.config.eval.every, measure))
        elif train.sample_every:
            logger.warning("no images along the way: the autoencoder is not at hand")
        if self.codec is None and self.config.eval.every:
            raise CodecError("eval.every: images along the way need the autoencoder, which is not at hand")
        if around.heldout is None and heldout.every:
            logger.info("no held-out images: nothing is measured on any (data.heldout names a list)")
        if around.heldout is not None and heldout.num:
            measure = heldout_hook(self.task, around.heldout, heldout.num, around)
            found.insert(0, Hook(heldout.every, measure))
        return found


def model_spec(config: RunConfig, data: Samples) -> ModelSpec:
    """What the run's steps say of themselves. A codec's folder is named by its whole path, for steps are opened from
    anywhere."""
    codec, names = config.codec, data.names or None
    if isinstance(codec, AutoencoderConfig):
        codec = replace(codec, name=whole_name(codec.name))
    return ModelSpec(config.model, config.process, codec, ClassConditionerConfig(names), config.sampling)


def _codec(config: RunConfig, data: Samples, world: World) -> Codec | None:
    """The codec on this process's device. Cached latents do without one, but not with another than made them."""
    if not isinstance(config.codec, AutoencoderConfig):
        if data.cache is not None:
            raise ConfigError(f"data.path: {data.root} holds latents, this model takes pixels (codec.kind)")
        return open_codec(config.codec)
    dtype = DTYPES[config.data.codec_precision]
    try:
        codec = open_codec(config.codec, (), world.device, dtype, config.model.in_channels)
    except CodecError:
        if data.cache is None or find_codec(config.codec.name) is not None:
            raise  # one that is there and broken is no absent one
        codec = None
    assert not isinstance(codec, PixelCodec)
    if data.cache is not None:
        _check_cache(config, data.root, data.cache, codec)
    return codec


def _check_cache(config: RunConfig, root: Path, cache: CacheDescription, codec: Codec | None) -> None:
    """ConfigError or DataError where the run's codec is not the cache's. Without the codec its name must do."""
    assert isinstance(config.codec, AutoencoderConfig)
    record = cache.codec
    for key, theirs, ours in (
        ("codec.factor", record.factor, config.codec.factor),
        ("model.in_channels", record.channels, config.model.in_channels),
    ):
        if theirs != ours:
            raise ConfigError(f"{key}: {ours}, the latents of {root} have {theirs}")
    fingerprint = codec.fingerprint() if isinstance(codec, AutoencoderCodec) else None
    if fingerprint is None:
        if Path(record.name).name != Path(config.codec.name).name:
            raise ConfigError(f"codec.name: {config.codec.name} is not at hand, and {root} was made with {record.name}")
        logger.warning("the autoencoder %s is not at hand: %s is known by that name alone", config.codec.name, root)
        for name in ("scale", "shift"):
            used, own = getattr(config.codec, name), getattr(record, name)
            if used != own:
                logger.warning("codec.%s: %s, that of the autoencoder of %s was %s", name, used, root, own)
    cache.check(root, fingerprint, config.data.image_size, CROP)


def _inputs(config: RunConfig, data: Samples, codec: Codec | None) -> Inputs:
    if data.cache is not None:
        assert isinstance(config.codec, AutoencoderConfig)
        return CachedInputs(config.codec, config.train.seed)
    return EncodedInputs(codec, config.train.seed) if isinstance(codec, AutoencoderCodec) else PlainInputs()


def _request(spec: ModelSpec) -> ResolvedRequest:
    """The request of the image grids, checked before the first step: the first classes, unguided where the model has
    no null class."""
    conditioner = build_conditioner(spec)
    if conditioner.is_unconditional:
        return check_request(spec, SamplingRequest(num=6 * SAMPLES_PER_CLASS))
    labels = [label for label in range(min(conditioner.count, 16)) for _ in range(SAMPLES_PER_CLASS)]
    guidance = 1.0 if conditioner.null is None else None
    return check_request(spec, SamplingRequest(class_labels=labels, guidance=guidance))


def _compare(theirs: ModelSpec, ours: ModelSpec) -> None:
    """Say what shapes do not show: a network that reads its weights in another way has to learn them anew."""
    keys = [("model", key) for key in ("n_heads", "n_kv_heads", "rope", "qk_norm", "kind")] + [("process", None)]
    for section, key in keys:
        old, new = (spec[section] if key is None else spec[section].get(key) for spec in (theirs, ours))
        if old != new:
            logger.warning(
                "the start differs in %s: %s there, %s here", ".".join(filter(None, (section, key))), old, new
            )
