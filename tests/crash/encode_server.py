"""The fork server for `ldit encode`: as forkserver.py, with a codec that needs no weights and takes its time."""

import sys
import time

import forkserver
import torch
from torch import Tensor

from ldit.cli.main import dispatch, guard
from ldit.commands import encode as flow
from ldit.config.spec import AutoencoderConfig

PAUSE = 0.004  # seconds a batch


class SlowCodec:
    """A pooled image times something."""

    factor, channels, dtype = 4, 2, torch.float32
    config = AutoencoderConfig(name="slow", scale=1.0, shift=0.0, factor=4)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(PAUSE)
        pooled = torch.nn.functional.avg_pool2d(images, 4)
        return pooled[:, :2] * 3, pooled[:, 1:] - 1

    def fingerprint(self) -> str:
        return "51" * 32


def encode(argv: list[str]) -> int:
    flow.open_autoencoder = lambda request, device: SlowCodec()
    return guard(lambda: dispatch("encode", argv))


if __name__ == "__main__":
    torch.set_num_threads(1)
    forkserver.main = encode  # type: ignore[assignment]
    mine = forkserver.serve()
    sys.exit(0 if mine is None else forkserver.carry_out(mine))
