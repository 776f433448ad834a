"""The inference copy on a CUDA device: `pytest -m gpu`."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from test_variants import TINY, filled

from ldit.config.model import ClassModelConfig
from ldit.nn.dit import DiT
from ldit.nn.kernels import attention_kernels
from ldit.sampling.fast.graphs import Graphs
from ldit.sampling.fast.options import InferenceOptions
from ldit.sampling.fast.prepare import Prepared, prepare

pytestmark = pytest.mark.gpu
TIMES, LABELS = (17.0, 3.5, 999.0), (4, 0, 5)


def tiny(dtype: torch.dtype) -> DiT:
    config = ClassModelConfig(**{**TINY, "dim": 128, "input_size": 8, "num_classes": 5, "qk_norm": True})
    return filled(config).to("cuda", dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 2**-5)])
@pytest.mark.parametrize(
    "inference", [{}, {"graph": True}, {"compiled": True}, {"graph": True, "compiled": True}], ids=str
)
def test_same_outputs(inference: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    """At two batch shapes, guided and not, in turn; conditions on the host and on the device."""
    model = tiny(dtype)
    network = prepare(model, InferenceOptions(**inference))
    assert isinstance(network, Prepared)
    network.plan(product(TIMES, LABELS))
    for rows in (3, 6, 3, 6):
        x = torch.randn(rows, 4, 8, 8, device="cuda", dtype=dtype)
        t, y = torch.tensor(TIMES * 2)[:rows], torch.tensor(LABELS * 2)[:rows]
        with torch.no_grad():
            expected = model(x, t.cuda(), y.cuda()).float()
        for found in (network(x, t, y), network(x, t.cuda(), y.cuda())):
            assert (found.float() - expected).abs().max() <= tolerance * expected.abs().max()
    if inference.get("graph"):
        assert isinstance(network.graphs, Graphs) and len(network.graphs) == 2, "captured, not fallen back"
        view = network.for_request()
        assert view.release() and len(network.graphs) == 0 and not view.release()
        for found in (view(x, t, y), network(x, t, y)):
            assert (found.float() - expected).abs().max() <= tolerance * expected.abs().max()
        assert len(network.graphs) == 1, "captured again by who shares them still"


def test_threads_that_share_graphs() -> None:
    """Each gets its own numbers, whoever captured first."""
    model = tiny(torch.float32)
    network = prepare(model, InferenceOptions(graph=True))
    assert isinstance(network, Prepared)
    y = torch.tensor(LABELS)

    def work(number: int) -> list[torch.Tensor]:
        view, out = network.for_request(), []
        for turn in range(20):
            x = torch.full((3, 4, 8, 8), number + turn / 20, device="cuda")
            out.append(view(x, torch.full((3,), float(number)), y).cpu())
        return out

    alone = [work(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(4)))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_planned_call_does_not_wait() -> None:
    network = prepare(tiny(torch.bfloat16))
    assert isinstance(network, Prepared)
    network.plan(product(TIMES, LABELS))
    x, t, y = torch.randn(3, 4, 8, 8, device="cuda").bfloat16(), torch.tensor(TIMES), torch.tensor(LABELS)
    network(x, t, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        network(x, t, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_adaln_weights_leave_the_device() -> None:
    model = tiny(torch.float32)
    x, t, y = torch.randn(3, 4, 8, 8, device="cuda"), torch.tensor(TIMES).cuda(), torch.tensor(LABELS).cuda()
    with torch.no_grad():
        expected = model(x, t, y)
    network = prepare(model, InferenceOptions(host_modulation=True))
    assert isinstance(network, Prepared)
    assert all(p.device.type == ("cpu" if "adaLN" in name else "cuda") for name, p in model.named_parameters())
    network.plan(product(TIMES, LABELS))
    assert (network(x, t, y) - expected).abs().max() <= 5e-6 * expected.abs().max()


@pytest.mark.parametrize("head_dim", [32, 48, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_are_right(dtype: torch.dtype, head_dim: int) -> None:
    q, k, v = (torch.randn(2, 4, 256, head_dim, device="cuda", dtype=dtype) for _ in range(3))
    expected = torch.softmax(q.float() @ k.float().mT * head_dim**-0.5, -1) @ v.float()
    with attention_kernels(q.device, dtype, head_dim)():
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert (found.float() - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()
