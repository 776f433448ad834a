"""SiT's .pt files: DiT's names and shapes, another process."""

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import FOLDER
from safetensors.torch import load_file
from torch import Tensor

from ldit.checkpoint.layouts.dit_pt import SIT, content
from ldit.checkpoint.open import open_source
from ldit.cli.main import main
from ldit.config.spec import DDPMConfig, FlowConfig
from ldit.pipeline.load import load

Fault = Callable[..., str]
HEADS = 4


@pytest.fixture(scope="module")
def raw() -> dict[str, Tensor]:
    return load_file(FOLDER / "dit_tiny.weights.safetensors")


def trained(raw: dict[str, Tensor], **settings: Any) -> dict[str, Any]:
    """What SiT's train.py saves; its parser's names and defaults."""
    left = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity", "loss_weight": None, **settings}
    return {"model": raw, "ema": raw, "opt": {}, "args": argparse.Namespace(**left)}


def process(path: Path, **arguments: Any) -> Any:
    return open_source(path, heads=HEADS, **arguments).spec.process


def test_its_convention() -> None:
    assert FlowConfig(prediction="v", time_scale=1.0, data_at=1, shift=1.0) == SIT


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("SiT-XL-2-256x256.pt", None, SIT),
        ("sit.pt", None, SIT),
        ("DiT-XL-2-256x256.pt", None, DDPMConfig()),
        ("0400000.pt", None, DDPMConfig()),
        ("0400000.pt", {}, SIT),
        ("0400000.pt", {"model": None}, SIT),
        ("DiT.pt", {}, SIT),  # settings before names
        ("0400000.pt", {"path_type": None, "prediction": None}, SIT),
        ("SiT.pt", {"model": "DiT-XL/2", "path_type": None, "prediction": None}, DDPMConfig()),
    ],
)
def test_what_tells(
    tmp_path: Path, raw: dict[str, Tensor], name: str, settings: dict[str, Any] | None, expected: Any
) -> None:
    content: Any = raw if settings is None else trained(raw, **settings)
    if settings and "path_type" in settings:
        del content["args"].path_type, content["args"].prediction
    torch.save(content, tmp_path / name)
    assert process(tmp_path / name) == expected


def test_a_flag_says_otherwise(tmp_path: Path, raw: dict[str, Tensor]) -> None:
    torch.save(raw, tmp_path / "x.pt")
    torch.save(trained(raw, path_type="GVP"), tmp_path / "y.pt")
    assert process(tmp_path / "x.pt", process="flow") == SIT
    assert process(tmp_path / "y.pt", process="flow") == replace(SIT, path="gvp")
    assert process(tmp_path / "y.pt", process="ddpm") == DDPMConfig()
    assert load(tmp_path / "x.pt", heads=HEADS, process="flow").spec.process == SIT


def test_the_log_says_what_was_taken(tmp_path: Path, raw: dict[str, Tensor], caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ldit").propagate = True
    caplog.set_level(logging.INFO, "ldit")
    for name, said in (("SiT.pt", "SiT (flow, data at time 1): by its name"), ("x.pt", "DiT (ddpm): neither")):
        torch.save(raw, tmp_path / name)
        process(tmp_path / name)
        assert said in caplog.messages[-1] and "--process" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"path_type": "Cosine"}, "args.path_type: expected SiT's Linear, GVP, VP, got 'Cosine'"),
        ({"path_type": "linear"}, "args.path_type"),  # REPA's, whose time runs the other way
        ({"prediction": ["score"]}, "args.prediction: expected SiT's velocity, noise, score, got ['score']"),
    ],
)
def test_paths_and_predictions_that_are_not_built(
    tmp_path: Path, raw: dict[str, Tensor], settings: dict[str, Any], said: str, fault: Fault
) -> None:
    torch.save(trained(raw, **settings), tmp_path / "x.pt")
    assert said in fault(open_source, tmp_path / "x.pt", HEADS)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("path_type", ["Linear", "GVP", "VP"])
