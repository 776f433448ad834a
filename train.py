"""The original's entry point: torchrun --nproc_per_node 8 train.py --model … [flags]. See `ldit train` for more."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from ldit.cli.main import guard, leave
from ldit.cli.original.train import run

if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    sys.exit(leave(guard(lambda: run(arguments), debug="--debug" in sys.argv)))
