"""Waiting for a described condition, instead of sleeping and hoping."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import TYPE_CHECKING, Any, TypeVar, overload

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


@overload
async def until(condition: Callable[[], Awaitable[T]], what: str, within: float = ...) -> T: ...
@overload
async def until(condition: Callable[[], bool], what: str, within: float = ...) -> bool: ...
async def until(condition: Callable[[], Any], what: str, within: float = PATIENCE) -> Any:
    """The same for a test that runs on a loop; the condition may have to be awaited."""
    deadline = time.monotonic() + within
    while not (value := await found if inspect.isawaitable(found := condition()) else found):
        assert time.monotonic() < deadline, f"waited {within:g} s until {what}"
        await asyncio.sleep(_PAUSE)
    return value
