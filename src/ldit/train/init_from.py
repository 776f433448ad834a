"""What a run takes from another checkpoint as its starting weights (`--train.init_from`)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldit.checkpoint.open import open_source
from ldit.config.model import TextModelConfig
from ldit.config.spec import ModelSpec
from ldit.errors import SourceError
from ldit.log import logger
from ldit.train.state import TrainState

LABEL_TABLE = "y_embedder.embedding_table.weight"

_TRUNK = ("layers.", "blocks.")  # blocks of our networks and of the original DiT
_INTO_WIDTH = ("x_embedder.weight", "x_embedder.bias", "x_embedder.proj.bias")  # entries whose first size is the width


@dataclass(frozen=True)
class Start:
    """A starting value, fp32. `rows` None: the whole parameter `name`; otherwise value[k] belongs in row rows[k] of it
    and the rows not named keep their fresh values."""

    name: str
    value: Tensor
    rows: tuple[int, ...] | None = None


@dataclass
class StartReport:
    """What `starting_weights` took; complete when its iterator is at its end."""

    taken: list[str] = field(default_factory=list)
    """Entries taken whole."""
    resized: dict[str, str] = field(default_factory=dict)
    """Entries taken by rows, and in words which rows."""
    fresh: list[str] = field(default_factory=list)
    """The network's entries that the source has not, or in another shape."""
    unused: list[str] = field(default_factory=list)
    """The source's entries that the network has not, or in another shape."""

    def line(self) -> str:
        """One line for the log."""
        used = len(self.taken) + len(self.resized)
        parts = [f"{used} of the network's {used + len(self.fresh)} entries"]
        parts += [f"{name} by rows: {words}" for name, words in self.resized.items()]
        parts += [f"fresh stay {_some(self.fresh)}"] if self.fresh else []
        parts += [f"unused are {_some(self.unused)}"] if self.unused else []
        return "; ".join(parts)


def start_from(name: str, ema: bool, spec: ModelSpec, state: TrainState) -> None:
    """Put into a fresh `state` the weights of source `name` that fit a network of `spec`; averages begin as the result.

    Every rank calls it and fills its own part. What is taken, and differences that shapes do not show, are logged."""
    source, weights, report = open_source(name, ema=ema), state.weights, StartReport()
    shapes = {name: layout.shape for name, layout in zip(weights.names, weights.layouts, strict=True)}
    null, source_null = (_null(one) for one in (spec, source.spec))
    tensors = source.tensors(ema)
    names, source_names = spec.class_names, source.spec.class_names
    for start in starting_weights(tensors, shapes, names, source_names, null, source_null, report):
        weights.put(start.name, start.value, start.rows)
    weights.sync_to_model()
    state.averages.start(weights.masters)
    logger.info("starts from %s: %s", name, report.line())
    _warn_of_differences(source.spec, spec)


def _null(spec: ModelSpec) -> int | None:
    """The row of the null class; text models have none."""
    return None if isinstance(spec.model, TextModelConfig) else spec.model.null_class


def _warn_of_differences(source: ModelSpec, spec: ModelSpec) -> None:
    """Shapes do not show these: a network that reads its weights in another way has to learn them anew."""
    model = ("n_heads", "n_kv_heads", "rope", "qk_norm", "kind", "input_size")
    codec = ("kind", "scale", "shift", "factor")
    keys = [*(("model", key) for key in model), ("process", None), *(("codec", key) for key in codec)]
    for section, key in keys:
        old, new = (one[section] if key is None else one[section].get(key) for one in (source, spec))
        if old != new:
            name = ".".join(filter(None, (section, key)))
            logger.warning("the start differs in %s: %s there, %s here", name, old, new)


