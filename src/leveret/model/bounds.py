"""Bounds of what anybody may have written: where it is decoded, and how deep it may be nested.

How deep it may be nested is said here. Where Python itself gives up depends on its version, on the thread and on who
calls; and what was decoded in one place may be too deep for another, to print it or to send it on.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_DECIMAL_TEXT = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{1,30})?")
#: The last Unix time that is a date: the end of the year 9999.
LATEST = 253_402_300_799.0
#: What comes from elsewhere is decoded as these: whoever reads it can show, count and ask for it.
UnixTime: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=LATEST)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
#: AMQP's short string has 255 bytes; see also `is_name`.
Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=255)]
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=100_000)]
#: JSON may be nested so deep. Leveret's own has less: see `leveret.client.values`, and what is around the values.
MAX_DEPTH = 200
#: A message's headers may be nested so deep, themselves included: decoders, encoders and copies all go down by calling
#: themselves.
MAX_HEADERS_DEPTH = 32
#: What opens as 1, and what closes as -1.
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_MARKS = bytes(set(range(256)) - set(b'[{]}"'))


def decoded(decode: Callable[[Any], T], encoded: object) -> T | None:
    """What it is; None for what makes no sense, is out of bounds, or is nested too deep."""
    try:
        if isinstance(encoded, str):
            encoded = encoded.encode()
        return decode(shallow(encoded) if isinstance(encoded, bytes) else encoded)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, TypeError):
        return None


def shallow(encoded: bytes) -> bytes:
    """The JSON as it is. Raises RecursionError when it is nested more than `MAX_DEPTH` deep."""
    if encoded.count(b"[") + encoded.count(b"{") > MAX_DEPTH and _depth(encoded) > MAX_DEPTH:
        raise RecursionError(f"it is nested more than {MAX_DEPTH} deep")
    return encoded


def is_flat(value: object, depth: int) -> bool:
    """Whether a value is nested no deeper than that."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(is_flat(item, depth - 1) for item in inner if isinstance(item, (dict, list)))


def _depth(encoded: bytes) -> int:
    """How deep JSON is nested, in one pass that calls nothing: it may be long, and made to take long."""
    # Brackets in strings do not count. Without what is escaped, each quotation mark begins or ends a string.
    if b"\\" in encoded:
        encoded = encoded.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = encoded.translate(None, _NO_MARKS).replace(b'""', b"")
    outside = b"".join(marks.split(b'"')[::2])
    return max(accumulate(memoryview(outside.translate(_STEPS)).cast("b")), default=0)


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
