"""What a network takes from another checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldit.checkpoint.open import open_source
from ldit.config.model import ClassModelConfig
from ldit.config.recipes.registry import recipe
from ldit.errors import SourceError
from ldit.nn.build import build_model, parameter_shapes
from ldit.nn.dit import init_weights
from ldit.rng import generator
from ldit.training.init_from import LABEL_TABLES, Start, StartReport, starting_weights

NAMES = tuple("abcdefghi")
LABEL_TABLE = LABEL_TABLES[0]


def config(**changes: Any) -> ClassModelConfig:
    return replace(recipe("tiny-cpu").model, **changes)


def weights(model: ClassModelConfig, seed: int = 1) -> dict[str, Tensor]:
    """A network's weights, none of them zero."""
    drawn = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=drawn) for name, shape in parameter_shapes(model).items()}


def take(
    source: Mapping[str, Tensor],
    target: ClassModelConfig,
    names: Sequence[str] | None = NAMES,
    source_names: Sequence[str] | None = NAMES,
    nulls: tuple[int | None, int | None] | None = None,
) -> tuple[dict[str, Start], StartReport]:
    report = StartReport()
    null, source_null = nulls or (target.null_class, len(source[LABEL_TABLE]) - 1)
    shapes = parameter_shapes(target)
    found = list(starting_weights(source.items(), shapes, names, source_names, null, source_null, report))
    assert len({start.name for start in found}) == len(found)
    assert {*report.taken, *report.resized} == {start.name for start in found}
    assert {start.name for start in found} | set(report.fresh) == set(shapes)
    assert {start.name for start in found} | set(report.unused) == set(source)
    assert all(start.value.dtype == torch.float32 for start in found)
    return {start.name: start for start in found}, report


def table(start: Start, rows: int, fresh: float = -7.0) -> Tensor:
    """The new label table, rows that stay fresh filled with a number."""
    if start.rows is None:
        return start.value
    out = torch.full((rows, start.value.shape[1]), fresh)
    out[list(start.rows)] = start.value
    return out


def test_the_same_network_is_taken_whole() -> None:
    source = weights(config())
    starts, report = take(source, config())
    assert all(start.rows is None and torch.equal(start.value, source[name]) for name, start in starts.items())
    assert report.line() == f"{len(source)} of the network's {len(source)} entries"


def test_lower_precision_becomes_fp32() -> None:
    source = {name: value.bfloat16() for name, value in weights(config()).items()}
    starts, _ = take(source, config(num_classes=3), ("c", "x", "a"))
    assert torch.equal(starts["x_embedder.weight"].value, source["x_embedder.weight"].float())
    assert torch.equal(table(starts[LABEL_TABLE], 4)[0], source[LABEL_TABLE][2].float())


# ---------------------------------------------------------------- the bundled model


def bundled(num_classes: int, names: Sequence[str] | None) -> tuple[Tensor, Tensor, StartReport]:
    """(the source's label table, the new one, report); everything else must be taken whole."""
    opened = open_source("emoji64-class-xs")
    source = dict(opened.tensors(ema=True))
    target = replace(opened.spec.model, num_classes=max(num_classes, 1))
    shapes = {**parameter_shapes(target), LABEL_TABLE: (num_classes + 1, 256)}
    report = StartReport()
    start = {
        start.name: start
        for start in starting_weights(source.items(), shapes, names, opened.spec.class_names, num_classes, 9, report)
    }
    assert report.fresh == report.unused == []
    assert all(torch.equal(start[name].value, source[name].float()) for name in source if name != LABEL_TABLE)
    return source[LABEL_TABLE].float(), table(start[LABEL_TABLE], num_classes + 1), report


def test_other_classes_start_from_the_null_class() -> None:
    old, new, report = bundled(10, [f"breed {i}" for i in range(10)])
    assert torch.equal(new, old[[9] * 11])
    assert report.resized == {LABEL_TABLE: "none of 10 classes, 10 new ones from the null class, the null class"}


