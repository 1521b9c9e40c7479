"""What counts as a duration: a number of seconds, or a timedelta. Pure; the caller names the argument."""

from __future__ import annotations

import math
import reprlib
from datetime import timedelta
from decimal import Decimal
from numbers import Real

#: A year, and a day for leap years: the longest that a task may wait (seconds).
MAX_DELAY = 366 * 86_400.0

_UNITS = (("day", 86_400), ("hour", 3_600), ("minute", 60))


class NotADuration(ValueError):
    """The value is no duration, or not one that is allowed; the text says what is."""


_show = reprlib.Repr()
_show.maxstring = _show.maxother = 80


def show(value: object) -> str:
    """A value in an error's text: short, and without what its own ``__repr__`` may raise."""
    try:
        return _show.repr(value)
    except Exception:  # noqa: BLE001 - it is the user's code
        return f"<{type(value).__name__}>"


def parse_seconds(value: object, *, above_zero: bool = False, most: float | None = None, none: str = "") -> float:
    """The seconds of a number or a timedelta. Raises NotADuration, which says what would be one.

    ``above_zero``: whether 0 is too little. ``none``: what None would mean, where it is allowed.
    """
    seconds = _number(value)
    fits = seconds is not None and (0 < seconds < math.inf if above_zero else 0 <= seconds < math.inf)
    if seconds is not None and fits and (most is None or seconds <= most):
        return seconds
    least = "more than 0" if above_zero else "0 or more"
    limit = "" if most is None else f", at most {spell_seconds(most)}"
    alternative = f", or None for {none}" if none else ""
    raise NotADuration(f"it must be {least} seconds (a number, or a timedelta){limit}{alternative}")


def spell_seconds(seconds: float) -> str:
    """A duration for people: "366 days", "90 seconds"."""
    for unit, length in _UNITS:
        if seconds >= length and seconds % length == 0:
            count = f"{seconds / length:.0f} {unit}"
            return count if seconds == length else f"{count}s"
    return "1 second" if seconds == 1 else f"{seconds:.15g} seconds"


def _number(value: object) -> float | None:
    if isinstance(value, timedelta):
        return value.total_seconds()
    # A bool is an integer to Python, and a slip of the pen here. numpy's timedelta64 is one too, of any unit.
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)) or type(value).__name__ == "timedelta64":
        return None
    try:
        return float(value)
    except (TypeError, ValueError, ArithmeticError):
        return None
