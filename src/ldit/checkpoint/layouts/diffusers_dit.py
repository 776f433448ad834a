"""Reads folders of diffusers' DiTPipeline, whose network is the original DiT, without diffusers.

model_index.json names the parts and the classes; transformer/ is the network, scheduler/ the process, vae/ the codec.
Names are mapped to the original's. q, k and v are joined to one matrix; of the embedders, which every block has a copy
of, one is kept; the position table, which is not stored, is computed.

diffusers' class uses other timestep frequencies than facebookresearch/DiT, and another epsilon in a block's second norm
(`OriginalDiTConfig.variant`). Folders that name this class, DiTTransformer2DModel, are computed as diffusers does. The
published folders (facebook/DiT-XL-2-256 and -512) name Transformer2DModel, the class of their conversion in 2023. Their
weights were trained by the original code and are computed as there.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldit.checkpoint.layouts.class_names import assumed_names
from ldit.config.assets import imagenet_names
from ldit.config.model import OriginalDiTConfig
from ldit.config.serial import from_dict, show
from ldit.config.spec import AutoencoderConfig, ClassConditionerConfig, DDPMConfig, ModelSpec
from ldit.errors import ConfigError, SourceError
from ldit.log import logger
from ldit.precision import dtype_word
from ldit.storage.atomic import read_json
from ldit.storage.pickled import open_state
from ldit.storage.shards import SUFFIX, has_set, read_set, set_files
from ldit.storage.tensors import NamedTensors, safetensors_shapes

INDEX = "model_index.json"
CODEC = "vae"
_NETWORK, _STEM = "transformer", "diffusion_pytorch_model"
PICKLED = (f"{_NETWORK}/{_STEM}.bin", f"{CODEC}/{_STEM}.bin")
_PUBLISHED, _OWN = "Transformer2DModel", "DiTTransformer2DModel"
_HEAD = re.compile(r"transformer_blocks\.(\d{1,4})\.(.+)")
_TOP = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",  # shift, then scale, in both
    "proj_out_2": "final_layer.linear",
}
_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_EMBEDDERS = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
_QKV = {"attn1.to_q": 0, "attn1.to_k": 1, "attn1.to_v": 2}
_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "trained_betas": None,
    "clip_sample": False,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
}
_GRID = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}
"""The scheduler's settings of the levels at which it samples, and what published folders have."""


@dataclass(frozen=True)
class _Transformer:
    """The arguments of diffusers' class, by their names. Those typed with a single value support only that value."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    sample_size: int = 32
    patch_size: int = 2
    num_embeds_ada_norm: int = 1000
    norm_eps: float = 1e-5
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    attention_bias: Literal[True] = True
    norm_elementwise_affine: Literal[False] = False
    only_cross_attention: Literal[False] = False
    cross_attention_dim: Literal[None] = None
    num_vector_embeds: Literal[None] = None
    dropout: float = 0.0
    norm_num_groups: int = 32
    upcast_attention: bool = False
    use_linear_projection: bool = False


def is_pipeline(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def lacks_weights(folder: Path) -> bool:
    """Whether there are no safetensors files: the published folders have .bin files only."""
    return not has_set(folder / _NETWORK, _STEM)


def read_spec(folder: Path) -> ModelSpec:
    """The spec, from the configurations of the parts; SourceError names the file and key that is not supported."""
    index = _object(folder / INDEX)
    if index.get("_class_name") != "DiTPipeline":
        raise SourceError(f"{folder / INDEX}: only a DiTPipeline is read, got {show(index.get('_class_name'))}")
    _check_scheduler(folder / "scheduler" / "scheduler_config.json")
    model = _read_model(folder / _NETWORK / "config.json")
    try:
        names = ClassConditionerConfig(_class_names(folder / INDEX, index.get("id2label"), model.num_classes))
        return ModelSpec(model, DDPMConfig(), _read_codec(folder / CODEC / "config.json"), names)
    except ConfigError as error:
        raise SourceError(f"{folder}: {error}") from None


def read_weights(folder: Path, spec: ModelSpec, check: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Tensors with the original DiT's names, one by one; `check` as in `load_pickled`, for .bin files."""
    yield from _renamed(folder / _NETWORK, _stored(folder / _NETWORK, check), spec.model)


