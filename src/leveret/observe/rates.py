"""Rates for ``leveret top`` and the dashboard: what was counted, by the time between."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from leveret.model import QueueStats, WorkerReport

#: The rates of queues are those of this long (seconds).
WINDOW = 5.0
#: So many names are remembered, those too that were not counted again.
_MOST_NAMES = 10_000


class Rates:
    """Changes a second of what is counted by name, over a window (seconds); at least since the look before."""

    def __init__(self, window: float = 0.0) -> None:
        self._window = window
        self._looks: deque[tuple[float, Mapping[str, int]]] = deque()

    def look(self, now: float, counts: Mapping[str, int], starts: Mapping[str, int]) -> dict[str, float] | None:
        """None: not known yet. ``starts``: where a name begins that was not there before; others are left out."""
        # What does not answer in time is not new when it does again.
        known = {**(self._looks[-1][1] if self._looks else {}), **counts}
        self._looks.append((now, dict(list(known.items())[-_MOST_NAMES:])))
        # Looks of the future are from before the clock was set back.
        while len(self._looks) > 2 and (self._looks[1][0] <= now - self._window or self._looks[0][0] > now):
            self._looks.popleft()
        then, before = self._looks[0]
        if now <= then:
            return None
        known_before = {**starts, **before}
        return {
            name: (count - known_before[name]) / (now - then) for name, count in counts.items() if name in known_before
        }


class Rate(msgspec.Struct, frozen=True):
    """Tasks a second."""

    incoming: float = 0.0
    outgoing: float = 0.0


class QueueRates:
    """What goes in and out of queues, from how many tasks ended and how many there are.

    Tasks of which no results are kept end unheard, and are missing in both.
    """

    def __init__(self) -> None:
        self._ended: Counter[str] = Counter()
        self._outgoing = Rates(WINDOW)
        self._growth = Rates(WINDOW)

    def ended(self, queue: str) -> None:
        self._ended[queue] += 1

    def look(self, now: float, queues: Sequence[QueueStats]) -> dict[str, Rate]:
        held = {one.name: one.ready + one.running + one.delayed for one in queues}
        outgoing = self._outgoing.look(now, {name: self._ended[name] for name in held}, dict.fromkeys(held, 0))
        growth = self._growth.look(now, held, held)
        if outgoing is None or growth is None:
            return {}
        return {name: Rate(max(0.0, out + growth[name]), out) for name, out in outgoing.items()}


class WorkerRates:
    """Runs that end, and those of them that fail, from the workers' own counters."""

    def __init__(self) -> None:
        self._finished = Rates()
        self._failed = Rates()
        self._last = 0.0

    def look(self, now: float, workers: Sequence[WorkerReport]) -> tuple[float | None, float | None]:
        """Of all workers, a second; None: not known yet."""
        new = {one.name: 0 for one in workers if one.started_at >= self._last}
        self._last = now
        return (
            _sum(self._finished.look(now, {one.name: one.finished for one in workers}, new)),
            _sum(self._failed.look(now, {one.name: one.failed for one in workers}, new)),
        )


def _sum(rates: Mapping[str, float] | None) -> float | None:
    return None if rates is None else sum(max(0.0, rate) for rate in rates.values())
