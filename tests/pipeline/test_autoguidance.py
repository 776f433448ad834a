"""A weaker model as guide: what it computes, what is counted, what does not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline.models import MODEL, close, tiny, tiny_flow

from ldit.checkpoint.export import write_export
from ldit.cli.main import main
from ldit.config.spec import AutoencoderConfig, ClassConditionerConfig, FlowConfig
from ldit.errors import RequestError
from ldit.pipeline.generate import Done, Sample
from ldit.pipeline.load import Pipeline


def saved(pipe: Pipeline, folder: Path) -> Path:
    folder.mkdir()
    write_export(folder, pipe.spec, pipe.model.state_dict().items())
    return folder


def test_one_step_is_the_formula() -> None:
    """One Euler step of a flow from pure noise is x0 = z - v, so that the outputs mix as the estimates do."""
    strong, weak = tiny_flow(0), tiny_flow(1)
    arguments: dict[str, Any] = {"class_labels": [1, 2], "steps": 1, "solver": "euler", "seed": 3}
    c = strong.sample_latents(**arguments, guidance=1)
    u = weak.sample_latents(**arguments, guidance=1)
    mixed = strong.sample_latents(**arguments, guidance=2.5, guide=weak)
    expected = u + 2.5 * (c - u)
    assert close(mixed, expected)
    assert (mixed - strong.sample_latents(**arguments, guidance=2.5)).abs().max() > 0.01  # not the null class's


def test_a_model_that_guides_itself_changes_nothing() -> None:
    """u + w·(c - u) with u = c, up to the rounding of three operations a step."""
    pipe = tiny()
    plain = pipe.sample_latents([0, 1], guidance=1, steps=4)
    assert close(pipe.sample_latents([0, 1], guidance=4, steps=4, guide=pipe), plain)


def test_its_rows_are_guided_rows() -> None:
    events = list(tiny_flow(0).iterate([0, 1, 2], guide=tiny_flow(1), guidance_interval=(0.0, 0.6), batch_size=2))
    done = events[-1]
    assert isinstance(done, Done)
    # Heun's four steps look at 1, .75, .75, .5, .5, .25, .25
    assert done.evaluations == 2 * 7 and done.guided_rows == 3 * 4


def test_by_name_by_path_and_as_a_pipeline(tmp_path: Path) -> None:
    strong, weak = tiny_flow(0), tiny_flow(1)
    folder = saved(weak, tmp_path / "weak")
    expected = strong.sample_latents([1], guide=weak)
    kept = []
    for guide in (folder, str(folder)):
        assert close(strong.sample_latents([1], guide=guide), expected)
        kept.append(strong._guide)
    assert kept[0] is not None and kept[0] is kept[1]  # read once
    strong.to(torch.bfloat16)
    assert strong._guide is None  # it would stay behind on the old device
    assert strong.sample_latents([1], guide=weak).isfinite().all()  # each network in its own dtype
    assert strong.sample_latents([1], guide=folder).isfinite().all()


def test_models_without_a_null_class_or_classes() -> None:
    alone = replace(MODEL, class_dropout_prob=0.0)
    assert len(tiny(alone).sample([0], guidance=2, guide=tiny(alone, 1), steps=2)) == 1
    none = replace(MODEL, num_classes=0)
    pipe = tiny(none)
    done = [e for e in pipe.iterate(num=2, guidance=3, guide=tiny(none, 1), steps=2) if isinstance(e, Done)]
    assert done[0].guided_rows == 4
    assert [e.guided_rows for e in pipe.iterate(num=2, guide=tiny(none, 1), steps=2) if isinstance(e, Done)] == [4]
    with pytest.raises(RequestError, match="nothing to guide"):
        pipe.sample(guidance=3)


def test_a_guide_may_be_of_another_size() -> None:
    smaller = replace(MODEL, dim=16, learn_sigma=False, patch_size=4, class_dropout_prob=0.0)
    assert tiny().sample_latents([1], guide=tiny(smaller, 1)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("guide", "said"),
    [
        (lambda: tiny(process=FlowConfig()), "guide: its process is flow of v .*, the model's ddpm"),
        (lambda: tiny(replace(MODEL, input_size=16)), r"guide: its latent shape is \(3, 16, 16\), the model's"),
        (lambda: tiny(replace(MODEL, num_classes=5)), "guide: its number of classes is 5, the model's 4"),
        (
            lambda: tiny(conditioner=ClassConditionerConfig(("ant", "bee", "cow", "dog"))),
            "guide: its class 2 is 'cow', the model's 'cat'",
        ),
        (lambda: tiny(codec=AutoencoderConfig(factor=1)), "guide: its codec is autoencoder_kl"),
        (lambda: tiny(replace(MODEL, cond_channels=1)), "guide: model.cond_channels"),
    ],
)
def test_guides_that_do_not_fit(guide: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        tiny().sample([0], guide=guide())


def test_a_guide_must_fit_the_size_asked_for() -> None:
    with pytest.raises(RequestError, match="6x8 are no multiples of its patch size 4"):
        tiny().sample([0], guide=tiny(replace(MODEL, patch_size=4)), height=6)


def test_a_shift_of_times_is_no_other_process() -> None:
    assert len(tiny_flow().sample([0], guide=tiny_flow(1, process=FlowConfig(shift=3.0)))) == 1


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strong, weak = saved(tiny_flow(0), tmp_path / "strong"), saved(tiny_flow(1), tmp_path / "weak")
    out = tmp_path / "x.pt"
    command = ["sample", "--ckpt", str(strong), "--class-labels", "bee", "--latents-out", str(out)]
    assert main([*command, "--guide", str(weak), "--guidance-schedule", "linear"]) == 0
    assert "7 evaluations, 6 guided rows" in capsys.readouterr().out  # not at pure noise
    expected = tiny_flow(0).sample_latents(["bee"], guide=tiny_flow(1), guidance_schedule="linear")
    assert close(torch.load(out, weights_only=True), expected)
    other = saved(tiny(), tmp_path / "other")
    for mistake, said in (
        (["--guide", str(other)], "guide: its process is ddpm"),
        (["--guide", str(tmp_path / "absent")], "absent"),
        (["--guidance-schedule", "sine"], "guidance_schedule"),
    ):
        assert main([*command, *mistake]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1


def test_images_say_their_guide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from PIL import Image

    strong, weak = saved(tiny_flow(0), tmp_path / "strong"), saved(tiny_flow(1), tmp_path / "weak")
    grid = tmp_path / "grid.png"
    assert main(["sample", "--ckpt", str(strong), "--guide", str(weak), "--image-save-path", str(grid)]) == 0
    settings = json.loads(Image.open(grid).text["ldit"])  # type: ignore[attr-defined]
    assert settings["guide"] == str(weak) and settings["sampling"]["guidance_schedule"] == "constant"


def test_events_come_as_ever() -> None:
    images = [e for e in tiny().iterate([0, 1], guide=tiny(weights=1), steps=2) if isinstance(e, Sample)]
    assert [p.index for p in images] == [0, 1]
