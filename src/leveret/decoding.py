"""Decoding what anybody may have written. It has bounds: see `UnixTime`, `Name` and their like in `leveret.model`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def decoded(decode: Callable[[Any], T], encoded: object) -> T | None:
    """What it is; None for what makes no sense, is out of bounds, or is nested too deep."""
    try:
        return decode(encoded)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, TypeError):
        return None
