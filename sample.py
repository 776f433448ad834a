"""The original's entry point: python -u sample.py --ckpt DIR [flags]. See `ldit sample` for more."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from ldit.cli.main import guard, leave
from ldit.cli.original.sample import run

if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    sys.exit(leave(guard(lambda: run(arguments), debug="--debug" in sys.argv)))
