"""Cancelled tasks: those that wait are taken out of their queues; of those that run, their consumers get a mark."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from leveret.brokers.sqlite.sql import Statements
from leveret.model import (
    FROM_THE_FUTURE,
    MOST_SKEW,
    CancelRequest,
    Status,
    cancelled_before,
    cancelled_running,
    unix_time,
)

if TYPE_CHECKING:
    from collections.abc import Container

    from leveret.brokers.sqlite.dealing import Dealing
    from leveret.brokers.sqlite.statuses import Records

log = logging.getLogger("leveret.sqlite")

#: A mark's task is with the mark's consumer, and not another one that came later under the same id.
_COVERED = "state = 'running' AND task.consumer = mark.consumer AND (enqueued_at IS NULL OR enqueued_at <= mark.at)"
#: From the marks, which are few, to the tasks, whatever the planner thinks.
MARKED = (
    "SELECT task.token, task.queue, task.id FROM mark CROSS JOIN task ON task.id = mark.task"  # noqa: S608 - constants
    f" WHERE mark.consumer = ? AND {_COVERED}"
)


class Cancellations(Statements):
    def __init__(self, records: Records, dealing: Dealing) -> None:
        super().__init__(records.database)
        self._records = records
        self._dealing = dealing

    def cancel(self, id_: str) -> Status | None:
        """Take a task that waits out of its queue, or leave its worker a mark."""
        now = time.time()
        known = next(iter(self._records.statuses([id_])), None)
        taken = self.execute(
            "DELETE FROM task WHERE id = ? AND state IN ('ready', 'delayed', 'limited')"
            " RETURNING iif(state = 'ready', lane, NULL)",
            id_,
        ).fetchone()
        if taken is not None and taken[0] is not None:
            self._dealing.limits.ended(taken)
        if known is not None and taken is not None:
            self._records.note([cancelled_before(known, now)])
            return self._records.recorded(id_)
        row = self.execute("SELECT state, consumer FROM task WHERE id = ?", id_).fetchone()
        if row is not None:
            holders = [row[1]] if row[0] == "running" else []
        elif known is None or not known.is_final:
            # Acknowledged before it ran: nobody knows who has it, so each that could hears of it.
            holders = [consumer for (consumer,) in self.execute("SELECT DISTINCT consumer FROM taker")]
        else:
            holders = []
        for holder in holders:
            self.execute("INSERT OR REPLACE INTO mark (consumer, task, at) VALUES (?, ?, ?)", holder, id_, now)
            self._dealing.woken.add(holder)
        return known

    def marks(self, consumer: int) -> list[CancelRequest]:
        """For the consumer, which is told of them now. They stay while it has their tasks: see `marked`, `end_all`."""
        self._forget_future_marks(consumer)
        rows = self.execute(
            f"SELECT mark.task, at, EXISTS (SELECT 1 FROM task WHERE id = mark.task AND {_COVERED})"  # noqa: S608
            " FROM mark WHERE mark.consumer = ?",
            consumer,
        ).fetchall()
        sound = [row for row in rows if type(row[0]) is str and unix_time(row[1]) is not None]
        for id_ in [id_ for id_, _, is_held in rows if not is_held]:
            self.execute("DELETE FROM mark WHERE consumer = ? AND task = ?", consumer, id_)
        return [CancelRequest(id_, at) for id_, at, _ in sound]

    def marked(self, consumer: int, tokens: Container[int]) -> dict[int, tuple[int, str]]:
        """Those of the tokens whose tasks would run again, and were cancelled: their queues and ids."""
        self._forget_future_marks(consumer)
        rows = self.execute(MARKED, consumer).fetchall()
        return {token: (queue, id_) for token, queue, id_ in rows if token in tokens}

    def end(self, consumer: int, id_: str) -> None:
        """Take away a task that was cancelled while the consumer had it."""
        known = next(iter(self._records.statuses([id_])), None)
        taken = self.execute("DELETE FROM task WHERE id = ? AND consumer = ? RETURNING lane", id_, consumer).fetchone()
        if taken is not None and taken[0] is not None:
            self._dealing.limits.ended(taken)
        if known is not None and taken is not None:
            self._records.note([cancelled_running(known, time.time())])

    def end_all(self, consumer: int) -> None:
        """A consumer that ends: what it had and was cancelled never runs again."""
        self._forget_future_marks(consumer)
        for _, _, id_ in self.execute(MARKED, consumer).fetchall():
            self.end(consumer, id_)
        self.execute("DELETE FROM mark WHERE consumer = ?", consumer)

    def _forget_future_marks(self, consumer: int) -> None:
        """Anybody who may write the file may have put them there. See `CancelRequest.is_from_the_future`."""
        latest = time.time() + MOST_SKEW
        if self.execute("SELECT 1 FROM mark WHERE consumer = ? AND at > ? LIMIT 1", consumer, latest).fetchone():
            self.execute("DELETE FROM mark WHERE consumer = ? AND at > ?", consumer, latest)
            log.warning(FROM_THE_FUTURE)
