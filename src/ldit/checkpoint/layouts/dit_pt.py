"""Checkpoints of facebookresearch/DiT and SiT: a bare state dict, or {model, ema, opt, args} as their train.py writes.

Both have the same names and shapes, so the process comes from `args`, else from the file's name.
"""

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ldit.checkpoint.layouts.class_names import assumed_names
from ldit.config.assets import imagenet_names
from ldit.config.model import OriginalDiTConfig
from ldit.config.presets import ORIGINAL_DIT_HEADS
from ldit.config.spec import (
    SIT,
    AutoencoderConfig,
    ClassConditionerConfig,
    DDPMConfig,
    FlowConfig,
    ModelSpec,
    PathName,
    Predicted,
    ProcessConfig,
)
from ldit.errors import ConfigError, SourceError
from ldit.log import logger
from ldit.storage.pickled import as_state, load_pickled

ProcessName = Literal["ddpm", "flow"]
DIT = DDPMConfig()
"""DiT (Peebles and Xie 2023)."""
REPA = FlowConfig(prediction="v", time_scale=1.0, data_at=0)
"""REPA (Yu et al. 2025): SiT's network with data at time 0 and noise at 1, the reverse of SiT."""
_PROJECTORS = "projectors."  # REPA's parts that only its training uses
_OF_REPA = ("enc_type", "projector_depth", "proj_coeff")  # settings of its train.py

_VAES = {word: f"stabilityai/sd-vae-ft-{word}" for word in ("mse", "ema")}
_VAE = _VAES["mse"]
# SiT's settings path_type and prediction, and ours.
_PATHS: dict[str, PathName] = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}
_PREDICTIONS: dict[str, Predicted] = {"velocity": "v", "noise": "eps", "score": "score"}


def is_pt(source: str | Path) -> bool:
    """Whether the name has the suffix of such a file."""
    return Path(source).suffix in (".pt", ".pth")


def read_state(path: Path, ema: bool, check: bool = True) -> dict[str, Tensor]:
    """A state dict, memory-mapped: with `ema` the EMA weights if they are separate; `check` as in `load_pickled`."""
    return PtFile(path, check).state(ema)


class PtFile:
    """Such a file, memory-mapped; `check` as in `load_pickled`. Only the weights that are asked for are judged.

    `kept`: which weights it has, "model" and "ema"; a bare state dict is "model". `settings`: what train.py stored in
    `args`.
    """

    def __init__(self, path: Path, check: bool = True) -> None:
        data = load_pickled(path, check)
        if not isinstance(data, dict):
            raise SourceError(f"{path} holds a {type(data).__name__}, expected a state dict")
        args = data.get("args")
        self.path = path
        self.settings = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
        self._entries = {key: data[key] for key in ("model", "ema") if key in data} or {"model": data}
        self.kept = tuple(self._entries)
        if any(
            str(key).startswith(_PROJECTORS)
            for state in self._entries.values()
            if isinstance(state, dict)
            for key in state
        ):
            self.settings = {"proj_coeff": None, **self.settings}

    def state(self, ema: bool) -> dict[str, Tensor]:
        """The weights, under the names of the published files: with `ema` the EMA weights if they are separate."""
        if not ema and "model" not in self.kept:
            raise SourceError(f"{self.path} has no raw weights ('model'), only 'ema'")
        key = "ema" if "model" not in self.kept or (ema and "ema" in self.kept) else "model"
        state = as_state(self._entries[key], f"{self.path}: {key}")
        state = {name: value for name, value in state.items() if not name.startswith(_PROJECTORS)}
        if "pos_embed" not in state or "x_embedder.proj.weight" not in state:
            raise SourceError(f"{self.path} is not a DiT checkpoint: {key} has no pos_embed and x_embedder.proj")
        return state


