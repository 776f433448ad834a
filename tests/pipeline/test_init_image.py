"""Sampling from images: cut, encoded, noised to a level of the grid; the rest of the grid runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline.models import close, tiny, tiny_flow
from torch import Tensor

from ldit.checkpoint.export import write_export
from ldit.cli.main import main
from ldit.codecs.pixels import from_pil, to_uint8
from ldit.config.requests.sampling import SamplingRequest
from ldit.config.spec import AutoencoderConfig
from ldit.data.images.transforms import center_crop
from ldit.diffusion import DDPM
from ldit.errors import CodecError, RequestError
from ldit.pipeline.generate import Done
from ldit.pipeline.init_image import encoded
from ldit.pipeline.load import Pipeline
from ldit.pipeline.request import check_request
from ldit.rng import normal

BOTH = pytest.mark.parametrize("make", [tiny, tiny_flow])


def image(seed: int = 0, width: int = 8, height: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_pixels_there_and_back() -> None:
    one = image()
    assert torch.equal(to_uint8(from_pil([one]))[0].permute(1, 2, 0), torch.from_numpy(np.array(one)))


@BOTH
def test_the_start_is_the_noised_image(make: Callable[[], Pipeline]) -> None:
    """alpha·z + sigma·noise at the first level no noisier than the strength; the noise is of the image's own seed."""
    pipe, one = make(), image()
    request = check_request(
        pipe.spec, SamplingRequest(class_labels=[1, 2], steps=10, init_image=one, strength=0.55, seed=7)
    )
    first = request.levels[0]
    grid = check_request(pipe.spec, SamplingRequest(class_labels=[1], steps=10)).levels
    assert first in grid and first.noise_time <= 0.55 < grid[grid.index(first) - 1].noise_time
    seen: list[Tensor] = []
    pipe.inference = None  # the network itself, whose hooks see every evaluation
    pipe.model.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    pipe.sample_latents([1, 2], steps=10, init_image=one, strength=0.55, seed=7, guidance=1)
    for row, seed in enumerate((7, 8)):
        expected = first.alpha * from_pil([one])[0] + first.sigma * normal((3, 8, 8), seed, "picture")
        assert torch.equal(seen[0][row], expected)


@BOTH
def test_the_steps_left_are_counted(make: Callable[[], Pipeline]) -> None:
    events = list(make().iterate([0, 1], steps=10, solver="euler", init_image=image(), strength=0.5))
    done = events[-1]
    assert isinstance(done, Done) and done.evaluations == 5 and done.guided_rows == 10


def test_strength_1_of_a_flow_is_plain_sampling_bit_for_bit() -> None:
    pipe = tiny_flow()
    plain = pipe.sample_latents([0, 1], seed=4)
    assert torch.equal(pipe.sample_latents([0, 1], seed=4, init_image=image(), strength=1), plain)


def test_strength_1_of_ddpm_leaves_a_trace_of_the_image() -> None:
    """Its noisiest level has alpha 0.0064."""
    pipe, level = tiny(), DDPM().own_grid("5")[0]
    assert 0.006 < level.alpha < 0.0065
    seen: list[Tensor] = []
    pipe.inference = None  # the network itself, whose hooks see every evaluation
    pipe.model.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    pipe.sample_latents([0], seed=4, init_image=image(), strength=1, guidance=1)
    pipe.sample_latents([0], seed=4, guidance=1)
    assert len(seen) == 10
    expected = level.alpha * from_pil([image()]) + level.sigma * seen[5]
    assert torch.equal(seen[0], expected)


@BOTH
def test_less_strength_stays_nearer(make: Callable[[], Pipeline]) -> None:
    """Of a network that denoises nothing (eps or velocity 0), what is left of the image falls with the strength."""
    pipe = make()
    for p in pipe.model.parameters():
        p.zero_()
    one = from_pil([image()])
    distance = [
        (pipe.sample_latents([0], steps=20, solver="euler", init_image=image(), strength=s) - one).norm().item()
        for s in (0.1, 0.3, 0.6)
    ]
    assert distance[0] < distance[1] < distance[2]


@BOTH
def test_one_for_all_or_one_each(make: Callable[[], Pipeline]) -> None:
    pipe, pictures = make(), [image(i) for i in range(3)]
    each = pipe.sample_latents([0, 1, 2], init_image=pictures, strength=0.5)
    for k in range(3):
        alone = pipe.sample_latents([k], seeds=[k], init_image=pictures[k], strength=0.5)
        assert (alone[0] - each[k]).abs().max() < 1e-5 * each.abs().max()
    one = pipe.sample_latents([0, 0], init_image=pictures[:1], strength=0.5)
    assert not torch.equal(one[0], one[1])  # variations: seeds differ
    with pytest.raises(RequestError, match="init_image: 2 images to start from for 3"):
        pipe.sample([0, 1, 2], init_image=pictures[:2])


def test_images_are_cut_by_the_adm_rule() -> None:
    spec, large = tiny().spec, image(1, 50, 37)
    request = check_request(spec, SamplingRequest(class_labels=[0], init_image=large))
    assert request.init is not None and request.strength == 0.6
    assert np.array_equal(np.array(request.init[0]), np.array(center_crop(large, 8)))
    wide = check_request(spec, SamplingRequest(class_labels=[0], init_image=large, width=24, height=4))
    assert wide.init is not None and wide.init[0].size == (24, 4)


