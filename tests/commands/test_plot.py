"""`ldit plot`: what is read, what is drawn where, and one line for every mistake."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from folders import said
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ldit.cli.main import main
from ldit.commands.plot import Curve, Panel, draw, plot, read_metrics, smoothed
from ldit.config.requests.plot import PlotRequest
from ldit.errors import RequestError, SourceError
from ldit.figure import COLOURS


def make_run(folder: Path, records: list[dict[str, Any]], batch: int | None = 8) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if batch is not None:
        (folder / "config.json").write_text(json.dumps({"train": {"batch_size": batch}}))
    return folder


def ramp(steps: range, **more: Any) -> list[dict[str, Any]]:
    return [{"step": step, "loss": step / 100, "lr": 1e-4, "images_per_second": 4.0, **more} for step in steps]


def curve(values: list[float], run: int = 0, smooth: list[float] | None = None) -> Curve:
    raw = np.array(values)
    return Curve(run, np.arange(len(values), dtype=float), raw, raw if smooth is None else np.array(smooth))


# The figure


def lone(panel: Panel, log_y: bool = False) -> Axes:
    """The panel of a figure that has one."""
    (axes,) = draw([panel], ["a", "b"], "step", log_y).axes
    return axes


def labels(axes: Axes) -> list[str]:
    """Of the y ticks that are shown."""
    axes.figure.draw_without_rendering()
    low, high = axes.get_ylim()
    return [t.get_text() for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high]


def test_raw_values_are_faint_behind_the_means() -> None:
    raw, flat, mean, second = lone(
        Panel("loss", (curve([0.0, 1.0, 0.0, 1.0], smooth=[0.5] * 4), curve([0.2] * 4, run=1), curve([0.5] * 4, run=2)))
    ).lines
    assert raw.get_ydata().tolist() == [0, 1, 0, 1] and flat.get_ydata().tolist() == [0.5] * 4
    assert raw.get_color() == flat.get_color() == COLOURS[0] and raw.get_alpha() < 0.5 and flat.get_alpha() is None
    assert raw.get_zorder() < min(line.get_zorder() for line in (flat, mean, second))
    assert [line.get_color() for line in (mean, second)] == list(COLOURS[1:3]), "what is not averaged is drawn once"


def test_gaps_stay_open_and_single_points_are_dots() -> None:
    values = [1.0] * 11
    for hole in (3, 4, 6):
        values[hole] = math.nan
    (line,) = lone(Panel("loss", (curve(values),))).lines
    assert np.isnan(line.get_ydata()).nonzero()[0].tolist() == [3, 4, 6]
    assert line.get_marker() == "o" and line.get_markevery() == [5]
    (line,) = lone(Panel("loss", (curve([3.0]),))).lines
    assert line.get_markevery() == [0]


def test_dashes_tell_the_eighth_run_from_the_first() -> None:
    first, eighth = (lone(Panel("loss", (curve([1.0, 1.0], run=run),))).lines[0] for run in (0, 7))
    assert first.get_color() == eighth.get_color() and first.is_dashed() != eighth.is_dashed()


@pytest.mark.parametrize(
    ("values", "log_y", "expected"),
    [
        ([0.0, 2e-5, 8e-5, 1e-4], False, ["0", "2e-5", "4e-5", "6e-5", "8e-5", "0.0001"]),
        ([0.0, 0.5, 1.5], False, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0", "1.2", "1.4"]),
        ([31.0, 49.0], True, ["35", "40", "45", "50"]),
        ([0.04, 1.6], True, ["0.05", "0.1", "0.2", "0.5", "1"]),
        ([1e-3, 2e3], True, ["0.001", "0.01", "0.1", "1", "10", "100", "1000"]),
    ],
)
def test_tick_labels_are_short(values: list[float], log_y: bool, expected: list[str]) -> None:
    axes = lone(Panel("loss", (curve(values),)), log_y)
    assert labels(axes) == expected and axes.get_yscale() == ("log" if log_y else "linear")


@pytest.mark.parametrize(("x_label", "expected"), [("step", "20k"), ("images", "20k"), ("hours", "20000")])
def test_counts_have_units(x_label: str, expected: str) -> None:
    (axes,) = draw(
        [Panel("loss", (Curve(0, np.array([0.0, 2e4]), np.ones(2), np.ones(2)),))], ["a"], x_label, False
    ).axes
    axes.figure.draw_without_rendering()
    assert expected in [t.get_text() for t in axes.get_xticklabels()] and axes.get_xlabel() == x_label


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [math.nan],
        [0.0],
        [-1.0, -2.0],
        [5.0, 5.0],
        [1e-149, 1e149],
        [-1.7e308, 1.7e308],
        [0.0, 5e-324],
        [1.0],
        [3e-9] * 2,
    ],
)
def test_any_values_can_be_drawn(values: list[float], log_y: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [{"step": i, "loss": value} for i, value in enumerate(values)])
    assert Image.open(plot(PlotRequest((run,), tmp_path / "a.png", log_y=log_y))).size[0] > 900


def test_no_text_is_cut_off_or_lies_on_other_text() -> None:
    """Long names, many runs, five panels and an empty one: all lies within the figure, and the legend is free."""
    names = [f"a-run-with-a-long-name-{i}" for i in range(12)] + ["x" * 400, "$a_b$"]
    panels = [Panel(key * 9, (curve([1.0, 2.0], run=i),)) for i, key in enumerate("abcd")] + [Panel("e", ())]
    figure = draw(panels, names, "step", False)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown[:12] == names[:12] and "…" in shown[12] and shown[13] == "$a_b$"
    width, height = figure.bbox.size
    key = legend.get_window_extent()
    assert key.x1 <= width and key.y1 <= height
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= key.y0
    assert figure.axes[4].texts[0].get_text() == "no finite values" and len(figure.axes) == 5


# Smoothing


def test_smoothing_is_a_weighted_mean_of_neighbours() -> None:
    rng = np.random.default_rng(0)
    values, weight = rng.normal(size=41), 0.6
    expected = []
    for i in range(41):
        near = range(0, min(2 * i, 40) + 1)
        weights = np.array([weight ** abs(i - j) for j in near])
        expected.append((weights * values[near.start : near.stop]).sum() / weights.sum())
    assert np.abs(smoothed(values, weight) - expected).max() < 5e-3  # neighbours below 1e-3 of the weight are left out
    assert np.array_equal(smoothed(values, 0.0), values)


def test_smoothing_does_not_cross_gaps() -> None:
    values = np.array([1.0, 1.0, math.nan, 9.0, 9.0])
    np.testing.assert_allclose(smoothed(values, 0.9), values)


# Reading


def test_a_run_becomes_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", ramp(range(1, 50)))
    out = tmp_path / "c.png"
    assert main(["plot", str(run), str(run / "metrics.jsonl"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    two_rows = Image.open(out)
    assert two_rows.format == "PNG"
    assert main(["plot", str(run), "--out", str(out), "--keys", "loss", "lr"]) == 0
    assert Image.open(out).height < 0.7 * two_rows.height
    assert main(["plot", str(run), "--out", str(tmp_path / "c.SVG")]) == 0
    drawing = (tmp_path / "c.SVG").read_bytes()
    assert ElementTree.fromstring(drawing).tag == "{http://www.w3.org/2000/svg}svg"
    assert main(["plot", str(run), "--out", str(tmp_path / "again.svg")]) == 0
    assert (tmp_path / "again.svg").read_bytes() == drawing, "equal data, equal files"
    assert len(list(tmp_path.iterdir())) == 4


def test_what_a_run_does_not_log_is_one_line(tmp_path: Path) -> None:
    """Of keys that were asked for; the others are drawn."""
    a, b = make_run(tmp_path / "a", ramp(range(3))), make_run(tmp_path / "b", [{"step": 1, "loss": 1}])
    with said() as lines:
        plot(PlotRequest((a, b), tmp_path / "f.png", ("loss", "lr", "images_per_second")))
        plot(PlotRequest((a, b), tmp_path / "f.png"))
    assert lines == ["not logged, so not drawn: b: lr, b: images_per_second"]


def test_without_matplotlib_one_line_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is read."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", str(tmp_path / "nowhere"), "--out", str(tmp_path / "f.png")]) == 2
    err = capsys.readouterr().err
    assert err == 'ldit: --out: f.png is drawn by matplotlib, not found: pip install "large-dit[plot]"\n'


def test_other_plots_of_the_process_stay_as_they_are(tmp_path: Path) -> None:
    """No pyplot, no backend, no settings; matplotlib is imported where a figure is made."""
    run = make_run(tmp_path / "run", ramp(range(3)))
    code = f"""
