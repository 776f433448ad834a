"""The fork server for sets of images: as forkserver.py, for `ldit sample`. The first word of an order is the number
of cores that the process takes."""

import sys

import forkserver
import torch

import ldit.pipeline.sets.make  # noqa: F401 (all that a process imports)
from ldit.cli.main import dispatch, guard


def sample(argv: list[str]) -> int:
    torch.set_num_threads(int(argv[0]))
    return guard(lambda: dispatch("sample", argv[1:]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    forkserver.main = sample  # type: ignore[assignment]
    mine = forkserver.serve()
    sys.exit(0 if mine is None else forkserver.carry_out(mine))
