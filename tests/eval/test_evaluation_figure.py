"""The image of a report: points, ellipses and bars lie where the numbers say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval.evaluation import Inceptive, Stub, folder, job, noise
from PIL import Image, ImageColor
from runs import ALONE

from ldit.commands.chart import COLOURS
from ldit.config.requests.evaluate import StatsRequest
from ldit.errors import EvaluationError, RequestError
from ldit.eval import evaluate as flow
from ldit.eval.evaluate import check_evaluation, measured, save_statistics
from ldit.eval.metrics.components import Cloud, cloud, principal_components
from ldit.eval.plot import LEFT, REFERENCE, SAMPLES, SIDE, WIDE, draw

FIGURES = {"fid": 1.5, "kid": 0.25, "kid_deviation": 0.01}
REPORT = {
    **FIGURES, "figures": ["fid", "kid"], "num_samples": 10, "labels": "balanced", "extractor": "inception",
    "extractor_sha256": "0" * 64, "resize": "none", "evaluations": None, "compared": ["a", "b"],
}  # fmt: skip
NONE = torch.empty(0, 2)


def still(x: float, y: float, points: torch.Tensor = NONE, deviation: float = 1e-3) -> Cloud:
    mean = torch.tensor([x, y], dtype=torch.float64)
    return Cloud(points, mean, torch.eye(2, dtype=torch.float64) * deviation**2)


def places(image: Image.Image, colour: str) -> np.ndarray:
    """(rows, columns) within the plot area, (0, 0) its lower left corner."""
    area = np.asarray(image)[-SIDE - 66 : -66, LEFT : LEFT + SIDE]
    rows, columns = (area == ImageColor.getrgb(colour)).all(2).nonzero()
    return np.stack([SIDE - 1 - rows, columns])


def test_both_sets_lie_in_one_plane_of_one_scale() -> None:
    """Reference around (0, 0), samples around (10, 5): the longer side fills the area but for 2 % of it on both."""
    corners = torch.tensor([[0.0, 0.0], [0.0, 5.0], [10.0, 0.0]])
    image = draw(REPORT, still(10, 5, corners[1:]), still(0, 0, corners[:1]))
    edge = 0.02 / 1.04 * SIDE
    step = SIDE / 1.04 / 10
    low = SIDE / 2 - 2.5 * step
    blue, orange = places(image, SAMPLES), places(image, REFERENCE)
    assert orange.mean(1) == pytest.approx([low, edge], abs=2)
    for x, y in ((10, 5), (0, 5), (10, 0)):
        near = np.abs(blue - np.array([[low + y * step], [edge + x * step]])).max(0) < 4
        assert near.any(), (x, y)


def test_ellipses_of_two_deviations() -> None:
    """Along a diagonal of deviation 2, across it 1, beside a reference that spans the area."""
    across = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64) / 2**0.5
    covariance = across.T @ torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)) @ across
    wide = torch.tensor([[-8.0, -8.0], [8.0, 8.0]])
    image = draw(REPORT, Cloud(NONE, torch.zeros(2).double(), covariance), still(0, 0, wide))
    at = places(image, SAMPLES) - (SIDE - 1) / 2
    along, beside = (at[0] + at[1]) / 2**0.5, (at[0] - at[1]) / 2**0.5
    step = SIDE / 1.04 / 16
    assert np.abs(along).max() == pytest.approx(2 * 2 * step, abs=2)
    assert np.abs(beside).max() == pytest.approx(2 * 1 * step, abs=2)


def test_a_bar_a_class() -> None:
    classes = [{"class": c, "pictures": 5, "precision": p, "accuracy": 0.5} for c, p in (("x", 0.25), ("y", 1.0))]
    image = draw({**REPORT, "classes": classes}, still(0, 0), still(1, 1))
    assert image.width == WIDE
    area = np.asarray(image)[-SIDE - 66 : -66]
    green, pink = ((area == ImageColor.getrgb(colour)).all(2) for colour in COLOURS[2:4])
    lengths = [green[half].sum(1).max() for half in (slice(0, SIDE // 2), slice(SIDE // 2, SIDE))]
    assert lengths[0] / lengths[1] == pytest.approx(0.25, abs=0.01)
    assert pink.sum(1).max() / lengths[1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("classes", [None, [], [{"class": "x", "pictures": 3, "precision": 1.0}],
                                     [{"class": "x", "pictures": 3}, {"class": "y", "pictures": 3}]])  # fmt: skip
def test_without_shares_of_classes_there_are_no_bars(classes: list[dict[str, Any]] | None) -> None:
    image = draw({**REPORT, "classes": classes}, still(0, 0), still(1, 1))
    assert image.width < 0.6 * WIDE


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
    monkeypatch.setattr(flow, "open_extractor", lambda name, weights, device: Inceptive())
    folder(tmp_path / "a", noise(12, 0)), folder(tmp_path / "b", noise(9, 1))
    out, orange = tmp_path / "f.png", []
    save_statistics(StatsRequest(images=str(tmp_path / "b"), out=tmp_path / "b.npz", batch_size=4))
    for reference in ("b", "b.npz"):
        measured(job(tmp_path / "a", tmp_path / reference, figure=out, metrics=("fd",)), Inceptive(), ALONE)
        with Image.open(out) as image:
            assert image.format == "PNG" and len(places(image.convert("RGB"), SAMPLES)[0]) > 12 * 9
            orange.append(len(places(image.convert("RGB"), REFERENCE)[0]))
    assert orange[0] > orange[1] > 100  # the ellipse is left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "b.npz", "f.png"]


def test_components_of_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and covariance are all that principal components need."""
    monkeypatch.setattr(flow, "open_extractor", lambda name, weights, device: Inceptive())
    folder(tmp_path / "a", noise(12, 0)), folder(tmp_path / "b", noise(9, 1))
    save_statistics(StatsRequest(images=str(tmp_path / "b"), out=tmp_path / "b.npz", batch_size=4))
    found = [
        measured(job(tmp_path / "a", tmp_path / name, components=3, metrics=("fd",)), Inceptive(), ALONE)
        for name in ("b", "b.npz")
    ]
    assert found[0]["fid_3"] == pytest.approx(found[1]["fid_3"], rel=1e-9)


def test_where_a_figure_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"figure: expected a name that ends in \.png, got .*f\.jpg"):
        check_evaluation(job("a", "b", figure=tmp_path / "f.jpg"))
    with pytest.raises(RequestError, match=r"no folder .*gone to write f\.png into"):
        measured(job("a", "b", figure=tmp_path / "gone" / "f.png"), Stub(), ALONE)


def test_a_reference_that_spans_no_plane(tmp_path: Path) -> None:
    """That is known before samples are looked at."""
    folder(tmp_path / "a", noise(5, 0)), folder(tmp_path / "b", np.repeat(noise(1, 1), 5, 0))
    extractor = Stub()
    with pytest.raises(EvaluationError, match="components: 2 are too many for a reference that spans 0"):
        measured(job(tmp_path / "a", tmp_path / "b", figure=tmp_path / "f.png"), extractor, ALONE)
    assert extractor.seen == 5 and not (tmp_path / "f.png").exists()
    folder(tmp_path / "two", noise(2, 1))
    with pytest.raises(EvaluationError, match="figure: components: 2 are too many for a reference that spans 1"):
        measured(job(tmp_path / "a", tmp_path / "two", figure=tmp_path / "f.png", metrics=("fd",)), Stub(), ALONE)