@pytest.mark.parametrize("size", [(3, 3), (8, 8), (16, 16), (31, 64), (300, 17), (1, 60), (33, 32)])
@pytest.mark.parametrize("target", [(8, 8), (24, 4), (4, 24), (7, 5)])
def test_a_crop_covers_what_is_asked(size: tuple[int, int], target: tuple[int, int]) -> None:
    """One flat colour stays flat to the border: nothing of the outside comes in."""
    cut = center_crop(Image.new("RGB", size, (10, 200, 30)), *target)
    assert cut.size == target and cut.getcolors() == [(target[0] * target[1], (10, 200, 30))]


def test_every_mode_and_file(tmp_path: Path) -> None:
    spec = tiny().spec
    image().save(tmp_path / "a.png")
    grey = image().convert("L")
    request = check_request(
        spec, SamplingRequest(class_labels=[0, 1, 2], init_image=[image(), tmp_path / "a.png", grey])
    )
    assert request.init is not None
    assert np.array_equal(np.array(request.init[0]), np.array(request.init[1]))
    assert request.init[2].mode == "RGB"


class Halving:
    """A codec whose latents are means of 2x2 pixels; counts what it encodes."""

    factor = 2

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return torch.nn.functional.avg_pool2d(images, 2)


def test_a_image_is_encoded_once_and_alone() -> None:
    codec, a, b = Halving(), image(0), image(1)
    latents = encoded([a, b, a], codec)  # type: ignore[arg-type]
    assert codec.batches == [1, 1] and latents.shape == (3, 3, 4, 4)
    assert torch.equal(latents[0], latents[2]) and not torch.equal(latents[0], latents[1])


def test_a_image_that_memory_does_not_suffice_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the codec's error nor that of cutting it is shown raw."""

    class Short(Halving):
        def encode(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    pipe = tiny()
    pipe._codec = Short()  # type: ignore[assignment]
    said = "init_image: memory does not suffice for an image of 24x8: a smaller height and width need less"
    with pytest.raises(RequestError) as caught:
        pipe.sample([0], init_image=image(), height=8, width=24)
    assert str(caught.value) == said and caught.value.__suppress_context__

    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("ldit.pipeline.init_image.center_crop", full)
    with pytest.raises(RequestError, match=said):
        check_request(pipe.spec, SamplingRequest(class_labels=[0], init_image=image(), height=8, width=24))
    monkeypatch.setattr("ldit.pipeline.init_image.center_crop", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check_request(pipe.spec, SamplingRequest(class_labels=[0], init_image=image()))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"strength": 0.5}, "strength 0.5: there is no init_image"),
        ({"init_image": [image()], "strength": 0.0}, "strength: must be above 0 and at most 1, got 0"),
        ({"init_image": [image()], "strength": 1.5}, "got 1.5"),
        ({"init_image": [image()], "strength": float("nan")}, "got nan"),
        ({"init_image": [image()], "strength": 0.0005}, "the last of the 5 steps starts at 0.001; take more steps"),
        ({"init_image": []}, "init_image: no image given"),
        ({"init_image": [3]}, "init_image: expected an image or a file, got a int"),
        ({"init_image": "absent.png"}, "init_image absent.png: "),
    ],
)
def test_requests_that_cannot_be_served(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        tiny().sample([0], **arguments)


def test_latents_need_the_codec_to_start_from_a_image() -> None:
    pipe = tiny(codec=AutoencoderConfig("absent-vae", factor=1))
    assert pipe.sample_latents([0], steps=1).shape == (1, 3, 8, 8)
    with pytest.raises(CodecError, match="absent-vae"):
        pipe.sample_latents([0], steps=2, init_image=image())


def test_a_missing_codec_is_told_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, folder = tiny(codec=AutoencoderConfig("absent-vae", factor=1)), tmp_path / "model"
    folder.mkdir()
    write_export(folder, pipe.spec, pipe.model.state_dict().items())
    image().save(tmp_path / "a.png")
    monkeypatch.setattr("ldit.commands.sample.load_source", lambda *given: pytest.fail("weights were read"))
    command = ["sample", "--ckpt", str(folder), "--init-image", str(tmp_path / "a.png")]
    assert main([*command, "--latents-out", str(tmp_path / "x.pt")]) == 2
    assert "absent-vae" in capsys.readouterr().err


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, folder = tiny_flow(), tmp_path / "model"
    folder.mkdir()
    write_export(folder, pipe.spec, pipe.model.state_dict().items())
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, file in enumerate(files):
        image(seed, 20, 12).save(file)
    out, grid = tmp_path / "x.pt", tmp_path / "grid.png"
    start = ["--init-image", *map(str, files), "--strength", "0.5", "--class-labels", "ant", "bee", "--per-class", "2"]
    assert main(["sample", "--ckpt", str(folder), *start, "--latents-out", str(out)]) == 0
    assert "4 images, 3 evaluations" in capsys.readouterr().out  # Heun's two steps from 0.5
    both = [image(seed, 20, 12) for seed in (0, 0, 1, 1)]
    expected = pipe.sample_latents([0, 0, 1, 1], init_image=both, strength=0.5)
    assert close(torch.load(out, weights_only=True), expected)
    assert main(["sample", "--ckpt", str(folder), *start, "--image-save-path", str(grid)]) == 0
    settings = json.loads(Image.open(grid).text["ldit"])  # type: ignore[attr-defined]
    assert settings["init_image"] == ["a.png", "b.png"] and settings["strength"] == 0.5
    capsys.readouterr()
    (tmp_path / "no.png").write_text("no image")
    for mistake, said in (
        (["--init-image", str(tmp_path / "no.png")], "no.png: not a JPEG"),
        (["--strength", "0.5"], "no init_image"),
        (["--init-image", *map(str, files), "--class-labels", "ant"], "2 images to start from for 1"),
    ):
        assert main(["sample", "--ckpt", str(folder), *mistake]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1
