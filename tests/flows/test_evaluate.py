"""Pictures from anywhere against a reference: the figures are those of the pictures, with what they depend on."""

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flows.evaluation import SIDE, WIDTH, Inceptive, Stub, folder, job, noise, rows_of
from flows.sets import exported, made
from flows.sets import job as set_job
from folders import said
from PIL import Image
from runs import ALONE

from ldit.checkpoint import manifest
from ldit.errors import EvaluationError, LditError, RequestError
from ldit.eval.extractor import Extractor
from ldit.eval.kernel import kernel_distance
from ldit.eval.neighbours import precision_recall
from ldit.eval.statistics import read_statistics
from ldit.flows import evaluate as flow
from ldit.flows import evaluation_outputs, evaluation_report, progress
from ldit.flows.evaluate import EvaluateJob, ExtractorJob, measured, save_statistics
from ldit.flows.evaluation_report import balance, table
from ldit.flows.picture_stream import is_pictures, open_stream
from ldit.flows.pictures import PictureJob


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
    assert report["reference"] == {"statistics": "b.npz", "crc32": kept.crc32, "count": 31, "resize": "none"}
    assert len(kept.crc32.split()) == 2 and len(kept.crc32) == 17
    other = Inceptive()
    other.resize = "otherwise"
    with pytest.raises(EvaluationError, match="statistics of pictures resized by none, not otherwise"):
        found(job(place / "a", tmp_path / "b.npz"), other)
    other = Inceptive()
    other.fingerprint = "1" * 64
    with pytest.raises(EvaluationError, match=r"statistics of other weights of inception"):
        found(job(place / "a", tmp_path / "b.npz"), other)


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


