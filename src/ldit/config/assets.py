"""Where the bundled data lies."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"
