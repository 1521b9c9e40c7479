"""What somebody may have meant by a name that is not known."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'resize'?`` for the end of an error, or nothing when no known name is close."""
    from difflib import get_close_matches

    every = list(known)
    lower = {one.lower(): one for one in every}
    close = get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f"; did you mean {lower[close[0]]!r}?" if close and lower[close[0]] != name else ""
