"""Charts with matplotlib: a common style, and files in PNG or SVG.

matplotlib is an extra, imported when a figure is made. pyplot is not used, so plots and backend of the process stay as
they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ldit.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
# Colours of Okabe & Ito (2008), which colour-blind readers can distinguish; without yellow, which is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TEXT, FAINT, GRID = "#333333", "#767676", "#E4E4E4"
_STYLE = {
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # matplotlib's own: the same figure on every machine
    "font.size": 9.5,
    "text.color": TEXT,
    "text.parse_math": False,  # a run may be called "a$b$"
    "text.usetex": False,
    "axes.edgecolor": "#9A9A9A",
    "axes.labelcolor": TEXT,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "axes.formatter.use_mathtext": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "legend.frameon": False,
    "legend.borderaxespad": 0.2,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 150,
    "svg.hashsalt": "ldit",  # the same bytes for the same data
}


def check_plotting(file: Path, name: str = "--out") -> None:
    """RequestError when `file`, the value of flag `name`, cannot be drawn. Called before any long work."""
    if file.suffix.lower() not in SUFFIXES:
        raise RequestError(f"{name}: expected a name that ends in .png or .svg, got {file}")
    if find_spec("matplotlib") is None:
        raise RequestError(f'{name}: {file.name} is drawn by matplotlib, not found: pip install "large-dit[plot]"')


@contextmanager
def style() -> Iterator[None]:
    """A context, or decorator, in which figures have the common style. matplotlib's settings are restored."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of width x height inches, laid out so that no text is cut off."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    return figure


@style()
def figure_bytes(figure: Figure, kind: str, about: dict[str, str] | None = None) -> bytes:
    """The file of a figure as `kind`, "png" or "svg"; `about` goes into its metadata."""
    metadata: dict[str, str | None] = {key: printable(value) for key, value in (about or {}).items()}
    if kind == "svg":  # its keys are fixed; no date, so that equal data give equal files
        metadata = {"Date": None, "Description": "; ".join(f"{key}: {value}" for key, value in metadata.items())}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box is drawn in its place
        data = BytesIO()
        figure.savefig(data, format=kind, metadata=metadata)
    return data.getvalue()


def printable(text: str) -> str:
    """The text with "?" for characters that cannot be printed: file names may contain any."""
    return "".join(c if c.isprintable() else "?" for c in text)


def shortened(text: str, longest: int) -> str:
    """Printable text of at most `longest` characters; a longer one loses its middle."""
    text = printable(text)
    if len(text) <= longest:
        return text
    tail = (longest - 1) // 2
    return f"{text[: longest - 1 - tail]}…{text[len(text) - tail :]}"
