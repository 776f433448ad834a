"""Describes a set of images to be made: how many, which labels, which weights, how they are sampled.

The description depends on no machine, so that any machine makes the same set, or notices that it would make another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldit.checkpoint.fingerprint import weights_fingerprint
from ldit.checkpoint.open import Source
from ldit.codecs.conditioners import ClassConditioner, Conditioner, TextConditioner, text_config
from ldit.codecs.kl_config import read_kl_config
from ldit.codecs.kl_weights import fingerprint
from ldit.codecs.open import codec_folder
from ldit.codecs.text import text_fingerprint, text_folder
from ldit.config.experiment import identity_of, is_of_package, name_of
from ldit.config.model import without_idle_switches
from ldit.config.requests.sampling import INTERNAL, ModelRequest, Rule
from ldit.config.serial import to_dict
from ldit.config.spec import AutoencoderConfig, ModelSpec, without_defaults_added
from ldit.errors import RequestError, brief
from ldit.pipeline.load import own_network
from ldit.pipeline.loaded import codec_roots
from ldit.pipeline.request import ResolvedRequest
from ldit.rng import uniform
from ldit.sampling.denoiser import build_denoiser
from ldit.sampling.guidance import Guided

FORMAT = 1
ENDING = ("complete", "labels")  # keys of samples.json that are known only in the end


@dataclass(frozen=True)
class Labels:
    """The labels of a set's images, each a function of the image's number; 0 for a model without classes.

    balanced: image k has label choices[k mod len(choices)], so that every part of a set covers all classes. random:
    uniform over `choices`, drawn for each k from (seed, "label", k).
    """

    rule: Rule | None
    choices: tuple[int, ...]
    seed: int

    def of(self, rows: range) -> tuple[int, ...]:
        """The labels of images `rows`."""
        count = len(self.choices)
        if self.rule == "random":
            return tuple(self.choices[int(uniform(self.seed, "label", id=k) * count)] for k in rows)
        return tuple(self.choices[k % count] for k in rows)


def assign_labels(request: ModelRequest, conditioner: Conditioner, prompts: Sequence[str] | None = None) -> Labels:
    """The labels of a set, of a text model those of its prompts; RequestError for a class that the model lacks, or for
    labels of a model without classes."""
    if conditioner.is_unconditional:
        if request.class_labels or request.labels is not None:
            given = f"labels {request.labels}" if request.labels is not None else f"class {request.class_labels[0]!r}"
            raise RequestError(f"{given}: this model has no classes")
        return Labels(None, (0,), request.seed)
    if prompts is not None:  # as often as they are listed
        places = {text: place for place, text in enumerate(conditioner.names or ())}
        return Labels(request.labels or "balanced", tuple(places[prompt] for prompt in prompts), request.seed)
    assert isinstance(conditioner, ClassConditioner)
    choices = conditioner.resolve(request.class_labels) or tuple(range(conditioner.count))
    return Labels(request.labels or "balanced", choices, request.seed)


def describe(
    request: ModelRequest,
    num: int,
    source: Source,
    guide: Source | None,
    resolved: ResolvedRequest,
    labels: Labels,
    dtype: str,
) -> dict[str, Any]:
    """The content of samples.json at the start: everything that the images depend on. Weights and autoencoder are
    identified by fingerprints, which takes as long as reading them unless a manifest lists their checksums."""
    spec, factor = source.spec, source.spec.codec.factor
    evaluations, guided = cost(resolved, spec, guide is not None)
    conditioner = resolved.conditioner
    every_class = labels.choices == tuple(range(conditioner.count))
    description = {
        "format": FORMAT,
        "num": num,
        "size": [side * factor for side in resolved.shape[1:]],
        # Images depend on the batch size too: blocks are sampled together.
        "batch_size": request.batch_size,
        "seed": request.seed,
        "label_rule": labels.rule,
        # Of a text model they are the prompts.
        "class_names": None if conditioner.names is None else list(conditioner.names),
        "classes": None if every_class or labels.rule is None else list(labels.choices),
        # How they are sampled.
        "sampling": resolved.sampling(),
        "evaluations": evaluations,
        "guided_evaluations": guided,
        "dtype": dtype,
        "int8": request.int8,
        "compiled": request.compile,
        "ema": request.ema,
        # The model.
        "source": _name(request.source),
        "weights": weights_fingerprint(source, request.ema),
        "training": to_dict(spec.training),
        "network": without_idle_switches(to_dict(spec.model)),
        "process": without_defaults_added(to_dict(spec.process)),
        "codec": _codec(request, source),
        "guide": None,
        "complete": False,
    }
    if own := _own_objects(source, resolved):
        description["experiment"] = own
    if isinstance(conditioner, TextConditioner):
        description["text"] = _text(request, source, conditioner)
    if resolved.internal:
        description["guide"] = {"source": INTERNAL}
    if guide is not None:
        weights = weights_fingerprint(guide, request.ema)
        description["guide"] = {"source": _name(request.guide), "weights": weights}
    return description


def _own_objects(source: Source, resolved: ResolvedRequest) -> dict[str, str]:
    """Names of the user's process and network; empty where both are the package's."""
    own = {}
    if not is_of_package(type(resolved.process)):
        own["process"] = identity_of(resolved.process)
    if network := own_network(source):
        own["network"] = name_of(network)
    return own


def ended(description: dict[str, Any], labels: Labels) -> dict[str, Any]:
    """The content of samples.json once every image exists."""
    content = {**description, "complete": True}
    return content if labels.rule is None else {**content, "labels": list(labels.of(range(description["num"])))}


def check_format(out: Path, begun: Any) -> None:
    """RequestError for a description written by another version."""
    version = begun.get("format") if isinstance(begun, dict) else begun
    if not isinstance(begun, dict) or version != FORMAT:
        raise RequestError(f"--out {out}: its description is of format {brief(version)}, expected {FORMAT}")


def cost(request: ResolvedRequest, spec: ModelSpec, weak: bool) -> tuple[int, int] | tuple[None, None]:
    """Network evaluations for an image, and how many of them are guided; None where every image has its own number.

    They are counted by running the solver on one pixel with a function that returns zeros for a network. `weak`:
    whether guidance uses a second model."""
    if request.one_by_one:
        return None, None
    channels = spec.model.out_channels

    def zeros(x: Tensor, time: Tensor, cond: Any, mid: bool = False) -> Any:
        out = torch.zeros(len(x), channels, *x.shape[2:])
        return (out, out) if mid else out

    settings, label = request.settings, torch.zeros(1, dtype=torch.int64)
    null = None if request.conditioner.null is None else label
    predict = Guided(
        zeros,
        label,
        null,
        settings.guidance,
        request.channels,
        settings.guidance_interval,
        schedule=settings.guidance_schedule,
        weak=zeros if weak else None,
        internal=request.internal,
    )
    zero = torch.zeros(1, request.shape[0], 1, 1)
    for _ in request.solve(build_denoiser(request.process, predict), zero, request.levels, lambda i: zero):
        pass
    return predict.evaluations, predict.guided_rows


def _codec(request: ModelRequest, source: Source) -> dict[str, Any]:
    """The codec, identified by its settings and weights, not by its path."""
    config = source.spec.codec
    record = {key: value for key, value in to_dict(config).items() if key != "name"}
    if isinstance(config, AutoencoderConfig):
        folder = codec_folder(config.name, codec_roots(request.local_diffusers_model_root, source.path))
        record["weights"] = fingerprint(folder, read_kl_config(folder))
    return record


def _text(request: ModelRequest, source: Source, conditioner: TextConditioner) -> dict[str, Any]:
    """The text encoder, identified by its files, and the text of guidance."""
    config, roots = text_config(source.spec), codec_roots(request.local_diffusers_model_root, source.path)
    encoder = text_folder(config.encoder, roots)
    tokenizer = text_folder(config.tokenizer, roots) if config.tokenizer else encoder
    return {
        "encoder": text_fingerprint(encoder, tokenizer),
        "max_tokens": config.max_tokens,
        "null": conditioner.null_text,
    }


def _name(source: str) -> str:
    """The last part of a path or name: the rest differs between machines."""
    return Path(source).name or source
