"""R4: losses of three small runs, fp32 on the CPU.

Written anew only by `python tests/training/golden_losses.py --write`. A change of these numbers is a change of what
training computes: LOG.md must explain it.
"""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "golden" / "losses.json"
STEPS = 50


def recipes() -> dict[str, Any]:
    from smallrun import small

    common = {"train.steps": STEPS, "data.flip": True, "ema.decay": 0.99}
    return {
        "ddpm-adamw": small({**common, "train.warmup": 5, "optim.weight_decay": 0.01}),
        "flow-v-muon": small({**common, "optim.kind": "muon", "train.lr": 2e-3, "model.qk_norm": "head"}, flow="v"),
        "flow-x0-accumulating-cosine": small(
            {**common, "train.micro_batch_size": 2, "train.schedule": "cosine", "model.rope": "2d", "train.lr": 2e-3},
            flow="x0",
        ),
    }


def losses(config: Any) -> list[float]:
    """The loss of every step of a run, computed on one thread."""
    from smallrun import begin, one_thread

    from ldit.training.step import train_step

    with one_thread():
        state, task, loader = begin(config)
        return [train_step(state, task, batch).values["loss"] for batch in loader.from_step(0, STEPS)]


def machine() -> dict[str, str]:
    """What decides the order of sums: the same here and there, and losses are equal to the last bit."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    told = [line for line in lines if line.startswith(("vendor_id", "cpu family", "model\t"))]
    names = [line.partition(":")[2].strip() for line in told]
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": " ".join(names[:3]) or platform.processor(),
    }


def main() -> None:
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(__doc__)
    sys.path[:0] = [str(ROOT / "src"), str(Path(__file__).parent)]
    found = {name: losses(config) for name, config in recipes().items()}
    FILE.write_text(json.dumps({"machine": machine(), "losses": found}, indent=1) + "\n")
    print(FILE)


if __name__ == "__main__":
    main()
