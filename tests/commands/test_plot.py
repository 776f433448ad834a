"""`ldit plot`: what is read, what is drawn where, and one line for every mistake."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from ldit.cli.main import main
from ldit.commands import curves
from ldit.commands.chart import COLOURS, FONT, Axis, linear_ticks, log_ticks, tick_labels
from ldit.commands.curves import Curve, Panel, draw
from ldit.commands.plot import plot, read_metrics, smoothed
from ldit.config.requests.plot import PlotRequest
from ldit.errors import RequestError, SourceError

BLUE, RED = (ImageColor.getrgb(colour) for colour in COLOURS[:2])


def make_run(folder: Path, records: list[dict[str, Any]], batch: int | None = 8) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if batch is not None:
        (folder / "config.json").write_text(json.dumps({"train": {"batch_size": batch}}))
    return folder


def ramp(steps: range, **more: Any) -> list[dict[str, Any]]:
    return [{"step": step, "loss": step / 100, "lr": 1e-4, "images_per_second": 4.0, **more} for step in steps]


def lone(panel: Panel, log_y: bool = False) -> np.ndarray:
    """The pixels of the plot area of an image with one panel."""
    image = np.array(draw([panel], ["a", "b"], "step", log_y))
    top = image.shape[0] - curves.MARGIN - curves.BOTTOM - curves.LONE[1]
    left = curves.MARGIN + curves.LEFT
    return image[top : top + curves.LONE[1], left : left + curves.LONE[0]]


def curve(values: list[float], run: int = 0, smooth: list[float] | None = None) -> Curve:
    raw = np.array(values)
    return Curve(run, np.arange(len(values), dtype=float), raw, raw if smooth is None else np.array(smooth))


def where(pixels: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    return np.argwhere((pixels == np.array(colour)).all(-1))


# Ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 7400, [0, 2000, 4000, 6000]),
        (0.3, 1.1, [0.4, 0.6, 0.8, 1.0]),
        (-3, 9, [-2, 0, 2, 4, 6, 8]),
        (0, 5e-4, [0, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4]),
    ],
)
def test_linear_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert linear_ticks(low, high, 7 if high > 1000 else 6) == pytest.approx(expected)


def test_log_ticks_thin_out_with_the_decades() -> None:
    assert log_ticks(0.04, 1.6, 6) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1])
    assert log_ticks(1e-4, 2.0, 6) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1])
    assert log_ticks(1e-12, 1.0, 6) == pytest.approx([1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1])
    assert log_ticks(31, 49, 6) == pytest.approx([35, 40, 45])
    assert all(0 < len(log_ticks(low, low * ratio, 6)) <= 8 for low in (3e-9, 1.7, 8e7) for ratio in (1.05, 3, 40, 1e9))


@pytest.mark.parametrize(
    ("ticks", "log", "labels"),
    [
        ([0, 0.5, 1.0, 1.5], False, ["0.0", "0.5", "1.0", "1.5"]),
        ([0, 5000, 10000], False, ["0", "5k", "10k"]),
        ([0, 5e5, 1e6, 1.5e6], False, ["0.0", "0.5M", "1.0M", "1.5M"]),
        ([0, 1e-4, 2e-4], False, ["0", "1e-4", "2e-4"]),
        ([-2000, 2000], False, ["-2000", "2000"]),
        ([1e-4, 1e-2, 1, 1e5], True, ["1e-4", "0.01", "1", "100k"]),
        ([], False, []),
    ],
)
def test_labels(ticks: list[float], log: bool, labels: list[str]) -> None:
    assert tick_labels(ticks, log) == labels


def test_axes() -> None:
    assert [Axis(0, 10, 101).at(v) for v in (0, 5, 10)] == [0, 50, 100]
    assert [Axis(1, 100, 101, True).at(v) for v in (1, 10, 100)] == pytest.approx([0, 50, 100])


# The image


def test_a_line_stands_where_its_values_are() -> None:
    pixels = lone(Panel("loss", (curve([0.0, 1.0]),)))
    found = where(pixels, BLUE)
    height, width, _ = pixels.shape
    assert found[:, 1].min() <= 2 and found[:, 1].max() >= width - 3
    # y runs from 0 to 1.04 over the height
    expected = (height - 1) * (1 - found[:, 1] / (width - 1) / 1.04)
    assert np.abs(found[:, 0] - expected).max() <= 1.5


def test_a_log_axis_is_logarithmic() -> None:
    pixels = lone(Panel("loss", (curve([1.0, 10.0, 100.0]),)), log_y=True)
    found = where(pixels, BLUE)
    height, width, _ = pixels.shape
    expected = (height - 1) * (1 - (0.04 + found[:, 1] / (width - 1)) / 1.08)
    assert np.abs(found[:, 0] - expected).max() <= 1.5


def test_gaps_stay_open_and_single_points_are_dots() -> None:
    values = [1.0] * 11
    for hole in (3, 4, 6):
        values[hole] = math.nan
    columns = set(where(lone(Panel("loss", (curve(values),))), BLUE)[:, 1].tolist())
    width = curves.LONE[0]
    at = [round(i / 10 * (width - 1)) for i in range(11)]
    assert {at[1], at[2] - 2, at[5], at[7] + 2, at[9]} <= columns
    assert not columns & {*range(at[2] + 3, at[5] - 3), *range(at[5] + 4, at[7] - 3)}


def test_raw_values_are_faint_behind_the_means() -> None:
    pixels = lone(Panel("loss", (curve([0.0, 1.0, 0.0, 1.0], smooth=[0.5] * 4), curve([0.5] * 4, run=1))))
    assert len(where(pixels, ImageColor.getrgb(curves._faint(COLOURS[0])))) > 50
    assert (pixels == np.array(RED)).all(-1).all(1).any()  # an unbroken row: the second mean lies over all else
    assert not len(where(pixels, BLUE))


def test_dashes_tell_the_eighth_run_from_the_first() -> None:
    solid, dashed = (len(where(lone(Panel("loss", (curve([1.0, 1.0], run=run),))), BLUE)) for run in (0, 7))
    assert 0.35 * solid < dashed < 0.65 * solid


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


def test_the_legend_wraps_and_shortens() -> None:
    names = [f"a-run-with-a-long-name-{i}" for i in range(12)] + ["x" * 400]
    places, height = curves._legend_places(names, 900)
    assert {y for _, y, _ in places} == set(range(0, height - curves.LEGEND_ROW, curves.LEGEND_ROW))
    assert all(x + curves.SWATCH + 8 + FONT.getlength(text) <= 900 for x, _, text in places)
    assert "…" in places[-1][2]


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


def test_a_run_becomes_a_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", ramp(range(1, 50)))
    out = tmp_path / "c.png"
    assert main(["plot", str(run), str(run / "metrics.jsonl"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    two_rows = Image.open(out)
    assert two_rows.format == "PNG"
    assert main(["plot", str(run), "--out", str(out), "--keys", "loss", "lr"]) == 0
    assert Image.open(out).height == two_rows.height - curves.WIDE[1] - curves.TOP - curves.BOTTOM


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

    def keep(panels: list[Panel], runs: list[str], *_: Any) -> Image.Image:
        taken.extend((panels, runs))
        return Image.new("RGB", (1, 1))

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
        (["run", "--out", "run/metrics.jsonl"], r"--out: expected a name that ends in \.png"),
        (["run", "--out", "nowhere/a.png"], r"nowhere/a\.png: No such file"),
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