def weight_shapes(folder: Path, spec: ModelSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype word) without reading the weights."""
    part = folder / _NETWORK
    if has_set(part, _STEM):
        files = [safetensors_shapes(part / name) for name in set_files(part, _STEM)]
        stored = {
            name: torch.empty(shape, dtype=_torch_dtype(word), device="meta")
            for file in files
            for name, (shape, word) in file.items()
        }
    else:
        stored = {name: t.to("meta") for name, t in _stored(part, check=False)}
    return {
        name: (tuple(t.shape), dtype_word(str(t.dtype).removeprefix("torch.")))
        for name, t in _renamed(part, stored.items(), spec.model)
    }


def _stored(part: Path, check: bool) -> NamedTensors:
    if has_set(part, _STEM):
        return read_set(part, _STEM)
    if (part / f"{_STEM}.bin").is_file():
        return open_state(part / f"{_STEM}.bin", check).items()
    raise SourceError(f"{part} has neither {_STEM}{SUFFIX}, nor its shards, nor {_STEM}.bin")


def _renamed(part: Path, stored: NamedTensors, model: Any) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors under the original's names. Unknown entries keep their names: the error when the network is
    filled then shows them."""
    embedders: dict[str, Tensor] = {}  # the first block's, with which those of the other blocks are compared
    waiting: dict[str, dict[int, Tensor]] = {}  # q, k and v of a block until all three have come
    like: Tensor | None = None
    for name, tensor in stored:
        stem, _, leaf = name.rpartition(".")
        like = tensor if like is None else like
        if name == "pos_embed.pos_embed":  # in files of old versions; it is computed below
            continue
        # Outside of blocks.
        if not (block := _HEAD.fullmatch(stem)):
            yield f"{_TOP[stem]}.{leaf}" if stem in _TOP else name, tensor
        # Embedders: each block has its own copy, all must be equal.
        elif block[2] in _EMBEDDERS:
            own = f"{_EMBEDDERS[block[2]]}.{leaf}"
            first = embedders.setdefault(own, tensor)
            if first is tensor:
                yield own, tensor
            elif not _same(first, tensor):
                raise SourceError(f"{part}: {name} differs from another block's; the original DiT has one for all")
        # q, k, v: joined when the third has come.
        elif block[2] in _QKV:
            own = f"blocks.{block[1]}.attn.qkv.{leaf}"
            parts = waiting.setdefault(own, {})
            parts[_QKV[block[2]]] = tensor
            if len(parts) == len(_QKV):
                yield own, _joined(part, own, waiting.pop(own))
        # The rest of a block.
        else:
            yield f"blocks.{block[1]}.{_BLOCK[block[2]]}.{leaf}" if block[2] in _BLOCK else name, tensor
    if waiting:
        own, parts = next(iter(waiting.items()))
        raise SourceError(f"{part}: {own} is made of to_q, to_k and to_v, of which {len(parts)} are there")
    # The position table, with the dtype and device of the others.
    if like is not None:
        side = model.input_size // model.patch_size
        yield "pos_embed", _positions(side, model.hidden_size).to(device=like.device, dtype=like.dtype)


def _joined(part: Path, name: str, parts: dict[int, Tensor]) -> Tensor:
    try:
        return torch.cat([parts[i] for i in sorted(parts)])
    except (RuntimeError, TypeError) as error:
        raise SourceError(f"{part}: {name}: {str(error).splitlines()[0]}") from None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.is_meta or torch.equal(a, b))


