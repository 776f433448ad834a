"""The figure of an evaluation: points, ellipses, bars and text say what the numbers say."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval.evaluation import Inceptive, Stub, folder, found, job, noise
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from PIL import Image
from runs import ALONE

from ldit.config.requests.evaluate import StatsRequest
from ldit.errors import EvaluationError, RequestError
from ldit.eval import outputs
from ldit.eval.evaluate import evaluate_with, save_statistics
from ldit.eval.extractors import extractor as extractor_room
from ldit.eval.metrics.components import Cloud, cloud, principal_components
from ldit.eval.plot import REFERENCE, SAMPLES, draw

FIGURES = {"fid": 1.5, "kid": 0.25, "kid_deviation": 0.01}
REPORT = {
    **FIGURES, "figures": ["fid", "kid"], "num_samples": 10, "labels": "balanced", "extractor": "inception",
    "extractor_sha256": "0" * 64, "resize": "none", "evaluations": None, "compared": ["a", "b"],
}  # fmt: skip
NONE = torch.empty(0, 2)


def still(x: float, y: float, points: torch.Tensor = NONE, deviation: float = 1e-3) -> Cloud:
    mean = torch.tensor([x, y], dtype=torch.float64)
    return Cloud(points, mean, torch.eye(2, dtype=torch.float64) * deviation**2)


def points(axes: Axes) -> dict[str, list[list[float]]]:
    """The points of both sets, by the colour they are drawn in."""
    (dots,) = axes.collections
    colours = [to_hex(one).upper() for one in dots.get_facecolors()]
    found: dict[str, list[list[float]]] = {}
    for colour, point in zip(colours, dots.get_offsets().tolist(), strict=True):
        found.setdefault(colour, []).append(point)
    return {colour: sorted(rows) for colour, rows in found.items()}


def test_both_sets_lie_in_one_plane_of_one_scale() -> None:
    """Mixed in a random order, and equal steps are equal on both axes."""
    a, b = (torch.randn(30, 2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    figure = draw(REPORT, still(10, 5, a), still(0, 0, b))
    (axes,) = figure.axes
    assert points(axes) == {SAMPLES: sorted(a.double().tolist()), REFERENCE: sorted(b.double().tolist())}
    order = [to_hex(one).upper() for one in axes.collections[0].get_facecolors()]
    assert order != sorted(order) and order != sorted(order, reverse=True)
    figure.draw_without_rendering()
    origin, right, up = axes.transData.transform([(0, 0), (1, 0), (0, 1)])
    assert right[0] - origin[0] == pytest.approx(up[1] - origin[1])


def test_ellipses_of_two_deviations() -> None:
    """Along a diagonal of deviation 2, across it 1, about its mean."""
    across = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64) / 2**0.5
    covariance = across.T @ torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)) @ across
    middle = torch.tensor([3.0, -1.0], dtype=torch.float64)
    (axes,) = draw(REPORT, Cloud(NONE, middle, covariance), still(0, 0)).axes
    lines = {line.get_label(): np.stack(line.get_data(), 1) for line in axes.lines}
    turned = (lines["samples"] - middle.numpy()) @ across.numpy().T
    assert np.abs(turned).max(0) == pytest.approx([4, 2]) and turned.mean(0) == pytest.approx([0, 0], abs=0.1)
    assert np.abs(lines["reference"]).max() == pytest.approx(2e-3)


def test_the_text_says_what_every_metric_depends_on() -> None:
    report = {**REPORT, "compared": ["a" * 300, "$b_c$"], "evaluations": 20}
    figure = draw(report, still(0, 0), still(1, 1))
    shown = [text.get_text() for text in figure.texts]
    assert {"fid", "1.5", "kid", "0.25", "± 0.01"} <= set(shown)
    words = " ".join(shown)
    assert "against $b_c$" in words and "images 10, labels balanced, extractor inception 000000000000" in words
    assert "evaluations 20" in words and "…" in words
    figure.draw_without_rendering()
    top = figure.axes[0].get_tightbbox().y1
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    assert all(box.y0 > top and box.y1 <= figure.bbox.height and box.x1 <= figure.bbox.width for box in boxes)


def test_a_bar_a_class() -> None:
    """The first class on top, precision above accuracy."""
    classes = [{"class": c, "pictures": 5, "precision": p, "accuracy": 0.5} for c, p in (("x", 0.25), ("y", 1.0))]
    _, axes = draw({**REPORT, "classes": classes}, still(0, 0), still(1, 1)).axes
    precision, accuracy = axes.containers
    assert [bar.get_width() for bar in precision] == [0.25, 1.0] and [bar.get_width() for bar in accuracy] == [0.5] * 2
    assert [label.get_text() for label in axes.get_yticklabels()] == ["x (5)", "y (5)"] and axes.yaxis_inverted()
    heights = [bar.get_y() for pair in zip(precision, accuracy, strict=True) for bar in pair]
    assert heights == sorted(heights) and axes.get_xlim() == (0, 1)


@pytest.mark.parametrize("classes", [None, [], [{"class": "x", "pictures": 3, "precision": 1.0}],
                                     [{"class": "x", "pictures": 3}, {"class": "y", "pictures": 3}]])  # fmt: skip
def test_without_shares_of_classes_there_are_no_bars(classes: list[dict[str, Any]] | None) -> None:
    assert len(draw({**REPORT, "classes": classes}, still(0, 0), still(1, 1)).axes) == 1


def test_a_cloud_is_spread_over_its_set() -> None:
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    mean, covariance = rows.mean(0), torch.cov(rows.T)
    axes = principal_components(mean, covariance, 2)
    found = cloud(axes, mean, covariance, rows, most=20)
    assert torch.equal(found.points, axes.project(rows[::3]))
    assert len(cloud(axes, mean, covariance, rows, most=50).points) == 50
    assert cloud(axes, mean, covariance, None).points.shape == (0, 2)
    assert found.covariance.diagonal() == pytest.approx(torch.linalg.eigvalsh(covariance).flip(0)[:2], rel=1e-12)


def test_an_evaluation_draws_its_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images, and of statistics, which have no points; where no other figure needs rows."""
    monkeypatch.setattr(extractor_room, "open_extractor", lambda name, weights, device, protocol=None: Inceptive())
    folder(tmp_path / "a", noise(12, 0)), folder(tmp_path / "b", noise(9, 1))
    drawn: list[Axes] = []
    monkeypatch.setattr(outputs, "draw", lambda *given: (drawn.append((figure := draw(*given)).axes[0]), figure)[1])
    save_statistics(StatsRequest(images=str(tmp_path / "b"), out=tmp_path / "b.npz", batch_size=4))
    for reference, out in (("b", tmp_path / "f.png"), ("b.npz", tmp_path / "f.svg")):
        evaluate_with(job(tmp_path / "a", tmp_path / reference, figure=out, metrics=("fd",)), Inceptive(), ALONE)
        (tmp_path / f"x{out.suffix}").write_bytes(out.read_bytes().replace(b"ldit evaluate", b"ldit evaluatf"))
        with pytest.raises(RequestError, match="was not made by ldit evaluate"):
            evaluate_with(job(tmp_path / "a", tmp_path / "b", figure=tmp_path / f"x{out.suffix}"), Inceptive(), ALONE)
        (tmp_path / f"x{out.suffix}").unlink()
        evaluate_with(job(tmp_path / "a", tmp_path / reference, figure=out, metrics=("fd",)), Inceptive(), ALONE)
    with Image.open(tmp_path / "f.png") as image:
        assert image.format == "PNG" and image.info["ldit evaluate"].endswith(f"against {tmp_path / 'b'}")
    assert f"ldit evaluate: {tmp_path / 'a'} against" in (tmp_path / "f.svg").read_text()
    assert [{c: len(p) for c, p in points(axes).items()} for axes in drawn[::2]] == [
        {SAMPLES: 12, REFERENCE: 9}, {SAMPLES: 12},
    ]  # fmt: skip
    assert all(len(axes.lines) == 2 for axes in drawn), "ellipses are left"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "b.npz", "f.png", "f.svg"]


