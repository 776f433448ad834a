"""Images from anywhere against a reference: the figures are those of the images, with what they depend on."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval.evaluation import SIDE, WIDTH, Inceptive, Stub, folder, found, job, noise, rows_of
from folders import said
from PIL import Image
from pipeline.sets import exported, made
from pipeline.sets import job as set_job

from ldit.config.requests.evaluate import EvaluateRequest, StatsRequest
from ldit.errors import EvaluationError, LditError
from ldit.eval.evaluate import check_evaluation, save_statistics
from ldit.eval.extractors import extractor as extractor_room
from ldit.eval.metrics.kernel import kernel_distance
from ldit.eval.metrics.neighbours import precision_recall
from ldit.eval.reference import read_statistics
from ldit.eval.report import table
from ldit.pipeline.sets.stream import is_images, open_stream


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """By the roots of the eigenvalues of the product: fine for covariances of full rank."""
    one, two = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(one @ two).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two) - 2 * root)


@pytest.mark.parametrize("kind", ["", ".npz", "-packed.npz"])
def test_figures_are_those_of_the_images(place: Path, kind: str) -> None:
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


def test_statistics_of_another_size_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`ldit stats` crops to the side of its first image; the samples have another. With one side for both, the file is
    worth its images."""
    logging.getLogger("ldit").propagate = True
    monkeypatch.setattr(extractor_room, "open_extractor", lambda name, weights, device, protocol=None: Stub())
    (tmp_path / "b").mkdir()
    for i, side in enumerate((24, 16, 40, 32, 16, 28)):
        Image.fromarray(noise(1, i, side=side)[0]).save(tmp_path / "b" / f"{i}.png")
    samples = folder(tmp_path / "a", noise(9, 9, side=16))
    stats = StatsRequest(images=str(tmp_path / "b"), out=tmp_path / "b.npz", extractor="stub")
    assert save_statistics(stats) == (6, (24, 24))
    found(job(samples, tmp_path / "b.npz"))
    head = "images of 16 x 16 are compared with a reference of 24 x 24: resizing affects metrics"
    assert [message for message in caplog.messages if message.startswith(head)]
    caplog.clear()
    assert save_statistics(replace(stats, image_size=16)) == (6, (16, 16))
    ours, whole = found(job(samples, tmp_path / "b.npz")), found(job(samples, tmp_path / "b"))
    assert not any("resizing affects" in message for message in caplog.messages)
    for name in ours["figures"]:
        assert ours[name] == pytest.approx(whole[name], rel=1e-9)


def test_saved_statistics_stand_for_their_images(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractor_room, "open_extractor", lambda name, weights, device, protocol=None: Inceptive())
    assert save_statistics(StatsRequest(images=str(place / "b"), out=tmp_path / "b.npz", batch_size=4)) == (
        31,
        (SIDE, SIDE),
    )
    kept = read_statistics(tmp_path / "b.npz")
    assert (kept.count, kept.extractor, kept.fingerprint) == (31, "inception", "0" * 64)
    report = found(job(place / "a", tmp_path / "b.npz"), Inceptive())
    whole = found(job(place / "a", place / "b"), Inceptive())
    assert report["figures"] == ["fid", "sfid", "inception_score"]
    for name in report["figures"]:
        assert report[name] == pytest.approx(whole[name], rel=1e-9)
    with pytest.raises(EvaluationError, match=r"^metrics: kid needs the images of the reference"):
        found(job(place / "a", tmp_path / "b.npz", metrics=("kid",)), Inceptive())
    with pytest.raises(EvaluationError, match=r"statistics of inception, the extractor is stub"):
        found(job(place / "a", tmp_path / "b.npz"))
    assert report["reference"] == {
        "statistics": "b.npz",
        "crc32": kept.crc32,
        "count": 31,
        "resize": "none",
        "size": [SIDE, SIDE],
    }
    assert len(kept.crc32.split()) == 2 and len(kept.crc32) == 17
    other = Inceptive()
    other.resize = "otherwise"
    with pytest.raises(EvaluationError, match="statistics of images resized by none, not otherwise"):
        found(job(place / "a", tmp_path / "b.npz"), other)
    other = Inceptive()
    other.fingerprint = "1" * 64
    with pytest.raises(EvaluationError, match=r"statistics of inception with other weights"):
        found(job(place / "a", tmp_path / "b.npz"), other)


