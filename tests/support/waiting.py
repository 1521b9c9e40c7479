"""Waiting for a described condition, instead of sleeping and hoping."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

#: Generous: a test that waits this long has failed (seconds).
PATIENCE = 60.0
_PAUSE = 0.02


def wait_until(condition: Callable[[], T], what: str, within: float = PATIENCE) -> T:
    """The first true value of the condition; fails with ``what`` was waited for."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {within:g} s until {what}"
        time.sleep(_PAUSE)
    return value


async def until(condition: Callable[[], Awaitable[T]], what: str, within: float = PATIENCE) -> T:
    """The same for a test that runs on a loop."""
    deadline = time.monotonic() + within
    while not (value := await condition()):
        assert time.monotonic() < deadline, f"waited {within:g} s until {what}"
        await asyncio.sleep(_PAUSE)
    return value