def test_some_of_the_classes_in_another_order() -> None:
    """Exact names first, then case-folded; the null row comes along."""
    old, new, report = bundled(5, ["travel", "Food", "ghosts", "animals", "FLAGS"])
    assert torch.equal(new, old[[8, 3, 9, 1, 2, 9]])
    assert report.resized == {LABEL_TABLE: "4 of 5 classes, 1 new ones from the null class, the null class"}
    assert f"{LABEL_TABLE} by rows: 4 of 5 classes" in report.line()


def test_the_same_names_in_another_order_are_moved() -> None:
    names = open_source("emoji64-class-xs").spec.class_names
    assert names is not None
    old, new, _ = bundled(9, names[::-1])
    assert torch.equal(new, old[[8, 7, 6, 5, 4, 3, 2, 1, 0, 9]])


@pytest.mark.parametrize("names", [None, ()])
def test_no_classes(names: tuple[str, ...] | None) -> None:
    """An unconditional network has the null row alone."""
    old, new, report = bundled(0, names)
    assert torch.equal(new, old[9:])
    assert report.resized == {LABEL_TABLE: "the null class"}


# ---------------------------------------------------------------- the label table


@pytest.mark.parametrize(
    ("classes", "names", "source_names", "expected"),
    [
        (9, None, None, list(range(10))),
        (9, NAMES, None, list(range(10))),
        (9, None, NAMES, list(range(10))),
        (4, None, None, [9] * 5),
        (4, NAMES[:4], None, [9] * 5),
        (12, None, NAMES, [9] * 13),
        (12, (*NAMES, "x", "y", "z"), NAMES, [*range(9), 9, 9, 9, 9]),
        (3, ("B", "b", "ä"), NAMES, [1, 1, 9, 9]),
    ],
)
def test_counterparts(
    classes: int, names: Sequence[str] | None, source_names: Sequence[str] | None, expected: list[int]
) -> None:
    """Names where both know them; indices only where the counts agree; the null row for all others."""
    source = weights(config())
    starts, _ = take(source, config(num_classes=classes), names, source_names)
    assert torch.equal(table(starts[LABEL_TABLE], classes + 1), source[LABEL_TABLE][expected])
    assert (starts[LABEL_TABLE].rows is None) == (expected == list(range(10)))


def test_names_that_only_differ_in_case() -> None:
    """Exact beats case-folded; a case-folded name that two classes have is none."""
    source = weights(config(num_classes=3))
    starts, _ = take(source, config(num_classes=3), ("mug", "MUG", "Cup"), ("Mug", "mug", "cup"))
    assert torch.equal(table(starts[LABEL_TABLE], 4), source[LABEL_TABLE][[1, 3, 2, 3]])


def test_without_null_rows() -> None:
    """No null row in the source: classes without counterpart stay fresh, and so does a null row. None in the network:
    the source's is not carried, and still starts what is new."""
    source = weights(config(class_dropout_prob=0.0))
    starts, report = take(source, config(num_classes=2), ("c", "new"), NAMES, (2, None))
    assert starts[LABEL_TABLE].rows == (0,) and torch.equal(starts[LABEL_TABLE].value, source[LABEL_TABLE][[2]])
    assert report.resized[LABEL_TABLE] == "1 of 2 classes, 1 fresh, a fresh null class"
    starts, report = take(source, config(num_classes=2), ("x", "y"), NAMES, (2, None))
    assert LABEL_TABLE in report.fresh and LABEL_TABLE in report.unused
    source = weights(config())
    starts, _ = take(source, config(num_classes=2, class_dropout_prob=0.0), ("new", "c"), NAMES, (None, 9))
    assert torch.equal(table(starts[LABEL_TABLE], 2), source[LABEL_TABLE][[9, 2]])


def test_a_table_of_the_same_size_is_not_mistaken() -> None:
    """Nine classes and a null row, ten classes without one: the shape is the same, the rows are not."""
    source = weights(config())
    target = config(num_classes=10, class_dropout_prob=0.0)
    starts, _ = take(source, target, (*NAMES, "j"), NAMES)
    assert torch.equal(starts[LABEL_TABLE].value, source[LABEL_TABLE])  # the tenth class starts from the null row
    source = weights(target)
    starts, report = take(source, config(), NAMES, (*NAMES, "j"), (9, None))
    assert starts[LABEL_TABLE].rows == tuple(range(9)) and "a fresh null class" in report.resized[LABEL_TABLE]