def test_what_both_sides_leave_unsaid(place: Path, tmp_path: Path) -> None:
    """Statistics without words, samples with statistics, sides of other sizes: a line each."""
    a, large = noise(23, 0), rows_of(noise(400, 2))
    np.savez(tmp_path / "adm.npz", mu=large.mean(0), sigma=np.cov(large.T), arr_0=a)
    folder(tmp_path / "large", noise(31, 1, side=2 * SIDE))
    np.savez(tmp_path / "large.npz", noise(31, 1, side=2 * SIDE))
    adm, hot = str(tmp_path / "adm.npz"), str(tmp_path / "hot.npz")
    np.savez(hot, a, np.eye(23))
    for source, reference, words in (
        (place / "a", adm, [f"{adm} does not say which weights and resize rule its statistics are of: taken for ours"]),
        (adm, place / "b", [f"{adm} holds statistics too: its pictures are measured"]),
        (place / "a", tmp_path / "large", []),  # cut to the samples' size
        (place / "a", tmp_path / "large.npz", ["pictures of 8 x 8 are compared with a reference of 16 x 16: "]),
        (place / "a", place / "b", []),
        (hot, place / "b", [f"{hot}: arr_1 is not one integer a picture: labels are unknown"]),
    ):
        with said() as lines:
            found(job(source, reference, metrics=("fd",)), Inceptive())
        assert len(lines) == len(words) and all(map(str.startswith, lines, words)), lines
    assert found(job(place / "a", adm, metrics=("fd",)), Inceptive())["reference"]["resize"] == "not stated"


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
    said, *lines = table(report).splitlines()
    assert said == f"{place / 'a'} against {place / 'b'}"
    assert len(lines) == 1 + len(report["figures"]) and report["num_reference"] == 31
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
        ({"components": 7}, rf"components: 7 are too many for a reference that spans {WIDTH} at most"),
        ({"num": 3, "metrics": ("pr",)}, r"metrics: pr needs at least 4 pictures, got 3"),
        ({"rule": "random"}, r"there already: labels does nothing"),
        ({"labels": ("1",)}, r"there already: labels does nothing"),
        ({"options": {"seed": 0, "guidance": 3.0}}, r"there already: guidance does nothing"),
        ({"options": {"seed": 4}}, r"there already: seed does nothing"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_picture_is_read(
    place: Path, changes: dict[str, Any], words: str
) -> None:
    extractor = Stub()
    with pytest.raises(EvaluationError, match=words):
        found(job(place / "a", place / "b", **changes), extractor)
    assert not extractor.seen


def test_too_small_a_reference_is_known_before_any_picture_is_read(place: Path, tmp_path: Path) -> None:
    folder(tmp_path / "few", noise(3, 1))
    for changes, words in (
        ({"components": 3}, "components: 3 are too many for a reference that spans 2 at most"),
        ({"metrics": ("fd", "pr")}, "metrics: pr needs at least 4 reference pictures, got 3"),
    ):
        extractor = Stub()
        with pytest.raises(EvaluationError, match=words):
            found(job(place / "a", tmp_path / "few", **changes), extractor)
        assert not extractor.seen


def test_how_existing_pictures_are_made_is_nobodys_choice(place: Path) -> None:
    for changes in ({"int8": True}, {"ema": False}, {"guide": "x"}, {"dtype": "bf16"}, {"offload": True}):
        with pytest.raises(EvaluationError, match=f"there already: {next(iter(changes))} does nothing"):
            found(EvaluateJob(PictureJob(str(place / "a"), **changes), str(place / "b")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num": 1}, "num: must be at least 2, got 1"),
        ({"components": -1}, "components: must be at least 0, got -1"),
        ({"image_size": 0}, "image_size: must be at least 1, got 0"),
        ({"batch": 0}, "batch_size: must be at least 1, got 0"),
        ({"resamples": 5}, "say how many"),
        ({"figure": Path("x.jpg")}, r"figure: expected a name that ends in \.png, got x\.jpg"),
    ],
)
def test_mistakes_before_anything_is_opened(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LditError, match=words):
        job("a", "b", **changes)


@pytest.mark.parametrize("what", ["json", "figure", "stats"])
def test_nothing_is_written_into_what_a_manifest_seals(what: str, place: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.sealed({})))
    work = {
        "json": lambda: found(job(place / "a", place / "b", json=tmp_path / "r.json")),
        "figure": lambda: found(job(place / "a", place / "b", figure=tmp_path / "f.png")),
        "stats": lambda: save_statistics(str(place / "b"), tmp_path / "s.npz", None, None, ExtractorJob(), 4),
    }[what]
    with pytest.raises(RequestError, match="sealed by its"):
        work()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"json": "no/where.json"}, "no folder .*/no to write where.json into"),
        ({"json": "folder"}, "folder is a folder, expected the name of a file"),
        ({"json": "a.npz"}, r"a\.npz is what is read, and would be replaced: choose another name"),
        ({"json": "b.npz"}, r"b\.npz is what is read"),
        ({"json": "words.json"}, r"words\.json exists and is none of ldit evaluate: choose another name"),
        ({"json": "best.json"}, r"best\.json exists and is none of ldit evaluate"),
        ({"figure": "photo.png"}, r"photo\.png exists and is none of ldit evaluate"),
        ({"json": "x.png", "figure": "x.png"}, r"x\.png: the report and the figure need a file each"),
        ({"json": "folder/../x.png", "figure": "x.png"}, r"x\.png: the report and the figure need a file each"),
        ({"figure": "folder/x.png"}, r"x\.png: would become part of the pictures of .*folder"),
        ({"figure": "linked/x.png"}, r"x\.png: would become part of the pictures of .*folder"),
        ({"json": "folder/metadata.jsonl"}, r"metadata\.jsonl: would become part of the pictures of .*folder"),
        ({"json": "folder/samples.json"}, r"samples\.json: would become part of the pictures of .*folder"),
    ],
)
def test_nothing_is_replaced_that_is_no_report(tmp_path: Path, names: dict[str, str], words: str) -> None:
    """Known before any picture is read."""
    folder(tmp_path / "folder", noise(5, 1))
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", noise(23, 0))
    (tmp_path / "linked").symlink_to(tmp_path / "folder")
    (tmp_path / "words.json").write_text("words")
    (tmp_path / "best.json").write_text('{"step": 1}')
    Image.fromarray(noise(1, 0)[0]).save(tmp_path / "photo.png")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    extractor, files = Stub(), {key: tmp_path / name for key, name in names.items()}
    reference = tmp_path / ("b.npz" if names == {"json": "b.npz"} else "folder")
    with pytest.raises(RequestError, match=words):
        found(job(tmp_path / "a.npz", reference, **files), extractor)
    assert not extractor.seen and before == {path: path.read_bytes() for path in tmp_path.glob("*.*")}


def test_a_report_replaces_a_report_and_statistics_statistics(place: Path, tmp_path: Path) -> None:
    files = {"json": tmp_path / "r.json", "figure": tmp_path / "f.png"}
    for file in files.values():
        file.touch()  # of mktemp, say
    for num in (22, 23):
        found(job(place / "a.npz", place / "b", num=num, metrics=("fd",), **files))
        assert json.loads((tmp_path / "r.json").read_text())["num_samples"] == num
        with Image.open(tmp_path / "f.png") as picture:
            assert picture.info["ldit evaluate"] == f"{place / 'a.npz'} against {place / 'b'}"
    shutil.copytree(place / "b", tmp_path / "b")
    found(job(place / "a.npz", tmp_path / "b", json=tmp_path / "b/r.json"))  # beside the pictures
    found(job(place / "a.npz", tmp_path / "b", json=tmp_path / "b/r.json"))


