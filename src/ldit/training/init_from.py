"""Starting weights of a run from another checkpoint (`--train.init_from`)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ldit.checkpoint.layouts.dit_pt import DIT, ProcessName, PtFile, is_pt, stated_process
from ldit.checkpoint.open import Source, open_source
from ldit.config.model import OriginalDiTConfig, TextModelConfig
from ldit.config.presets import ORIGINAL_DIT_HEADS
from ldit.config.spec import FlowConfig, ModelSpec
from ldit.errors import SourceError
from ldit.log import logger
from ldit.training.state import TrainState

LABEL_TABLES = ("y_embedder.embedding_table.weight", "y_tokens.embedding_table.weight")
"""Tables with a row a class: of its vector, and of its tokens."""

_TRUNK = ("layers.", "blocks.")  # blocks of our networks and of the original DiT
_OF_WIDTH = ("x_embedder.weight", "x_embedder.bias", "x_embedder.proj.bias")  # entries whose first size is the width


@dataclass(frozen=True)
class Start:
    """A starting value, fp32. With `rows` None it is the full parameter `name`. Otherwise value[k] is row rows[k] of
    the parameter, and the other rows keep their fresh values."""

    name: str
    value: Tensor
    rows: tuple[int, ...] | None = None


@dataclass
class StartReport:
    """What `starting_weights` took; complete when its iterator is exhausted."""

    taken: list[str] = field(default_factory=list)
    """Entries taken as they are."""
    resized: dict[str, str] = field(default_factory=dict)
    """Entries taken by rows -> a description of the rows."""
    fresh: list[str] = field(default_factory=list)
    """Entries of the network that the source lacks or has in another shape."""
    unused: list[str] = field(default_factory=list)
    """Entries of the source that the network lacks or has in another shape."""

    def line(self) -> str:
        """One line for the log."""
        used = len(self.taken) + len(self.resized)
        parts = [f"{used} of the network's {used + len(self.fresh)} entries"]
        parts += [f"{name} by rows: {words}" for name, words in self.resized.items()]
        parts += [f"fresh stay {_some(self.fresh)}"] if self.fresh else []
        parts += [f"unused are {_some(self.unused)}"] if self.unused else []
        return "; ".join(parts)


def start_from(name: str, ema: bool, spec: ModelSpec, state: TrainState) -> None:
    """Copy the weights of source `name` that fit a network of `spec` into a fresh `state`; averages start as a copy.

    Every rank calls it and fills its own part. It logs what was taken, and warns of differences that shapes do not
    show."""
    source, weights, report = _opened(name, ema, spec), state.weights, StartReport()
    shapes = {name: layout.shape for name, layout in zip(weights.names, weights.layouts, strict=True)}
    null, source_null = _null(spec), _null(source.spec)
    tensors = source.tensors(ema)
    names, source_names = spec.class_names, source.spec.class_names
    for start in starting_weights(tensors, shapes, names, source_names, null, source_null, report):
        weights.put(start.name, start.value, start.rows)
    weights.sync_to_model()
    state.averages.start(weights.masters)
    logger.info("starts from %s: %s", name, report.line())
    _warn_of_differences(source.spec, spec)


def _opened(name: str, ema: bool, spec: ModelSpec) -> Source:
    """The source. A DiT or SiT file that does not state its heads or process is taken to have those of this run."""
    model = spec.model
    if not (is_pt(name) and Path(name).is_file() and isinstance(model, OriginalDiTConfig)):
        return open_source(name, ema=ema)
    heads = None if (model.hidden_size, model.depth) in ORIGINAL_DIT_HEADS else model.num_heads
    process: ProcessName | None = None
    stated, _ = stated_process(Path(name), PtFile(Path(name), check=False).settings)
    own = spec.process == DIT or (isinstance(spec.process, FlowConfig) and spec.process.is_sit)
    if own and stated in (None, spec.process):
        process = "ddpm" if spec.process == DIT else "flow"
    source = open_source(name, heads, ema, process)
    # "flow" does not say which of SiT's paths and predictions: those of this run.
    return replace(source, spec=replace(source.spec, process=spec.process)) if process == "flow" else source


def _null(spec: ModelSpec) -> int | None:
    """The label table's row of the null class; None for text models."""
    return None if isinstance(spec.model, TextModelConfig) else spec.model.null_class


