"""The rows of `gpu_first.py`: each a function that measures something on the GPU and returns it."""

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
Result = dict[str, Any]


def milliseconds(call: Callable[[], object], rounds: int = 10) -> float:
    """The median time of a call on the device, by events; two calls warm up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(rounds):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        call()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended))
    return median(times)


def versions() -> Result:
    import triton

    capability = torch.cuda.get_device_capability()
    free, total = torch.cuda.mem_get_info()
    return {
        "device": torch.cuda.get_device_name(), "capability": list(capability), "free_gb": free / 1e9,
        "total_gb": total / 1e9, "torch": torch.__version__, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "triton": triton.__version__, "python": platform.python_version(),
        "arch_list": torch.cuda.get_arch_list(),
    }  # fmt: skip


def tests(chosen: str) -> Result:
    """`pytest -m gpu`, in this row's process group; the summary, and each failure's line."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rf", "--tb=line", "-p", "no:cacheprovider",
               "-o", "addopts=--import-mode=importlib", "-o", "timeout=60", "-k", chosen, "tests/gpu"]  # fmt: skip
    if os.environ.get("NULL_LIB"):
        command.insert(3, "--assert=plain")  # the numbers of a simulated device are too strange to be shown
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    errors = [line.strip()[:300] for line in lines if line.startswith("/") or line.startswith("E  ")]
    return {"rc": done.returncode, "summary": lines[-1] if lines else done.stderr[-500:], "failed": failed,
            "lines": errors[:60]}  # fmt: skip


