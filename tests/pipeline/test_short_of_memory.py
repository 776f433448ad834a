"""Images when memory is short: blocks on the host, batches that are split, and what is said when neither helps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ldit
from ldit.cli.main import main
from ldit.errors import RequestError
from ldit.pipeline import load as pipeline
from ldit.pipeline.generate import Done, Preview, Sample
from ldit.pipeline.load import Pipeline
from ldit.sampling.fast import prepare as preparing
from ldit.sampling.fast.options import InferenceOptions, is_offloaded
from ldit.storage.tensors import write_safetensors

NAME = "emoji64-class-xs"
FEW: dict[str, Any] = {"steps": 2, "solver": "euler", "seed": 3}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in bf16, which fp32 must be converted from."""
    folder = tmp_path_factory.mktemp("half")
    source = ldit.load(NAME, "cpu")
    (folder / "config.json").write_text(json.dumps(source.spec))
    write_safetensors(folder / "model.safetensors", source.model.state_dict().items(), torch.bfloat16)
    return folder


def short(pipe: Pipeline, room: int) -> list[int]:
    """Let the network fail with more than `room` rows; returns the batches it was asked for."""
    asked: list[int] = []
    pipe.inference = None  # the network itself
    forward = pipe.model.forward

    def limited(x: Tensor, *rest: Any) -> Any:
        asked.append(len(x))
        if len(x) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(x, *rest)

    pipe.model.forward = limited
    return asked


def test_offload_gives_the_same_images(half: Path) -> None:
    plain, lent = ldit.load(half, "cpu", inference=None), ldit.load(half, "cpu", offload=True)
    assert is_offloaded(lent.model) and lent.dtype == torch.float32 and lent.device.type == "cpu"
    labels = [0, 3, 5]
    assert torch.equal(lent.sample_latents(labels, **FEW), plain.sample_latents(labels, **FEW))
    with pytest.raises(RequestError, match="load it again"):
        lent.to(torch.bfloat16)


def test_the_command(half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latents = tmp_path / "z.npy"
    command = ["sample", "--ckpt", str(half), "--steps", "2", "--latents-out", str(latents), "--offload"]
    assert main([*command, "--device", "cpu", "--class-labels", "0"]) == 0
    assert latents.is_file() and not capsys.readouterr().err.count("error")


def test_a_batch_too_large_is_split_and_the_images_stay(caplog: pytest.LogCaptureFixture) -> None:
    pipe = ldit.load(NAME, "cpu")
    labels = [0, 1, 2, 3, 4]
    expected = pipe.sample_latents(labels, batch_size=1, guidance=1, **FEW)
    asked = short(pipe, 2)
    events = list(pipe.iterate(labels, batch_size=5, guidance=1, preview_every=1, **FEW))
    assert asked == [5, *[2] * 4, 1, 1]
    images = [event for event in events if isinstance(event, Sample)]
    assert [image.index for image in images] == labels
    torch.testing.assert_close(torch.stack([p.latent for p in images]), expected, rtol=0, atol=1e-4)
    assert [event.indices for event in events if isinstance(event, Preview)] == [(0, 1)] * 2 + [(2, 3)] * 2 + [(4,)] * 2
    done = events[-1]
    assert isinstance(done, Done) and (done.images, done.evaluations, done.cancelled) == (5, 6, False)
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: batches of 2 from here on, 5 images to go"
    ]


@pytest.mark.parametrize(("offload", "named"), [(False, True), (True, False)])
def test_one_image_that_does_not_fit_names_the_way_out(offload: bool, named: bool) -> None:
    pipe = ldit.load(NAME, "cpu", offload=offload)
    short(pipe, 0)
    with pytest.raises(RequestError, match="memory does not suffice for one image: a smaller height") as caught:
        pipe.sample_latents([0, 1], guidance=1, **FEW)
    assert ("--offload" in str(caught.value)) == named


def test_noise_from_outside_is_not_split() -> None:
    pipe = ldit.load(NAME, "cpu")
    asked = short(pipe, 2)
    with pytest.raises(RequestError, match="3 images that cannot be split"):
        pipe.sample_latents([0, 1, 2], guidance=1, step_noise=lambda i, shape: torch.zeros(shape), **FEW)
    assert asked == [3]


@pytest.mark.parametrize(("offload", "named"), [(False, True), (True, False)])
def test_a_model_that_does_not_fit_names_the_way_out(
    offload: bool, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Callable[..., Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(pipeline, "load_model", full)
    with pytest.raises(RequestError, match="emoji64-class-xs does not fit into the memory of cpu") as caught:
        ldit.load(NAME, "cpu", offload=offload)
    assert ("--offload" in str(caught.value)) == named


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--int8", "--dtype", "bf16"], "int8: products in 8 bits are for the CPU and fp32"),
        (["--int8", "--offload"], "int8: does not go with offload"),
        (["--compile", "--offload"], "compiled: does not go with offload"),
        (["--int8", "--compile"], "int8: its products cannot be compiled"),
        (["--graphs"], "graph: CUDA graphs need a GPU, got cpu"),
        (["--host-modulation", "--offload"], "host_modulation: does not go with offload"),
    ],
)
def test_switches_that_cannot_be(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = str(tmp_path / "x.png")
    code = main(["sample", "--ckpt", NAME, "--device", "cpu", "--class-labels", "0", "--image-save-path", grid, *flags])
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1 and not (tmp_path / "x.png").exists()


def test_host_modulation_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing moves; the flag reaches the copy that samples."""
    asked: list[InferenceOptions | None] = []
    real = preparing.prepare
    monkeypatch.setattr(
        preparing, "prepare", lambda model, inference: asked.append(inference) or real(model, inference)
    )
    command = ["sample", "--ckpt", NAME, "--device", "cpu", "--class-labels", "0", "--steps", "2", "--host-modulation"]
    assert main([*command, "--latents-out", str(tmp_path / "z.npy")]) == 0
    assert asked == [InferenceOptions(host_modulation=True)]


def test_int8_images_are_near(tmp_path: Path) -> None:
    """Products in 8 bits: a hundredth of the network's output, and images of the same seeds that look alike."""
    plain, rounded = ldit.load(NAME, "cpu"), ldit.load(NAME, "cpu", inference=InferenceOptions(int8=True))
    a, b = (pipe.sample_latents([0, 3], steps=6, solver="dpm++2m") for pipe in (plain, rounded))
    assert not torch.equal(a, b) and (a - b).square().mean().sqrt() < 0.1 * a.std()
