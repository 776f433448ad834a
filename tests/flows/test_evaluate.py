"""Pictures from anywhere against a reference: the figures are those of the pictures, with what they depend on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flows.evaluation import SIDE, WIDTH, Inceptive, Stub, folder, job, noise, rows_of
from flows.sets import exported, made
from flows.sets import job as set_job
from runs import ALONE

from ldit.errors import EvaluationError, LditError
from ldit.eval.extractor import Extractor
from ldit.eval.kernel import kernel_distance
from ldit.eval.neighbours import precision_recall
from ldit.eval.statistics import read_statistics
from ldit.flows import evaluate as flow
from ldit.flows.evaluate import EvaluateJob, ExtractorJob, measured, save_statistics
from ldit.flows.evaluation_report import table
from ldit.flows.picture_stream import is_pictures, open_stream


def found(one: EvaluateJob, extractor: Extractor | None = None) -> dict[str, Any]:
    return measured(one, extractor or Stub(), ALONE)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """By the roots of the eigenvalues of the product: fine for covariances of full rank."""
    one, two = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(one @ two).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two) - 2 * root)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `a` (23 pictures) and `b` (31), and both as .npz."""
    base = tmp_path_factory.mktemp("evaluate")
    for name, pictures in (("a", noise(23, 0)), ("b", noise(31, 1, low=40))):
        folder(base / name, pictures)
        np.savez(base / f"{name}.npz", pictures)
        np.savez_compressed(base / f"{name}-packed.npz", arr_0=pictures)
    return base


@pytest.mark.parametrize("kind", ["", ".npz", "-packed.npz"])
def test_figures_are_those_of_the_pictures(place: Path, kind: str) -> None:
    report = found(job(place / f"a{kind}", place / f"b{kind}"))
    a, b = rows_of(noise(23, 0)), rows_of(noise(31, 1, low=40))
    both = precision_recall(torch.from_numpy(a), torch.from_numpy(b))
    kid = kernel_distance(torch.from_numpy(a), torch.from_numpy(b))
    # Features are fp32 on both sides; means of other batches differ by their rounding.
    assert report["fd_stub"] == pytest.approx(frechet(a, b), rel=1e-5)
    assert (report["precision"], report["recall"]) == (both.precision, both.recall)
    assert report["kid"] == pytest.approx(kid.mean, rel=1e-4) and report["kid_subset"] == 23
    assert report["num_samples"] == 23 and report["extractor"] == "stub" and report["labels"] == "unknown"
    assert "inception_score" not in report and "sfid" not in report
    assert report["figures"] == ["fd_stub", "precision", "recall", "kid"]


def test_batches_change_rounding_alone(place: Path) -> None:
    one, other = (found(job(place / "a", place / "b", batch)) for batch in (3, 23))
    for name in one["figures"]:
        assert one[name] == pytest.approx(other[name], rel=1e-5)


def test_inception_has_its_own(place: Path) -> None:
    report = found(job(place / "a", place / "b"), Inceptive())
    assert report["figures"] == ["fid", "sfid", "inception_score", "precision", "recall", "kid"]
    a, b = (2 * rows_of(x)[:, :4] for x in (noise(23, 0), noise(31, 1, low=40)))
    assert report["sfid"] == pytest.approx(frechet(a, b), rel=1e-5)
    assert report["inception_score"] > 1 and report["inception_score_splits"] == 1


def test_saved_statistics_stand_for_their_pictures(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "open_extractor", lambda name, weights, device: Inceptive())
    assert save_statistics(str(place / "b"), tmp_path / "b.npz", None, None, ExtractorJob(), 4) == 31
    kept = read_statistics(tmp_path / "b.npz")
    assert (kept.count, kept.extractor, kept.fingerprint) == (31, "inception", "0" * 64)
    report = found(job(place / "a", tmp_path / "b.npz"), Inceptive())
    whole = found(job(place / "a", place / "b"), Inceptive())
    assert report["figures"] == ["fid", "sfid", "inception_score"]
    for name in report["figures"]:
        assert report[name] == pytest.approx(whole[name], rel=1e-9)
    with pytest.raises(EvaluationError, match=r"^metrics: kid needs the pictures of the reference"):
        found(job(place / "a", tmp_path / "b.npz", metrics=("kid",)), Inceptive())
    with pytest.raises(EvaluationError, match=r"statistics of inception, the extractor is stub"):
        found(job(place / "a", tmp_path / "b.npz"))
    other = Inceptive()
    other.fingerprint = "1" * 64
    with pytest.raises(EvaluationError, match=r"statistics of other weights of inception"):
        found(job(place / "a", tmp_path / "b.npz"), other)