def test_paths_and_predictions_of_sit(path_type: str, prediction: str, tmp_path: Path, raw: dict[str, Tensor]) -> None:
    """Read from the settings of its train.py, and written into them again."""
    torch.save(trained(raw, path_type=path_type, prediction=prediction), tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt", HEADS)
    found = source.spec.process
    expected = {"velocity": "v", "noise": "eps", "score": "score"}[prediction]
    assert found == FlowConfig(prediction=expected, time_scale=1.0, data_at=1, path=path_type.lower())  # type: ignore[arg-type]
    settings = content(source.spec, {"ema": raw})["args"]
    assert settings == {"path_type": path_type, "prediction": prediction}


def test_folders_say_it_themselves(tmp_path: Path, fault: Fault) -> None:
    assert "states its process itself" in fault(open_source, "emoji64-class-xs", None, True, "flow")


def test_one_euler_step_by_hand(tmp_path: Path, raw: dict[str, Tensor]) -> None:
    """SiT's ODE from noise at t = 0 to data at t = 1: x = z + v(z, 0), v the first half of the output, t unscaled."""
    torch.save(raw, tmp_path / "SiT.pt")
    pipe = load(tmp_path / "SiT.pt", device="cpu", heads=HEADS)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    got = pipe.sample_latents([1, 2], steps=1, solver="euler", guidance=1, initial_noise=z)
    out = pipe.model(z, torch.zeros(2), torch.tensor([1, 2]))
    expected = z + out[:, :4]
    assert out.shape[1] == 8 and (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_two_euler_steps_by_hand(tmp_path: Path, raw: dict[str, Tensor]) -> None:
    torch.save(raw, tmp_path / "SiT.pt")
    pipe = load(tmp_path / "SiT.pt", device="cpu", heads=HEADS)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x, y = z, torch.tensor([1])
    for t in (0.0, 0.5):
        x = x + 0.5 * pipe.model(x, torch.tensor([t]), y)[:, :4]
    got = pipe.sample_latents([1], steps=2, solver="euler", guidance=1, initial_noise=z)
    assert (got - x).abs().max() < 1e-5 * x.abs().max()


def test_command(tmp_path: Path, raw: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(raw, tmp_path / "x.pt")
    out = tmp_path / "latents.pt"
    command = ["sample", "--ckpt", str(tmp_path / "x.pt"), "--heads", "4", "--class-labels", "1", "--steps", "3"]
    command += ["--latents-out", str(out), "--device", "cpu"]
    assert main([*command, "--process", "flow"]) == 0
    out_of = capsys.readouterr()
    assert "3 evaluations" in out_of.out and "3 steps of euler-maruyama" in out_of.err  # SiT's own default
    assert main(command) == 0
    assert "3 evaluations" in capsys.readouterr().out
    assert main([*command[:2], "emoji64-class-xs", *command[3:], "--process", "flow"]) == 2
    assert "is for DiT and SiT .pt files" in capsys.readouterr().err


def test_it_is_written_in_both_layouts(tmp_path: Path, raw: dict[str, Tensor], fault: Fault) -> None:
    """A .pt file states SiT's path and prediction, whatever its name; flows of other conventions are refused."""
    from ldit.checkpoint.export import write_export
    from ldit.commands.convert import convert

    torch.save(raw, tmp_path / "SiT.pt")
    out = convert(tmp_path / "SiT.pt", tmp_path / "out", heads=HEADS)
    spec = open_source(out).spec
    assert spec.process == SIT
    assert process(convert(out, tmp_path / "b.pt", "pt")) == SIT
    other = tmp_path / "other"
    other.mkdir()
    write_export(other, replace(spec, process=FlowConfig()), raw.items())
    assert "process 'flow' of other conventions" in fault(convert, other, tmp_path / "c.pt", "pt")


def test_info_and_convert_take_the_flag(
    tmp_path: Path, raw: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    file, heads = tmp_path / "x.pt", ["--heads", str(HEADS)]
    torch.save(raw, file)
    for flags, kind in (([], "ddpm"), (["--process", "flow"], "flow"), (["--process", "ddpm"], "ddpm")):
        assert main(["info", str(file), *heads, *flags, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["config"]["process"]["kind"] == kind
    assert main(["convert", str(file), str(tmp_path / "out"), *heads, "--process", "flow"]) == 0
    assert process(tmp_path / "out") == SIT
    capsys.readouterr()
    assert main(["convert", str(file), str(tmp_path / "y.pt"), *heads, "--process", "flow", "--to", "pt"]) == 0
    assert process(tmp_path / "y.pt") == SIT
    capsys.readouterr()
    for command in (["info", str(tmp_path / "out")], ["convert", str(tmp_path / "out"), str(tmp_path / "z")]):
        assert main([*command, "--process", "flow"]) == 2
        error = capsys.readouterr().err
        assert "states its process itself" in error and error.count("\n") == 1


def test_repa_has_its_data_at_the_other_end(
    tmp_path: Path, raw: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Known by its projectors or its settings, whatever --process says; without both the log says what was assumed."""
    expected = FlowConfig(prediction="v", time_scale=1.0, data_at=0)
    projector = {"projectors.0.0.weight": torch.zeros(2, 2)}
    torch.save({"ema": {**raw, **projector}}, tmp_path / "a.pt")
    torch.save({"ema": raw, "args": {"path_type": "linear", "prediction": "v", "proj_coeff": 0.5}}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        assert process(tmp_path / name) == process(tmp_path / name, process="flow") == expected
    load(tmp_path / "a.pt", device="cpu", heads=HEADS)
    torch.save(raw, tmp_path / "c.pt")
    with caplog.at_level(logging.INFO):
        assert process(tmp_path / "c.pt", process="flow") == SIT
    assert "in REPA's files they are at time 0" in caplog.text


def test_the_null_class_is_not_guessed(
    tmp_path: Path, raw: dict[str, Tensor], fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    """The table's last row is a class where the settings count it, and of 1000 rows all are classes."""
    table = "y_embedder.embedding_table.weight"
    rows = len(raw[table])

    def model(**settings: Any) -> Any:
        torch.save({"ema": raw, "args": settings}, tmp_path / "x.pt")
        return open_source(tmp_path / "x.pt", heads=HEADS).spec.model

    assert (model(num_classes=rows).num_classes, model(num_classes=rows).null_class) == (rows, None)
    assert (model(num_classes=rows - 1).null_class, model().null_class) == (rows - 1, rows - 1)
    torch.save({"ema": raw, "args": {"num_classes": rows + 5}}, tmp_path / "x.pt")
    assert f"its table has {rows} rows" in fault(open_source, tmp_path / "x.pt", HEADS)
    torch.save({**raw, table: torch.zeros(1000, raw[table].shape[1])}, tmp_path / "y.pt")
    with caplog.at_level(logging.INFO):
        spec = open_source(tmp_path / "y.pt", heads=HEADS).spec
    assert (spec.model.num_classes, spec.model.null_class) == (1000, None)  # type: ignore[union-attr]
    assert "without a null class" in caplog.text and "ImageNet's names are assumed" in caplog.text
