"""Reads and writes the original's folders: consolidated[_ema].MM-of-NN.pth and model_args.pth."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldit.checkpoint.layouts.class_names import assumed_names
from ldit.config.model import SWITCHES, ClassModelConfig, ModelConfig, TextModelConfig, model_from_dict
from ldit.config.presets import PRESETS
from ldit.config.serial import convert, show
from ldit.config.spec import (
    AutoencoderConfig,
    ClassConditionerConfig,
    ConditionerConfig,
    DDPMConfig,
    ModelSpec,
    TextConditionerConfig,
)
from ldit.errors import ConfigError, SourceError
from ldit.storage.atomic import fsync
from ldit.storage.pickled import load_pickled, open_state
from ldit.storage.tensors import NamedTensors

ARGS = "model_args.pth"
_SHARD = re.compile(r"consolidated(_ema)?\.(\d+)-of-(\d+)\.pth$")
_FACTOR = 8
PROCESS = DDPMConfig()
"""The layout does not state the process: all its models are trained with this one."""
_BACKBONE = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps")
_SHARED = (*_BACKBONE, "patch_size", "in_channels", "learn_sigma")

# How fairscale split each matrix: by rows (axis 0) or columns (axis 1). Those not listed are complete on every rank.
_ROWS = (
    "wq.",
    "wk.",
    "wv.",
    "w1.",
    "w3.",
    "wk_y.",
    "wv_y.",
    "x_embedder.",
    "t_embedder.mlp.0.",
    "adaLN_modulation.1.",
    "final_layer.linear.",
    "cap_embedder.1.",
    "attention.gate",
)
_COLUMNS = ("wo.weight", "w2.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight")


def is_original(folder: Path) -> bool:
    return (folder / ARGS).is_file() or any(_SHARD.match(path.name) for path in folder.glob("consolidated*.pth"))


def kept(folder: Path) -> tuple[str, ...]:
    """Which weights the folder has: "raw", "ema", or both."""
    matches = [match for path in folder.glob("consolidated*.pth") if (match := _SHARD.match(path.name))]
    return tuple(word for word, ema in (("raw", False), ("ema", True)) if any(bool(m[1]) == ema for m in matches))


def shard_files(folder: Path, ema: bool) -> list[Path]:
    """The weight files in rank order; SourceError names a missing one."""
    files = {}  # (rank, size) -> file
    for path in folder.glob("consolidated*.pth"):
        match = _SHARD.match(path.name)
        if match and bool(match[1]) == ema:
            files[int(match[2]), int(match[3])] = path
    word = "consolidated_ema" if ema else "consolidated"
    if not files:
        hint = "; ema=False takes the raw weights" if ema else ""
        raise SourceError(f"{folder} has no {word}.00-of-01.pth{hint}")
    # A folder may hold files of several launches: take those with the most ranks, and require all of them.
    size = max(total for _, total in files)
    ranks = sorted(rank for rank, total in files if total == size)
    missing = next((i for i, rank in enumerate(ranks) if i != rank), len(ranks))
    if missing != size:
        raise SourceError(f"{folder / f'{word}.{missing:02d}-of-{size:02d}.pth'} is missing")
    return [files[rank, size] for rank in ranks]


def read_args(folder: Path) -> argparse.Namespace:
    """The settings in model_args.pth."""
    args = load_pickled(folder / ARGS)
    if not isinstance(args, argparse.Namespace):
        raise SourceError(f"{folder / ARGS} holds a {type(args).__name__}, expected an argparse.Namespace")
    return args


def read_spec(folder: Path, shapes: dict[str, tuple[int, ...]]) -> ModelSpec:
    """The spec from model_args.pth; what it does not state is inferred from the weights' shapes."""
    args = read_args(folder)
    try:
        return _spec(folder, args, shapes)
    except ConfigError as error:
        raise SourceError(f"{folder / ARGS}: {error}") from None


