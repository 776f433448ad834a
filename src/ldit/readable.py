"""Numbers for people: counts, sizes, times and tables in few characters."""

from collections.abc import Sequence


def count(number: float) -> str:
    """33,012,345 as "33.0M"; below a thousand as it is."""
    for unit, word in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{word}" if number >= 100 * unit else f"{number / unit:.1f}{word}"
    return f"{number:g}"


def size(number: float) -> str:
    """Bytes as "1.24 GB" (a GB has 1e9)."""
    for unit, word in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.3g} {word}"
    return f"{number:g} bytes"


def clock(seconds: float) -> str:
    """Seconds as H:MM:SS."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length, the first of which has the heads, in columns; columns without any text are left out."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    kept = [i for i, width in enumerate(widths) if width]
    return "\n".join("  ".join(row[i].ljust(widths[i]) for i in kept).rstrip() for row in rows)
