"""`--train.init_from` through the whole flow: what fits is taken, the label table by class names, the rest is fresh."""

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import make_folder, make_idx, over, said
from safetensors.torch import load_file
from smallrun import changed
from torch import Tensor

from ldit.checkpoint.open import open_source
from ldit.checkpoint.run import step_folder
from ldit.commands.train import run as train
from ldit.config.run import RunConfig
from ldit.errors import SourceError
from ldit.rng import generator
from ldit.training.init_from import LABEL_TABLES, starting_weights
from ldit.training.state import TrainState
from ldit.training.tasks.diffusion import DiffusionTask

NAMES = ("a", "b", "c")
LABEL_TABLE = LABEL_TABLES[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data sets and a run over three classes whose weights and averages differ."""
    base = tmp_path_factory.mktemp("init")
    make_folder(base / "data", NAMES)
    make_folder(base / "other", ("c", "zebra", "A", "b", "x"))
    make_folder(base / "large", NAMES, side=16)
    make_idx(base / "digits")
    config = over(base / "data", {"train.steps": 4, "train.lr": 0.05})
    assert train(config, base / "run") == 0
    assert train(changed(config, {"model.class_dropout_prob": 0.0}), base / "without-null") == 0
    return base


def source(place: Path, ema: bool = True) -> dict[str, Tensor]:
    """The weights of the source, as its files hold them."""
    file = step_folder(place / "run", 4) / ("ema.safetensors" if ema else "model.safetensors")
    return load_file(file)


Begun = tuple[dict[str, Tensor], TrainState, list[str]]


def begun(config: RunConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> Begun:
    """The weights a run starts with, its state at that moment, and what it says."""
    caught: list[tuple[dict[str, Tensor], TrainState]] = []
    real = DiffusionTask.begin

    def begin(subject: DiffusionTask, state: TrainState) -> None:
        real(subject, state)
        masters = {n: m.detach().clone() for n, m in zip(state.weights.names, state.weights.masters, strict=True)}
        for track in state.averages.tracks.values():
            assert all(torch.equal(a, b) for a, b in zip(masters.values(), track.values, strict=True))
        caught.append((masters, state))

    with monkeypatch.context() as patch, said() as lines:
        patch.setattr(DiffusionTask, "begin", begin)
        assert train(config, out) == 0
    ((masters, state),) = caught
    return masters, state, lines


def started_from(place: Path, data: str, changes: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    return changed(over(place / data), {"train.init_from": str(place / "run"), **(changes or {}), **more})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ema", [True, False])
def test_the_same_network_starts_with_the_weights(
    ema: bool, precision: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the average, or the raw ones; every average begins as they are, and bf16 computes with their copy."""
    changes = {"train.init_ema": ema, "train.precision": precision, "ema.more": (0.5,), "ema.power": (0.1,)}
    masters, _, lines = begun(started_from(place, "data", changes), tmp_path / "run", monkeypatch)
    expected = source(place, ema)
    assert masters.keys() == expected.keys() and all(torch.equal(masters[n], expected[n]) for n in masters)
    assert not torch.equal(source(place)["x_embedder.weight"], source(place, False)["x_embedder.weight"])
    told = next(line for line in lines if line.startswith("starts from"))
    assert f"{len(expected)} of the network's {len(expected)} entries" in told


def test_classes_are_carried_by_name(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """c, b by name; A folded to a; x and zebra from the null row, which goes to the null row."""
    config = started_from(place, "other", {"model.num_classes": 5})
    masters, _, lines = begun(config, tmp_path / "run", monkeypatch)
    theirs, ours = source(place)[LABEL_TABLE], masters[LABEL_TABLE]
    names = open_source(tmp_path / "run").spec.class_names
    assert names is not None and sorted(names) == ["A", "b", "c", "x", "zebra"]
    expected = {"A": theirs[0], "b": theirs[1], "c": theirs[2], "x": theirs[3], "zebra": theirs[3]}
    assert all(torch.equal(ours[row], expected[name]) for row, name in enumerate(names))
    assert torch.equal(ours[5], theirs[3])
    others = [name for name in masters if name != LABEL_TABLE]
    assert all(torch.equal(masters[name], source(place)[name]) for name in others)
    told = next(line for line in lines if line.startswith("starts from"))
    assert "3 of 5 classes" in told and "2 new ones from the null class" in told


def test_tokens_of_a_class_are_carried_as_its_vector(place: Path) -> None:
    """Both tables have a row a class, and the null class last."""
    tables = {name: torch.randn(4, width) for name, width in zip(LABEL_TABLES, (16, 48), strict=True)}
    block = {"layers.0.attention.wq.weight": torch.zeros(2, 2)}
    shapes = {name: (3, value.shape[1]) for name, value in tables.items()} | {next(iter(block)): (2, 2)}
    found = {
        start.name: start
        for start in starting_weights([*tables.items(), *block.items()], shapes, ("c", "x"), NAMES, 2, 3)
    }
    for name, table in tables.items():
        assert found[name].rows == (0, 1, 2)  # "c", a new class from the null class, the null class
        assert torch.equal(found[name].value, table[[2, 3, 3]])


def test_rows_without_counterpart_stay_fresh(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source without null class has nothing for new classes, nor for the null class."""
    values = {"model.num_classes": 5, "train.init_from": str(place / "without-null")}
    masters, _, _ = begun(over(place / "other", values), tmp_path / "run", monkeypatch)
    theirs = load_file(step_folder(place / "without-null", 4) / "ema.safetensors")[LABEL_TABLE]
    fresh = torch.empty(6, 16).normal_(0.0, 0.02, generator=generator(0, "init", 0, LABEL_TABLE))
    names = open_source(tmp_path / "run").spec.class_names or ()
    expected = {"A": theirs[0], "b": theirs[1], "c": theirs[2], "x": fresh[names.index("x")]}
    expected["zebra"] = fresh[names.index("zebra")]
    assert len(theirs) == 3 and all(torch.equal(masters[LABEL_TABLE][r], expected[n]) for r, n in enumerate(names))
    assert torch.equal(masters[LABEL_TABLE][5], fresh[5])


@pytest.mark.parametrize("data", ["digits", "data"])
def test_a_model_without_classes_takes_the_null_row(
    data: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masters, state, _ = begun(started_from(place, data, {"model.num_classes": 0}), tmp_path / "run", monkeypatch)
    assert torch.equal(masters[LABEL_TABLE], source(place)[LABEL_TABLE][3:])
    assert state.step == 2 and state.updates == 2


def test_ten_digits_from_three_classes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No name in common and another count: every class begins as the null class, none as a fresh row."""
    masters, _, _ = begun(started_from(place, "digits", {"model.num_classes": 10}), tmp_path / "run", monkeypatch)
    assert all(torch.equal(row, source(place)[LABEL_TABLE][3]) for row in masters[LABEL_TABLE])


def test_another_resolution(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the tokens: all is taken, as no entry depends on the number of tokens."""
    config = started_from(place, "large", {"model.input_size": 16, "data.image_size": 16})
    masters, _, _ = begun(config, tmp_path / "run", monkeypatch)
    assert all(torch.equal(masters[name], value) for name, value in source(place).items())


def test_more_blocks_stay_fresh(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masters, _, lines = begun(started_from(place, "data", {"model.n_layers": 2}), tmp_path / "run", monkeypatch)
    wq = masters["layers.1.attention.wq.weight"]
    bound = (6.0 / sum(wq.shape)) ** 0.5
    own = generator(0, "init", 0, "layers.1.attention.wq.weight")
    fresh = torch.empty(wq.shape).uniform_(-bound, bound, generator=own)
    assert torch.equal(wq, fresh)
    assert torch.equal(masters["layers.0.attention.wq.weight"], source(place)["layers.0.attention.wq.weight"])
    assert any("fresh stay" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.rope": "2d"}, "model.rope"),
        ({"model.n_heads": 4}, "model.n_heads"),
        ({"model.n_heads": 4, "model.rope": "2d"}, "model.rope"),
    ],
)
def test_what_shapes_do_not_show_is_said(
    changes: dict[str, Any], named: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, lines = begun(started_from(place, "data", changes), tmp_path / "run", monkeypatch)
    assert any(f"init_from: {named} differs: " in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.dim": 32}, "no block fits: the source has width 16, this network 32"),
        ({"train.init_from": "nowhere/at-all"}, "nowhere/at-all"),
    ],
)
def test_a_start_that_does_not_fit_is_one_line(
    changes: dict[str, Any], named: str, place: Path, tmp_path: Path
) -> None:
    """And leaves no step; the same directory takes a run that fits."""
    with pytest.raises(SourceError) as error:
        train(started_from(place, "data", changes), tmp_path / "run")
    assert named in str(error.value) and "\n" not in str(error.value) and error.value.code == 2
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert train(started_from(place, "data"), tmp_path / "run") == 0


def test_going_on_does_not_start_again(place: Path, tmp_path: Path) -> None:
    """The source may be gone when the run is resumed; the checkpoint counts."""
    config = started_from(place, "data", {"train.checkpoint_every": 1})
    for run, steps in (("whole", 4), ("halved", 2), ("halved", 4)):
        assert train(changed(config, {"train.steps": steps}), tmp_path / run) == 0
    a, b = (load_file(step_folder(tmp_path / run, 4) / "model.safetensors") for run in ("whole", "halved"))
    assert all(torch.equal(a[name], b[name]) for name in a)
