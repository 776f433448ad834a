"""The same numbers on a CUDA device: `pytest -m gpu`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden import assert_close, doubled_noise, golden

from ldit.config.recipes import recipe
from ldit.config.spec import ClassConditionerConfig, ModelSpec
from ldit.data.loader import Loader
from ldit.data.source import open_data
from ldit.diffusion import DDPM
from ldit.flows.pipeline import Pipeline
from ldit.nn.conditioning import TextCondition
from ldit.train import state_io
from ldit.train.step import TrainState, train_step
from ldit.train.task import DiffusionTask

pytestmark = pytest.mark.gpu
CASES = ["class_qknorm", "class_plain_gqa", "dit_tiny", "text_qknorm"]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """fp32 means fp32: no TF32 in matrix products."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(cond: torch.Tensor | TextCondition, dtype: torch.dtype) -> torch.Tensor | TextCondition:
    return cond.to("cuda", dtype) if isinstance(cond, TextCondition) else cond.to("cuda")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 5e-2)])
def test_forward(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """fp32 as on the CPU; bf16 (8 bits of mantissa) to a few of its own roundings."""
    case = golden(name)
    model = case.model.to("cuda", dtype)
    out = model(case.io["in.x"].to("cuda", dtype), case.io["in.t"].cuda(), on_gpu(case.cond, dtype))
    assert_close(out.float().cpu(), case.io["out.forward"], tolerance)


@pytest.mark.parametrize("name", ["class_qknorm", "class_plain_gqa"])
def test_losses(name: str) -> None:
    case = golden(name)
    model, io = case.model.cuda(), {key: value.cuda() for key, value in case.io.items()}
    losses = DDPM().losses(lambda x, t: model(x, t, io["in.y"]), io["loss.x0"], io["loss.mixed.t"], io["loss.noise"])
    for key in ("loss", "mse", "vb"):
        assert_close(losses[key].cpu(), case.io[f"loss.mixed.{key}"])


def test_chain() -> None:
    case = golden("class_qknorm")
    z, noises = doubled_noise(case.seed, tuple(case.io["sample10.z"].shape), 10)
    latents = Pipeline(case.model.cuda(), case.spec).sample_latents(
        case.io["in.y"], steps=10, guidance=4.0, initial_noise=z, step_noise=lambda i, shape: noises[i]
    )
    assert_close(latents, case.io["sample10.ddpm_cfg4"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_resumes(precision: str, tmp_path: Path) -> None:
    """Saved at step 2 and restored on the device, the next steps repeat to rounding (CUDA sums have no fixed order)."""
    config = recipe("tiny-cpu")
    config = replace(config, train=replace(config.train, precision=precision))
    data, _ = open_data("emoji64", 16, max_per_class=20)
    task = DiffusionTask(
        config, ModelSpec(config.model, config.process, config.codec, ClassConditionerConfig(data.names))
    )
    batches = list(Loader(data, 16, 0, False).from_step(0, 4))
    state = TrainState(task.build().cuda(), config)
    for batch in batches[:2]:
        train_step(state, task, batch)
    folder = state_io.save(tmp_path, state, task.spec, keep=1)
    expected = [train_step(state, task, batch)["loss"] for batch in batches[2:]]
    resumed = TrainState(task.build().cuda(), config)
    state_io.restore(folder, resumed)
    found = [train_step(resumed, task, batch)["loss"] for batch in batches[2:]]
    assert found == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 1e-2)
