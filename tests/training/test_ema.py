"""`ldit ema`: snapshots of power averages into an export of another width."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ldit
from ldit.cli.main import main
from ldit.config.recipes.registry import recipe
from ldit.config.spec import ClassConditionerConfig, ModelSpec
from ldit.nn.build import parameter_shapes
from ldit.storage import shards as sets
from ldit.storage.atomic import committed, write_json
from ldit.training import reconstruct as ema
from ldit.training.posthoc import combination, gamma_of, power_decay, residual

SPACING, UPDATES, SKIPPED = 50, 400, 3  # a step counts SKIPPED more than the updates made by then
TRACKED = (0.05, 0.10)
DIRECT = (0.07, 0.15)


def tiny_spec() -> ModelSpec:
    config = recipe("tiny-cpu")
    model = replace(config.model, dim=16, n_layers=1, n_heads=2, multiple_of=16)
    names = ClassConditionerConfig(tuple("abcdefghi"))
    return ModelSpec(model, config.process, config.codec, names, config.sampling, {"step": 1, "images": 16})


def trajectory(n: int) -> dict[str, Tensor]:
    """The weights at update n, float64: they turn as they grow, each entry in its own way."""
    values = {}
    for index, (name, shape) in enumerate(parameter_shapes(tiny_spec().model).items()):
        phase = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape) + index
        values[name] = 1 + (n / UPDATES) ** 0.5 * torch.sin(phase + 4 * n / UPDATES)
    return values


def write_snapshot(folder: Path, updates: int, averages: dict[float, dict[str, Tensor]], shards: int) -> None:
    with committed(folder) as temporary:
        step = updates + SKIPPED
        write_json(temporary / "config.json", replace(tiny_spec(), training={"step": step, "images": 16}).to_json())
        write_json(temporary / "snapshot.json", {"step": step, "updates": updates})
        for width, table in averages.items():
            stem, names = f"power-{width:.4f}", sorted(table, reverse=shards > 1)
            files = {name: sets.shard_name(stem, i % shards, shards) for i, name in enumerate(names)}
            for file in set(files.values()):
                save_file({n: table[n].float() for n in names if files[n] == file}, temporary / file)
            if shards > 1:
                sets.write_index(temporary, stem, files, 1)


@dataclass(frozen=True)
class Tracked:
    """A run with snapshots, and averages tracked directly: (updates, width) -> weights, float64."""

    run: Path
    direct: dict[tuple[int, float], dict[str, Tensor]]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    run = tmp_path_factory.mktemp("tracked") / "run"
    averages: dict[float, dict[str, Tensor]] = {}
    direct = {}
    for n in range(1, UPDATES + 1):
        weights = trajectory(n)
        for width in (*TRACKED, *DIRECT):
            beta = power_decay(gamma_of(width), n)
            old = averages.get(width, weights)
            averages[width] = {name: beta * old[name] + (1 - beta) * weights[name] for name in weights}
        if n % SPACING == 0:
            direct |= {(n, width): averages[width] for width in averages}
            folder = run / "snapshots" / f"step-{n + SKIPPED:08d}"
            write_snapshot(folder, n, {width: averages[width] for width in TRACKED}, shards=1 + n // SPACING % 2)
    (run / "snapshots" / "step-00000500.tmp-0123abcd").mkdir()
    return Tracked(run, direct)


def fault(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line of a command that fails."""
    assert main(["ema", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize("width", DIRECT)
@pytest.mark.parametrize("updates", [UPDATES, 250])
def test_it_is_the_average_tracked_directly(tracked: Tracked, tmp_path: Path, width: float, updates: int) -> None:
    """The error of an entry is the sum over updates of (error of the profile)·(weights - their mean), at most
    residual·norm of the profile·norm of what is averaged; besides, fp32 rounding of what is stored and written."""
    made = ema.reconstruct(tracked.run, tmp_path / "out", width, updates + SKIPPED)
    count = updates // SPACING
    assert (made.step, made.snapshots, made.sets) == (updates + SKIPPED, count, 2 * count)
    stored = [(SPACING * i, w) for i in range(1, count + 1) for w in TRACKED]
    coefficients = combination(stored, (updates, width))
    assert made.residual == residual(stored, (updates, width), coefficients)
    written = load_file(tmp_path / "out" / "model.safetensors")
    path = [trajectory(n) for n in range(1, updates + 1)]
    exponent = gamma_of(width) + 1
    profile = math.sqrt(
        sum(((n / updates) ** exponent - ((n - 1) / updates) ** exponent) ** 2 for n in range(1, updates + 1))
    )
    for name, value in tracked.direct[updates, width].items():
        moved = torch.stack([weights[name] for weights in path])
        bound = made.residual * profile * (moved - moved.mean(0)).norm(dim=0) + 3 * 2**-23 * made.magnitude
        assert written[name].dtype == torch.float32
        error = (written[name] - value).abs()
        assert (error <= bound).all()
        others = (tracked.direct[updates, own][name] - value for own in TRACKED)
        assert error.norm() < 0.05 * min(other.norm() for other in others)


def test_a_tracked_width_is_read_and_nothing_else(tracked: Tracked, tmp_path: Path) -> None:
    """Its own coefficient is 1, the others rounding: one set is read, and comes out to the last bit."""
    made = ema.reconstruct(tracked.run, tmp_path / "out", 0.05)
    assert (made.snapshots, made.sets) == (1, 1) and made.residual < 1e-7
    newest = tracked.run / "snapshots" / f"step-{UPDATES + SKIPPED:08d}"
    stored, written = dict(sets.read_set(newest, "power-0.0500")), load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == written.keys() and all(torch.equal(stored[name], written[name]) for name in stored)


def test_the_export_is_a_model(tracked: Tracked, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command: it opens and predicts, its record says what it is, and the line says how true it is."""
    out = tmp_path / "out"
    assert main(["ema", str(tracked.run), str(out), "--sigma-rel", "0.07", "--step", str(203), "--dtype", "bf16"]) == 0
    line, path = capsys.readouterr().out.splitlines()
    assert path == str(out)
    assert line.startswith("width 0.07 at step 203 from 8 averages of 4 snapshots: profile residual ")
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    pipe = ldit.load(out)
    record = {"step": 203, "images": 16, "ema": {"sigma_rel": 0.07, "snapshots": 4}}
    assert json.loads((out / "config.json").read_text()) == replace(tiny_spec(), training=record).to_json()
    assert pipe.model(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long)).isfinite().all()
    stored = load_file(out / "model.safetensors")
    for name, value in tracked.direct[200, 0.07].items():
        # bf16 keeps 8 bits: half a unit of values under 2 is 2^-8; the reconstruction is well within another
        assert stored[name].dtype == torch.bfloat16 and (stored[name].double() - value).abs().max() < 2**-7


def test_tensors_are_read_one_at_a_time(tracked: Tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets in one order are read side by side: the same tensor from each before the next one."""
    read: list[str] = []

    def logged(folder: Path, stem: str) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in sorted(sets.read_set(folder, stem)):
            read.append(name)
            yield name, tensor

    monkeypatch.setattr(ema, "read_set", logged)
    made = ema.reconstruct(tracked.run, tmp_path / "out", 0.07)
    names = sorted(parameter_shapes(tiny_spec().model))
    assert read == [name for name in names for _ in range(made.sets)]


def test_poor_fits_are_told(tracked: Tracked, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ema.reconstruct(tracked.run, tmp_path / "good", 0.07)
    assert caplog.text == ""
    made = ema.reconstruct(tracked.run, tmp_path / "poor", 0.27, 103)
    assert made.residual > 0.1
    assert f"cannot express width 0.27 well: profile residual {100 * made.residual:.0f} %" in caplog.text


def test_a_run_reconstructs_what_another_tracked(tmp_path: Path) -> None:
    """The same run twice, once with the width wanted among the tracked ones: from files of `ldit train` alone."""
    flags = ["--train.steps", "24", "--train.batch-size", "4", "--heldout.every", "0", "--train.sample-every", "0"]
    for name, widths in (("two", ["0.05", "0.10"]), ("one", ["0.07"])):
        more = ["--ema.power", *widths, "--ema.snapshot-every", "3"]
        assert main(["train", "tiny-cpu", "--out", str(tmp_path / name), *flags, *more]) == 0
    made = ema.reconstruct(tmp_path / "two", tmp_path / "out", 0.07)
    assert (made.step, made.snapshots, made.sets) == (24, 8, 16)
    snapshots = [tmp_path / name / "snapshots" / "step-00000024" for name in ("one", "two", "two")]
    stems = ("power-0.0700", "power-0.0500", "power-0.1000")
    wanted, *stored = (dict(sets.read_set(folder, stem)) for folder, stem in zip(snapshots, stems, strict=True))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == wanted.keys()

    def distance(table: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float((table[name] - wanted[name]).square().sum()) for name in wanted))

    assert distance(written) < 0.05 * min(map(distance, stored))


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("width", ["0", "-0.1", "0.28", "nan"])
def test_widths_out_of_range(tracked: Tracked, tmp_path: Path, capsys: Any, width: str) -> None:
    assert "sigma-rel: must be in (0, 0.28), got" in fault(capsys, tracked.run, tmp_path / "o", f"--sigma-rel={width}")


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (404, "step 404 is beyond the last snapshot, of step 403"),
        (52, "step 52 is before the first snapshot, of step 53"),
        (100, "there is no snapshot of step 100; the nearest are of steps 53 and 103"),
    ],
)
def test_steps_without_a_snapshot(tracked: Tracked, tmp_path: Path, capsys: Any, step: int, said: str) -> None:
    assert said in fault(capsys, tracked.run, tmp_path / "out", "--sigma-rel", 0.1, "--step", step)
    assert not (tmp_path / "out").exists()


def test_places_at_fault(tracked: Tracked, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run" / "snapshots" / "step-00000050").mkdir(parents=True)
    for run, out, said in (
        (tracked.run, tmp_path, f"{tmp_path} exists already"),
        (tracked.run, tmp_path / "no" / "out", f"no folder {tmp_path / 'no'}"),
        (tmp_path / "no", tmp_path / "out", f"no folder {tmp_path / 'no'}"),
        (tmp_path / "run", tmp_path / "out", "step-00000050/manifest.json is missing"),
    ):
        assert said in fault(capsys, run, out, "--sigma-rel", 0.1)
    (tmp_path / "run" / "snapshots" / "step-00000050").rmdir()
    for _ in range(2):  # an empty folder, and none
        said = fault(capsys, tmp_path / "run", tmp_path / "out", "--sigma-rel", 0.1)
        assert "has no snapshots; ldit train makes them with --ema.power 0.05 0.10 --ema.snapshot-every N" in said
        if (tmp_path / "run" / "snapshots").exists():
            (tmp_path / "run" / "snapshots").rmdir()


@pytest.fixture
def two(tmp_path: Path) -> Callable[..., Path]:
    """A run of two snapshots; `change` edits the tables of the second before they are written."""

    def make(change: Callable[[dict[float, dict[str, Tensor]]], Any] = lambda averages: None) -> Path:
        for updates in (50, 100):
            averages = {width: trajectory(updates) for width in TRACKED}
            if updates == 100:
                change(averages)
            write_snapshot(tmp_path / "run" / "snapshots" / f"step-{updates:08d}", updates, averages, updates // 50)
        return tmp_path / "run"

    return make


@pytest.mark.parametrize(
    "name",
    [
        "step-00000050/power-0.0500.safetensors",
        "step-00000050/snapshot.json",
        "step-00000100/config.json",
        "step-00000100/power-0.1000-00002-of-00002.safetensors",
        "step-00000100/power-0.1000.safetensors.index.json",
    ],
)
@pytest.mark.parametrize("lost", [True, False])
def test_a_damaged_snapshot_is_named(
    two: Callable[..., Path], tmp_path: Path, capsys: Any, name: str, lost: bool
) -> None:
    path = two() / "snapshots" / name
    content = path.read_bytes()
    for old, new in ((b'"images": 16', b'"images": 17'), (b'"updates": 50', b'"updates": 51'), (content[-2:], b" }")):
        if not lost and content == path.read_bytes():  # a change that leaves JSON valid, where it is JSON
            path.write_bytes(content.replace(old, new))
    path.unlink() if lost else None
    said = fault(capsys, tmp_path / "run", tmp_path / "out", "--sigma-rel", 0.07)
    assert name in said and ("missing" if lost else "damaged") in said
    assert not (tmp_path / "out").exists()


def drop(averages: dict[float, dict[str, Tensor]]) -> None:
    averages[0.1] = {name: value for name, value in averages[0.1].items() if name != "x_embedder.bias"}


def grow(averages: dict[float, dict[str, Tensor]]) -> None:
    averages[0.1] = {**averages[0.1], "more": torch.zeros(1)}


def stretch(averages: dict[float, dict[str, Tensor]]) -> None:
    averages[0.1] = {**averages[0.1], "x_embedder.bias": torch.zeros(17)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, "power-0.1000: x_embedder.bias is missing"),
        (grow, "power-0.1000: more is not in the other snapshots"),
        (stretch, "power-0.1000: x_embedder.bias has shape (17,), elsewhere (16,)"),
        (lambda averages: averages.update({0.3: averages[0.1]}), "power-0.3000 is not the average of"),
    ],
)
def test_snapshots_that_do_not_belong_together(
    two: Callable[..., Path], tmp_path: Path, capsys: Any, change: Any, said: str
) -> None:
    assert said in fault(capsys, two(change), tmp_path / "out", "--sigma-rel", 0.07)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("content", [[], {}, {"step": 100}, {"step": 100, "updates": "x"}, {"step": -1, "updates": 1}])
def test_a_snapshot_without_its_numbers(two: Callable[..., Path], tmp_path: Path, capsys: Any, content: Any) -> None:
    with committed(two() / "snapshots" / "step-00000150") as folder:
        write_json(folder / "snapshot.json", content)
    said = fault(capsys, tmp_path / "run", tmp_path / "out", "--sigma-rel", 0.07)
    assert "snapshot.json: expected the numbers step and updates" in said


def test_a_snapshot_before_the_first_update_is_no_average(two: Callable[..., Path], tmp_path: Path) -> None:
    write_snapshot(two() / "snapshots" / "step-00000000", 0, {width: trajectory(0) for width in TRACKED}, 1)
    assert ema.reconstruct(tmp_path / "run", tmp_path / "out", 0.07).snapshots == 2


# ---------------------------------------------------------------- help


def test_help_is_torch_free_and_complete() -> None:
    """(How long it takes is measured with the other commands, in tests/cli.)"""
    code = (
        "import sys\nfrom ldit.cli.main import main\n"
        "try:\n    main(['ema', '--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print('TORCH' if 'torch' in sys.modules else 'free')"
    )
    environment = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.rstrip().endswith("free")
    assert all(word in done.stdout for word in ("RUN", "OUT", "--sigma-rel", "--step", "--dtype"))