def attention() -> Result:
    """Each kernel at each head width and length: error of the output and of gradients against fp32 arithmetic, in
    roundings of bf16, and milliseconds for 32 images of 24 heads. 576 tokens have key length % 128 = 64."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = []
    for width in (48, 96, 128):
        for tokens in (64, 200, 256, 576, 1024):
            source = torch.Generator("cuda").manual_seed(tokens)
            small = [torch.randn(2, 4, tokens, width, generator=source, device="cuda") for _ in range(4)]
            expected = _attention(SDPBackend.MATH, small)
            large = [torch.randn(32, 24, tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
            for kernel in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
                row: Result = {"width": width, "tokens": tokens, "kernel": kernel.split("_")[0].lower()}
                backend = getattr(SDPBackend, kernel)
                try:
                    found = _attention(backend, [x.to(torch.bfloat16) for x in small])
                    eps = torch.finfo(torch.bfloat16).eps
                    errors = [((a.float() - b).abs().max() / b.abs().max() / eps).item()
                              for a, b in zip(found, expected, strict=True)]  # fmt: skip
                    row |= {"roundings": [round(error, 2) for error in errors]}
                    with sdpa_kernel(backend), torch.no_grad():
                        q, k, v, _ = large
                        row["forward_ms"] = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v), 5)  # noqa: B023
                    row["both_ms"] = milliseconds(lambda: _attention(backend, large), 5)  # noqa: B023
                except RuntimeError as error:
                    row["failed"] = str(error).splitlines()[0][:200]
                rows.append(row)
    return {"rows": rows}


def _attention(backend: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    from torch.nn.attention import sdpa_kernel

    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]


def products() -> Result:
    """TFLOP/s of square products, and of the networks' own with 32 x 256 rows: apart, and joined into one."""
    found: Result = {}
    for side in (4096, 8192):
        a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        found[f"square_{side}"] = 2 * side**3 / milliseconds(lambda: a @ b) / 1e9  # noqa: B023
    rows = 32 * 256
    for name, dim, hidden in (("600m", 1536, 4096), ("3b", 3072, 8192), ("7b", 4096, 11008)):
        x = torch.randn(rows, dim, device="cuda", dtype=torch.bfloat16)
        for what, width, count in (("qkv", dim, 3), ("w1_w3", hidden, 2)):
            weights = [torch.randn(width, dim, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
            joined, flops = torch.cat(weights), 2 * rows * dim * width * count
            apart = milliseconds(lambda: [x @ w.T for w in weights])  # noqa: B023
            found[f"{name}_{what}"] = {
                "apart": flops / apart / 1e9,
                "joined": flops / milliseconds(lambda: x @ joined.T) / 1e9,  # noqa: B023
            }
    return found


def training(size: str, batch: int, micro: int | None, variants: tuple[Any, ...], **more: Any) -> Result:
    """`ldit bench train`."""
    from ldit.bench.train_step import bench_train
    from ldit.config.requests.bench import BenchTrainRequest

    steps = 2 if os.environ.get("NULL_LIB") else 4
    request = BenchTrainRequest(size, batch, micro, variants=variants, steps=steps, rounds=ROUNDS, **more)  # type: ignore[arg-type]
    return bench_train(request)


def rotation() -> Result:
    """The two forms of the rotation of 32 x 256 tokens with 32 heads of 96 (3B), forward and backward."""
    from ldit.nn.rope import rotate_complex, rotate_real

    x = torch.randn(32, 256, 32, 96, device="cuda", requires_grad=True)
    table = torch.randn(256, 1, 48, 2, device="cuda")
    found = {}
    for form in (rotate_complex, rotate_real):
        call = lambda: form(x.unflatten(-1, (-1, 2)), table).sum().backward()  # noqa: E731, B023
        found[f"{form.__name__}_ms"] = milliseconds(call)
    return found


def profiled() -> Result:
    """Where one compiled step of 3B goes: the kernels that take most of its time."""
    from torch.profiler import ProfilerActivity, profile

    from ldit.bench.train_step import bench_config, started, step_of

    state, task, batch = started(bench_config("imagenet256-3b", 64, "bf16", 32), torch.device("cuda"))
    step = step_of("compiled", state, task, batch)
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as report:
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    rows = sorted(report.key_averages(), key=lambda row: -row.self_device_time_total)
    kernels = [[row.key[:120], row.count, round(row.self_device_time_total / 1000, 3)] for row in rows[:40]]
    return {"step_ms": 1000 * seconds, "kernels_count_ms": kernels}


def update() -> Result:
    """Milliseconds of norm, optimiser, average and copy at 3B: pass by pass, and in one; by kind of moments."""
    found: Result = {}
    for moments in ("fp32", "bf16", "int8"):
        found |= _updates(moments)
        torch.cuda.empty_cache()
    return found


def _updates(moments: Any) -> Result:
    from dataclasses import replace

    from ldit.bench.train_step import bench_config, started
    from ldit.training.update import Update

    config = bench_config("imagenet256-3b", 64, "bf16")
    config = replace(config, optim=replace(config.optim, moments=moments))
    state, _, _ = started(config, torch.device("cuda"))
    count = sum(m.numel() for m in state.weights.masters)
    grads = [torch.randn_like(m, dtype=torch.bfloat16) for m in state.weights.masters]
    sound, half = torch.ones((), dtype=torch.bool, device="cuda"), torch.tensor(0.5, device="cuda")
    found: Result = {}
    forms = {"fused": state.update}
    if moments == "fp32":
        forms["passes"] = Update(state.weights, state.averages, state.optimizer)
        found["norm_ms"] = milliseconds(lambda: torch._foreach_norm(grads, 2, torch.float32), 5)
    for name, form in forms.items():

        def call(form: Update = form) -> None:
            form.queue(grads, 1e-4, sound, 0, half, 1)
            form.settle(1)

        taken = milliseconds(call, 5)
        floor = {"fp32": 36, "bf16": 28, "int8": 22}[moments] * count  # bytes: each number once
        found[f"{moments}_{name}"] = {"ms": taken, "tb_per_second_of_floor": floor / taken / 1e9}
    return found


def sampling(size: str) -> Result:
    """`ldit bench sample` at batch 1 and 8: kernels one by one, as a graph, compiled, both."""
    from ldit.bench.sampling import bench_sample
    from ldit.config.requests.bench import BenchSampleRequest

    found = {}
    for name, switches in (("plain", {}), ("graph", {"graphs": True}), ("compiled", {"compile": True}),
                           ("graph+compiled", {"graphs": True, "compile": True})):  # fmt: skip
        request = BenchSampleRequest(size, (1, 8), steps=20, rounds=ROUNDS, **switches)  # type: ignore[arg-type]
        report = bench_sample(request)
        found[name] = {"ceiling_flops": report["ceiling_flops"], "rows": report["rows"]}
    return found


def autoencoder() -> Result:
    """Milliseconds to encode and decode an image of 256 pixels, eight at once, by precision and memory format. The
    network is the usual one with random weights."""
    from ldit.codecs.kl_network import build_network
    from ldit.precision import products as rounding

    config = {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "sample_size": 256, "scaling_factor": 0.18215,
    }  # fmt: skip
    with torch.device("cuda"):
        network = build_network(config).eval().requires_grad_(False)
    images, rows = torch.randn(8, 3, 256, 256, device="cuda"), []
    exact: dict[bool, Tensor] = {}
    for precision, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
            network = network.to(dtype=dtype, memory_format=layout)
            given = images.to(dtype, memory_format=layout)
            with torch.no_grad(), rounding("tf32" if precision == "tf32" else "fp32"):
                mean = network.moments(given)[0]
                exact.setdefault(True, mean.float())
                error = ((mean.float() - exact[True]).norm() / exact[True].norm()).item()
                encode = milliseconds(lambda: network.moments(given), 5)  # noqa: B023
                decode = milliseconds(lambda: network.images(mean), 5)  # noqa: B023
            rows.append({"precision": precision, "layout": name, "encode_ms": encode / 8, "decode_ms": decode / 8,
                         "relative_error": error})  # fmt: skip
    return {"rows": rows}


def saving() -> Result:
    """Seconds that training waits for a checkpoint of 600M."""
    sys.path.append(str(ROOT / "benchmarks"))
    from training import save

    return save("600m", torch.device("cuda"), 1)


def threads() -> Result:
    """Two threads sample with shared graphs while a third allocates: pictures are those of one thread alone."""
    from ldit.bench.sampling import random_network
    from ldit.config.presets import preset
    from ldit.sampling.fast.prepare import Prepared, prepare

    device = torch.device("cuda")
    config = preset("S", input_size=32, qk_norm=True)
    network = prepare(random_network(config, device, torch.bfloat16))
    assert isinstance(network, Prepared)
    x = torch.randn(2, 4, 32, 32, device=device, dtype=torch.bfloat16)
    time_, labels = torch.tensor([500.0, 500.0]), torch.tensor([1, 2])
    expected = network.for_request()(x, time_, labels)
    assert isinstance(expected, Tensor)
    same: list[bool] = []

    def ask() -> None:
        own = network.for_request()
        for _ in range(50):
            found = own(x, time_, labels)
            same.append(isinstance(found, Tensor) and torch.equal(found, expected))

    def allocate() -> None:
        for i in range(200):
            torch.empty(1 << (10 + i % 12), device=device)

    workers = [threading.Thread(target=target) for target in (ask, ask, allocate)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert network.graphs is not None
    return {"calls": len(same), "equal": sum(same), "graphs": len(network.graphs)}


def within(gigabytes: float, work: Callable[[], Result]) -> Result:
    """`work()` in a part of the card's memory."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
    return {"limit_gb": gigabytes, **work()}


ROWS: dict[str, tuple[int, Callable[[], Result]]] = {
    "versions": (30, versions),
    "tests": (75, lambda: tests("not compiled and not True")),
    "attention": (45, attention),
    "3b": (75, lambda: training("3b", 64, 32, ("fused", "compiled"))),
    "update": (40, update),
    "sample-3b": (90, lambda: sampling("3b")),
    "products": (25, products),
    "profile": (60, profiled),
    "tests-compiled": (90, lambda: tests("compiled or True")),
    "3b-80gb": (60, lambda: within(79.1 * 1.0737, lambda: training(
        "3b", 32, 32, ("compiled",), recompute="full", moments="bf16"))),
    "7b": (75, lambda: training("7b", 32, 16, ("compiled",), recompute="full", moments="bf16")),
    "7b-80gb": (75, lambda: within(79.1 * 1.0737, lambda: training(
        "7b", 16, 16, ("compiled",), recompute="full", moments="int8", host_ema=True))),
    "600m": (60, lambda: training("600m", 256, None, ("original", "fused", "compiled"))),
    "autoencoder": (40, autoencoder),
    "rotation": (20, rotation),
    "threads": (30, threads),
    "7b-muon": (75, lambda: training("7b", 16, 16, ("compiled",), recompute="full", muon=True)),
    "saving": (100, saving),
    "sample-600m": (60, lambda: sampling("600m")),
}  # fmt: skip
"""Rows in order, each with its time limit in seconds."""
