"""Whether a weaker model can guide another one."""

from ldit.config.model import TextModelConfig
from ldit.config.spec import ModelSpec, PixelCodecConfig
from ldit.errors import RequestError

Shape = tuple[int, int, int]
"""(C, h, w) of latents."""


def check_guide(spec: ModelSpec, guide: ModelSpec, shape: Shape, trained: tuple[Shape, Shape]) -> None:
    """RequestError names the first reason why a weaker model cannot guide this one: both get the same latents, times
    and labels, and their outputs are mixed. `trained`: the latents' shapes in the training of both."""
    assert not isinstance(guide.model, TextModelConfig) and not isinstance(spec.model, TextModelConfig)
    # Latents, times and labels must mean the same to both.
    facts = (
        ("process", _process(spec), _process(guide)),
        ("codec", _latents(spec), _latents(guide)),
        ("latent shape", *trained),
        ("number of classes", spec.model.num_classes, guide.model.num_classes),
    )
    for fact, own, other in facts:
        if own != other:
            raise RequestError(f"guide: its {fact} is {other}, the model's {own}")
    names = zip(spec.class_names or (), guide.class_names or (), strict=False)
    for index, (own, other) in enumerate(names):
        if own != other:
            raise RequestError(f"guide: its class {index} is {other!r}, the model's {own!r}")
    # The guide must be able to compute on latents of the requested size.
    if spec.cascade != guide.cascade or spec.model.cond_channels != guide.model.cond_channels:
        raise RequestError("guide: model.cond_channels: the model and its guide are not of the same stage of a cascade")
    unit = guide.model.side_unit
    if shape[1] % unit or shape[2] % unit:
        raise RequestError(f"guide: latents of {shape[1]}x{shape[2]} are no multiples of its patch size {unit}")


def _process(spec: ModelSpec) -> str:
    """The process that a model was trained with: the name of a user's, or the convention of a package's."""
    return str((spec.training or {}).get("process") or spec.process.convention)


def _latents(spec: ModelSpec) -> str:
    """The meaning of latents, as far as the configuration says: the codec's kind, scale, shift and factor."""
    if isinstance(spec.codec, PixelCodecConfig):
        return spec.codec.kind
    return f"{spec.codec.kind} (scale {spec.codec.scale}, shift {spec.codec.shift}, factor {spec.codec.factor})"