import sys
from pathlib import Path
from ldit.commands.plot import plot
from ldit.config.requests.plot import PlotRequest
assert "matplotlib" not in sys.modules and "torch" not in sys.modules
import matplotlib
before = dict(matplotlib.rcParams.copy())
plot(PlotRequest((Path({str(run)!r}),), Path({str(tmp_path / "f.png")!r})))
assert dict(matplotlib.rcParams.copy()) == before and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_default_output_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", ramp(range(1, 5)))
    monkeypatch.chdir(tmp_path / "run")
    assert main(["plot", "."]) == 0
    assert (tmp_path / "run" / "curves.png").is_file()


def test_null_and_non_finite_are_gaps_absent_is_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": null}\n{"step": 2, "lr": 1}\n{"step": 3, "loss": NaN, "logit": [1, null]}\n'
        '{"step": 4, "loss": Infinity}\n{"step": 5, "loss": 2.5}\n{"step": 6, "lo'
    )
    metrics = read_metrics(path)
    assert metrics.steps == [1, 2, 3, 4, 5]
    assert [math.isnan(line["loss"]) if "loss" in line else None for line in metrics.values] == [
        True, None, True, True, False,
    ]  # fmt: skip
    assert metrics.names() == ["loss", "lr", "logit/0", "logit/1"]


def captured(monkeypatch: pytest.MonkeyPatch, job: PlotRequest) -> tuple[list[Panel], list[str]]:
    taken: list[Any] = []

    def keep(panels: list[Panel], runs: list[str], *_: Any) -> Figure:
        taken.extend((panels, runs))
        return Figure((1, 1))

    monkeypatch.setattr("ldit.commands.plot.draw", keep)
    plot(job)
    return taken[0], taken[1]


