"""What a report says: conditions of every figure, classes, and what both sides leave unsaid."""

import json
from pathlib import Path

import numpy as np
import pytest
from eval.evaluation import SIDE, Inceptive, Stub, folder, found, job, noise, rows_of
from folders import said

from ldit.eval import report as evaluation_report
from ldit.eval.report import balance, table
from ldit.storage import progress


def test_the_report_says_what_figures_depend_on(place: Path, tmp_path: Path) -> None:
    report = found(job(place / "a", place / "b", json=tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text()) == report
    said, *lines = table(report).splitlines()
    assert said == f"{place / 'a'} against {place / 'b'}"
    assert len(lines) == 2 + len(report["figures"]) and report["num_reference"] == 31
    assert lines[-1] == "images 23, labels unknown, extractor stub 000000000000, resize none"
    ways = {line.split()[0]: line[-1] for line in lines[1:-1]}
    assert ways == {"fd_stub": "↓", "precision": "↑", "recall": "↑", "kid": "↓"}
    assert max(map(len, lines)) < 80
    assert report["reference"]["count"] == 31 and report["samples"]["crop"].startswith(f"{SIDE}x{SIDE}")


def test_few_images_on_either_side_are_warned_of(place: Path, tmp_path: Path) -> None:
    folder(tmp_path / "few", noise(5, 1))
    for source, reference, words in (
        (tmp_path / "few", place / "b", ["5 images for 6 features"]),
        (place / "a", tmp_path / "few", ["5 reference images for 6 features"]),
        (place / "a", place / "b", []),
    ):
        with said() as lines:
            found(job(source, reference))
        assert [line.split(":")[0] for line in lines] == words
    with said() as lines:
        found(job(tmp_path / "few", place / "b", metrics=("kid",)))
    assert not lines


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


def test_what_both_sides_leave_unsaid(place: Path, tmp_path: Path) -> None:
    """Statistics without words, samples with statistics, sides of other sizes: a line each."""
    a, large = noise(23, 0), rows_of(noise(400, 2))
    np.savez(tmp_path / "adm.npz", mu=large.mean(0), sigma=np.cov(large.T), arr_0=a)
    folder(tmp_path / "large", noise(31, 1, side=2 * SIDE))
    np.savez(tmp_path / "large.npz", noise(31, 1, side=2 * SIDE))
    adm, hot = str(tmp_path / "adm.npz"), str(tmp_path / "hot.npz")
    np.savez(hot, a, np.eye(23))
    for source, reference, words in (
        (
            place / "a",
            adm,
            [
                f"{adm} does not state the weights and resize rule of its statistics: "
                "assumed to be those of this evaluation (--protocol)"
            ],
        ),
        (adm, place / "b", [f"{adm} holds statistics too: its images are measured"]),
        (place / "a", tmp_path / "large", []),  # cut to the samples' size
        (place / "a", tmp_path / "large.npz", ["images of 8 x 8 are compared with a reference of 16 x 16: "]),
        (place / "a", place / "b", []),
        (hot, place / "b", [f"{hot}: arr_1 is not one integer an image: labels are unknown"]),
    ):
        with said() as lines:
            found(job(source, reference, metrics=("fd",)), Inceptive())
        assert len(lines) == len(words) and all(map(str.startswith, lines, words)), lines
    assert found(job(place / "a", adm, metrics=("fd",)), Inceptive())["reference"]["resize"] == "not stated"


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
        assert [line.split(":")[0].endswith("is sorted by class") for line in lines] == [True] * warned


def test_lines_without_a_terminal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with said() as lines:
        found(job(place / "a", place / "b", 10))
    told = [line.split("  ")[0] for line in lines]
    assert told == [
        f"{n} of {of} images" for n, of in ((10, 31), (20, 31), (30, 31), (31, 31), (10, 23), (20, 23), (23, 23))
    ]


def test_a_row_a_class(tmp_path: Path) -> None:
    """Accuracy where the extractor's classes are those of the images, and only there."""
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
