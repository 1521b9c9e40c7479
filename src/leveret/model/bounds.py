"""Decoding what anybody may have written. It has bounds: see `UnixTime`, `Name` and their like in `leveret.model`."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_DECIMAL_TEXT = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{1,30})?")


def decoded(decode: Callable[[Any], T], encoded: object) -> T | None:
    """What it is; None for what makes no sense, is out of bounds, or is nested too deep."""
    try:
        return decode(encoded)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, TypeError):
        return None


#: The last Unix time that is a date: the end of the year 9999.
LATEST = 253_402_300_799.0
#: What comes from elsewhere is decoded as these: whoever reads it can show, count and ask for it.
UnixTime: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=LATEST)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
#: AMQP's short string has 255 bytes; see also `is_name`.
Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=255)]
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=100_000)]


def unix_time(value: object) -> float | None:
    """A Unix time from elsewhere (seconds); None for what is none: no number, negative, or after `LATEST`."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= LATEST:
        return float(value)
    return None


def number(value: object) -> int | float | Decimal | None:
    """What is a number, or decimal text; None: it is neither."""
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return value if math.isfinite(value) else None
    if isinstance(value, str) and _DECIMAL_TEXT.fullmatch(value.strip()):
        return Decimal(value.strip())
    return None