def _spec(folder: Path, args: argparse.Namespace, shapes: dict[str, tuple[int, ...]]) -> ModelSpec:
    # The network: a size by name plus settings of the Namespace, or all sizes from the Namespace.
    name = getattr(args, "model", None)
    fields: dict[str, Any] = {key: getattr(args, key) for key in _SHARED if hasattr(args, key)}
    if isinstance(name, str) and name in PRESETS:
        fields = {**fields, **PRESETS[name]}
    elif not all(key in fields for key in ("dim", "n_layers", "n_heads")) or not isinstance(name, str):
        known = ", ".join(key for key in PRESETS if key.startswith("DiT_"))
        raise ConfigError(f"model: unknown name {show(name)} (known: {known})")
    fields["qk_norm"] = _setting(args, "qk_norm", bool, False)
    # The Namespace does not state the kind of model: a text model has a caption projection.
    vae = _setting(args, "vae", Literal["ema", "mse"], "ema")
    projection = shapes.get("cap_embedder.1.weight")
    if projection is None:
        model, conditioner = _class_parts(folder, args, fields, shapes)
    else:
        model, conditioner = _text_parts(args, fields, projection)
    step = getattr(args, "step", None)
    training = {"step": step} if isinstance(step, int) else None
    codec = AutoencoderConfig(f"stabilityai/sd-vae-ft-{vae}")
    return ModelSpec(model, PROCESS, codec, conditioner, None, training)


def _setting(args: argparse.Namespace, name: str, kind: Any, default: Any) -> Any:
    """A setting of the Namespace with its type checked; the default if it is absent or None."""
    value = getattr(args, name, None)
    return default if value is None else convert(kind, value, name)