def test_a_protocol_is_reported_and_splits_its_way(place: Path, tmp_path: Path) -> None:
    """23 images: one split by ADM's rule, ten by torch-fidelity's."""
    for protocol, splits in ((None, 1), ("adm", 1), ("torch-fidelity", 10), ("clean-fid", 1)):
        extractor = Inceptive()
        extractor.protocol = protocol  # type: ignore[attr-defined]
        report = found(job(place / "a", place / "b", protocol=protocol), extractor)
        assert (report["inception_score_splits"], report["protocol"]) == (splits, protocol)
        assert (f"protocol {protocol}" in table(report)) is (protocol is not None)


def test_kept_images_give_every_figure(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all images in the file it is worth the folder; its keys are guided-diffusion's, arr_0 first."""
    monkeypatch.setattr(extractor_room, "open_extractor", lambda name, weights, device, protocol=None: Inceptive())
    stats = StatsRequest(images=str(place / "b"), out=tmp_path / "b.npz", batch_size=4, keep_images=31)
    save_statistics(stats)
    with np.load(tmp_path / "b.npz") as file:
        assert list(file) == ["arr_0", "mu", "sigma", "mu_s", "sigma_s", "about"]
        assert file["arr_0"].shape == (31, SIDE, SIDE, 3) and file["arr_0"].dtype == np.uint8
    report, whole = (found(job(place / "a", path), Inceptive()) for path in (tmp_path / "b.npz", place / "b"))
    assert report["figures"] == whole["figures"] == ["fid", "sfid", "inception_score", "precision", "recall", "kid"]
    for name in report["figures"]:
        assert report[name] == pytest.approx(whole[name], rel=1e-9)
    save_statistics(replace(stats, keep_images=7))
    assert len(read_statistics(tmp_path / "b.npz").images or ()) == 7
    few = found(job(place / "a", tmp_path / "b.npz"), Inceptive())
    assert "reference images of precision, recall and KID 7, " in table(few) and "KID" not in table(whole)
    with pytest.raises(EvaluationError, match="keep_images: must be 0 or more, got -1"):
        save_statistics(replace(stats, keep_images=-1))


def test_spatial_statistics_of_another_width_are_known_at_once(place: Path, tmp_path: Path) -> None:
    moments = {"mu": np.zeros(WIDTH), "sigma": np.eye(WIDTH), "mu_s": np.zeros(5), "sigma_s": np.eye(5)}
    np.savez(tmp_path / "wide.npz", **moments)
    extractor = Inceptive()
    with pytest.raises(EvaluationError, match=r"wide\.npz: 5 spatial features, inception has 4$"):
        found(job(place / "a", tmp_path / "wide.npz"), extractor)
    moments |= {"mu_s": np.zeros(4), "sigma_s": np.eye(4) + 2 * np.eye(4)[::-1]}
    np.savez(tmp_path / "none.npz", **moments)
    with pytest.raises(EvaluationError, match="not a covariance: it has the eigenvalue -1"):
        found(job(place / "a", tmp_path / "none.npz"), extractor)
    assert not extractor.seen


def test_adm_statistics_with_images(place: Path, tmp_path: Path) -> None:
    """mu and sigma are of a larger set than arr_0, whose images serve precision, recall and KID."""
    b, large = noise(31, 1, low=40), rows_of(noise(400, 2))
    arrays = {"mu": large.mean(0), "sigma": np.cov(large.T), "arr_0": b}
    np.savez(tmp_path / "adm.npz", **arrays)
    report = found(job(place / "a", tmp_path / "adm.npz"), Inceptive())
    images = found(job(place / "a", place / "b"), Inceptive())
    assert report["fid"] == pytest.approx(frechet(rows_of(noise(23, 0)), large), rel=1e-5)
    assert "sfid" not in report
    assert [report[n] for n in ("precision", "recall", "kid")] == [images[n] for n in ("precision", "recall", "kid")]


def test_images_of_a_model_are_those_of_its_set(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made and kept nowhere, or made by `ldit sample --num` and read again: the same figures."""
    source = exported(tmp_path / "model")
    options = {"steps": "2", "seed": 3}
    asked = set_job(source, 22, options=options)
    for out in (tmp_path / "set", tmp_path / "set.npz"):
        made(monkeypatch, asked, out)
    made_now = found(job(source, place / "b", 4, num=22, **options))
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


def test_some_images_are_spread_over_a_folder(tmp_path: Path) -> None:
    """The order of class folders is that of their names: the first ones would be of one class."""
    a = folder(tmp_path / "a", noise(12, 0), ("p", "q", "r"))
    stream = open_stream(str(a), 6, None, 4)
    assert stream.labels == (0, 0, 1, 1, 2, 2)
    assert sum(len(p) for _, p in stream.blocks(0, 2)) + sum(len(p) for _, p in stream.blocks(1, 2)) == 6
    first = next(iter(stream.blocks(0, 1)))[1]
    assert np.array_equal(first[1].permute(1, 2, 0).numpy(), noise(12, 0)[6])  # the third of class p


def test_components_and_their_interval(place: Path) -> None:
    one = job(place / "a", place / "b", components=2, bootstrap=40)
    report = found(one)
    a, b = rows_of(noise(23, 0)), rows_of(noise(31, 1, low=40))
    axes = np.linalg.eigh(np.cov(b.T))[1][:, ::-1][:, :2]
    assert report["fd_stub_2"] == pytest.approx(frechet((a - b.mean(0)) @ axes, (b - b.mean(0)) @ axes), rel=1e-4)
    low, high = report["fd_stub_2_interval"]
    assert low < report["fd_stub_2"] < high
    assert found(one)["fd_stub_2_interval"] == [low, high]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": ("fdi",)}, r"metrics: expected some of fd, sfid, is, pr, kid, got 'fdi'"),
        ({"metrics": ("sfid",)}, r"metrics: sfid needs Inception"),
        ({"num": 24}, r"holds 23 images, 24 are asked for"),
        ({"components": 7}, rf"components: 7 are too many for a reference that spans at most {WIDTH}"),
        ({"num": 3, "metrics": ("pr",)}, r"metrics: pr needs at least 4 images, got 3"),
        ({"labels": "random"}, r"exist already: labels has no effect"),
        ({"class_labels": ("1",)}, r"exist already: class_labels has no effect"),
        ({"seed": 0, "guidance": 3.0}, r"exist already: guidance has no effect"),
        ({"seed": 4}, r"exist already: seed has no effect"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_image_is_read(place: Path, changes: dict[str, Any], words: str) -> None:
    extractor = Stub()
    with pytest.raises(EvaluationError, match=words):
        found(job(place / "a", place / "b", **changes), extractor)
    assert not extractor.seen


def test_too_small_a_reference_is_known_before_any_image_is_read(place: Path, tmp_path: Path) -> None:
    folder(tmp_path / "few", noise(3, 1))
    for changes, words in (
        ({"components": 3}, "components: 3 are too many for a reference that spans at most 2"),
        ({"metrics": ("fd", "pr")}, "metrics: pr needs at least 4 reference images, got 3"),
    ):
        extractor = Stub()
        with pytest.raises(EvaluationError, match=words):
            found(job(place / "a", tmp_path / "few", **changes), extractor)
        assert not extractor.seen


def test_how_existing_images_are_made_is_nobodys_choice(place: Path) -> None:
    for changes in ({"int8": True}, {"ema": False}, {"guide": "x"}, {"dtype": "bf16"}, {"offload": True}):
        with pytest.raises(EvaluationError, match=f"exist already: {next(iter(changes))} has no effect"):
            found(EvaluateRequest(source=str(place / "a"), reference=str(place / "b"), **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num": 1}, "num: must be at least 2, got 1"),
        ({"components": -1}, "components: must be at least 0, got -1"),
        ({"image_size": 0}, "image_size: must be at least 1, got 0"),
        ({"batch": 0}, "batch_size: must be at least 1, got 0"),
        ({"bootstrap": 5}, "give their number"),
        ({"figure": Path("x.jpg")}, r"figure: expected a name that ends in \.png or \.svg, got x\.jpg"),
    ],
)
def test_mistakes_before_anything_is_opened(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LditError, match=words):
        check_evaluation(job("a", "b", **changes))


def test_the_inception_score_alone_needs_no_reference(place: Path) -> None:
    extractor = Inceptive()
    report = found(job(place / "a", place / "b", metrics=("is",)), extractor)
    assert report["figures"] == ["inception_score"] and extractor.seen == 23 and report["num_reference"] == 31


def test_a_side_is_for_folders(place: Path) -> None:
    with pytest.raises(
        EvaluationError, match=r"image_size: only folders are cropped, the images of .*a\.npz are 8 x 8"
    ):
        found(job(place / "a.npz", place / "b", image_size=6))
    assert found(job(place / "a", place / "b", image_size=6))["samples"]["crop"].startswith("6x6")
    with pytest.raises(
        EvaluationError, match=r"a\.npz@heldout: an \.npz has no parts, name it without @train or @heldout"
    ):
        found(job(f"{place / 'a.npz'}@heldout", place / "b"))


def test_missing_and_empty_places(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "words.npz", other=np.zeros(3))
    for source, reference in (
        (place / "nowhere", place / "b"), (place / "a", place / "nowhere"), (place / "a", place / "no.npz"),
        (tmp_path / "empty", place / "b"), (place / "a", tmp_path / "words.npz"), (place / "a@heldout", place / "b"),
    ):  # fmt: skip
        culprit = next(one for one in (source, reference) if one not in (place / "a", place / "b"))
        with pytest.raises(LditError, match=re.escape(str(culprit).removesuffix("@heldout"))):
            found(job(source, reference))


def test_few_images_give_an_error_or_a_value(place: Path, tmp_path: Path) -> None:
    """E1: singular covariances and sets of hardly any image."""
    for count in (2, 3, 4, 5):
        folder(tmp_path / str(count), noise(count, 7))
        report = found(job(tmp_path / str(count), place / "b", metrics=("fd", "kid")))
        assert np.isfinite([report["fd_stub"], report["kid"]]).all() and report["fd_stub"] >= 0
    folder(tmp_path / "same", np.repeat(noise(1, 8), 9, 0))
    report = found(job(tmp_path / "same", place / "b"))
    assert np.isfinite([report[name] for name in report["figures"]]).all()
    with said() as lines:
        assert found(job(tmp_path / "3", place / "b"))["figures"] == ["fd_stub", "kid"]
    assert lines[0] == "left out: pr needs at least 4 images, got 3"


def test_features_that_are_not_finite_are_an_error(place: Path) -> None:
    class Wild(Stub):
        def __call__(self, images):
            features = super().__call__(images)
            if self.seen > 31 + 10:
                features.pool[1, 2] = float("nan")
            return features

    with pytest.raises(EvaluationError, match="image 11 are not finite"):
        found(job(place / "a", place / "b"), Wild())


def test_memory_that_does_not_suffice_is_one_line(place: Path) -> None:
    class Large(Stub):
        def __call__(self, images):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(EvaluationError, match=r"^there is not enough memory for 5 images in stub: use a smaller"):
        found(job(place / "a", place / "b"), Large())


def test_what_is_a_set_of_images(place: Path, tmp_path: Path) -> None:
    assert all(map(is_images, ("emoji64", "emoji64@heldout", str(place / "a"), str(place / "a.npz"))))
    assert not is_images(str(exported(tmp_path / "model"))) and not is_images("emoji64-class-xs")


def test_a_reference_that_is_none_is_known_before_samples_are_made(place: Path, tmp_path: Path) -> None:
    """Of files that do not say how many images they are of."""
    for name, sigma, changes, words in (
        ("negative", np.diag([1.0, 1, 1, 1, 1, -1]), {}, "is not a covariance"),
        ("indefinite", np.eye(WIDTH) + 2 * np.eye(WIDTH)[::-1], {}, "not a covariance: it has the eigenvalue -1"),
        ("narrow", np.diag([1.0, 1, 0, 0, 0, 0]), {"components": 4}, "4 are too many for a reference that spans 2"),
    ):
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(WIDTH), sigma=sigma)
        extractor = Inceptive()
        with pytest.raises(EvaluationError, match=rf"{name}\.npz: .*{words}"):
            found(job(place / "a", tmp_path / f"{name}.npz", metrics=("fd",), **changes), extractor)
        assert not extractor.seen


def test_images_of_statistics_are_looked_at_where_figures_need_them(place: Path, tmp_path: Path) -> None:
    """The bootstrap draws samples alone."""
    b = rows_of(noise(400, 2))
    np.savez(tmp_path / "adm.npz", mu=b.mean(0), sigma=np.cov(b.T), arr_0=noise(31, 1, low=40))
    for changes, seen in (({"components": 2, "bootstrap": 3}, 23), ({"metrics": ("fd", "pr")}, 23 + 31)):
        extractor = Inceptive()
        found(job(place / "a", tmp_path / "adm.npz", **{"metrics": ("fd",), **changes}), extractor)
        assert extractor.seen == seen
