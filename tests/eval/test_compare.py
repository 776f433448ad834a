"""Several sources in one table."""

import json
from pathlib import Path

import pytest
from eval.evaluation import SIDE, Stub, folder, noise
from folders import make_folder, over

import ldit
from ldit.cli.main import main
from ldit.config.requests.evaluate import EvaluateRequest
from ldit.config.spec import SamplingConfig
from ldit.errors import EvaluationError, LditError
from ldit.eval import evaluate as evaluation
from ldit.eval import measure
from ldit.eval.compare import table_of


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub()
    monkeypatch.setattr(evaluation, "open_named", lambda *arguments: made)
    return made


def test_folders_side_by_side(tmp_path: Path, stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    """Values of each source as alone, in one table; the reference goes through the network once."""
    for name, count, seed in (("a", 12, 1), ("b", 15, 2), ("real", 20, 3)):
        folder(tmp_path / name, noise(count, seed))
    a, b, real = (str(tmp_path / name) for name in ("a", "b", "real"))
    alone = [ldit.evaluate(source, real, extractor="stub") for source in (a, b)]
    stub.seen = 0
    report = tmp_path / "both.json"
    assert main(["evaluate", a, b, "--reference", real, "--extractor", "stub", "--json", str(report)]) == 0
    assert stub.seen == 12 + 15 + 20
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0] == f"against {real}"
    assert lines[1].split() == ["source", "fd_stub", "↓", "precision", "↑", "recall", "↑", "kid", "↓"]
    assert lines[2].startswith("a ") and lines[3].startswith("b ")
    found = json.loads(report.read_text())
    for one, expected in zip(found["reports"], alone, strict=True):
        assert one["fd_stub"] == expected["fd_stub"] and one["compared"] == expected["compared"]
    assert found["differences"]["images"] == ["12", "15"]
    assert "extractor stub 000000000000" in said and "resize none" in said.split("what differs")[0]
    # The report may be replaced by another of these commands.
    assert main(["evaluate", b, a, "--reference", real, "--extractor", "stub", "--json", str(report)]) == 0


def test_runs_show_what_differs(tmp_path: Path, stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two runs that differ in a rate and a width: those two settings, and nothing that is the same."""
    data = make_folder(tmp_path / "data")
    for name, changes in (("one", {}), ("two", {"train.lr": 5e-4, "model.dim": 32})):
        ldit.train(over(data, changes), tmp_path / name)
    sources = [str(tmp_path / "one"), str(tmp_path / "two" / "checkpoints" / "step-00000002")]
    flags = ["--reference", str(data), "--num", "6", "--steps", "1", "--extractor", "stub"]
    assert main(["evaluate", *sources, *flags]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.split("what differs")[1].splitlines()}
    assert rows["model.dim"] == ["16", "32"] and rows["train.lr"] == ["0.001", "0.0005"]
    assert not any(key.startswith(("train.steps", "data.", "ema.", "process.")) for key in rows)


def test_all_are_opened_before_the_first_is_measured(tmp_path: Path, stub: Stub) -> None:
    folder(tmp_path / "a", noise(8, 1))
    source = str(tmp_path / "a")
    folder(tmp_path / "few", noise(2, 1))
    few = EvaluateRequest(source=source, others=(str(tmp_path / "few"),), reference=source, metrics=("pr",))
    with pytest.raises(EvaluationError, match="needs at least"):
        evaluation.evaluate(few, print)
    (tmp_path / "notes.txt").write_text("none")
    for wrong in (str(tmp_path / "absent"), str(tmp_path / "notes.txt")):
        with pytest.raises(LditError):
            evaluation.evaluate(EvaluateRequest(source=source, others=(wrong,), reference=source), print)
    assert stub.seen == 0 and SIDE == 8
    request = EvaluateRequest(source=source, others=(source,), reference=source, figure=tmp_path / "f.png")
    with pytest.raises(EvaluationError, match="figure: is of one source"):
        evaluation.evaluate(request, print)


def test_the_held_out_part_of_a_run_is_that_of_all(tmp_path: Path, stub: Stub) -> None:
    """PATH@heldout for a run, a model that states nothing and images; runs with other shares have none in common."""
    data = make_folder(tmp_path / "data", each=10)
    for share in ("0.2", "0.4"):
        ldit.train(over(data, {"data.heldout": share}), tmp_path / share)
    step = str(tmp_path / "0.2" / "checkpoints" / "step-00000002")
    settings = {"reference": f"{data}@heldout", "num": 4, "extractor": "stub"}
    for sources in ((str(tmp_path / "0.2"), step), (step, str(tmp_path / "0.2")), (str(data), str(tmp_path / "0.2"))):
        report = ldit.evaluate(sources[0], others=sources[1:], **settings)
        assert [one["num_reference"] for one in report["reports"]] == [6, 6]
    with pytest.raises(EvaluationError, match="the runs hold out other shares"):
        ldit.evaluate(str(tmp_path / "0.2"), others=(str(tmp_path / "0.4"),), **settings)


def test_the_bar_moves_with_the_first_image(tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first block is complete; in the end it has counted every image once."""
    heard: list[tuple[str, float]] = []

    class Heard(measure.Progress):
        def begun(self, count: float) -> None:
            heard.append(("begun", count))
            super().begun(count)

        def advance(self, count: int) -> None:
            heard.append(("done", count))
            super().advance(count)
            assert self._begun < 1e-6

    monkeypatch.setattr(measure, "Progress", Heard)
    data = make_folder(tmp_path / "data")
    ldit.train(over(data), tmp_path / "run")
    ldit.evaluate(str(tmp_path / "run"), str(data), num=6, steps=4, solver="ddim", batch_size=6, extractor="stub")
    samples = heard[[kind for kind, _ in heard].index("begun") :]
    assert [kind for kind, _ in samples] == ["begun"] * 4 + ["done"]
    assert sum(count for kind, count in samples if kind == "begun") == pytest.approx(6) and samples[-1][1] == 6


def test_settings_as_they_were_used(tmp_path: Path, stub: Stub) -> None:
    """The steps of the request, not those of a run's configuration; long values that differ at their ends."""
    data = make_folder(tmp_path / ("x" * 60 + "-one"))
    again = make_folder(tmp_path / ("x" * 60 + "-two"))
    own = {"sampling.": SamplingConfig("euler", 9, 1.0)}
    ldit.train(over(data, own, flow="v"), tmp_path / "a")
    ldit.train(over(again, flow="v"), tmp_path / "b")
    sources = [str(tmp_path / name) for name in ("a", "b")]
    settings = {"reference": str(data), "num": 4, "steps": 2, "solver": "euler", "guidance": 1.0, "extractor": "stub"}
    report = ldit.evaluate(sources[0], others=(sources[1],), **settings)
    differences = report["differences"]
    assert differences["data.path"] == [str(data), str(again)]
    assert not any(key.startswith("sampling.") for key in differences)
    assert "-one" in table_of(report) and "-two" in table_of(report)
