"""What users give for an option, read strictly: each error names the argument, its value and the remedy."""

from __future__ import annotations

import operator
import time
from datetime import date, datetime
from typing import TypeAlias

from leveret.errors import ConfigurationError
from leveret.model.durations import MAX_DELAY, NotADuration, parse_seconds, show, spell_seconds

#: One class of exceptions, or several.
Exceptions: TypeAlias = (
    type[BaseException]
    | tuple[type[BaseException], ...]
    | list[type[BaseException]]
    | set[type[BaseException]]
    | frozenset[type[BaseException]]
)


def seconds(
    argument: str, value: object, *, above_zero: bool = False, most: float | None = None, none: str = ""
) -> float:
    """A duration (seconds). Raises ConfigurationError. See `leveret.model.durations.parse_seconds`."""
    try:
        return parse_seconds(value, above_zero=above_zero, most=most, none=none)
    except NotADuration as problem:
        raise ConfigurationError(f"{argument} is {show(value)}; {problem}{_hint(value)}") from None


def seconds_or_none(
    argument: str, value: object, *, none: str, above_zero: bool = False, most: float | None = None
) -> float | None:
    """A duration (seconds), or None. Raises ConfigurationError."""
    return None if value is None else seconds(argument, value, above_zero=above_zero, most=most, none=none)


def timeout(value: object, *, none: str = "no limit") -> float | None:
    """How long somebody waits (seconds; None: without a limit). Raises ConfigurationError."""
    return seconds_or_none("timeout", value, none=none)


def count(argument: str, value: object, *, least: int = 1, most: int = 2**31 - 1, none: str = "") -> int:
    """A whole number. Raises ConfigurationError."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        alternative = f", or None for {none}" if none else ""
        raise ConfigurationError(
            f"{argument} is {show(value)}; it must be a whole number, at least {least} and at most {most}{alternative}"
        )
    return number


def flag(argument: str, value: object) -> bool:
    """True or False, and nothing that Python takes for one. Raises ConfigurationError."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{argument} is {show(value)}; it must be True or False")
    return value


def moment(argument: str, value: object, *, most: float | None = MAX_DELAY) -> float:
    """The Unix time of an aware datetime; 0 for one before 1970, which is long past too.

    ``most``: how far ahead it may be (seconds). Raises ConfigurationError.
    """
    if not isinstance(value, datetime):
        remedy = (
            "a date has no hour: use datetime.combine(day, time(9), tzinfo=UTC)"
            if isinstance(value, date)
            else "it must be a datetime with a time zone; for a duration there is delay=..."
        )
        raise ConfigurationError(f"{argument} is {show(value)}; {remedy}")
    if value.utcoffset() is None:
        raise ConfigurationError(
            f"{argument} is {value!r}, which has no time zone, so it names no moment: "
            "use datetime.now(UTC) + ... or .astimezone()"
        )
    unix = value.timestamp()
    if most is not None and unix - time.time() > most:
        raise ConfigurationError(
            f"{argument} is {value!r}, which is more than a year away; it may be {spell_seconds(most)} at most"
        )
    return max(0.0, unix)


def exceptions(argument: str, value: object) -> tuple[type[BaseException], ...]:
    """Classes of exceptions: one, or some in a tuple, a list or a set. Raises ConfigurationError."""
    if isinstance(value, (tuple, list, set, frozenset)):  # also in one another, as "except" takes them
        return tuple(dict.fromkeys(one for part in value for one in exceptions(argument, part)))
    if isinstance(value, type) and issubclass(value, BaseException):
        return (value,)
    raise ConfigurationError(
        f"{argument} has {show(value)}; it must be a class of exceptions, as ConnectionError, "
        "or some of them in a tuple, a list or a set"
    )


def _hint(value: object) -> str:
    if isinstance(value, date):
        return ". A datetime is a moment: pass how far away it is, as moment - datetime.now(UTC)"
    if isinstance(value, str):
        return ". Text is not read: 5 minutes are timedelta(minutes=5), or 300"
    return ""