def test_statistics_replace_statistics_alone(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "open_extractor", lambda name, weights, device: Inceptive())
    np.savez(tmp_path / "pictures.npz", noise(23, 0))
    before = (tmp_path / "pictures.npz").read_bytes()
    for source, words in ((tmp_path / "pictures.npz", "is what is read"), (place / "b", "is no file of ldit stats")):
        with pytest.raises(RequestError, match=rf"pictures\.npz .*{words}"):
            save_statistics(str(source), tmp_path / "pictures.npz", None, None, ExtractorJob(), 4)
    assert (tmp_path / "pictures.npz").read_bytes() == before
    for name, count in (("a", 23), ("b", 31)):
        save_statistics(str(place / name), tmp_path / "s.npz", None, None, ExtractorJob(), 4)
        assert read_statistics(tmp_path / "s.npz").count == count
    with pytest.raises(RequestError, match=r"s\.npz is what is read"):
        save_statistics(str(tmp_path / "s.npz"), tmp_path / "s.npz", None, None, ExtractorJob(), 4)


def test_a_table_that_cannot_be_said_costs_no_file(place: Path, tmp_path: Path) -> None:
    def closed(text: str) -> None:
        raise BrokenPipeError

    files = {"json": tmp_path / "r.json", "figure": tmp_path / "f.png"}
    with pytest.raises(BrokenPipeError):
        measured(job(place / "a", place / "b", **files), Stub(), ALONE, closed)
    assert json.loads((tmp_path / "r.json").read_text())["num_samples"] == 23 and (tmp_path / "f.png").exists()


def test_the_inception_score_alone_needs_no_reference(place: Path) -> None:
    extractor = Inceptive()
    report = found(job(place / "a", place / "b", metrics=("is",)), extractor)
    assert report["figures"] == ["inception_score"] and extractor.seen == 23 and report["num_reference"] == 31


def test_a_side_is_for_folders(place: Path) -> None:
    with pytest.raises(EvaluationError, match=r"image_size: only folders are cut, the pictures of .*a\.npz are 8 x 8"):
        found(job(place / "a.npz", place / "b", image_size=6))
    assert found(job(place / "a", place / "b", image_size=6))["samples"]["crop"].startswith("6x6")
    with pytest.raises(EvaluationError, match=r"a\.npz@heldout: an \.npz has no parts, name it alone"):
        found(job(f"{place / 'a.npz'}@heldout", place / "b"))


def test_figures_are_said_where_they_cannot_be_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluation_outputs, "write_json_atomic", full)
    said: list[str] = []
    files = {"json": tmp_path / "r.json", "figure": tmp_path / "f.png"}
    with pytest.raises(RequestError, match=r"r\.json was not written: No space left on device$"):
        measured(job(place / "a", place / "b", **files), Stub(), ALONE, said.append)
    assert len(said) == 1 and "fd_stub" in said[0] and (tmp_path / "f.png").exists()
    with pytest.raises(RequestError, match=r"r\.json was not written"):  # and nothing can be said
        measured(job(place / "a", place / "b", **files), Stub(), ALONE, lambda text: print(1 / 0))


def test_few_pictures_on_either_side_are_warned_of(place: Path, tmp_path: Path) -> None:
    folder(tmp_path / "few", noise(5, 1))
    for source, reference, words in (
        (tmp_path / "few", place / "b", ["5 pictures for 6 features"]),
        (place / "a", tmp_path / "few", ["5 reference pictures for 6 features"]),
        (place / "a", place / "b", []),
    ):
        with said() as lines:
            found(job(source, reference))
        assert [line.split(":")[0] for line in lines] == words
    with said() as lines:
        found(job(tmp_path / "few", place / "b", metrics=("kid",)))
    assert not lines


