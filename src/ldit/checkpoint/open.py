"""Opens a model source of any kind: recognises it, reads its spec, and its weights on demand."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from ldit.checkpoint import export
from ldit.checkpoint.layouts import diffusers_dit, dit_pt, original
from ldit.checkpoint.run import committed_steps, open_step, run_is_begun, run_kind
from ldit.config.assets import ASSETS
from ldit.config.autoencoder import AUTOENCODER
from ldit.config.classifier import CLASSIFIER
from ldit.config.experiment import Experiment
from ldit.config.spec import ModelSpec
from ldit.errors import SourceError
from ldit.precision import dtype_word
from ldit.storage import manifest
from ldit.storage.atomic import read_json
from ldit.storage.hub import MODEL_FILES, from_hub, is_hub_id
from ldit.storage.names import is_run
from ldit.storage.pickled import open_state
from ldit.storage.strange import what_is_it

Kind = Literal["ldit", "original", "dit-pt", "diffusers"]


@dataclass(frozen=True)
class Source:
    """A model source that has been recognised and whose spec has been read; its weights are read on demand."""

    kind: Kind
    path: Path
    spec: ModelSpec
    kept: tuple[str, ...]
    """Which weights it has: "raw", "ema" (separate EMA weights) or both."""
    verified: bool | None = None
    """The value of `ema` for which the weight files were verified at opening, if any."""
    experiment: Experiment | None = None
    """The user's own objects, for a run that was trained with a network or process of the user's."""
    trusted: bool = False
    """Whether files are read without a comparison with their checksums."""
    held: object = field(default=None, repr=False, compare=False)
    """What keeps a run's step where it is (`ldit.checkpoint.run.open_step`) for as long as this lives."""

    def tensors(self, ema: bool, check: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Named tensors, memory-mapped, one by one; `check` compares the files with their checksums first, unless they
        are trusted."""
        check = check and not self.trusted
        if self.kind == "original":
            yield from original.read_weights(self.path, ema, self.spec.model, check)
        elif self.kind == "dit-pt":
            yield from dit_pt.read_state(self.path, ema, check).items()
        elif self.kind == "diffusers":
            yield from diffusers_dit.read_weights(self.path, self.spec, check)
        else:
            if check and self.verified is not ema:
                export.verify_export(self.path, ema)
            yield from export.read_weights(self.path, ema)

    def has_ema(self) -> bool:
        """Whether there are separate EMA weights."""
        return "ema" in self.kept

    def has_raw(self) -> bool:
        """Whether there are weights other than EMA."""
        return "raw" in self.kept

    def shapes(self, ema: bool) -> dict[str, tuple[tuple[int, ...], str]]:
        """name -> (shape, dtype word) without reading the weights."""
        if self.kind == "ldit":
            shapes = export.weight_shapes(self.path, ema)
            return {name: (shape, dtype_word(word)) for name, (shape, word) in shapes.items()}
        if self.kind == "diffusers":
            return diffusers_dit.weight_shapes(self.path, self.spec)
        return {
            name: (tuple(t.shape), dtype_word(str(t.dtype).removeprefix("torch.")))
            for name, t in self.tensors(ema, check=False)
        }

    def verify(self) -> None:
        """Verify every file; SourceError names the first damaged one."""
        if self.kind == "ldit" and (self.path / manifest.NAME).exists():
            manifest.verify(self.path)
            return
        for ema in (True, False):
            if self.has_ema() if ema else self.has_raw():
                for _ in self.tensors(ema):
                    pass


def open_source(
    source: str | Path,
    heads: int | None = None,
    ema: bool = True,
    process: dit_pt.ProcessName | None = None,
    verify: bool = True,
) -> Source:
    """Recognise `source`; SourceError says what was looked for. `heads`: for DiT files of unlisted sizes. `process`:
    for DiT and SiT files that do not state it. `ema`: which weights of a run's step must match the manifest. Without
    `verify` no weights are compared with their checksums."""
    found = _opened(_locate(source), heads, ema, process, verify)
    return found if verify else replace(found, trusted=True, held=found)


def _opened(path: Path, heads: int | None, ema: bool, process: dit_pt.ProcessName | None, verify: bool) -> Source:
    """`open_source` for a path."""
    # A file can only be a DiT or SiT checkpoint.
    if path.is_file():
        return _open_pt(path, heads, process, ema)
    if process is not None:
        raise SourceError(f"{path} states its process itself; process {process!r} is for DiT and SiT .pt files")
    # A folder is recognised by the files in it.
    if is_run(path):
        return _open_run(path, ema, verify)
    if original.is_original(path):
        return _open_original(path)
    if export.is_export(path):
        if (path / "state").is_dir():
            manifest.verify(path, [export.CONFIG])
        return open_step(path, lambda folder: Source("ldit", folder, export.read_spec(folder), export.kept(folder)))
    if diffusers_dit.is_pipeline(path):
        return Source("diffusers", path, diffusers_dit.read_spec(path), ("raw",))
    if run_is_begun(path):
        raise SourceError(f"{path} is a run that has no committed step yet (train.checkpoint_every)")
    if (path / export.CONFIG).is_file() and "_class_name" in (content := read_json(path / export.CONFIG)):
        raise SourceError(
            f"{path} is an autoencoder or another part of a pipeline ({content['_class_name']}), not a model"
        )
    raise SourceError(
        f"{path} is not a model: found neither config.json with weights, nor model_args.pth, nor checkpoints/, nor "
        "model_index.json"
    )


def _open_pt(path: Path, heads: int | None, process: dit_pt.ProcessName | None, ema: bool) -> Source:
    """A DiT or SiT file: shapes give the network, `args` or the file's name the process."""
    if not dit_pt.is_pt(path):
        why = what_is_it(path)
        raise SourceError(f"{path} {why}" if why else f"{path}: expected a folder or a DiT .pt file")
    file = dit_pt.PtFile(path, check=False)
    shapes = {name: tuple(t.shape) for name, t in file.state(ema or "model" not in file.kept).items()}
    kept = tuple(word for word, key in (("raw", "model"), ("ema", "ema")) if key in file.kept)
    stated = dit_pt.process_of(path, file.settings, process), dit_pt.codec_of(file.settings)
    spec = dit_pt.spec_from_shapes(path, shapes, heads, *stated, classes=file.settings.get("num_classes"))
    return Source("dit-pt", path, spec, kept)


def _open_original(path: Path) -> Source:
    """A folder in the layout of the original."""
    kept = original.kept(path)
    file = original.shard_files(path, ema="raw" not in kept)[0]
    shapes = {name: tuple(t.shape) for name, t in open_state(file, check=False).items()}
    spec = original.read_spec(path, shapes)
    step = original.training_step(path)
    return Source("original", path, replace(spec, training={"step": step}) if step is not None else spec, kept)


def _open_run(run: Path, ema: bool, verify: bool) -> Source:
    """The latest step whose weights match the manifest; a damaged one is skipped with a warning. Without `verify` the
    latest step."""
    kind = run_kind(run)
    if kind in (AUTOENCODER, CLASSIFIER):
        raise export.no_model(run, kind)
    if not committed_steps(run):
        # The original's results folder has checkpoints/ too, with its own layout below.
        others = sorted(
            path for path in (run / "checkpoints").iterdir() if path.is_dir() and original.is_original(path)
        )
        if others:
            raise SourceError(f"{run} is a results folder of the original; name one of its checkpoints: {others[-1]}")
        raise SourceError(f"{run} has no committed step yet")

    def opened(folder: Path) -> Source:
        if verify:
            export.verify_export(folder, ema)
        return Source("ldit", folder, export.read_spec(folder), export.kept(folder), verified=ema if verify else None)

    return open_step(run, opened)


def _locate(source: str | Path) -> Path:
    """The file or folder of a source: a path, else the name of a bundled model, else a Hub id."""
    text = str(source)
    bundled = ASSETS / "models" / text
    try:
        path = Path(text).expanduser()
        if path.exists():
            return path
    except (OSError, ValueError, RuntimeError):  # name too long, NUL in it, ~ of an unknown user
        raise SourceError(f"no file or folder {text[:100]!r}…") from None
    if re.fullmatch(r"[\w.-]+", text) and bundled.is_dir():
        return bundled
    if isinstance(source, str) and is_hub_id(text):
        folder = from_hub(text)
        # The published DiTPipeline folders have no safetensors: fetch their .bin files then.
        if diffusers_dit.is_pipeline(folder) and diffusers_dit.lacks_weights(folder):
            folder = from_hub(text, (*MODEL_FILES, *diffusers_dit.PICKLED))
        return folder
    known = sorted(p.name for p in (ASSETS / "models").iterdir()) if (ASSETS / "models").is_dir() else []
    raise SourceError(f"no file or folder {text!r}, and no bundled model of that name ({', '.join(known) or 'none'})")