def test_adm_statistics_with_pictures(place: Path, tmp_path: Path) -> None:
    """mu and sigma are of a larger set than arr_0, whose pictures serve precision, recall and KID."""
    b, large = noise(31, 1, low=40), rows_of(noise(400, 2))
    arrays = {"mu": large.mean(0), "sigma": np.cov(large.T), "arr_0": b}
    np.savez(tmp_path / "adm.npz", **arrays)
    report = found(job(place / "a", tmp_path / "adm.npz"), Inceptive())
    pictures = found(job(place / "a", place / "b"), Inceptive())
    assert report["fid"] == pytest.approx(frechet(rows_of(noise(23, 0)), large), rel=1e-5)
    assert "sfid" not in report
    assert [report[n] for n in ("precision", "recall", "kid")] == [pictures[n] for n in ("precision", "recall", "kid")]


def test_pictures_of_a_model_are_those_of_its_set(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made and kept nowhere, or made by `ldit sample --num` and read again: the same figures."""
    source = exported(tmp_path / "model")
    options = {"steps": "2", "seed": 3}
    asked = set_job(source, 22, options=options)
    for out in (tmp_path / "set", tmp_path / "set.npz"):
        made(monkeypatch, asked, out)
    made_now = found(job(source, place / "b", 4, num=22, options=options))
    for out in (tmp_path / "set", tmp_path / "set.npz"):
        read = found(job(out, place / "b", 4))
        assert [read[n] for n in read["figures"]] == [made_now[n] for n in made_now["figures"]]
        assert read["labels"] == "balanced" and len(read["classes"]) == 4
    assert made_now["evaluations"] == 3 and made_now["labels"] == "balanced"
    assert made_now["classes"][0]["class"] == "ant" and made_now["classes"][0]["pictures"] == 6
    described = json.loads((tmp_path / "set/samples.json").read_text())
    (tmp_path / "set/samples.json").write_text(json.dumps({**described, "complete": False}))
    with pytest.raises(EvaluationError, match="not complete"):
        found(job(tmp_path / "set", place / "b"))


def test_a_row_a_class(tmp_path: Path) -> None:
    """Accuracy where the extractor's classes are those of the pictures, and only there."""
    names = ("p", "q", "r")
    a = folder(tmp_path / "a", noise(12, 0), names)
    folder(tmp_path / "b", noise(20, 1))
    report = found(job(a, tmp_path / "b"), Stub(names))
    by_hand = rows_of(noise(12, 0))[:, :3].argmax(1)
    for label, row in enumerate(report["classes"]):
        assert row["class"] == names[label] and row["pictures"] == 4
        assert row["accuracy"] == pytest.approx((by_hand[label::3] == label).mean())
    share = sum(row["precision"] for row in report["classes"]) / 3
    assert share == pytest.approx(report["precision"])
    assert "accuracy" not in found(job(a, tmp_path / "b"), Stub(("x", "y", "z")))["classes"][0]


def test_some_pictures_are_spread_over_a_folder(tmp_path: Path) -> None:
    """The order of class folders is that of their names: the first ones would be of one class."""
    a = folder(tmp_path / "a", noise(12, 0), ("p", "q", "r"))
    stream = open_stream(str(a), 6, None, 4)
    assert stream.labels == (0, 0, 1, 1, 2, 2)
    assert sum(len(p) for _, p in stream.blocks(0, 2)) + sum(len(p) for _, p in stream.blocks(1, 2)) == 6
    first = next(iter(stream.blocks(0, 1)))[1]
    assert np.array_equal(first[1].permute(1, 2, 0).numpy(), noise(12, 0)[6])  # the third of class p


def test_components_and_their_interval(place: Path) -> None:
    one = job(place / "a", place / "b", components=2, resamples=40)
    report = found(one)
    a, b = rows_of(noise(23, 0)), rows_of(noise(31, 1, low=40))
    axes = np.linalg.eigh(np.cov(b.T))[1][:, ::-1][:, :2]
    assert report["fd_stub_2"] == pytest.approx(frechet((a - b.mean(0)) @ axes, (b - b.mean(0)) @ axes), rel=1e-4)
    low, high = report["fd_stub_2_interval"]
    assert low < report["fd_stub_2"] < high
    assert found(one)["fd_stub_2_interval"] == [low, high]


def test_the_report_says_what_figures_depend_on(place: Path, tmp_path: Path) -> None:
    report = found(job(place / "a", place / "b", json=tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text()) == report
    lines = table(report).splitlines()
    assert len(lines) == 1 + len(report["figures"])
    for line in lines[1:]:
        for word in ("23", "unknown", "stub 000000000000", "none"):
            assert word in line
    assert report["reference"]["count"] == 31 and report["samples"]["crop"].startswith(f"{SIDE}x{SIDE}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": ("fdi",)}, r"metrics: expected some of fd, sfid, is, pr, kid, got 'fdi'"),
        ({"metrics": ("sfid",)}, r"metrics: sfid needs Inception"),
        ({"num": 24}, r"holds 23 pictures, 24 are asked for"),
        ({"metrics": ("fd",), "components": 7}, rf"components: must be 1 to {WIDTH}, got 7"),
        ({"rule": "random"}, r"labels are not dealt"),
    ],
)
def test_what_cannot_be_is_one_line(place: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        found(job(place / "a", place / "b", **changes))


@pytest.mark.parametrize(
    "changes", [{"num": 1}, {"components": -1}, {"resamples": 5}, {"json": Path("/no/where.json")}]
)
def test_mistakes_before_anything_is_opened(changes: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError):
        job("a", "b", **changes)


def test_missing_and_empty_places(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "words.npz", other=np.zeros(3))
    for source, reference in (
        (place / "nowhere", place / "b"), (place / "a", place / "nowhere"), (place / "a", place / "no.npz"),
        (tmp_path / "empty", place / "b"), (place / "a", tmp_path / "words.npz"), (place / "a@heldout", place / "b"),
    ):  # fmt: skip
        with pytest.raises(LditError):
            found(job(source, reference))


def test_few_pictures_give_an_error_or_a_value(place: Path, tmp_path: Path) -> None:
    """E1: singular covariances and sets of hardly any picture."""
    for count in (2, 3, 4, 5):
        folder(tmp_path / str(count), noise(count, 7))
        report = found(job(tmp_path / str(count), place / "b", metrics=("fd", "kid")))
        assert np.isfinite([report["fd_stub"], report["kid"]]).all() and report["fd_stub"] >= 0
    folder(tmp_path / "same", np.repeat(noise(1, 8), 9, 0))
    report = found(job(tmp_path / "same", place / "b"))
    assert np.isfinite([report[name] for name in report["figures"]]).all()
    with pytest.raises(EvaluationError, match="nearest neighbours need at least 4 samples, got 3"):
        found(job(tmp_path / "3", place / "b"))


def test_features_that_are_not_finite_are_an_error(place: Path) -> None:
    class Wild(Stub):
        def __call__(self, pictures):
            features = super().__call__(pictures)
            if self.seen > 31 + 10:
                features.pool[1, 2] = float("nan")
            return features

    with pytest.raises(EvaluationError, match="picture 11 are not finite"):
        found(job(place / "a", place / "b"), Wild())


def test_what_is_a_set_of_pictures(place: Path, tmp_path: Path) -> None:
    assert all(map(is_pictures, ("emoji64", "emoji64@heldout", str(place / "a"), str(place / "a.npz"))))
    assert not is_pictures(str(exported(tmp_path / "model"))) and not is_pictures("emoji64-class-xs")
