"""The SQL of what became of tasks: one row each, kept for a while, and who wants to know of which."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.brokers.feeds import EVERY
from leveret.brokers.sqlite.rows import text
from leveret.model import (
    FROM_THE_FUTURE,
    MOST_SKEW,
    CancelRequest,
    State,
    Status,
    cancelled_before,
    cancelled_running,
    kept_body,
    newer,
    placed,
    purged,
    status_of,
    unix_time,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Container, Iterable, Sequence

log = logging.getLogger("leveret.sqlite")

#: So many old rows are deleted, at most, with each update: never many at once.
_PURGE = 4
#: The same, from what is less to what is more: the planner knows neither how much changed nor how much is followed.
OF_FEW = (
    "SELECT status FROM watch CROSS JOIN record ON record.id = watch.task"
    " WHERE watch.consumer = ? AND change > ? ORDER BY change"
)
OF_MANY = (
    "SELECT status FROM record CROSS JOIN watch ON watch.task = record.id AND watch.consumer = ?"
    " WHERE change > ? ORDER BY change"
)
#: A mark's task is with the mark's consumer, and not another one that came later under the same id.
_COVERED = "state = 'running' AND task.consumer = mark.consumer AND (enqueued_at IS NULL OR enqueued_at <= mark.at)"
#: From the marks, which are few, to the tasks, whatever the planner thinks.
MARKED = (
    "SELECT task.token, task.queue, task.id FROM mark CROSS JOIN task ON task.id = mark.task"  # noqa: S608 - constants
    f" WHERE mark.consumer = ? AND {_COVERED}"
)
_pack = msgspec.json.Encoder().encode


class Changes(msgspec.Struct, frozen=True):
    """What changed, and the number of the last change."""

    statuses: list[Status]
    last: int


class Records:
    """Used by `Store`, in its transactions. ``ring``: told of each consumer that has something to see."""

    def __init__(self, database: sqlite3.Connection, ring: Callable[[int], object]) -> None:
        self._database = database
        self._ring = ring

    def note(self, updates: Sequence[Status]) -> None:
        """Record updates."""
        if not updates:
            return
        for update in updates:
            status = newer(self._recorded(update.id), update)
            (change,) = self._execute("UPDATE clock SET tick = tick + 1 RETURNING tick").fetchone()
            self._execute(
                "INSERT INTO record (id, change, at, status) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET change = excluded.change, at = excluded.at, status = excluded.status",
                update.id,
                change,
                status.at,
                _pack(status),
            )
        self._ring_for(updates)

    def amend(self, ids: Iterable[str], change: Callable[[Status], Status]) -> None:
        """Tell something new of those of the tasks that are recorded."""
        known = [self._recorded(id_) for id_ in ids]
        self.note([change(status) for status in known if status is not None])

    def statuses(self, ids: Iterable[str]) -> list[Status]:
        found = [placed(self._recorded(id_), self._row(id_)) for id_ in dict.fromkeys(ids)]
        return [status for status in found if status is not None]

    def watch(self, consumer: int, ids: Sequence[str]) -> list[Status]:
        """Have the consumer's bell rung when one of these changes; what is known of them now."""
        self._database.executemany(
            "INSERT OR IGNORE INTO watch (task, consumer) VALUES (?, ?)", [(id_, consumer) for id_ in ids]
        )
        return self.statuses(ids)

    def unwatch(self, consumer: int, ids: Sequence[str]) -> None:
        self._database.executemany(
            "DELETE FROM watch WHERE task = ? AND consumer = ?", [(id_, consumer) for id_ in ids]
        )

    def changes(self, consumer: int, after: int, followed: int) -> Changes | None:
        """What changed of the so many tasks that the consumer watches since change ``after``; None: not registered."""
        (last,) = self._execute("SELECT tick FROM clock").fetchone()
        if self._watches(EVERY, consumer):
            rows = self._execute("SELECT status FROM record WHERE change > ? ORDER BY change", after).fetchall()
        elif followed < last - after:
            rows = self._execute(OF_FEW, consumer, after).fetchall()
        else:
            rows = self._execute(OF_MANY, consumer, after).fetchall()
        if not rows and not self._execute("SELECT 1 FROM consumer WHERE id = ?", consumer).fetchone():
            return None
        statuses = [status_of(status) for (status,) in rows]
        return Changes([status for status in statuses if status is not None], last)

    def cancel(self, id_: str) -> Status | None:
        """Take a task that waits out of its queue, or leave its worker a mark."""
        now = time.time()
        known = next(iter(self.statuses([id_])), None)
        taken = self._execute("DELETE FROM task WHERE id = ? AND state IN ('ready', 'delayed') RETURNING 1", id_)
        if known is not None and taken.fetchone():
            self.note([cancelled_before(known, now)])
            return self._recorded(id_)
        row = self._execute("SELECT state, consumer FROM task WHERE id = ?", id_).fetchone()
        if row is not None:
            holders = [row[1]] if row[0] == "running" else []
        elif known is None or not known.is_final:
            # Acknowledged before it ran: nobody knows who has it, so each that could hears of it.
            holders = [consumer for (consumer,) in self._execute("SELECT DISTINCT consumer FROM taker")]
        else:
            holders = []
        for holder in holders:
            self._execute("INSERT OR REPLACE INTO mark (consumer, task, at) VALUES (?, ?, ?)", holder, id_, now)
            self._ring(holder)
        return known

    def purged(self, queue: int) -> None:
        """Tell of all tasks that wait in a queue, and are deleted, as far as anybody knows or follows them."""
        which = "" if self.is_watched() else " AND (id IN (SELECT id FROM record) OR id IN (SELECT task FROM watch))"
        ids = self._execute(
            f"SELECT id FROM task WHERE queue = ? AND state IN ('ready', 'delayed'){which}",  # noqa: S608 - constants
            queue,
        ).fetchall()
        now = time.time()
        self.note([purged(status, now) for status in self.statuses(id_ for (id_,) in ids)])

    def marks(self, consumer: int) -> list[CancelRequest]:
        """For the consumer, which is told of them now. They stay while it has their tasks: see `marked`, `orphaned`."""
        self._forget_future_marks(consumer)
        rows = self._execute(
            f"SELECT mark.task, at, EXISTS (SELECT 1 FROM task WHERE id = mark.task AND {_COVERED})"  # noqa: S608
            " FROM mark WHERE mark.consumer = ?",
            consumer,
        ).fetchall()
        sound = [row for row in rows if type(row[0]) is str and unix_time(row[1]) is not None]
        for id_ in [id_ for id_, _, is_held in rows if not is_held]:
            self._execute("DELETE FROM mark WHERE consumer = ? AND task = ?", consumer, id_)
        return [CancelRequest(id_, at) for id_, at, _ in sound]

    def marked(self, consumer: int, tokens: Container[int]) -> dict[int, tuple[int, str]]:
        """Those of the tokens whose tasks would run again, and were cancelled: their queues and ids."""
        self._forget_future_marks(consumer)
        rows = self._execute(MARKED, consumer).fetchall()
        return {token: (queue, id_) for token, queue, id_ in rows if token in tokens}

    def orphaned(self, consumer: int) -> None:
        """A consumer that ends: what it had and was cancelled never runs again."""
        self._forget_future_marks(consumer)
        for _, _, id_ in self._execute(MARKED, consumer).fetchall():
            self.end_cancelled(consumer, id_)
        self._execute("DELETE FROM mark WHERE consumer = ?", consumer)
        self._execute("DELETE FROM watch WHERE consumer = ?", consumer)

    def _forget_future_marks(self, consumer: int) -> None:
        """Anybody who may write the file may have put them there. See `CancelRequest.is_from_the_future`."""
        latest = time.time() + MOST_SKEW
        if self._execute("SELECT 1 FROM mark WHERE consumer = ? AND at > ? LIMIT 1", consumer, latest).fetchone():
            self._execute("DELETE FROM mark WHERE consumer = ? AND at > ?", consumer, latest)
            log.warning(FROM_THE_FUTURE)

    def end_cancelled(self, consumer: int, id_: str) -> None:
        """Take away a task that was cancelled while the consumer had it."""
        known = next(iter(self.statuses([id_])), None)
        taken = self._execute("DELETE FROM task WHERE id = ? AND consumer = ? RETURNING 1", id_, consumer)
        if known is not None and taken.fetchone():
            self.note([cancelled_running(known, time.time())])

    def recent(self, limit: int) -> list[Status]:
        """The tasks that changed last: of those that are recorded, and of those that were stored last."""
        recorded = self._execute("SELECT id FROM record ORDER BY change DESC LIMIT ?", limit).fetchall()
        stored = self._execute("SELECT id FROM task ORDER BY seq DESC LIMIT ?", limit).fetchall()
        found = self.statuses(id_ for (id_,) in (*recorded, *stored))
        return sorted(found, key=lambda status: status.at, reverse=True)[:limit]

    def is_watched(self) -> bool:
        """Whether anybody wants to know of every task."""
        return self._execute("SELECT 1 FROM watch WHERE task = ? LIMIT 1", EVERY).fetchone() is not None

    def _watches(self, id_: str, consumer: int) -> bool:
        row = self._execute("SELECT 1 FROM watch WHERE task = ? AND consumer = ?", id_, consumer).fetchone()
        return row is not None

    def _ring_for(self, updates: Sequence[Status]) -> None:
        if self._execute("SELECT 1 FROM watch LIMIT 1").fetchone() is None:
            return
        for id_ in (EVERY, *(update.id for update in updates)):
            for (consumer,) in self._execute("SELECT consumer FROM watch WHERE task = ?", id_).fetchall():
                self._ring(consumer)

    def purge(self, keep: float, recorded: int) -> None:
        """Forget what is older than ``keep`` seconds: some, now that so many were recorded."""
        now, count = time.time(), _PURGE * recorded
        old = self._execute("SELECT seq, id FROM record WHERE at < ? ORDER BY at LIMIT ?", now - keep, count).fetchall()
        for seq, id_ in old:
            if self._execute("SELECT 1 FROM task WHERE id = ?", id_).fetchone():
                self._execute("UPDATE record SET at = ? WHERE seq = ?", now, seq)
            else:
                self._execute("DELETE FROM record WHERE seq = ?", seq)

    def _recorded(self, id_: str) -> Status | None:
        row = self._execute("SELECT status FROM record WHERE id = ?", id_).fetchone()
        return None if row is None else status_of(row[0])

    def _row(self, id_: str) -> Status | None:
        """Where the task is in the file."""
        row = self._execute(
            "SELECT state, queue.name, task.name, attempt, enqueued_at, due, last_error, reason, traceback, died_at,"
            " worker, body FROM task JOIN queue ON queue.id = task.queue WHERE task.id = ?",
            id_,
        ).fetchone()
        if row is None:
            return None
        state, queue, name, attempt, enqueued_at, due, error, reason, traceback, died_at, worker, body = row
        queue, attempt, body = text(queue), attempt if type(attempt) is int else 1, body if type(body) is bytes else b""
        name, error, reason, worker = (None if one is None else text(one) for one in (name, error, reason, worker))
        enqueued_at, due, died_at = unix_time(enqueued_at), unix_time(due), unix_time(died_at)
        if state == "dead":
            return Status(
                id_,
                "dead",
                died_at or 0.0,
                queue,
                name,
                attempt,
                enqueued_at,
                error=reason,
                traceback="" if traceback is None else text(traceback),
                worker=worker,
                body=kept_body(body),
            )
        at = enqueued_at or 0.0
        is_delayed = state == "delayed" and due is not None and due > time.time()
        waiting: State = "retrying" if attempt > 1 else "delayed" if is_delayed else "queued"
        return Status(
            id_,
            "running" if state == "running" else waiting,
            at,
            queue,
            name,
            attempt,
            enqueued_at,
            due=due if is_delayed else None,
            error=error,
            body=kept_body(body),
        )

    def _execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        return self._database.execute(sql, values)