def test_a_table_that_does_not_fit_its_names() -> None:
    source = weights(config())
    for arguments, said in (
        ((NAMES[:4], NAMES, 9, 9), "the network has 4 class names for 9 classes"),
        ((NAMES, NAMES[:4], 9, 9), "the source has 4 class names for 9 classes"),
        ((None, None, 9, 12), "the source's label table has 10 rows, its null class is 12"),
    ):
        with pytest.raises(SourceError, match=said):
            list(starting_weights(source.items(), parameter_shapes(config()), *arguments))


# ---------------------------------------------------------------- other networks


def test_another_resolution_needs_nothing() -> None:
    _, report = take(weights(config()), config(input_size=32))
    assert report.fresh == report.unused == []


def test_another_patch_size_leaves_both_ends_fresh() -> None:
    """The entries of other shapes are named; the embedder's bias has its shape and is taken."""
    _, report = take(weights(config()), config(patch_size=2))
    both = {"x_embedder.weight", "final_layer.linear.weight", "final_layer.linear.bias"}
    assert set(report.fresh) == set(report.unused) == both
    assert all(f"{name}" in report.line() for name in both)


def test_more_blocks_and_fewer() -> None:
    """Blocks of the same number are taken; many names are cut to four and a count."""
    deep, shallow = config(n_layers=4), config(n_layers=1)
    _, report = take(weights(config()), deep)
    assert {name.split(".")[1] for name in report.fresh} == {"2", "3"}
    assert f"fresh stay {len(report.fresh)} ({', '.join(report.fresh[:4])}, …)" in report.line()
    _, report = take(weights(config()), shallow)
    assert report.fresh == [] and {name.split(".")[1] for name in report.unused} == {"1"}


def test_another_width_is_refused() -> None:
    """Also between widths beyond 1024, which share the time embedder and the label table."""
    with pytest.raises(SourceError, match="no block fits: the source has width 32, this network 64"):
        take(weights(config(dim=32)), config())
    wide, wider = ({n: torch.empty(s, device="meta") for n, s in parameter_shapes(config(dim=d)).items()}
                   for d in (1088, 1152))  # fmt: skip
    small = {n: torch.zeros(()).expand(v.shape) for n, v in wide.items() if not n.startswith("layers")}
    shapes = {n: tuple(v.shape) for n, v in wider.items()}
    with pytest.raises(SourceError, match="width 1088, this network 1152"):
        list(starting_weights(small.items(), shapes, NAMES, NAMES, 9, 9))


def test_another_kind_of_network_is_refused() -> None:
    with pytest.raises(SourceError, match=r"none of the network's entries is in the source, which has 1 \(blocks"):
        list(starting_weights([("blocks.0.w", torch.zeros(2))], parameter_shapes(config()), None, None, 9, 9))


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("x_embedder.bias", torch.zeros(64)), "x_embedder.bias occurs twice"),
        (("more", torch.zeros(2, dtype=torch.int64)), "more is a torch.int64 tensor"),
        (("more", torch.zeros(2, device="meta")), "more is a"),
    ],
)
def test_entries_at_fault(extra: tuple[str, Tensor], said: str) -> None:
    tensors = [*weights(config()).items(), extra]
    with pytest.raises(SourceError, match=said):
        list(starting_weights(tensors, parameter_shapes(config()), NAMES, NAMES, 9, 9))


def test_a_network_started_so_predicts_as_its_source() -> None:
    """Applied to a fresh network with the classes in another order, every class predicts as before."""
    names = (*NAMES[5:], *NAMES[:5])
    source, target = build_model(config()), build_model(config())
    init_weights(target, lambda name: generator(0, "init", 0, name))
    source.load_state_dict(weights(config()))
    parameters = dict(target.named_parameters())
    with torch.no_grad():
        for start in starting_weights(source.state_dict().items(), parameter_shapes(config()), names, NAMES, 9, 9):
            if start.rows is None:
                parameters[start.name].copy_(start.value)
            else:
                parameters[start.name][list(start.rows)] = start.value
        x, t = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.full((10,), 500.0)
        old = source(x, t, torch.tensor([*(NAMES.index(name) for name in names), 9]))
        assert torch.equal(target(x, t, torch.arange(10)), old)