def test_a_set_in_the_order_of_its_classes_has_no_inception_score(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it has more than one split."""
    np.savez(tmp_path / "sorted.npz", noise(23, 0), np.arange(23) // 12)
    np.savez(tmp_path / "mixed.npz", noise(23, 0), np.arange(23) % 2)
    for split, name, metrics, warned in (
        (10, "sorted", (), True), (10, "sorted", ("fd",), False), (10, "mixed", (), False), (23, "sorted", (), False),
    ):  # fmt: skip
        monkeypatch.setattr(evaluation_report, "SPLIT", split)
        with said() as lines:
            found(job(tmp_path / f"{name}.npz", place / "b", metrics=metrics), Inceptive())
        assert [line.split(":")[0].endswith("is in the order of its classes") for line in lines] == [True] * warned


@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [
        (None, 3, "unknown"),
        ((0, 1, 2, 0), 3, "balanced"),
        ((0, 1, 2), None, "balanced, 3 classes"),
        ((2, 2, 2), 3, "balanced, 1 of 3 classes"),
        ((0, 1, 1, 1), 2, "1 to 3 a class"),
        ((0, 1, 1, 1), 3, "0 to 3 a class"),
        ((0, 10**12), None, "balanced, 2 classes"),
    ],
)
def test_balance_is_over_all_classes(labels: tuple[int, ...] | None, classes: int | None, words: str) -> None:
    assert balance(labels, classes) == words


def test_lines_without_a_terminal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SAY_EVERY", 0.0)
    with said() as lines:
        found(job(place / "a", place / "b", 10))
    told = [line.split("  ")[0] for line in lines]
    assert told == [
        f"{n} of {of} pictures" for n, of in ((10, 31), (20, 31), (30, 31), (31, 31), (10, 23), (20, 23), (23, 23))
    ]


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


def test_few_pictures_give_an_error_or_a_value(place: Path, tmp_path: Path) -> None:
    """E1: singular covariances and sets of hardly any picture."""
    for count in (2, 3, 4, 5):
        folder(tmp_path / str(count), noise(count, 7))
        report = found(job(tmp_path / str(count), place / "b", metrics=("fd", "kid")))
        assert np.isfinite([report["fd_stub"], report["kid"]]).all() and report["fd_stub"] >= 0
    folder(tmp_path / "same", np.repeat(noise(1, 8), 9, 0))
    report = found(job(tmp_path / "same", place / "b"))
    assert np.isfinite([report[name] for name in report["figures"]]).all()
    with said() as lines:
        assert found(job(tmp_path / "3", place / "b"))["figures"] == ["fd_stub", "kid"]
    assert lines[0] == "left out: pr needs at least 4 pictures, got 3"


def test_features_that_are_not_finite_are_an_error(place: Path) -> None:
    class Wild(Stub):
        def __call__(self, pictures):
            features = super().__call__(pictures)
            if self.seen > 31 + 10:
                features.pool[1, 2] = float("nan")
            return features

    with pytest.raises(EvaluationError, match="picture 11 are not finite"):
        found(job(place / "a", place / "b"), Wild())


def test_memory_that_does_not_suffice_is_one_line(place: Path) -> None:
    class Large(Stub):
        def __call__(self, pictures):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(EvaluationError, match=r"^memory does not suffice for 5 pictures in stub: take fewer"):
        found(job(place / "a", place / "b"), Large())


def test_what_is_a_set_of_pictures(place: Path, tmp_path: Path) -> None:
    assert all(map(is_pictures, ("emoji64", "emoji64@heldout", str(place / "a"), str(place / "a.npz"))))
    assert not is_pictures(str(exported(tmp_path / "model"))) and not is_pictures("emoji64-class-xs")


def test_a_reference_that_is_none_is_known_before_samples_are_made(place: Path, tmp_path: Path) -> None:
    """Of files that do not say how many pictures they are of."""
    for name, sigma, changes, words in (
        ("negative", np.diag([1.0, 1, 1, 1, 1, -1]), {}, "is no covariance"),
        ("indefinite", np.eye(WIDTH) + 2 * np.eye(WIDTH)[::-1], {}, "not a covariance: it has the eigenvalue -1"),
        ("narrow", np.diag([1.0, 1, 0, 0, 0, 0]), {"components": 4}, "4 are too many for a reference that spans 2"),
    ):
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(WIDTH), sigma=sigma)
        extractor = Inceptive()
        with pytest.raises(EvaluationError, match=rf"{name}\.npz: .*{words}"):
            found(job(place / "a", tmp_path / f"{name}.npz", metrics=("fd",), **changes), extractor)
        assert not extractor.seen


def test_pictures_of_statistics_are_looked_at_where_figures_need_them(place: Path, tmp_path: Path) -> None:
    """The bootstrap draws samples alone."""
    b = rows_of(noise(400, 2))
    np.savez(tmp_path / "adm.npz", mu=b.mean(0), sigma=np.cov(b.T), arr_0=noise(31, 1, low=40))
    for changes, seen in (({"components": 2, "resamples": 3}, 23), ({"metrics": ("fd", "pr")}, 23 + 31)):
        extractor = Inceptive()
        found(job(place / "a", tmp_path / "adm.npz", **{"metrics": ("fd",), **changes}), extractor)
        assert extractor.seen == seen