def _warn_of_differences(source: ModelSpec, spec: ModelSpec) -> None:
    """Warn of settings that shapes do not show, under which the network would use the same weights differently."""
    llama = ("n_heads", "n_kv_heads", "rope", "qk_norm", "kind", "input_size", "mid_layer", "fine_layers")
    model = (*llama, "num_heads", "variant")
    codec = ("kind", "scale", "shift", "factor")
    keys = [*(("model", key) for key in model), ("process", None), *(("codec", key) for key in codec)]
    for section, key in keys:
        old, new = (one[section] if key is None else one[section].get(key) for one in (source, spec))
        if old != new:
            name = ".".join(filter(None, (section, key)))
            logger.warning("init_from: %s differs: %s in the source, %s in this run", name, old, new)


def starting_weights(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    names: Sequence[str] | None,
    source_names: Sequence[str] | None,
    null: int | None,
    source_null: int | None,
    report: StartReport | None = None,
) -> Iterator[Start]:
    """Yields what a network with entries `shapes` takes from the source's `tensors`, one by one, as fp32 (fp32 tensors
    share the source's memory: copy them). Entries of the same name and shape are taken as they are. The label table is
    taken by rows where the classes differ (`_row_sources`): `names` and `source_names` are the class names where known,
    `null` and `source_null` the rows of the null class, if any.

    Shapes do not show heads, rotary positions, process or codec: the caller compares those. `report` is filled as the
    tensors come. SourceError for an entry that occurs twice or is not plain floating-point numbers, for class names or
    null rows that do not fit the label table, and, at the end, when no block fits.
    """
    report = StartReport() if report is None else report
    seen: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors:
        # Files may come from anywhere: refuse what no network can take.
        if name in seen:
            raise SourceError(f"starting weights: {name} occurs twice")
        if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta:
            raise SourceError(f"starting weights: {name} is a {tensor.dtype} tensor, expected floating-point numbers")
        seen[name] = tuple(tensor.shape)
        # Label tables go by classes, everything else by name and shape.
        start: Start | None = None
        if name in LABEL_TABLES and name in shapes and seen[name][1:] == tuple(shapes[name])[1:]:
            mapping = _row_sources(shapes[name][0], len(tensor), names, source_names, null, source_null)
            start = _label_rows(name, tensor, shapes[name][0], mapping)
            if start is not None and start.rows is not None:
                report.resized[name] = _in_words(mapping, shapes[name][0], null, source_null)
        elif seen[name] == tuple(shapes.get(name, ())) and name in shapes:
            start = Start(name, tensor.float())
        if start is None:
            report.unused.append(name)
            continue
        if start.rows is None:
            report.taken.append(name)
        yield start
    # A run that takes no block at all has most likely been given the wrong source.
    used = {*report.taken, *report.resized}
    report.fresh += [name for name in shapes if name not in used]
    trunk = [name for name in shapes if name.startswith(_TRUNK)] or list(shapes)
    if used.isdisjoint(trunk):
        raise SourceError(f"starting weights: {_why_nothing_fits(seen, shapes)}")


