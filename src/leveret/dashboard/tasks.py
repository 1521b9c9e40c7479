"""The tasks that the dashboard knows: those that changed last, and whole ones that somebody looked at."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import msgspec

from leveret.model import NO_RESULT, Status, newer, shorten

if TYPE_CHECKING:
    from leveret.client import App

#: So many tasks are remembered, without their results; and so many whole ones that somebody looked at.
MOST_TASKS = 1_000
_MOST_WHOLE = 32
_MOST_FAILURES = 20
#: What the broker told of a task that has not ended is asked again after that (seconds): some tasks tell no news.
_STALE = 10.0
#: So much of a reason is remembered (characters).
LISTED_REASON = 1_000


class _Whole(msgspec.Struct, frozen=True):
    status: Status
    asked: float


class Tasks:
    """Its values are replaced, never changed, so a page may read them as it likes."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._tasks: OrderedDict[str, Status] = OrderedDict()
        #: Of those the ones that failed last, which many others would push out.
        self._failures: OrderedDict[str, Status] = OrderedDict()
        self._whole: OrderedDict[str, _Whole] = OrderedDict()

    def latest(self, queue: str | None = None) -> list[Status]:
        """The tasks that changed last, the newest first, without their results."""
        return [status for status in reversed(self._tasks.values()) if queue in (None, status.queue)]

    def failures(self) -> list[Status]:
        """The tasks that failed last, the newest first: dead, or waiting for another attempt."""
        return list(reversed(self._failures.values()))

    async def task(self, id_: str) -> Status | None:
        """One task whole. Raises BrokerError."""
        known = self._whole.get(id_)
        fresh = known is not None and (known.status.is_final or time.monotonic() - known.asked < _STALE)
        if not fresh:
            found = next(iter(await self._app.client.broker.statuses.read([id_])), None)
            if found is None:
                self._whole.pop(id_, None)
                return self._tasks.get(id_)
            known = _Whole(found, time.monotonic())
        assert known is not None
        self._remember(known)
        return known.status

    def keep(self, status: Status) -> None:
        """As the latest."""
        status = _light(status)
        _put(self._tasks, status, MOST_TASKS)
        if status.state in ("dead", "retrying"):
            _put(self._failures, status, _MOST_FAILURES)
        else:
            self._failures.pop(status.id, None)

    def _remember(self, whole: _Whole) -> None:
        self._whole[whole.status.id] = whole
        self._whole.move_to_end(whole.status.id)
        while len(self._whole) > _MOST_WHOLE:
            self._whole.popitem(last=False)

    def fold(self, update: Status) -> float | None:
        """Take in an update. If it tells the end of a task: how long that ran (seconds)."""
        known = self._tasks.get(update.id)
        status = newer(known, update)
        self.keep(status)
        whole = self._whole.get(update.id)
        if whole is not None:
            self._whole[update.id] = _Whole(newer(whole.status, update), whole.asked)
        ends = status.is_final and (known is None or not known.is_final)
        return status.at - status.started_at if ends and status.started_at is not None else None

    def forget_whole(self) -> None:
        """They are asked for again: some updates were missed."""
        self._whole.clear()

    def forget(self) -> None:
        for known in (self._tasks, self._failures, self._whole):
            known.clear()


def _put(statuses: OrderedDict[str, Status], status: Status, most: int) -> None:
    """As the latest; the oldest go."""
    statuses[status.id] = status
    statuses.move_to_end(status.id)
    while len(statuses) > most:
        statuses.popitem(last=False)


def _light(status: Status) -> Status:
    """Without what may be large."""
    error = None if status.error is None else shorten(status.error, LISTED_REASON)
    return msgspec.structs.replace(
        status, encoded_result=NO_RESULT, traceback="", body=None, history=[], error=error, problem=""
    )
