"""The original's own numbers: forward, losses, posteriors, lists, sampling chains, schedules, parameter counts."""

import json

import numpy as np
import pytest
import torch
from golden import FOLDER, Golden, assert_close, doubled_noise, golden
from torch import Tensor

from ldit.config.presets import preset, text_preset
from ldit.diffusion import DDPM
from ldit.diffusion.build import build_process
from ldit.diffusion.schedule import respace
from ldit.nn.build import forward_flops, parameter_count, parameter_shapes
from ldit.nn.conditioning import TextCondition
from ldit.pipeline.load import Pipeline
from ldit.sampling.denoiser import build_denoiser
from ldit.sampling.guidance import Guided
from ldit.sampling.solvers import find_solver

CLASS = ["class_qknorm", "class_plain_gqa"]
ALL = [*CLASS, "dit_tiny", "text_qknorm"]


@pytest.fixture(scope="module", params=ALL)
def case(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


def test_names_and_shapes(case: Golden) -> None:
    assert {name: list(shape) for name, shape in parameter_shapes(case.config).items()} == case.keys


def test_forward(case: Golden) -> None:
    assert_close(case.model(case.io["in.x"], case.io["in.t"], case.cond), case.io["out.forward"])


def test_guided_forward(case: Golden) -> None:
    """Batch [conditional; null] and three guided channels; every row of both halves is stored."""
    x, t, cond = case.io["in.x"], case.io["in.t"], case.cond
    expected = case.io["out.forward_cfg4"]
    half = len(expected) // 2
    if isinstance(cond, TextCondition):
        first, null, x, t = cond[:1], cond[1:], x[:1], t[:1]
    else:
        first, null = cond, torch.full_like(cond, case.config.num_classes)
    guided = torch.cat([_guided(case, x, t, first, null), _unguided_rest(case, x, t, null)])
    guided[half:, :3] = guided[:half, :3]  # the original writes the same guided eps into both halves
    assert_close(guided, expected)


def _guided(case: Golden, x: Tensor, t: Tensor, cond: object, null: object) -> Tensor:
    level = DDPM().own_grid("1000")[0]
    predict = Guided(lambda x, _, c: case.model(x, torch.cat([t, t]), c), cond, null, 4.0, 3)
    return predict(x, level)


def _unguided_rest(case: Golden, x: Tensor, t: Tensor, null: object) -> Tensor:
    return case.model(x, t, null)


def test_lists_of_sizes() -> None:
    case = golden("text_qknorm")
    out = case.model([case.io["in.list0"], case.io["in.list1"]], case.io["in.t"], case.cond)
    assert isinstance(out, list)
    assert_close(out[0], case.io["out.list0"])
    assert_close(out[1], case.io["out.list1"])


@pytest.mark.parametrize("name", CLASS)
@pytest.mark.parametrize("times", ["mixed", "zero", "mid"])
def test_class_losses(name: str, times: str) -> None:
    case = golden(name)
    io, ddpm = case.io, DDPM(steps=1000)
    t = io[f"loss.{times}.t"]
    assert_close(ddpm.q_sample(io["loss.x0"], t, io["loss.noise"]), io[f"loss.{times}.x_t"])
    losses = ddpm.losses(lambda x, time: case.model(x, time, case.cond), io["loss.x0"], t, io["loss.noise"])
    for key in ("loss", "mse", "vb"):
        assert_close(losses[key], io[f"loss.{times}.{key}"])


@pytest.mark.parametrize("name", ["dit_tiny", "text_qknorm"])
def test_other_losses(name: str) -> None:
    case = golden(name)
    io = case.io
    losses = DDPM().losses(lambda x, t: case.model(x, t, case.cond), io["loss.x0"], io["in.t"], io["loss.noise"])
    for key in ("loss", "mse", "vb"):
        assert_close(losses[key], io[f"loss.{key}"])


@pytest.mark.parametrize("name", CLASS)
def test_posterior(name: str) -> None:
    case = golden(name)
    posterior = DDPM().posterior(case.io["out.forward"], case.io["in.x"], case.io["in.t"])
    for key, value in posterior._asdict().items():
        assert_close(value, case.io[f"pmv.{key}"])


@pytest.mark.parametrize("name", [*CLASS, "dit_tiny"])
def test_class_chains(name: str) -> None:
    """Whole pipeline: ancestral at guidance 4 and DDIM at 1.5, ten and twenty-five steps."""
    case = golden(name)
    labels = case.io["in.y"].tolist()
    for key in (key for key in case.io if key.startswith("sample") and not key.endswith(".z")):
        group, _, run = key.partition(".")
        steps, solver, guidance = int(group[6:]), run.split("_")[0], float(run.split("cfg")[1])
        z, noises = doubled_noise(case.seed, tuple(case.io[f"{group}.z"].shape), steps)
        assert torch.equal(z, case.io[f"{group}.z"])
        latents = Pipeline(case.model, case.spec).sample_latents(
            labels,
            steps=steps,
            solver=solver,
            guidance=guidance,
            guidance_channels=3,
            initial_noise=z,
            step_noise=lambda i, shape, noises=noises: noises[i],
        )
        assert_close(latents, case.io[key])


def test_text_chain() -> None:
    case = golden("text_qknorm")
    assert isinstance(case.cond, TextCondition)
    z, noises = doubled_noise(case.seed, tuple(case.io["sample10.z"].shape), 10)
    predict = Guided(case.model, case.cond[:1], case.cond[1:], 4.0, 3)
    denoise = build_denoiser(build_process(case.spec.process), predict)
    *_, last = find_solver("ddpm")(denoise, z, DDPM().own_grid("10"), lambda i: noises[i])
    assert_close(last.x, case.io["sample10.ddpm_cfg4"])


def test_schedule() -> None:
    """Respacing lists and float64 tables are equal, not close."""
    data = json.loads((FOLDER / "schedule.json").read_text())
    for sections, expected in data["space_timesteps"].items():
        assert list(respace(1000, sections)) == expected, sections
    assert list(DDPM.respaced("250").timestep_map) == data["timestep_map_250"]
    for name, process in (("full1000", DDPM()), ("respaced250", DDPM.respaced("250"))):
        for table, expected in data["schedules"][name].items():
            assert np.array_equal(getattr(process.tables, table), np.array(expected)), (name, table)


@pytest.mark.parametrize(
    ("name", "plain", "normed", "text", "entries"),
    [
        ("DiT_Llama_600M_patch2", 609_738_272, 609_836_576, 814_459_936, (187, 251, 352)),
        ("DiT_Llama_3B_patch2", 4_237_430_816, 4_237_824_032, 5_046_643_744, (363, 491, 688)),
        ("DiT_Llama_7B_patch2", 7_293_295_648, 7_293_819_936, 8_371_142_688, (363, 491, 688)),
    ],
)
def test_published_counts(name: str, plain: int, normed: int, text: int, entries: tuple[int, int, int]) -> None:
    configs = (preset(name), preset(name, qk_norm=True), text_preset(name, qk_norm=True, cap_feat_dim=4096))
    assert tuple(parameter_count(config) for config in configs) == (plain, normed, text)
    assert tuple(len(parameter_shapes(config)) for config in configs) == entries


@pytest.mark.parametrize(
    ("name", "at_256", "at_512"),
    [
        ("DiT_Llama_600M_patch2", 0.2387, 1.0313),
        ("DiT_Llama_3B_patch2", 1.8825, 7.8355),
        ("DiT_Llama_7B_patch2", 3.3518, 13.8146),
    ],
)
def test_flops(name: str, at_256: float, at_512: float) -> None:
    """TFLOP of one forward pass of one image, by hand, to the table's four places."""
    found = [round(forward_flops(preset(name), side, side) / 1e12, 4) for side in (32, 64)]
    assert found == [at_256, at_512]
