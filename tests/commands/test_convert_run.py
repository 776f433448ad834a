"""A run's step in our layout and in the original's, opened from there."""

from pathlib import Path

import pytest
import torch
from smallrun import begin, small

from ldit.checkpoint.open import Source, open_source
from ldit.cli.main import main
from ldit.config.spec import AutoencoderConfig
from ldit.training import checkpointing
from ldit.training.saver import Staging


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_with(AutoencoderConfig("stabilityai/sd-vae-ft-mse"), tmp_path)


def run_with(codec: AutoencoderConfig, tmp_path: Path) -> Path:
    """A run with a committed step whose weights and averages all differ, in latents as the original's are."""
    values = {"codec.": codec, "model.in_channels": 4, "ema.more": (0.5,), "ema.power": (0.1,)}
    state, task, _ = begin(small(values))
    with torch.no_grad():
        drawn = torch.Generator().manual_seed(0)
        for values in (state.weights.masters, *(track.values for track in state.averages.tracks.values())):
            for value in values:
                value.copy_(torch.randn(value.shape, generator=drawn))
    state.step = state.updates = 7
    checkpointing.save_work(tmp_path / "run", state, task.spec, Staging())()
    return tmp_path / "run"


def same(a: Source, b: Source) -> bool:
    """Whether both kinds of weights are equal, bit for bit."""
    pairs = [(dict(a.tensors(ema=ema)), dict(b.tensors(ema=ema))) for ema in (True, False)]
    assert not torch.equal(pairs[0][0]["x_embedder.weight"], pairs[1][0]["x_embedder.weight"])
    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n].float()) for n in x) for x, y in pairs)


@pytest.mark.parametrize("to", ["ldit", "original"])
def test_a_runs_step_opens_again(to: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The average that is sampled and the raw weights, and the same network; the other averages stay in the run."""
    assert main(["convert", str(run), str(tmp_path / "out"), "--to", to]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    before, after = open_source(run), open_source(tmp_path / "out")
    assert after.kind == ("ldit" if to == "ldit" else "original") and same(before, after)
    assert after.spec.model == before.spec.model and after.spec.process == before.spec.process


@pytest.mark.parametrize("name", ["/models/stabilityai/sd-vae-ft-ema", "../stabilityai/sd-vae-ft-mse/"])
def test_the_originals_autoencoders_by_path(name: str, tmp_path: Path) -> None:
    """As the original's own command names them with --local_diffusers_model_root."""
    run = run_with(AutoencoderConfig(name), tmp_path)
    assert main(["convert", str(run), str(tmp_path / "out"), "--to", "original"]) == 0
    assert open_source(tmp_path / "out").spec.codec == AutoencoderConfig("/".join(Path(name).parts[-2:]))


@pytest.mark.parametrize("name", ["/models/sd-vae-ft-ema", "/stabilityai/sd-vae-ft-ema/more", "sd-vae-ft-ema"])
def test_other_autoencoders_are_none_of_the_originals(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(AutoencoderConfig(name), tmp_path)
    assert main(["convert", str(run), str(tmp_path / "out"), "--to", "original"]) == 2
    assert f"codec {name!r}" in capsys.readouterr().err


def test_there_and_back(run: Path, tmp_path: Path) -> None:
    """Our layout made of the original's, and a run that starts from either, has the weights of the run."""
    for source, out, to in ((run, "original", "original"), (tmp_path / "original", "back", "ldit")):
        assert main(["convert", str(source), str(tmp_path / out), "--to", to]) == 0
    assert same(open_source(run), open_source(tmp_path / "back"))
    assert open_source(tmp_path / "back").spec.codec == open_source(run).spec.codec