def _positions(side: int, dim: int) -> Tensor:
    """Position table (1, side², dim), fp32: columns in the first half of the channels, rows in the second, each
    [sin | cos]; computed in float64."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.outer(torch.arange(side, dtype=torch.float64), omega)  # (side, dim / 4)
    one = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim / 2)
    return torch.cat([one.repeat(side, 1), one.repeat_interleave(side, dim=0)], dim=1).float()[None]


def _read_model(path: Path) -> OriginalDiTConfig:
    """The network's configuration; SourceError names the key that is not supported."""
    # The class of the folder says by which of the two variants to compute.
    data = _object(path)
    kind = data.get("_class_name")
    if kind not in (_PUBLISHED, _OWN):
        raise SourceError(f"{path}: _class_name: expected {_OWN}, got {show(kind)}")
    try:
        # Parsing refuses unknown keys and values.
        given = from_dict(_Transformer, {key: value for key, value in data.items() if not key.startswith("_")})
        # Values that are valid for diffusers' class, but that the original DiT cannot have.
        channels, eps = given.in_channels, given.norm_eps
        out = channels if given.out_channels is None else given.out_channels
        if out not in (channels, 2 * channels):
            raise ConfigError(f"out_channels: expected {channels} or {2 * channels}, got {out}")
        if eps != 1e-5:
            raise ConfigError(f"norm_eps: only 1e-05 is read, got {eps:g}")
        model = OriginalDiTConfig(
            input_size=given.sample_size,
            patch_size=given.patch_size,
            in_channels=channels,
            hidden_size=given.num_attention_heads * given.attention_head_dim,
            depth=given.num_layers,
            num_heads=given.num_attention_heads,
            num_classes=given.num_embeds_ada_norm,
            learn_sigma=out == 2 * channels,
            variant="original" if kind == _PUBLISHED else "diffusers",
        )
    except ConfigError as error:
        raise SourceError(f"{path}: {error}") from None
    if kind == _PUBLISHED:
        logger.info("%s is from 2023: its weights are facebookresearch/DiT's and are computed as there", path)
    return model


def _check_scheduler(path: Path) -> None:
    """SourceError unless noise schedule and estimates are those of DDPMConfig. The folder's solver and its grid are not
    used; where the grid is not the usual one, the log says so."""
    data = _object(path)
    for key, expected in _SCHEDULER.items():
        value = data.get(key, expected)
        if value != expected:
            advice = "; false in the file samples without it" if value is True else ""
            raise SourceError(f"{path}: {key}: only {expected} is read, got {show(value)}{advice}")
    unused = [f"{key} {show(data[key])}" for key, usual in _GRID.items() if data.get(key, usual) != usual]
    if unused:
        logger.warning("%s: not used, --grid and --steps choose the levels: %s", path, ", ".join(unused))


def _read_codec(path: Path) -> AutoencoderConfig:
    """The codec's scale and factor. DiTPipeline divides latents by scaling_factor and has no shift."""
    data = _object(path)
    scale, widths = data.get("scaling_factor", AutoencoderConfig.scale), data.get("block_out_channels", [64])
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not isinstance(widths, list) or not widths:
        raise SourceError(f"{path}: scaling_factor must be a number and block_out_channels a list")
    return AutoencoderConfig(CODEC, float(scale), 0.0, 1 << (min(len(widths), 12) - 1))


def _class_names(path: Path, labels: Any, count: int) -> tuple[str, ...] | None:
    """The class names of id2label, {"0": "tench, Tinca tinca", …}. ImageNet's are replaced by our own table. None if
    there are no names."""
    if labels is None:
        return assumed_names(path, count)
    if not isinstance(labels, dict) or set(labels) != set(map(str, range(count))):
        raise SourceError(f"{path}: id2label: expected a name for each of the {count} classes")
    names = tuple(labels[str(i)] for i in range(count))
    if not all(isinstance(name, str) for name in names):
        raise SourceError(f"{path}: id2label: names must be texts")
    table = imagenet_names()
    if count == len(table) and all(names[i].split(",")[0] == table[i].split(",")[0] for i in (0, count - 1)):
        return table
    return names


def _object(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise SourceError(f"{path}: expected an object")
    return data


def _torch_dtype(word: str) -> torch.dtype:
    """The torch dtype of a word in a safetensors header. int64 stands for all others: reading refuses those."""
    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}.get(
        word, torch.int64
    )
