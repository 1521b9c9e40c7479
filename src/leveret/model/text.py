"""Values as text for people."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

#: A reason or a traceback longer than this is cut in the middle, so that a dead letter stays readable (characters).
MAX_TRACEBACK = 16_384


def storable(text: str) -> str:
    """The text with its lone surrogates (a file name that is no UTF-8) escaped, so that it can be stored and sent."""
    # The method itself: a subclass's of the same name may do anything.
    return str.encode(text, errors="backslashreplace").decode()


def shorten(text: str, limit: int = MAX_TRACEBACK) -> str:
    """Cut the middle out of a long text; both ends of a traceback matter."""
    text = storable(text)
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


#: So much of a value is shown (characters).
_BRIEF = 100


def brief(name: str, **parts: Any) -> str:
    """What a value shows of itself to people: a line, without what is None, and with long values cut."""
    shown = [f"{key}={_cut(repr(value))}" for key, value in parts.items() if value is not None]
    return f"{name}({', '.join(shown)})"


def _cut(text: str) -> str:
    return text if len(text) <= _BRIEF else f"{text[: _BRIEF - 4]}...{text[-1]}"


def moment(seconds: float | None) -> str | None:
    """Unix time for people, as it is here; in UTC where this zone has no such date."""
    if seconds is None:
        return None
    shown = datetime.fromtimestamp(seconds, UTC)
    with suppress(OverflowError, ValueError):
        shown = shown.astimezone()
    return shown.isoformat(" ", "seconds")
