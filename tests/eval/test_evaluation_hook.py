"""Evaluation along the way: the value is that of `ldit evaluate` on the committed step, and the best step is kept."""

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval.evaluation import WIDTH, Inceptive, Stub, job
from folders import make_folder, over, said
from runs import ALONE

from ldit.checkpoint.run import Best, best_step, committed_steps, drop_after, retire, write_best
from ldit.commands.train import run as train
from ldit.errors import ConfigError, EvaluationError, RequestError
from ldit.eval import during_training as evaluation_hook
from ldit.eval.evaluate import evaluate_with
from ldit.eval.extractors import extractor
from ldit.training.trainer import Trainer

SETTINGS: dict[str, Any] = {
    "train.steps": 4, "train.keep": 1, "train.checkpoint_every": 1, "eval.every": 1, "eval.num": 7,
    "eval.batch_size": 3, "eval.extractor": "stub",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractor, "open_extractor", lambda name, weights, device, protocol=None: Stub())


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_value_is_that_of_the_committed_step(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data")
    assert train(over(data, {**SETTINGS, "train.keep": 0}), tmp_path / "run") == 0
    values = [record["fd_stub"] for record in records(tmp_path / "run")]
    assert len(values) == 4
    for (step, folder), value in zip(reversed(committed_steps(tmp_path / "run")), values, strict=True):
        report = evaluate_with(job(folder, data, 3, num=7), Stub(), ALONE)
        assert report["fd_stub"] == pytest.approx(value, rel=1e-4), step
    best = min(range(4), key=values.__getitem__)
    kept = best_step(tmp_path / "run")
    assert kept is not None and kept[:2] == (best + 1, values[best])
    lowest = float("inf")
    for record in records(tmp_path / "run"):
        assert bool(record.get("best")) is (record["fd_stub"] < lowest)
        lowest = min(lowest, record["fd_stub"])


def test_the_best_step_outlives_the_newest_and_is_committed_for_its_own_sake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four evaluations the second is the best; no other step than the last would be committed."""
    wanted = iter([5.0, 1.0, 3.0, 1.0])
    monkeypatch.setattr(evaluation_hook, "compute_metrics", lambda *args: {"fd_stub": next(wanted)})
    data, run = make_folder(tmp_path / "data"), tmp_path / "run"
    assert train(over(data, {**SETTINGS, "train.checkpoint_every": 0}), run) == 0
    assert [step for step, _ in committed_steps(run)] == [4, 2]
    found = json.loads((run / "best.json").read_text())
    assert (found["step"], found["value"], found["before"]) == (2, 1.0, [[1, 5.0]])
    conditions, sampling = found["of"], found["of"].pop("sampling")
    assert conditions == {
        "figure": "fd_stub", "pictures": 7, "evaluations": 10, "extractor": "stub", "extractor_sha256": "0" * 64,
        "resize": "none", "reference": "training images", "reference_pictures": 12, "reference_is": {},
        "precision": "fp32",
    }  # fmt: skip
    assert {"solver", "steps", "guidance", "grid"} <= sampling.keys()


def test_a_run_that_goes_on_remembers_and_one_that_went_back_forgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = iter([5.0, 4.0, 4.5, 9.0])
    monkeypatch.setattr(evaluation_hook, "compute_metrics", lambda *args: {"fd_stub": next(wanted)})
    data, run = make_folder(tmp_path / "data"), tmp_path / "run"
    assert train(over(data, {**SETTINGS, "train.steps": 2}), run) == 0
    assert train(over(data, {**SETTINGS, "train.steps": 3}), run) == 0
    best = best_step(run)
    assert best is not None and best[:2] == (2, 4.0) and [step for step, _ in committed_steps(run)] == [3, 2]
    left = Best(9, 0.5, best.conditions, ((2, 4.0), (7, 1.0)))  # 7 and 9 are of a branch that was left
    write_best(run, left)
    assert train(over(data, {**SETTINGS, "train.steps": 4}), run) == 0
    best = best_step(run)
    assert best is not None and (best.step, best.value, best.before) == (2, 4.0, ())


def test_what_a_run_leaves_behind_is_forgotten(tmp_path: Path) -> None:
    best = Best(200, 5.0, {"figure": "fd"}, ((50, 6.0), (120, 5.5)))
    for step in (50, 120, 200):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    for step, expected in (
        (200, best), (300, best), (199, Best(120, 5.5, best.conditions, ((50, 6.0),))),
        (100, Best(50, 6.0, best.conditions)), (49, None),
    ):  # fmt: skip
        write_best(tmp_path, best)
        drop_after(tmp_path, step)
        assert best_step(tmp_path) == expected
    for gone, expected in ((200, Best(120, 5.5, best.conditions, ((50, 6.0),))), (120, Best(50, 6.0, best.conditions))):
        (tmp_path / f"checkpoints/step-{gone:08d}").rename(tmp_path / f"checkpoints/step-{gone:08d}.damaged")
        write_best(tmp_path, best)
        drop_after(tmp_path, 300)
        assert best_step(tmp_path) == expected


def test_a_best_file_of_a_former_version_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It said less of the conditions."""
    wanted = iter([5.0, 9.0])
    monkeypatch.setattr(evaluation_hook, "compute_metrics", lambda *args: {"fd_stub": next(wanted)})
    data, run = make_folder(tmp_path / "data"), tmp_path / "run"
    assert train(over(data, {**SETTINGS, "train.steps": 1}), run) == 0
    found = json.loads((run / "best.json").read_text())
    former = {key: value for key, value in found["of"].items() if key not in ("sampling", "precision", "reference_is")}
    (run / "best.json").write_text(json.dumps({"step": 1, "value": 5.0, "of": former}))
    assert train(over(data, {**SETTINGS, "train.steps": 2}), run) == 0
    assert [step for step, _ in committed_steps(run)] == [2, 1]
    best = best_step(run)
    assert best is not None and best[:2] == (1, 5.0)


def test_the_best_before_stays_until_the_new_one_is_committed(tmp_path: Path) -> None:
    """best.json names a step a little before it is there; another save may end in between."""
    for step in (50, 100, 150, 200):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    write_best(tmp_path, Best(250, 5.0, {}, ((50, 6.0), (100, 5.5))))
    retire(tmp_path, 1, 0)
    assert [step for step, _ in committed_steps(tmp_path)] == [200, 100]
    (tmp_path / "checkpoints/step-00000250").mkdir()
    retire(tmp_path, 1, 0)
    assert [step for step, _ in committed_steps(tmp_path)] == [250, 200]


def test_values_of_other_conditions_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of each counts as the best; the same again as before it does not."""
    wanted = iter([5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(evaluation_hook, "compute_metrics", lambda *args: {"fd_stub": next(wanted)})
    data, run, found = make_folder(tmp_path / "data"), tmp_path / "run", []
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"eval.num": 8},
        {"eval.num": 8},
        {"eval.num": 8, "sampling.guidance": 8.0},
    )
    for steps, change in enumerate(changes, 1):
        assert train(over(data, {**SETTINGS, "train.steps": steps, **change}), run) == 0
        best = best_step(run)
        assert best is not None
        found.append((best.step, best.value, best.conditions["pictures"]))
    assert found == [(1, 5.0, 7), (2, 6.0, 8), (2, 6.0, 8), (4, 8.0, 8)]


def test_a_best_file_that_cannot_be_read_costs_no_run(tmp_path: Path) -> None:
    for text in ("", "[]", '{"step": "x"}', '{"step": 1}', '{"step": 1, "value": 2, "of": {}, "before": [1]}',
                 '{"step": 1e999, "value": 2, "of": {}}'):  # fmt: skip
        (tmp_path / "best.json").write_text(text)
        with said() as lines:
            assert best_step(tmp_path) is None
        assert len(lines) == 1 and "cannot be read" in lines[0], text
    (tmp_path / "checkpoints").mkdir()
    for step in (1, 2, 3):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir()
    (tmp_path / "best.json").write_text('{"step": 1, "value": 2.0, "of": {}}')
    retire(tmp_path, 1, 0)
    assert [step for step, _ in committed_steps(tmp_path)] == [3, 1]


def test_images_that_are_not_finite_are_no_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = evaluation_hook._SampledBlocks._images
    monkeypatch.setattr(evaluation_hook._SampledBlocks, "_images", lambda self, rows: real(self, rows) * float("nan"))
    with said() as lines:
        assert train(over(make_folder(tmp_path / "data"), SETTINGS), tmp_path / "run") == 0
    assert "step 1: no evaluation: its images are not finite" in lines
    assert all("fd_stub" not in record for record in records(tmp_path / "run"))
    assert not (tmp_path / "run/best.json").exists()


def test_what_cannot_be_measured_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of the reference that is damaged, features that have no distance; the next evaluation is as ever."""
    data, other = make_folder(tmp_path / "data"), make_folder(tmp_path / "other")
    image = next(other.rglob("*.png"))
    sound = image.read_bytes()
    image.write_bytes(sound[:40])
    real, calls = evaluation_hook.compute_metrics, iter(range(9))

    def some(*given: Any) -> dict[str, Any]:
        image.write_bytes(sound)
        if next(calls) == 0:
            raise EvaluationError("no distance")
        return real(*given)

    def mended(*given: Any) -> Any:
        if (tmp_path / "run/metrics.jsonl").read_text():
            image.write_bytes(sound)
        return _features(*given)

    _features = evaluation_hook._features
    monkeypatch.setattr(evaluation_hook, "_features", mended)
    monkeypatch.setattr(evaluation_hook, "compute_metrics", some)
    with said() as lines:
        assert train(over(data, {**SETTINGS, "eval.reference": str(other)}), tmp_path / "run") == 0
    warned = [line for line in lines if "no evaluation" in line]
    assert len(warned) == 2 and str(image) in warned[0] and warned[1] == "step 2: no evaluation: no distance"
    assert ["fd_stub" in record for record in records(tmp_path / "run")] == [False, False, True, True]


@pytest.mark.parametrize("where", ["sampling", "extractor"])
def test_memory_that_does_not_suffice_costs_no_run(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []

    def full(*_: Any) -> Any:
        held.append(weakref.ref(large := torch.zeros(9)))
        try:
            raise torch.OutOfMemoryError(f"CUDA, {len(large)}")
        except RuntimeError as error:
            raise (RequestError("take fewer") if where == "sampling" else error) from error

    holder = evaluation_hook._SampledBlocks if where == "sampling" else Stub
    monkeypatch.setattr(holder, "_images" if where == "sampling" else "__call__", full)
    real = Trainer._commit

    def commit(self: Trainer, stopping: bool) -> None:
        assert not any(one() is not None for one in held), "memory of the fault is held when the run goes on"
        real(self, stopping)

    monkeypatch.setattr(Trainer, "_commit", commit)
    with said() as lines:
        assert train(over(make_folder(tmp_path / "data"), {**SETTINGS, "train.steps": 2}), tmp_path / "run") == 0
    warned = [line for line in lines if "no evaluation: there is not enough memory" in line]
    assert len(warned) == 2 and [step for step, _ in committed_steps(tmp_path / "run")] == [2]


def test_a_reference_that_is_none_is_known_before_the_first_step(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data")
    np.savez(tmp_path / "one.npz", np.zeros((1, 32, 32, 3), np.uint8))
    about = {"format": 1, "count": 9, "extractor": "stub", "fingerprint": "", "resize": ""}
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(tmp_path / "bad.npz", mu=np.zeros(WIDTH), sigma=np.eye(WIDTH) + 2 * np.eye(WIDTH)[::-1], about=text)
    for name, words in (("one", "a covariance needs at least 2 images, got 1"), ("bad", "not a covariance: it has")):
        with pytest.raises(EvaluationError, match=rf"^eval\.reference .*{name}\.npz: {words}"):
            train(over(data, {**SETTINGS, "eval.reference": str(tmp_path / f"{name}.npz")}), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*")) and not (tmp_path / "run/metrics.jsonl").read_text()


def test_a_reference_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another folder gives another value than the training images do."""
    data, other = make_folder(tmp_path / "data"), make_folder(tmp_path / "other", each=9)
    for name, reference in (("one", ""), ("two", str(other)), ("three", str(data))):
        assert train(over(data, {**SETTINGS, "train.steps": 1, "eval.reference": reference}), tmp_path / name) == 0
    one, two, three = (records(tmp_path / name)[0]["fd_stub"] for name in ("one", "two", "three"))
    assert one == pytest.approx(three, rel=1e-6) and abs(one - two) > 1e-4 * one


def test_what_is_missing_is_known_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_folder(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"eval.num: must be at least 2, got 1"):
        train(over(data, {**SETTINGS, "eval.num": 1}), tmp_path / "run")

    def missing(name: str, weights: Path | None, device: Any, protocol: str | None) -> None:
        raise EvaluationError("no weights")

    with monkeypatch.context() as patch:
        patch.setattr(extractor, "open_extractor", missing)
        with pytest.raises(EvaluationError, match=r"^no weights$"):
            train(over(data, SETTINGS), tmp_path / "run")
    for reference in ("nowhere", "nowhere.npz"):
        with pytest.raises(EvaluationError, match=reference):
            train(over(data, {**SETTINGS, "eval.reference": reference}), tmp_path / "run")
    with pytest.raises(EvaluationError, match=r"^eval.reference nowhere: no such file or folder$"):
        train(over(data, {**SETTINGS, "eval.reference": "nowhere"}), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*")) and not (tmp_path / "run/metrics.jsonl").read_text()


def test_conditions_are_said_once_and_few_images_warned_of(tmp_path: Path) -> None:
    with said() as lines:
        data = make_folder(tmp_path / "data")
        assert train(over(data, {**SETTINGS, "train.steps": 2, "eval.num": 5}), tmp_path / "run") == 0
    words = [line for line in lines if line.startswith("evaluation every")]
    assert words == [
        "evaluation every 1 steps: fd_stub of balanced labels, images 5, evaluations 10, extractor stub, "
        f"extractor_sha256 {'0' * 64}, resize none, reference training images, reference_images 12"
    ]
    assert len([line for line in lines if line.startswith("5 images for 6 features: a Fréchet")]) == 1


def test_inceptions_distance_is_called_fid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractor, "open_extractor", lambda name, weights, device, protocol=None: Inceptive())
    assert train(over(make_folder(tmp_path / "data"), {**SETTINGS, "train.steps": 1}), tmp_path / "run") == 0
    assert "fid" in records(tmp_path / "run")[0]
