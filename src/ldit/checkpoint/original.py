"""The original's folders: consolidated[_ema].MM-of-NN.pth beside model_args.pth, read and written."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldit.checkpoint.commit import fsync
from ldit.checkpoint.pickled import load_pickled
from ldit.checkpoint.tensors import NamedTensors
from ldit.config.imagenet import imagenet_names
from ldit.config.model import PRESETS, ClassModelConfig, ModelConfig, TextModelConfig
from ldit.config.spec import AutoencoderConfig, ClassConditionerConfig, DDPMConfig, ModelSpec, TextConditionerConfig
from ldit.errors import ConfigError, SourceError

ARGS = "model_args.pth"
_SHARD = re.compile(r"consolidated(_ema)?\.(\d+)-of-(\d+)\.pth$")
_FACTOR = 8
_BACKBONE = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps")
_SHARED = (*_BACKBONE, "patch_size", "in_channels", "learn_sigma")

# How fairscale split each matrix: by rows (axis 0) or columns (axis 1). Not listed: whole on every rank.
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


def shard_files(folder: Path, ema: bool) -> list[Path]:
    """The weight files in rank order; SourceError names what is missing."""
    found = {}
    for path in folder.glob("consolidated*.pth"):
        match = _SHARD.match(path.name)
        if match and bool(match[1]) == ema:
            found[int(match[2]), int(match[3])] = path
    word = "consolidated_ema" if ema else "consolidated"
    if not found:
        hint = "; ema=False takes the raw weights" if ema else ""
        raise SourceError(f"{folder} has no {word}.00-of-01.pth{hint}")
    size = max(total for _, total in found)
    missing = [rank for rank in range(size) if (rank, size) not in found]
    if missing:
        raise SourceError(f"{folder / f'{word}.{missing[0]:02d}-of-{size:02d}.pth'} is missing")
    return [found[rank, size] for rank in range(size)]


def read_args(folder: Path) -> argparse.Namespace:
    args = load_pickled(folder / ARGS)
    if not isinstance(args, argparse.Namespace):
        raise SourceError(f"{folder / ARGS} holds a {type(args).__name__}, expected an argparse.Namespace")
    return args


def read_spec(folder: Path, shapes: dict[str, tuple[int, ...]]) -> ModelSpec:
    """The spec from model_args.pth; what it does not say is read off the weights' shapes."""
    args = read_args(folder)
    try:
        return _spec(args, shapes)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{folder / ARGS}: {error}") from None


def _spec(args: argparse.Namespace, shapes: dict[str, tuple[int, ...]]) -> ModelSpec:
    name = getattr(args, "model", None)
    fields: dict[str, Any] = {key: getattr(args, key) for key in _SHARED if hasattr(args, key)}
    if name in PRESETS:
        fields = {**fields, **PRESETS[name]}
    elif not all(key in fields for key in ("dim", "n_layers", "n_heads")):
        known = ", ".join(key for key in PRESETS if key.startswith("DiT_"))
        raise ConfigError(f"model: unknown name {name!r} (known: {known})")
    fields["qk_norm"] = bool(getattr(args, "qk_norm", False))
    model: ModelConfig
    if "cap_embedder.1.weight" in shapes:
        model = TextModelConfig(
            **fields,
            cap_feat_dim=shapes["cap_embedder.1.weight"][1],
            max_seq_len=getattr(args, "max_seq_len", 288),
            rope_scaling_factor=float(getattr(args, "rope_scaling_factor", 1.0)),
        )
        encoder = getattr(args, "lm", None) or getattr(args, "tokenizer_path", None) or "meta-llama/Llama-2-7b-hf"
        conditioner: Any = TextConditionerConfig(encoder=str(encoder), max_tokens=getattr(args, "max_text_tokens", 128))
    else:
        num_classes = int(getattr(args, "num_classes", 1000))
        rows = shapes.get("y_embedder.embedding_table.weight", (num_classes + 1,))[0]
        model = ClassModelConfig(
            **fields,
            input_size=int(getattr(args, "image_size", 256)) // _FACTOR,
            num_classes=num_classes,
            class_dropout_prob=0.0 if rows == num_classes else 0.1,
        )
        conditioner = ClassConditionerConfig(imagenet_names() if num_classes == 1000 else None)
    vae = getattr(args, "vae", None) or "ema"
    return ModelSpec(
        model, DDPMConfig(), AutoencoderConfig(f"stabilityai/sd-vae-ft-{vae}"), conditioner, None, _record(args)
    )


def _record(args: argparse.Namespace) -> dict[str, Any] | None:
    step = getattr(args, "step", None)
    return {"step": step} if isinstance(step, int) else None


def training_step(folder: Path) -> int | None:
    """The step in resume_step.txt, or in the folder's name as training wrote it."""
    path = folder / "resume_step.txt"
    text = path.read_text(errors="replace").strip() if path.is_file() else folder.name
    return int(text) if re.fullmatch(r"\d+", text) else None


def open_state(path: Path, check: bool = True) -> dict[str, Tensor]:
    """A bare state dict, memory-mapped; `check` as in `load_pickled`."""
    state = load_pickled(path, check)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise SourceError(f"{path} is not a state dict of tensors")
    return state


def read_weights(folder: Path, ema: bool, qk_norm: bool, check: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Entries of the whole model, model-parallel shards joined."""
    files = shard_files(folder, ema)
    if len(files) > 1 and qk_norm:
        raise SourceError(
            f"{folder}: {len(files)} model-parallel parts with q/k norm: each part normalised its own heads only, "
            "so no single model computes the same"
        )
    parts = [open_state(path, check) for path in files]
    for name in parts[0]:
        missing = [path for path, part in zip(files, parts, strict=True) if name not in part]
        if missing:
            raise SourceError(f"{missing[0]} lacks {name}")
        yield name, _join(name, [part[name] for part in parts])


def _join(name: str, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if any(word in name for word in _ROWS):
        return torch.cat(parts, dim=0)
    return torch.cat(parts, dim=1) if name.endswith(_COLUMNS) else parts[0]


def write_original(
    folder: Path, spec: ModelSpec, weights: NamedTensors, ema: NamedTensors | None, step: int | None
) -> None:
    """Write the folder's files, fp32; SourceError where the original has no such model."""
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
    check_original(spec)
    model = spec.model
    assert isinstance(model, (ClassModelConfig, TextModelConfig))
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
    assert isinstance(spec.codec, AutoencoderConfig)
    args.vae = spec.codec.name.rsplit("-", 1)[-1]
    args.model_parallel_size = 1
    if isinstance(model, TextModelConfig):
        args.rope_scaling_factor, args.max_seq_len = model.rope_scaling_factor, model.max_seq_len
        if isinstance(spec.conditioner, TextConditionerConfig):
            args.lm = args.tokenizer_path = spec.conditioner.encoder
    else:
        args.image_size, args.num_classes = model.input_size * _FACTOR, model.num_classes
    return args


def check_original(spec: ModelSpec) -> None:
    """SourceError naming everything about the model that the original's layout cannot hold."""
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
    if not isinstance(spec.process, DDPMConfig):
        problems.append(f"process {spec.process.kind!r}")
    if not isinstance(spec.codec, AutoencoderConfig):
        problems.append(f"codec {spec.codec.kind!r}")
    if problems:
        raise SourceError(f"the original's layout cannot hold: {', '.join(problems)}")
