"""benchmarks/gpu_train.py on the simulated GPU, whose every number is strange: steps are told that they went well."""

import runpy
from pathlib import Path

from ldit.nn import kernels
from ldit.training import step
from ldit.training.trainer import LEFT_OUT

wait = step._HostCopy.wait
FLAGS = LEFT_OUT + 1


def sound(self: step._HostCopy) -> list[float]:
    """Loss and gradient 1, no signal, nothing left out."""
    return [1.0] * (len(wait(self)) - FLAGS) + [0.0] * FLAGS


step._HostCopy.wait = sound  # type: ignore[method-assign]
kernels._agrees = lambda *args: True
runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_train.py"), run_name="__main__")