def process_of(path: Path, settings: Mapping[str, Any], given: ProcessName | None = None) -> ProcessConfig:
    """The process that the file was trained with: `given`, else by its settings, else by its name (SiT…), else DDPM.
    The log says which. SourceError for a path or prediction of SiT that is not supported."""
    if given == "flow" and not _is_repa(settings):
        logger.info("%s is read as a SiT, with data at time 1; in REPA's files they are at time 0", path.name)
    if given == "ddpm":
        return DIT
    if given == "flow":
        return stated_process(path, settings)[0] or SIT if _is_repa(settings) else sit_of(path, settings)
    stated, reason = stated_process(path, settings)
    process = stated or DIT
    names: dict[ProcessConfig, str] = {SIT: "SiT (flow, data at time 1)", REPA: "SiT of REPA (flow, data at time 0)"}
    words = names.get(process, "DiT (ddpm)" if process == DIT else f"SiT ({process.convention})")
    logger.info("%s is read as a %s: %s; --process ddpm|flow overrides this", path.name, words, reason)
    return process


def stated_process(path: Path, settings: Mapping[str, Any]) -> tuple[ProcessConfig | None, str]:
    """The process by the file's settings or name, None where neither mentions one; and which it was, in words.
    SourceError for a path or prediction of SiT that is not supported."""
    if _is_repa(settings):
        path_type = settings.get("path_type", "linear")
        if path_type not in ("linear", "cosine"):
            raise SourceError(f"{path}: args.path_type: expected REPA's linear or cosine, got {path_type!r:.80}")
        return REPA if path_type == "linear" else replace(REPA, path="gvp"), "by its projectors"
    # SiT's train.py stores its path and prediction. Both store the model's name.
    stored, model = any(key in settings for key in ("path_type", "prediction")), settings.get("model")
    if stored or model is not None:
        return sit_of(path, settings) if stored or str(model).startswith("SiT") else DIT, "by its settings"
    for word, process in (("sit", SIT), ("dit", DIT)):
        if path.name.lower().startswith(word):
            return process, "by its name"
    return None, "neither its settings nor its name mention SiT"


def sit_of(path: Path, settings: Mapping[str, Any]) -> FlowConfig:
    """SiT's process with the path and the prediction in the settings of its train.py. SourceError for unknown ones."""
    values = []
    for key, default, known in (("path_type", "Linear", _PATHS), ("prediction", "velocity", _PREDICTIONS)):
        value = settings.get(key, default)
        if not isinstance(value, str) or value not in known:
            raise SourceError(f"{path}: args.{key}: expected SiT's {', '.join(known)}, got {value!r:.80}")
        values.append(value)
    return replace(SIT, path=_PATHS[values[0]], prediction=_PREDICTIONS[values[1]])


def _sit_settings(process: ProcessConfig) -> dict[str, str] | None:
    """The inverse of `sit_of`; None for a process that is not SiT's."""
    for path_type, path in _PATHS.items():
        for prediction, predicted in _PREDICTIONS.items():
            if process == replace(SIT, path=path, prediction=predicted):
                return {"path_type": path_type, "prediction": prediction}
    return None


def _is_repa(settings: Mapping[str, Any]) -> bool:
    return any(name in settings for name in _OF_REPA)


def check_dit_pt(spec: ModelSpec) -> list[str]:
    """What such a file leaves out of the model, which its readers must be told; SourceError naming everything that they
    would read wrongly."""
    model = spec.model
    if not isinstance(model, OriginalDiTConfig):
        raise SourceError(
            f"a DiT .pt holds facebookresearch/DiT and SiT networks (kind 'dit'), not kind {model.kind!r}"
        )
    problems = []
    if model.variant != "original":
        problems.append(f"variant {model.variant!r}")
    if spec.process != DIT and _sit_settings(spec.process) is None:
        problems.append(f"process {spec.process.kind!r} of other conventions than SiT's")
    published = isinstance(spec.codec, AutoencoderConfig) and replace(spec.codec, name=_VAE) == AutoencoderConfig(_VAE)
    if not published:
        problems.append(f"a codec with other scale, shift or factor than {_VAE}")
    if model.null_class is None:
        problems.append("a model without a null class")
    if spec.class_names not in (None, imagenet_names()) and model.num_classes == len(imagenet_names()):
        problems.append("other names of 1000 classes than ImageNet's")
    if ORIGINAL_DIT_HEADS.get((model.hidden_size, model.depth), model.num_heads) != model.num_heads:
        problems.append(f"{model.num_heads} heads at this width and depth")
    if problems:
        raise SourceError(f"a DiT .pt cannot hold: {', '.join(problems)}")
    left_out = []
    if spec.class_names not in (None, imagenet_names()):
        left_out.append(f"the names of the {model.num_classes} classes")
    if isinstance(spec.codec, AutoencoderConfig) and spec.codec.name not in _VAES.values():
        left_out.append(f"the autoencoder {spec.codec.name} (readers take {_VAE})")
    return left_out


