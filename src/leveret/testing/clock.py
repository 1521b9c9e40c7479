"""A clock that only a test moves."""

from __future__ import annotations

import heapq
import itertools
import time
from typing import TYPE_CHECKING

from leveret.model import arguments

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime, timedelta


class ManualClock:
    """The time of a test's broker. It stands still until the test moves it.

    Delays, expiry and the waits between attempts go by this clock; ``timeout`` and what the task's own code does
    with the time do not.
    """

    def __init__(self) -> None:
        self._now = time.time()
        self._order = itertools.count()
        self._calls: list[tuple[float, int, _Call]] = []

    def time(self) -> float:
        """Unix time, seconds."""
        return self._now

    def advance(self, seconds: float | timedelta) -> None:
        """Move forward. The next ``drain()`` runs what falls due.

        Args:
            seconds: How far (seconds, or a timedelta).

        Raises:
            ConfigurationError: ``seconds`` is no duration.
        """
        self._move_to(self._now + arguments.seconds("what the clock is to advance", seconds))

    def advance_to(self, moment: datetime) -> None:
        """Move forward to a moment, as to the night in which clocks are set: ``datetime(2026, 10, 25, tzinfo=UTC)``.

        Args:
            moment: An aware datetime; one that has passed changes nothing.

        Raises:
            ConfigurationError: ``moment`` is no datetime with a time zone.
        """
        self._move_to(max(self._now, arguments.moment("what the clock is to advance to", moment, most=None)))

    def skip(self) -> float:
        """Move to the moment when the next delayed task falls due.

        Returns:
            How far the clock moved (seconds); 0.0 if nothing is delayed.
        """
        self._forget_cancelled()
        if not self._calls:
            return 0.0
        before = self._now
        self._move_to(self._calls[0][0])
        return self._now - before

    def call_at(self, when: float, callback: Callable[[], None]) -> _Call:
        """Call a function when the clock comes to that time, unless it is cancelled before.

        Args:
            when: The time (Unix time, seconds).
            callback: The function.

        Returns:
            The call, which has ``cancel``.
        """
        call = _Call(callback)
        heapq.heappush(self._calls, (when, next(self._order), call))
        return call

    def _move_to(self, target: float) -> None:
        while self._calls and self._calls[0][0] <= target:
            when, _, call = heapq.heappop(self._calls)
            if not call.cancelled:
                self._now = when
                call.callback()
        self._now = target

    def _forget_cancelled(self) -> None:
        while self._calls and self._calls[0][2].cancelled:
            heapq.heappop(self._calls)


class _Call:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
