"""How many cases of a row of the reliability table run: few with every `make test`, many with LDIT_SOAK=1.

Case i draws everything from seed i, so that the few are the first of the many."""

import os


def count(ci: int, soak: int) -> int:
    """`ci` cases, or `soak` of them where LDIT_SOAK is set to 1."""
    return soak if os.environ.get("LDIT_SOAK") == "1" else ci
