"""Arguments of another type than expected are named in one line; numbers of every kind are taken."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline.models import tiny, tiny_flow

from ldit.config.requests.sampling import SamplingRequest
from ldit.errors import RequestError
from ldit.pipeline.load import Pipeline, process_device
from ldit.pipeline.request import MOST_PIXELS, check_request

IMAGE = Image.new("RGB", (8, 8))
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"height": 8.0}, "height: expected a whole number, got 8.0"),
    ({"height": "8"}, "height: expected a whole number, got '8'"),
    ({"width": True}, "width: expected a whole number, got True"),
    ({"height": 10**30}, f"height: must be at most {MOST_PIXELS} pixels, got 1{30 * '0'}"),
    ({"init_image": 5}, "init_image: expected images or files, got a int"),
    ({"strength": "a"}, "strength: expected a number, got 'a'"),
    ({"strength": "a", "init_image": IMAGE}, "strength: expected a number, got 'a'"),
    ({"grid": 5}, "grid: expected a name or a list of noise times, got 5"),
    ({"grid": []}, "grid: expected a name or a list of noise times, got []"),
    ({"grid": torch.tensor(0.5)}, "grid: expected a name or a list of noise times, got tensor(0.5000)"),
    ({"grid": [1, "a"]}, "grid: expected a number, got 'a'"),
    ({"grid": [2, 1]}, "grid: noise times must be above 0 and at most 1, got '2,1'"),
    ({"grid": [1, float("nan")]}, "grid: noise times must be above 0 and at most 1, got '1,nan'"),
    ({"grid": [0.5, 1]}, "grid '0.5,1': 2 noise times must fall"),
    ({"grid": [1, 0.5], "steps": 7}, "steps 7: grid '1,0.5' has 2"),
    ({"grid": [1], "steps": 7}, "steps 7: grid '1' has 1"),
    ({"steps": 2.5}, "steps: expected a whole number, got 2.5"),
    ({"steps": [1]}, "steps: expected a whole number, got [1]"),
    ({"steps": True}, "steps: expected a whole number, got True"),
    ({"seeds": ["a"]}, "seeds: expected a whole number, got 'a'"),
    ({"seeds": [1.5]}, "seeds: expected a whole number, got 1.5"),
    ({"seeds": 5}, "seeds: expected one whole number an image, got 5"),
    ({"seed": "a"}, "seed: expected a whole number, got 'a'"),
    ({"guidance": "x"}, "guidance: expected a number, got 'x'"),
    ({"guidance": torch.ones(2)}, "guidance: expected a number, got tensor([1., 1.])"),
    ({"guidance": 10**400}, "guidance: expected a number, got 1000"),
    ({"eta": "x"}, "eta: expected a number, got 'x'"),
    ({"guidance_interval": 5}, "guidance_interval: expected two numbers, got 5"),
    ({"solver": []}, "solver: expected a name, got []"),
    ({"guidance_schedule": {}}, "guidance_schedule: expected a name, got {}"),
    ({"rope_scaling": 1}, "rope_scaling: expected a name, got 1"),
    ({"class_labels": 2.5}, "class_labels: expected numbers or names, got 2.5"),
    (
        {"initial_noise": np.zeros((1, 3, 8, 8))},
        "initial_noise: expected a tensor of shape (1, 3, 8, 8), got a ndarray",
    ),
    ({"step_noise": 5}, "step_noise: expected a function of step and shape, got a int"),
    ({"batch_size": 2.0}, "batch_size: expected a whole number, got 2.0"),
    ({"callback": 5}, "callback: expected a function, got 5"),
]


@pytest.mark.parametrize("make", [tiny, tiny_flow])
@pytest.mark.parametrize(("arguments", "said"), WRONG, ids=lambda value: str(value)[:40])
def test_they_are_named(make: Callable[[], Pipeline], arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        make().sample(**{"class_labels": [0], **arguments})
    line = str(caught.value)
    assert line.startswith(said) and "\n" not in line and len(line) < 250


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"preview_every": 1.5}, "preview_every: expected a whole number, got 1.5"),
        ({"cancelled": 5}, "cancelled: expected a function, got 5"),
    ],
)
def test_those_of_iterators_too(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        tiny().iterate([0], **arguments)
    assert str(caught.value) == said


def test_num_of_a_model_without_classes() -> None:
    pipe = tiny(sampling=tiny().spec.sampling_defaults)
    with pytest.raises(RequestError, match="num"):
        check_request(pipe.spec, SamplingRequest(num=2.0))  # type: ignore[arg-type]


def test_numbers_of_every_kind() -> None:
    spec = tiny().spec
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        request = check_request(
            spec,
            SamplingRequest(
                class_labels=np.array([1, 2]),
                seeds=torch.tensor([4, 2**40]),
                height=np.int64(16),
                width=torch.tensor(8),
                guidance=np.float32(1.5),
                steps=np.int32(3),
            ),
        )
    assert request.labels == (1, 2) and request.seeds == (4, 2**40) and request.shape == (3, 16, 8)
    assert request.settings.guidance == 1.5 and len(request.levels) == 4
    assert all(type(seed) is int for seed in request.seeds)


@pytest.mark.parametrize("given", [[1, 0.5], (1.0, 0.5), np.array([1, 0.5]), torch.tensor([1, 0.5]), "1,0.5"])
@pytest.mark.parametrize("make", [tiny, tiny_flow])
def test_a_grid_in_a_list(make: Callable[[], Pipeline], given: Any) -> None:
    request = check_request(make().spec, SamplingRequest(class_labels=[0], grid=given))
    assert request.settings.grid == "1,0.5" and [level.noise_time for level in request.levels] == [1.0, 0.5, 0.0]


def test_a_grid_in_a_list_is_not_rounded() -> None:
    times = [1, 1 / 3, 1e-2, 1.5e-5]
    request = check_request(tiny_flow().spec, SamplingRequest(class_labels=[0], grid=times))
    assert [level.noise_time for level in request.levels] == [*times, 0.0]


def test_one_process_of_several_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number on its machine, not by that among all."""
    for name, value in {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert [process_device(name) for name in (None, "cuda", "cpu")] == [
        torch.device(d) for d in ("cuda:2",) * 2 + ("cpu",)
    ]
