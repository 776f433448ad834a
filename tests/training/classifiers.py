"""Small classifiers over images that a few steps tell apart."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from smallrun import changed

from ldit.config.classifier import ClassifierModelConfig, ClassifierRun
from ldit.config.sections import DataConfig, EMAConfig, HeldoutConfig, OptimConfig, TrainConfig

NAMES = ("across", "down", "noise")
SIDE = 32


def make_stripes(root: Path, each: int = 12, heldout: int = 4, side: int = SIDE) -> Path:
    """Three classes of coloured noise, two with stripes of one direction on it; the last `heldout` of each class are
    kept from training."""
    random = np.random.RandomState(3)
    kept = []
    for name in NAMES:
        (root / name).mkdir(parents=True)
        for index in range(each):
            image = random.uniform(0, 120, (side, side, 3))
            wave = 60 + 60 * np.sin(np.arange(side) * 2 * np.pi / 8 + random.uniform(0, 6))
            image += {"across": wave[:, None, None], "down": wave[None, :, None], "noise": 60.0}[name]
            Image.fromarray(image.astype(np.uint8)).save(root / name / f"{index:02d}.png")
            kept += [f"{name}/{index:02d}.png"] if index >= each - heldout else []
    (root / "heldout.txt").write_text("\n".join(kept) + "\n")
    return root


def classifier_run(root: Path, changes: dict[str, Any] | None = None) -> ClassifierRun:
    """A network of some thousand parameters over `make_stripes`: four steps, two commits, two measurements."""
    base = ClassifierRun(
        model=ClassifierModelConfig((8, 16), 4),
        data=DataConfig(str(root), SIDE, workers=0),
        train=TrainConfig(steps=4, batch_size=8, lr=5e-3, log_every=1, checkpoint_every=2, attention_every=0),
        optim=OptimConfig(weight_decay=0.05),
        ema=EMAConfig(0.9),
        heldout=HeldoutConfig(every=2, num=12),
    )
    return changed(base, changes or {})  # type: ignore[type-var, arg-type, return-value]