def _class_parts(
    folder: Path, args: argparse.Namespace, fields: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> tuple[ModelConfig, ConditionerConfig]:
    """Model and conditioner of a class model. Without a row for the null class there is no class dropout."""
    num_classes = _setting(args, "num_classes", int, 1000)
    image_size = _setting(args, "image_size", int, 256)
    rows = shapes.get("y_embedder.embedding_table.weight", (num_classes + 1,))[:1]
    dropout = _setting(args, "class_dropout_prob", float, 0.0 if rows == (num_classes,) else 0.1)
    if image_size % _FACTOR:
        raise ConfigError(f"image_size: {show(image_size)} is not divisible by {_FACTOR}")
    own = {"input_size": image_size // _FACTOR, "num_classes": num_classes, "class_dropout_prob": dropout}
    model = model_from_dict({**fields, **own, "kind": "class"}, "model")
    names = _setting(args, "class_names", tuple[str, ...], None)
    return model, ClassConditionerConfig(assumed_names(folder, num_classes) if names is None else names)


def _text_parts(
    args: argparse.Namespace, fields: dict[str, Any], projection: tuple[int, ...]
) -> tuple[ModelConfig, ConditionerConfig]:
    """Model and conditioner of a text model; `projection` is the shape of its caption projection."""
    if len(projection) != 2:
        raise ConfigError(f"cap_embedder.1.weight has shape {projection}, expected two axes")
    own = {
        "cap_feat_dim": projection[1],
        "max_seq_len": _setting(args, "max_seq_len", int, TextModelConfig.max_seq_len),
        "rope_scaling_factor": _setting(args, "rope_scaling_factor", float, 1.0),
    }
    default = TextConditionerConfig()
    tokenizer = _setting(args, "tokenizer_path", str, None)
    encoder = _setting(args, "lm", str, None) or tokenizer or default.encoder
    tokens = _setting(args, "max_text_tokens", int, default.max_tokens)
    model = model_from_dict({**fields, **own, "kind": "text"}, "model")
    own_tokenizer = None if tokenizer == encoder else tokenizer
    return model, TextConditionerConfig(encoder=encoder, max_tokens=tokens, tokenizer=own_tokenizer)


def training_step(folder: Path) -> int | None:
    """The step in resume_step.txt, else the folder's name, which is the step in the original's runs."""
    path = folder / "resume_step.txt"
    text = path.read_text(errors="replace").strip() if path.is_file() else folder.name
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def read_weights(folder: Path, ema: bool, model: ModelConfig, check: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Named full tensors, with model-parallel parts joined; `check` as in `load_pickled`."""
    files = shard_files(folder, ema)
    if len(files) > 1 and isinstance(model, (ClassModelConfig, TextModelConfig)) and model.qk_norm:
        raise SourceError(
            f"{folder}: {len(files)} model-parallel parts with q/k norm: each part normalised its own heads only, "
            "so no single model computes the same"
        )
    # Memory-mapped: parts are joined one tensor at a time.
    parts = [open_state(path, check) for path in files]
    for path, part in zip(files, parts, strict=True):
        if odd := part.keys() ^ parts[0].keys():
            raise SourceError(f"{path}: {min(odd)} is not in every part of the model")
    for name in parts[0]:
        try:
            yield name, _join(name, [part[name] for part in parts])
        except (RuntimeError, IndexError) as error:
            raise SourceError(f"{folder}: the parts of {name} do not fit together: {error}") from None


def _join(name: str, parts: list[Tensor]) -> Tensor:
    """The full tensor, joined as fairscale split it."""
    if len(parts) == 1:
        return parts[0]
    if any(word in name for word in _ROWS):
        return torch.cat(parts, dim=0)
    return torch.cat(parts, dim=1) if name.endswith(_COLUMNS) else parts[0]


def write_original(
    folder: Path, spec: ModelSpec, weights: NamedTensors, ema: NamedTensors | None, step: int | None
) -> None:
    """Write the folder's files, fp32; SourceError if the original's layout cannot express the model."""
    args = _namespace(spec)
    for word, tensors in (("consolidated", weights), ("consolidated_ema", ema)):
        if tensors is not None:
            path = folder / f"{word}.00-of-01.pth"
            torch.save({name: t.float().clone() for name, t in tensors}, path)
            fsync(path)
    torch.save(args, folder / ARGS)
    if step is not None:
        (folder / "resume_step.txt").write_text(f"{step}\n")


def _namespace(spec: ModelSpec) -> argparse.Namespace:
    """The content of model_args.pth."""
    check_original(spec)
    model = spec.model
    assert isinstance(model, (ClassModelConfig, TextModelConfig))
    # A named size implies width, depth and heads; of the other settings, only those that differ from the defaults are
    # stored. A size without a name stores all.
    sizes = {name: size for name, size in PRESETS.items() if name.startswith("DiT_")}
    own = {"dim": model.dim, "n_layers": model.n_layers, "n_heads": model.n_heads}
    name = next((name for name, size in sizes.items() if size == own), "DiT_Llama")
    values = asdict(model)
    kept = (
        _SHARED
        if name == "DiT_Llama"
        else tuple(key for key in _SHARED if key not in own and values[key] != getattr(type(model), key))
    )
    args = argparse.Namespace(model=name, qk_norm=bool(model.qk_norm), precision="fp32", **{k: values[k] for k in kept})
    # Codec and conditioner.
    assert isinstance(spec.codec, AutoencoderConfig)
    args.vae = Path(spec.codec.name).name.rsplit("-", 1)[-1]
    args.model_parallel_size = 1
    if isinstance(model, TextModelConfig):
        args.rope_scaling_factor, args.max_seq_len = model.rope_scaling_factor, model.max_seq_len
        if isinstance(spec.conditioner, TextConditionerConfig):
            args.lm = spec.conditioner.encoder
            args.tokenizer_path = spec.conditioner.tokenizer or args.lm
            args.max_text_tokens = spec.conditioner.max_tokens
    else:
        args.image_size, args.num_classes = model.input_size * _FACTOR, model.num_classes
        args.class_dropout_prob = model.class_dropout_prob
        if spec.class_names is not None:
            args.class_names = list(spec.class_names)
    return args


def check_original(spec: ModelSpec) -> None:
    """SourceError naming everything about the model that the original's layout cannot express."""
    # Of the model.
    model = spec.model
    problems = []
    if not isinstance(model, (ClassModelConfig, TextModelConfig)):
        raise SourceError(f"the original has no model of kind {model.kind!r}")
    if model.qk_norm == "head":
        problems.append("per-head q/k norm")
    if model.rope != "raster":
        problems.append("2-D RoPE")
    if model.cond_channels:
        problems.append("cond_channels")
    problems += [f"model.{name}" for name, value in asdict(model).items() if name in SWITCHES and value]
    if isinstance(model, ClassModelConfig) and not model.num_classes:
        problems.append("no classes")
    # Of process, codec and conditioner.
    if spec.process != PROCESS:
        problems.append(f"process {spec.process.kind!r}")
    if not isinstance(spec.codec, AutoencoderConfig):
        problems.append(f"codec {spec.codec.kind!r}")
    elif replace(spec.codec, name="/".join(Path(spec.codec.name).parts[-2:])) not in (  # of a local folder too
        AutoencoderConfig("stabilityai/sd-vae-ft-ema"),
        AutoencoderConfig("stabilityai/sd-vae-ft-mse"),
    ):
        problems.append(f"codec {spec.codec.name!r} or its scale, shift or factor")
    if isinstance(spec.conditioner, TextConditionerConfig) and spec.conditioner.null:
        problems.append(f"null caption {spec.conditioner.null!r}")
    if problems:
        raise SourceError(f"the original's layout cannot hold: {', '.join(problems)}")
