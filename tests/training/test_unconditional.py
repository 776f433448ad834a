"""Models without classes: one label, the null class; no labels and no guidance when they are sampled."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldit.checkpoint.export import write_export
from ldit.cli.main import main
from ldit.config.labels import resolve_label
from ldit.config.model import ClassModelConfig, OriginalDiTConfig
from ldit.config.requests.sampling import SamplingRequest
from ldit.config.spec import ClassConditionerConfig, DDPMConfig, FlowConfig, ModelSpec, PixelCodecConfig, SamplingConfig
from ldit.errors import ConfigError, RequestError
from ldit.nn.build import build_model, parameter_count, parameter_shapes
from ldit.pipeline.generate import Done, Sample
from ldit.pipeline.load import Pipeline
from ldit.pipeline.request import check_request

MODEL = ClassModelConfig(
    dim=32, n_layers=1, n_heads=2, multiple_of=16, input_size=8, in_channels=3, num_classes=0, learn_sigma=False
)
TABLE = "y_embedder.embedding_table.weight"


def spec(model: ClassModelConfig = MODEL, **changes: Any) -> ModelSpec:
    parts: dict[str, Any] = {
        "process": FlowConfig(),
        "codec": PixelCodecConfig(),
        "conditioner": ClassConditionerConfig(None),
        "sampling": SamplingConfig("heun", 4, 3.0, "all", (0.4, 1.0)),
    }
    return ModelSpec(model, **{**parts, **changes})


def pipeline(given: ModelSpec) -> Pipeline:
    torch.manual_seed(0)
    network = build_model(given.model)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (1.0 if p.ndim == 1 else 0.0))
    return Pipeline(network.eval().requires_grad_(False), given)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.9])
def test_the_label_table_is_the_null_class(dropout: float) -> None:
    model = replace(MODEL, class_dropout_prob=dropout)
    assert model.null_class == 0
    assert parameter_shapes(model)[TABLE] == (1, 32)
    assert build_model(model)(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.tensor([0, 0])).shape == (2, 3, 8, 8)


def test_models_with_classes_are_as_they_were() -> None:
    counts = {}
    for classes, dropout in ((1, 0.0), (1, 0.1), (9, 0.0), (9, 0.1)):
        model = replace(MODEL, num_classes=classes, class_dropout_prob=dropout)
        assert model.null_class == (classes if dropout else None)
        assert parameter_shapes(model)[TABLE] == (classes + (dropout > 0), 32)
        counts[classes, dropout] = parameter_count(model)
    assert counts[9, 0.1] - counts[1, 0.0] == 9 * 32
    with pytest.raises(ConfigError, match="num_classes: must be 0"):
        replace(MODEL, num_classes=-1)
    with pytest.raises(ConfigError, match="num_classes: must be 0"):
        OriginalDiTConfig(num_classes=-1)


def test_the_spec_travels() -> None:
    for conditioner in (None, ClassConditionerConfig(None), ClassConditionerConfig(())):
        given = spec(conditioner=conditioner)
        again = ModelSpec.from_json(json.loads(json.dumps(given)))
        assert again == given and not again.class_names and again.model.null_class == 0  # type: ignore[union-attr]


def test_numbers_of_images() -> None:
    assert check_request(spec(), SamplingRequest()).labels == (0,)
    request = check_request(spec(), SamplingRequest(num=3, seed=5))
    assert request.labels == (0, 0, 0) and request.seeds == (5, 6, 7)
    assert check_request(spec(), SamplingRequest(seeds=[4, 9])).labels == (0, 0)
    assert check_request(spec(), SamplingRequest(class_labels=[], num=2)).seeds == (0, 1)
    noise = torch.zeros(2, 3, 8, 8)
    assert check_request(spec(conditioner=None), SamplingRequest(num=2), initial_noise=noise).labels == (0, 0)


def test_guidance_is_one_whatever_the_recipe_says() -> None:
    assert check_request(spec(), SamplingRequest()).settings == SamplingConfig("heun", 4, 1.0, "all", (0.4, 1.0))
    assert check_request(spec(process=DDPMConfig(), sampling=None), SamplingRequest(steps=3)).settings.guidance == 1.0
    assert check_request(spec(), SamplingRequest(guidance=1)).settings.guidance == 1.0


@pytest.mark.parametrize("process", [FlowConfig(), DDPMConfig()], ids=["flow", "ddpm"])
def test_images(process: Any) -> None:
    """Each of its own seed, from the network's one label, without a null half."""
    pipe = pipeline(spec(process=process, sampling=None))
    seen: list[torch.Tensor] = []
    pipe.model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2]))
    events = list(pipe.iterate(num=3, seed=5, steps=2, batch_size=2))
    images = [event for event in events if isinstance(event, Sample)]
    assert [(p.index, p.label, p.seed) for p in images] == [(0, 0, 5), (1, 0, 6), (2, 0, 7)]
    assert isinstance(events[-1], Done) and events[-1].guided_rows == 0
    assert {len(labels) for labels in seen} == {1, 2} and all((labels == 0).all() for labels in seen)
    (alone,) = pipe.sample_latents(seed=6, steps=2)
    assert (alone - images[1].latent).abs().max() < 1e-5 * alone.abs().max()
    assert len(pipe(seed=0, num=2, steps=1)) == 2 and len(pipe(steps=1)) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"class_labels": [0]}, "class 0: this model has no classes"),
        ({"class_labels": "cat"}, "class 'cat': this model has no classes"),
        ({"class_labels": torch.tensor([1, 2])}, "no classes"),
        ({"class_labels": [0], "num": 1}, "no classes"),
        ({"guidance": 2.0}, "guidance 2: this model has no classes"),
        ({"guidance": 0.0}, "guidance 0"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"num": 0}, "num: must be at least 1, got 0"),
        ({"num": -2}, "num"),
        ({"num": 1.5}, "num: expected a whole number"),
        ({"seeds": []}, "num: must be at least 1"),
        ({"num": 3, "seeds": [1]}, "1 seeds for 3 images"),
        ({"num": 2, "initial_noise": torch.zeros(1, 3, 8, 8)}, "initial_noise"),
    ],
)
def test_requests_that_cannot_be_served(arguments: dict[str, Any], said: str) -> None:
    given = {name: value for name, value in arguments.items() if name != "initial_noise"}
    noise = arguments.get("initial_noise")
    with pytest.raises(RequestError, match=said):
        check_request(spec(), SamplingRequest(**given), initial_noise=noise)