def test_components_of_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and covariance are all that principal components need."""
    monkeypatch.setattr(extractor_room, "open_extractor", lambda name, weights, device, protocol=None: Inceptive())
    folder(tmp_path / "a", noise(12, 0)), folder(tmp_path / "b", noise(9, 1))
    save_statistics(StatsRequest(images=str(tmp_path / "b"), out=tmp_path / "b.npz", batch_size=4))
    found = [
        evaluate_with(job(tmp_path / "a", tmp_path / name, components=3, metrics=("fd",)), Inceptive(), ALONE)
        for name in ("b", "b.npz")
    ]
    assert found[0]["fid_3"] == pytest.approx(found[1]["fid_3"], rel=1e-9)


def test_where_a_figure_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"figure: expected a name that ends in \.png or \.svg, got .*f\.jpg"):
        found(job("a", "b", figure=tmp_path / "f.jpg"))
    with pytest.raises(RequestError, match=r"no folder .*gone to write f\.png into"):
        found(job("a", "b", figure=tmp_path / "gone" / "f.png"))


def test_a_reference_that_spans_no_plane(tmp_path: Path) -> None:
    """That is known before samples are looked at."""
    folder(tmp_path / "a", noise(5, 0)), folder(tmp_path / "b", np.repeat(noise(1, 1), 5, 0))
    extractor = Stub()
    with pytest.raises(EvaluationError, match="components: 2 are too many for a reference that spans 0"):
        evaluate_with(job(tmp_path / "a", tmp_path / "b", figure=tmp_path / "f.png"), extractor, ALONE)
    assert extractor.seen == 5 and not (tmp_path / "f.png").exists()
    folder(tmp_path / "two", noise(2, 1))
    with pytest.raises(
        EvaluationError, match="figure: components: 2 are too many for a reference that spans at most 1"
    ):
        evaluate_with(job(tmp_path / "a", tmp_path / "two", figure=tmp_path / "f.png", metrics=("fd",)), Stub(), ALONE)


def test_without_matplotlib_the_extra_is_named_before_any_image_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "a", noise(5, 0))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    extractor = Stub()
    with pytest.raises(RequestError, match=r'figure: f\.png is drawn by matplotlib, .*pip install "large-dit\[plot\]"'):
        found(job(tmp_path / "a", tmp_path / "a", figure=tmp_path / "f.png"), extractor)
    assert not extractor.seen