def codec_of(settings: Mapping[str, Any]) -> AutoencoderConfig:
    """The autoencoder named by the setting `vae` of train.py, "ema" or "mse"; else that of the published weights."""
    named = settings.get("vae")
    return AutoencoderConfig(_VAES.get(named, _VAE) if isinstance(named, str) else _VAE)


def content(spec: ModelSpec, states: Mapping[str, dict[str, Tensor]]) -> dict[str, Any]:
    """What such a file holds of `states`, "model" and "ema": one set of weights bare, as the published files are, where
    nothing has to be added; else the layout of its train.py, with autoencoder, path and prediction among the settings.
    """
    settings = _sit_settings(spec.process) or {}
    vaes = [word for word, name in _VAES.items() if spec.codec == AutoencoderConfig(name)]
    if vaes and spec.codec != AutoencoderConfig(_VAE):
        settings["vae"] = vaes[0]
    if len(states) == 1:
        (alone,) = states.values()
        return {"ema": alone, "args": settings} if settings else dict(alone)  # their programs look for "ema"
    return {**states, **({"args": settings} if settings else {})}


def spec_from_shapes(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    heads: int | None,
    process: ProcessConfig | None = None,
    codec: AutoencoderConfig | None = None,
    classes: object = None,
) -> ModelSpec:
    """The spec, inferred from the shapes. Defaults: heads by the S/B/L/XL table, process DDPM, codec that of the
    published weights. `classes`: the setting num_classes of train.py, if there is one."""
    # Read the sizes off the shapes. A file of another network has other names.
    try:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        blocks = {m[1] for name in shapes if (m := re.match(r"blocks\.(\d{1,4})\.", name))}
        depth = len(blocks)
        tokens = shapes["pos_embed"][1]
        rows = shapes["y_embedder.embedding_table.weight"][0]
        hidden = shapes["blocks.0.mlp.fc1.weight"][0]
        out = shapes["final_layer.linear.weight"][0] // (patch * patch)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise SourceError(f"{path} is not a DiT checkpoint: {error}") from None
    if blocks != {str(i) for i in range(depth)}:
        raise SourceError(f"{path}: its blocks are not numbered 0 to {depth - 1}")
    # Shapes do not show the number of heads.
    heads = heads or ORIGINAL_DIT_HEADS.get((width, depth))
    if heads is None:
        raise SourceError(
            f"{path}: heads cannot be read from a model of width {width} and depth {depth}; give --heads N "
            f"(ldit convert {path} EXPORT --heads N writes a model that states them)"
        )
    # Images are square.
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise SourceError(f"{path}: {tokens} positions are not a square")
    count = _classes_of(path, rows, classes)
    try:
        model = OriginalDiTConfig(
            input_size=side * patch,
            patch_size=patch,
            in_channels=channels,
            hidden_size=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=hidden / width,
            num_classes=count,
            class_dropout_prob=0.1 if count < rows else 0.0,
            learn_sigma=out == 2 * channels,
        )
    except (ConfigError, ZeroDivisionError) as error:
        raise SourceError(f"{path}: {error}") from None
    names = ClassConditionerConfig(assumed_names(path, model.num_classes))
    return ModelSpec(model, process or DIT, codec or codec_of({}), names)


def _classes_of(path: Path, rows: int, stated: object) -> int:
    """The number of classes of a table with so many rows; the null class, if there is one, is its last row.

    train.py stores the number. Where it is not stored, a null class is assumed, as in all published files, except for
    1000 rows: ImageNet's classes without one.
    """
    if isinstance(stated, int) and not isinstance(stated, bool):
        if stated not in (rows, rows - 1):
            raise SourceError(f"{path}: its settings say {stated} classes, its table has {rows} rows")
        return stated
    if rows == len(imagenet_names()):
        logger.info("%s: %d rows of classes are read as ImageNet's, without a null class (guidance 1)", path.name, rows)
        return rows
    return rows - 1