def _row_sources(
    rows: int,
    source_rows: int,
    names: Sequence[str] | None,
    source_names: Sequence[str] | None,
    null: int | None,
    source_null: int | None,
) -> dict[int, int]:
    """New row -> the source's row that it starts from. Rows without an entry stay fresh.

    A class takes the row of its name (exact, else case-folded if that is unique). If names are not known on both sides,
    it takes the row of its index, provided that both have the same number of classes. The null row takes the null row.

    A class without a counterpart takes the source's null row: the blocks have seen it with images of every class, so it
    suggests no wrong class. Held-out loss of the bundled emoji64-class-xs with all nine classes started so: null row
    0.0844, fresh rows 0.0856, mean of the class rows (shorter than any of them) 0.0862, another class's row 0.0936;
    their own rows 0.0807. Hence no match by index when the counts differ. Without a null row in the source, these
    classes stay fresh.
    """
    classes = _classes(rows, names, null, "the network")
    source_classes = _classes(source_rows, source_names, source_null, "the source")
    mapping: dict[int, int] = {}
    if names is not None and source_names is not None:
        mapping = _by_name(names, source_names)
    elif classes == source_classes:
        mapping = {index: index for index in range(classes)}
    if source_null is not None:
        mapping |= {index: source_null for index in range(classes) if index not in mapping}
        mapping |= {} if null is None else {null: source_null}
    return mapping


def _by_name(names: Sequence[str], source_names: Sequence[str]) -> dict[int, int]:
    """Class -> the source's class of the same name. A case-folded match counts if it is unique in the source."""
    exact = {name: index for index, name in enumerate(source_names)}
    folded: dict[str, list[int]] = {}
    for index, name in enumerate(source_names):
        folded.setdefault(name.casefold(), []).append(index)
    mapping = {}
    for index, name in enumerate(names):
        similar = folded.get(name.casefold(), [])
        if name in exact:
            mapping[index] = exact[name]
        elif len(similar) == 1:
            mapping[index] = similar[0]
    return mapping


def _classes(rows: int, names: Sequence[str] | None, null: int | None, whose: str) -> int:
    """The number of classes of a label table, whose null row, if any, must be the last. `whose` is for messages."""
    classes = rows - int(null is not None)
    if null is not None and null != classes:
        raise SourceError(f"starting weights: {whose}'s label table has {rows} rows, its null class is {null}")
    if names is not None and len(names) != classes:
        raise SourceError(f"starting weights: {whose} has {len(names)} class names for {classes} classes")
    return classes


def _label_rows(name: str, tensor: Tensor, rows: int, mapping: dict[int, int]) -> Start | None:
    """The start of label table `name` of `rows` rows: all of it where every row keeps its place, else the mapped rows;
    None when there are none."""
    if len(tensor) == rows and mapping == {row: row for row in range(rows)}:
        return Start(name, tensor.float())
    if not mapping:
        return None
    targets = tuple(sorted(mapping))
    return Start(name, tensor[[mapping[row] for row in targets]].float(), targets)


def _in_words(mapping: dict[int, int], rows: int, null: int | None, source_null: int | None) -> str:
    """A description of `mapping` for the log."""
    of_classes = {row: source for row, source in mapping.items() if row != null}
    from_null = sum(source == source_null for source in of_classes.values())
    classes = rows - int(null is not None)
    known = len(of_classes) - from_null
    parts = [f"{known or 'none'} of {classes} classes"] if classes else []
    parts += [f"{from_null} new ones from the null class"] if from_null else []
    parts += [f"{classes - len(of_classes)} fresh"] if classes > len(of_classes) else []
    if null is not None:
        parts.append("the null class" if null in mapping else "a fresh null class")
    return ", ".join(parts)


def _why_nothing_fits(source: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The most likely reason why no entry of the source fits the network."""
    width, own = _width(source), _width(shapes)
    if width is not None and own is not None and width != own:
        return f"no block fits: the source has width {width}, this network {own}"
    if set(shapes) & set(source):
        return "no block of the source has the shape of this network's"
    return f"none of the network's entries is in the source, which has {_some(list(source))}"


def _width(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    return next((shapes[name][0] for name in _OF_WIDTH if shapes.get(name)), None)


def _some(names: Sequence[str], limit: int = 4) -> str:
    shown = ", ".join(name[:100] for name in names[:limit])
    return f"{len(names)} ({shown}{', …' if len(names) > limit else ''})"