def test_horizontal_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = ramp(range(900, 3601, 900))
    records[1]["images_per_second"] = None
    records[3]["images_per_second"] = 8.0
    run = make_run(tmp_path / "run", records)
    for x, expected in (
        ("step", [900, 1800, 2700, 3600]),
        ("images", [7200, 14400, 21600, 28800]),
        ("hours", [0.5, 1.0, 1.5, 1.75]),
    ):
        panels, _ = captured(monkeypatch, PlotRequest((run,), tmp_path / "a.png", ("loss",), x))  # type: ignore[arg-type]
        assert panels[0].curves[0].x.tolist() == pytest.approx(expected)


def test_what_is_smoothed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"step": i, "loss": value, "lr": value} for i, value in enumerate((1.0, 100.0, 1.0, -1.0))]
    run = make_run(tmp_path / "run", records)
    job = PlotRequest((run,), tmp_path / "a.png", smooth=0.5, log_y=True)
    panels, _ = captured(monkeypatch, job)
    assert panels[0].curves[0].smooth[:3].tolist() == pytest.approx([1, 100, 1]), "few values are drawn as they are"
    monkeypatch.setattr("ldit.commands.plot.FEW", 0)
    panels, _ = captured(monkeypatch, job)
    loss, rate = (panel.curves[0] for panel in panels)
    # (0.5 ln 1 + ln 100 + 0.5 ln 1) / 2 = ln 10
    assert loss.smooth[:2].tolist() == pytest.approx([1, 10]) and math.isnan(loss.raw[3])
    assert rate.smooth[:3].tolist() == [1, 100, 1]


def test_names_in_the_legend_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [make_run(tmp_path / name, ramp(range(3))) for name in ("a/run", "b/run", "c")]
    (tmp_path / "kept.jsonl").write_text('{"step": 1, "loss": 1}\n')
    sources += [tmp_path / "c" / "metrics.jsonl", tmp_path / "kept.jsonl"]
    _, names = captured(monkeypatch, PlotRequest(tuple(sources), tmp_path / "a.png"))
    assert names == [str(sources[0]), str(sources[1]), str(sources[2]), str(sources[3]), "kept"]


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], r"nowhere: no such run or metrics\.jsonl"),
        (["empty"], r"empty/metrics\.jsonl: no such file"),
        (["silent"], r"silent/metrics\.jsonl: holds no metrics yet"),
        (["run", "--keys", "los"], r"no run has 'los' \(there are: loss, lr, images_per_second\)"),
        (["run", "--smooth", "1"], r"--smooth: must be in \[0, 1\), got 1\.0"),
        (["run", "--out", "run/metrics.jsonl"], r"--out: expected a name that ends in \.png or \.svg"),
        (["run", "--out", "nowhere/a.png"], r"no folder .*nowhere to write a\.png into"),
        (["run", "--x", "steps"], r"steps"),
        (["bare", "--x", "images"], r"bare/config\.json: no such file"),
        (["broken", "--x", "images"], r"broken/config\.json: no train\.batch_size"),
        (["unrated", "--x", "hours"], r"--x hours: .*unrated/metrics\.jsonl has no images_per_second"),
        (["other"], r"choose what to draw \(there are: accuracy\)"),
        (["damaged"], r"damaged/metrics\.jsonl:2: not a JSON object with an integer step"),
        ([], r"needs a run"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", ramp(range(3)))
    make_run(tmp_path / "bare", ramp(range(3)), batch=None)
    make_run(tmp_path / "silent", [])
    make_run(tmp_path / "other", [{"step": 1, "accuracy": 0.5}])
    make_run(tmp_path / "unrated", [{"step": 1, "loss": 0.5}])
    (make_run(tmp_path / "broken", ramp(range(3))) / "config.json").write_text("[]")
    (make_run(tmp_path / "damaged", []) / "metrics.jsonl").write_text('{"step": 1}\n{"step": true}\n{"step": 3}\n')
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["plot", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ldit: ") and err.count("\n") == 1 and re.search(said, err)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("line", [b"[]", b"3", b'{"step": "1"}', b"\xff\xfe", b"[" * 100_000, b'{"loss": 1}', b""])
def test_damaged_lines(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 1}\n'
    path.write_bytes(good + line)
    assert read_metrics(path).steps == [1]
    path.write_bytes(good + line + b"\n" + good)
    with pytest.raises(SourceError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)


def test_a_sealed_folder_is_left_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ramp(range(3)))
    step = run / "checkpoints" / "step-00000100"
    (step / "state").mkdir(parents=True)
    (step / "manifest.json").write_text('{"format": 1, "files": {}, "sha256": ""}')
    for out in (step / "a.png", step / "state" / "a.png"):
        with pytest.raises(RequestError, match=r"step-00000100 is sealed"):
            plot(PlotRequest((run,), out))
    assert sorted(path.name for path in step.rglob("*")) == ["manifest.json", "state"]
