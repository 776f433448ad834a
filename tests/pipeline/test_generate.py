"""Requests, events, seeds: the only way images are made."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pipeline.models import tiny_flow

from ldit.config.model import ClassModelConfig
from ldit.config.requests.sampling import SamplingRequest
from ldit.config.spec import (
    AutoencoderConfig,
    ClassConditionerConfig,
    DDPMConfig,
    FlowConfig,
    ModelSpec,
    PixelCodecConfig,
    SamplingConfig,
)
from ldit.errors import CodecError, RequestError
from ldit.nn.build import build_model
from ldit.pipeline.generate import Done, ImageSampler, Preview, Sample
from ldit.pipeline.load import Pipeline
from ldit.pipeline.request import check_request
from ldit.rng import normal

MODEL = ClassModelConfig(
    dim=32, n_layers=1, n_heads=2, multiple_of=16, input_size=8, in_channels=3, num_classes=4, qk_norm=True
)


def pipeline(model: ClassModelConfig = MODEL, **changes: Any) -> Pipeline:
    torch.manual_seed(0)
    network = build_model(model)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (1.0 if p.ndim == 1 else 0.0))
    parts: dict[str, Any] = {
        "process": DDPMConfig(),
        "codec": PixelCodecConfig(),
        "conditioner": ClassConditionerConfig(("ant", "bee", "cat", "dog")),
        "sampling": SamplingConfig("ddpm", 5, 2.0),
    }
    spec = ModelSpec(model=model, **{**parts, **changes})
    return Pipeline(network.eval().requires_grad_(False), spec)


def flow() -> Pipeline:
    model = replace(MODEL, learn_sigma=False)
    return pipeline(model, process=FlowConfig(), sampling=SamplingConfig("heun", 4, 2.0))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("make", [pipeline, flow])
def test_a_image_depends_on_its_seed_alone(make: Callable[[], Pipeline]) -> None:
    """Batch size and company change rounding at most: 1e-5 of the largest value over five steps in fp32."""
    pipe = make()
    labels = [0, 1, 2, 3, 1]
    whole = pipe.sample_latents(labels, seed=10)
    for size in (1, 2, 3):
        assert difference(pipe.sample_latents(labels, seed=10, batch_size=size), whole) < 1e-5
    alone = pipe.sample_latents([2], seeds=[12])
    assert difference(alone[0], whole[2]) < 1e-5
    assert torch.equal(pipe.sample_latents(labels, seed=10), whole)
    assert difference(pipe.sample_latents([2], seeds=[13])[0], whole[2]) > 0.1


def test_the_noise_rule_never_changes() -> None:
    """sha256("ldit|image|7|0|0"), first eight bytes big-endian, CPU, fp32."""
    import hashlib

    seed = int.from_bytes(hashlib.sha256(b"ldit|picture|7|0|0").digest()[:8], "big")
    expected = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(normal((2, 3), 7, "picture"), expected)


def test_every_step_and_seed_has_its_own_noise() -> None:
    drawn = [normal((100,), seed, "step", i) for seed in (0, 1) for i in (0, 1)]
    pipe = pipeline()
    generator = ImageSampler(pipe, check_request(pipe.spec, SamplingRequest(class_labels=[0, 1], seed=0)))
    rows = [generator._noise(i, range(2))[row].flatten() for row in (0, 1) for i in (0, 1)]
    for a in range(4):
        assert torch.equal(rows[a][:100], normal((3, 8, 8), a // 2, "step", a % 2).flatten()[:100])
        assert all(not torch.equal(drawn[a], drawn[b]) and not torch.equal(rows[a], rows[b]) for b in range(a))


def test_given_noise_is_used() -> None:
    pipe, seen = pipeline(), []

    def step_noise(i: int, shape: tuple[int, ...]) -> torch.Tensor:
        seen.append((i, shape))
        return torch.zeros(shape)

    z = torch.randn(2, 3, 8, 8)
    first = pipe.sample_latents([0, 1], initial_noise=z, step_noise=step_noise, seed=1)
    again = pipe.sample_latents([0, 1], initial_noise=z, step_noise=step_noise, seed=2)
    assert torch.equal(first, again)
    assert seen[:4] == [(i, (2, 3, 8, 8)) for i in range(4)]  # none after the last step


def test_events() -> None:
    events = list(flow().iterate(["bee", 3, "ca"], preview_every=2, batch_size=2))
    previews = [e for e in events if isinstance(e, Preview)]
    pictures = [e for e in events if isinstance(e, Sample)]
    assert [(p.indices, p.step, p.steps) for p in previews] == [
        ((0, 1), 2, 4),
        ((0, 1), 4, 4),
        ((2,), 2, 4),
        ((2,), 4, 4),
    ]
    assert [(p.index, p.label, p.seed) for p in pictures] == [(0, 1, 0), (1, 3, 1), (2, 2, 2)]
    assert pictures[0].image is not None and pictures[0].image.size == (8, 8)
    done = events[-1]
    assert isinstance(done, Done)
    assert (done.images, done.cancelled) == (3, False)
    assert done.evaluations == 2 * (2 * 4 - 1) and done.guided_rows == (2 + 1) * 7  # Heun: 2N - 1


def test_cancelling_stops_at_the_next_step() -> None:
    steps = 0

    def cancelled() -> bool:
        nonlocal steps
        steps += 1
        return steps == 2

    events = list(pipeline().iterate([0], cancelled=cancelled))
    assert len(events) == 1
    assert isinstance(events[0], Done) and events[0].cancelled and events[0].evaluations == 2


def test_the_callers_mode_stands_between_events() -> None:
    """Neither inference mode nor no_grad leaks out of an iterator, also when two are interleaved and closed."""
    first, second = (pipeline().iterate([0], steps=4, preview_every=1) for _ in range(2))
    weight = torch.ones(1, requires_grad=True)
    for iterator in (first, second, first):
        next(iterator)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        (weight * 2).sum().backward()
    first.close()  # type: ignore[attr-defined]
    second.close()  # type: ignore[attr-defined]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    picture = next(e for e in pipeline().iterate([0], steps=1) if isinstance(e, Sample))
    assert (weight * picture.latent).sum().requires_grad  # images are ordinary tensors
    assert not picture.latent.is_inference()


@pytest.mark.parametrize("labels", ["dog", 3, (3,), torch.tensor([3]), torch.tensor(3)])
def test_ways_to_name_one_class(labels: Any) -> None:
    assert check_request(pipeline().spec, SamplingRequest(class_labels=labels)).labels == (3,)


def test_a_class_named_like_a_number() -> None:
    pipe = pipeline(conditioner=ClassConditionerConfig(("3", "2", "1", "x")))
    assert check_request(pipe.spec, SamplingRequest(class_labels=["3", 3, "0"])).labels == (0, 3, 0)
    with pytest.raises(RequestError, match="²"):
        check_request(pipe.spec, SamplingRequest(class_labels=["²"]))


def test_the_spec_is_the_content_of_config_json() -> None:
    import json

    spec = pipeline().spec
    assert json.loads(json.dumps(spec))["model"]["num_classes"] == 4 == spec["model"]["num_classes"]
    assert ModelSpec.from_json(json.loads(json.dumps(spec))) == spec
    assert replace(spec, training={"step": 1})["training"] == {"step": 1}


def test_extra_input_channels_say_so() -> None:
    with pytest.raises(RequestError, match="cond_channels"):
        pipeline(replace(MODEL, cond_channels=1)).sample([0])


def test_closing_the_iterator_stops_it() -> None:
    events = pipeline().iterate([0], steps=1000, preview_every=1)
    assert isinstance(next(events), Preview)
    events.close()  # type: ignore[attr-defined]
    assert next(events, None) is None


def test_output_types() -> None:
    pipe = pipeline()
    images = pipe(class_labels=[0, "dog"], seed=3, steps=2)
    tensors = pipe.sample([0, "dog"], seed=3, steps=2, output_type="tensor")
    latents = pipe.sample([0, "dog"], seed=3, steps=2, output_type="latent")
    assert torch.equal(tensors, latents) and tensors.shape == (2, 3, 8, 8)
    expected = (127.5 * tensors[1] + 128).clamp(0, 255).to(torch.uint8)[:, 0, 0].tolist()
    assert list(images[1].getpixel((0, 0))) == expected
    with pytest.raises(RequestError, match="jpeg"):
        pipe.sample([0], output_type="jpeg")  # type: ignore[arg-type]


def test_other_sizes() -> None:
    assert pipeline().sample_latents([0], height=4, width=12, steps=1).shape == (1, 3, 4, 12)


def test_one_step_starts_at_the_noisiest_index() -> None:
    times = []
    pipe = pipeline()
    network = pipe.model
    pipe.model = Recorder(network, times)
    pipe.sample_latents([0], steps=1, guidance=1.0)
    assert times == [999.0]


class Recorder(torch.nn.Module):
    def __init__(self, network: torch.nn.Module, times: list[float]) -> None:
        super().__init__()
        self.network, self.times = network, times

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.times.append(t[0].item())
        return self.network(x, t, y)


def test_half_precision_networks_keep_an_fp32_state() -> None:
    pipe = pipeline()
    exact = pipe.sample_latents([0, 1], seed=0)
    pipe.model.to(torch.bfloat16)
    rough = pipe.sample_latents([0, 1], seed=0)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, rough.bfloat16().float())  # more digits than bf16 holds
    assert (rough - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"class_labels": None}, "at least one"),
        ({"class_labels": [4]}, "0 to 3"),
        ({"class_labels": ["x"]}, "'x'"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "1001"),
        ({"steps": "a,b"}, "a,b"),
        ({"solver": "rk45"}, "rk45"),
        ({"solver": "heun", "eta": 0.5}, "eta"),
        ({"grid": "parabolic"}, "grid"),
        ({"guidance": float("inf")}, "guidance"),
        ({"guidance_channels": 4}, "1 to 3"),
        ({"guidance_interval": (0.5, 0.2)}, "interval"),
        ({"height": 7}, "height: 7"),
        ({"width": 0}, "width: 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"seeds": [1, 2]}, "2 seeds for 1"),
        ({"initial_noise": torch.zeros(1, 3, 4, 4)}, "initial_noise"),
        ({"prompts": ["a cat"]}, "this model takes no text"),
    ],
)
def test_requests_that_cannot_be_served(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        pipeline().sample(**{"class_labels": [0], **arguments})


def test_guidance_needs_a_null_class() -> None:
    pipe = pipeline(replace(MODEL, class_dropout_prob=0.0))
    with pytest.raises(RequestError, match="no null class"):
        pipe.sample([0], guidance=2.0)
    assert len(pipe.sample([3], guidance=1.0, steps=1)) == 1


def test_a_missing_codec_stops_before_sampling() -> None:
    pipe = pipeline(replace(MODEL, in_channels=4), codec=AutoencoderConfig("absent-vae"))
    pipe.model = torch.nn.Linear(1, 1)  # would fail if it were called
    with pytest.raises(CodecError, match="absent-vae"):
        pipe.sample([0])


def test_learned_variance_is_never_guided() -> None:
    """guidance_channels "all" means those of the image."""
    pipe = pipeline()
    three = pipe.sample_latents([0], guidance=3.0, guidance_channels=3)
    assert torch.equal(pipe.sample_latents([0], guidance=3.0, guidance_channels="all"), three)
    assert not torch.equal(pipe.sample_latents([0], guidance=3.0, guidance_channels=1), three)


def test_a_section_and_what_is_asked_for() -> None:
    """The section's eta is its own solver's; a list of noise times has its own number of steps."""
    section = SamplingConfig("ddim", 10, 1.0, grid="1,0.6,0.2", eta=0.5)
    spec = tiny_flow(sampling=section).spec
    assert check_request(spec, SamplingRequest(class_labels=[0])).settings.eta == 0.5
    assert check_request(spec, SamplingRequest(class_labels=[0], solver="heun")).settings.eta == 0.0
    assert len(check_request(spec, SamplingRequest(class_labels=[0], steps=3)).levels) == 4
    with pytest.raises(RequestError, match=r"steps 50: grid '1,0\.6,0\.2' has 3"):
        check_request(spec, SamplingRequest(class_labels=[0], steps=50))
    assert len(check_request(spec, SamplingRequest(class_labels=[0], steps=50, grid="uniform")).levels) == 51
    for wrong in ((0, 0.5, 1), 3, "a"):
        with pytest.raises(RequestError, match="guidance_interval: expected two numbers, got"):
            check_request(spec, SamplingRequest(class_labels=[0], guidance_interval=wrong))  # type: ignore[arg-type]