def starting_weights(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    names: Sequence[str] | None,
    source_names: Sequence[str] | None,
    null: int | None,
    source_null: int | None,
    report: StartReport | None = None,
) -> Iterator[Start]:
    """What of the source's `tensors` a network with entries `shapes` starts from, one by one, as fp32 (fp32 tensors are
    the source's own memory: copy them). Entries of the same name and shape are taken whole; the label table by rows
    where the classes differ (`_row_sources`): `names` and `source_names` are the class names where known, `null` and
    `source_null` the rows of the null class, where there is one.

    Shapes do not tell heads, rotary positions, process or codec apart: the caller compares those. `report` is filled
    as the tensors come. SourceError for entries that are there twice or are not plain floating-point numbers, for
    class names or null rows that a label table cannot have, and, at the end, when no block fits.
    """
    report = StartReport() if report is None else report
    seen: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors:
        if name in seen:
            raise SourceError(f"starting weights: {name} is there twice")
        if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta:
            raise SourceError(f"starting weights: {name} is a {tensor.dtype} tensor, expected floating-point numbers")
        seen[name] = tuple(tensor.shape)
        start: Start | None = None
        if name == LABEL_TABLE and name in shapes and seen[name][1:] == tuple(shapes[name])[1:]:
            mapping = _row_sources(shapes[name][0], len(tensor), names, source_names, null, source_null)
            start = _label_rows(tensor, shapes[name][0], mapping)
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
    """New row -> the source's row it starts from; rows without an entry stay fresh.

    A class takes the row of its name (exact, else case-folded where that is unique). Where names are not known on both
    sides it takes the row of its index, if there are as many classes. The null row goes to the null row.

    A class without counterpart starts from the source's null row: the network saw images of every class with it, so
    it is a vector that the blocks know and that promises nothing wrong. Held-out loss of the bundled emoji64-class-xs
    with all nine classes on such a start: null row 0.0844, fresh 0.0856, mean of the class rows (too short to be one of
    them) 0.0862, another class's row 0.0936; with their own rows 0.0807. So an index is not a counterpart when the
    counts differ. Without a null row in the source these classes stay fresh.
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
    """Class -> the source's class of the same name; a case-folded name counts when only one of the source's has it."""
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
    """Number of classes of a label table; its null row, if any, is the last one."""
    classes = rows - int(null is not None)
    if null is not None and null != classes:
        raise SourceError(f"starting weights: {whose}'s label table has {rows} rows, its null class is {null}")
    if names is not None and len(names) != classes:
        raise SourceError(f"starting weights: {whose} has {len(names)} class names for {classes} classes")
    return classes


def _label_rows(tensor: Tensor, rows: int, mapping: dict[int, int]) -> Start | None:
    if len(tensor) == rows and mapping == {row: row for row in range(rows)}:
        return Start(LABEL_TABLE, tensor.float())
    if not mapping:
        return None
    targets = tuple(sorted(mapping))
    return Start(LABEL_TABLE, tensor[[mapping[row] for row in targets]].float(), targets)


def _in_words(mapping: dict[int, int], rows: int, null: int | None, source_null: int | None) -> str:
    own = {row: source for row, source in mapping.items() if row != null}
    unknown = sum(source == source_null for source in own.values())
    classes = rows - int(null is not None)
    parts = [f"{len(own) - unknown} of {classes} classes"] if classes else []
    parts += [f"{unknown} from the null class"] if unknown else []
    parts += [f"{classes - len(own)} fresh"] if classes > len(own) else []
    if null is not None:
        parts.append("the null class" if null in mapping else "a fresh null class")
    return ", ".join(parts)


def _why_nothing_fits(source: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> str:
    width, own = _width(source), _width(shapes)
    if width is not None and own is not None and width != own:
        return f"no block fits: the source has width {width}, this network {own}"
    if set(shapes) & set(source):
        return "no block of the source has the shape of this network's"
    return f"none of the network's entries is in the source, which has {_some(list(source))}"


def _width(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    return next((shapes[name][0] for name in _INTO_WIDTH if shapes.get(name)), None)


def _some(names: Sequence[str], limit: int = 4) -> str:
    shown = ", ".join(name[:100] for name in names[:limit])
    return f"{len(names)} ({shown}{', …' if len(names) > limit else ''})"