@pytest.mark.parametrize("labels", [None, [1], [0, 1]])
def test_models_with_classes_take_labels_not_numbers(labels: Any) -> None:
    with pytest.raises(RequestError, match="num 2: this model has classes"):
        check_request(spec(replace(MODEL, num_classes=3)), SamplingRequest(class_labels=labels, num=2))


def test_no_name_resolves_without_classes() -> None:
    for label in (0, "0", "cat"):
        with pytest.raises(RequestError, match="no classes"):
            resolve_label(label, 0, None)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    pipe = pipeline(spec())
    folder = tmp_path / "model"
    folder.mkdir()
    write_export(folder, pipe.spec, pipe.model.state_dict().items())
    return folder


def test_the_command(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, singles = tmp_path / "grid.png", tmp_path / "singles"
    command = ["sample", "--ckpt", str(export), "--image-save-path", str(grid), "--dtype", "fp32"]
    assert main([*command, "--num", "3", "--seed", "5", "--out", str(singles)]) == 0
    assert sorted(p.name for p in singles.iterdir()) == [*(f"00000{i}.png" for i in range(3)), "samples.json"]
    assert main([*command, "--num", "3", "--seed", "5"]) == 0
    with Image.open(grid) as image:
        settings = json.loads(image.text["ldit"])  # type: ignore[attr-defined]
    assert settings["seeds"] == [5, 6, 7] and settings["sampling"]["guidance"] == 1.0
    assert main(command) == 0
    capsys.readouterr()
    for mistake, said in (
        (["--class-labels", "2"], "class '2': this model has no classes"),
        (["--per-class", "4"], "per_class 4"),
        (["--cfg-scale", "4"], "guidance 4"),
        (["--num", "0"], "num: must be at least 1"),
    ):
        assert main([*command, *mistake]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1
