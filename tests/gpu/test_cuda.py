"""The same numbers on a CUDA device: `pytest -m gpu`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import assert_close, doubled_noise, golden
from runs import after, started, tiny

from ldit.config.sections import ParallelConfig
from ldit.diffusion import DDPM
from ldit.nn.conditioning import TextCondition
from ldit.parallel.world import World
from ldit.pipeline.load import Pipeline
from ldit.training import checkpointing
from ldit.training.saver import Staging
from ldit.training.step import train_step

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


CUDA = World(torch.device("cuda"))


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_resumes(precision: str, kind: str, tmp_path: Path) -> None:
    """Saved at step 2 and restored on the device, the next steps repeat to rounding (CUDA sums have no fixed order)."""
    config = tiny(precision=precision)
    config = replace(config, optim=replace(config.optim, kind=kind))
    state, task, loader = started(config, CUDA)
    batches = list(loader.from_step(0, 4))
    for batch in batches[:2]:
        train_step(state, task, batch)
    checkpointing.save_work(tmp_path, state, task.spec, Staging())()
    expected = [train_step(state, task, batch).values["loss"] for batch in batches[2:]]
    resumed, _, _ = started(config, CUDA)
    checkpointing.restore(tmp_path / "checkpoints" / "step-00000002", resumed)
    found = [train_step(resumed, task, batch).values["loss"] for batch in batches[2:]]
    assert found == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", [False, True])
def test_losses_as_on_the_cpu(recompute: Any, compiled: bool) -> None:
    """Ten fp32 steps, compiled and recomputed or not, against the plain CPU."""
    config = tiny()
    _, expected = after(config, 10)
    _, found = after(replace(config, parallel=ParallelConfig(recompute=recompute, eager=not compiled)), 10, CUDA)
    losses = [[o.values["loss"] for o in outcomes] for outcomes in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_refused_on_the_device(kind: str) -> None:
    config = tiny(precision="bf16")
    config = replace(config, optim=replace(config.optim, kind=kind))
    state, task, loader = started(config, CUDA)
    first, second = loader.from_step(0, 2)
    train_step(state, task, first)
    before = [m.detach().clone() for m in state.weights.masters]
    second.inputs[0, 0, 0, 0] = float("nan")
    assert train_step(state, task, second).fault == "nonfinite"
    assert all(torch.equal(a, b) for a, b in zip(before, state.weights.masters, strict=True))


def test_the_host_waits_once_a_step() -> None:
    """No hidden synchronisation: with torch's check set to raise, only the one wait for the step's numbers remains (an
    event, which the check does not count)."""
    state, task, loader = started(tiny(precision="bf16"), CUDA)
    first, second, third = loader.from_step(0, 3)
    train_step(state, task, first)
    train_step(state, task, second)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, task, third)
    finally:
        torch.cuda.set_sync_debug_mode("default")
