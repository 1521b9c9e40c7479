"""The SQL of what became of tasks: one row each, kept for a while, and who wants to know of which."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.brokers.following import EVERY
from leveret.status import Mark, State, Status, cancelled_before, cancelled_running, newer, placed

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Sequence

#: So many old rows are deleted, at most, with each update: never many at once.
_PURGE = 4
_pack = msgspec.json.Encoder().encode
_unpack = msgspec.json.Decoder(Status).decode


class News(msgspec.Struct, frozen=True):
    """What changed, and the number of the last change."""

    statuses: list[Status]
    last: int


class Records:
    """Used by `Store`, in its transactions. ``ring``: told of each consumer that has something to see."""

    def __init__(self, database: sqlite3.Connection, ring: Callable[[int], object]) -> None:
        self._database = database
        self._ring = ring

    def note(self, updates: Sequence[Status], keep: float) -> None:
        """Record updates, and forget some that are older than ``keep`` seconds."""
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
        self._purge(time.time(), keep, _PURGE * len(updates))

    def amend(self, ids: Iterable[str], change: Callable[[Status], Status], keep: float) -> None:
        """Tell something new of those of the tasks that are recorded."""
        known = [self._recorded(id_) for id_ in ids]
        self.note([change(status) for status in known if status is not None], keep)

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

    def changes(self, consumer: int, after: int) -> News | None:
        """What changed of what the consumer watches since change ``after``; None when it is not registered."""
        if self._watches(EVERY, consumer):
            rows = self._execute("SELECT change, status FROM record WHERE change > ? ORDER BY change", after).fetchall()
        else:
            rows = self._execute(
                "SELECT change, status FROM watch JOIN record ON record.id = watch.task"
                " WHERE watch.consumer = ? AND change > ? ORDER BY change",
                consumer,
                after,
            ).fetchall()
        if not rows and not self._execute("SELECT 1 FROM consumer WHERE id = ?", consumer).fetchone():
            return None
        return News([_unpack(status) for _, status in rows], rows[-1][0] if rows else after)

    def cancel(self, id_: str, keep: float) -> Status | None:
        """Take a task that waits out of its queue, or leave its worker a mark."""
        now = time.time()
        known = next(iter(self.statuses([id_])), None)
        taken = self._execute("DELETE FROM task WHERE id = ? AND state IN ('ready', 'delayed') RETURNING 1", id_)
        if known is not None and taken.fetchone():
            self.note([cancelled_before(known, now)], keep)
            return self._recorded(id_)
        holder = self._execute("SELECT consumer FROM task WHERE id = ? AND state = 'running'", id_).fetchone()
        if holder is not None:
            self._execute("INSERT OR IGNORE INTO mark (consumer, task, at) VALUES (?, ?, ?)", holder[0], id_, now)
            self._ring(holder[0])
        return known

    def marks(self, consumer: int) -> list[Mark]:
        """Of tasks that the consumer has. They stay until they are settled: see `orphaned`."""
        rows = self._execute("SELECT task, at FROM mark WHERE consumer = ?", consumer).fetchall()
        return [Mark(id_, at) for id_, at in rows]

    def settled(self, consumer: int) -> None:
        """Forget the marks of tasks that the consumer has no more."""
        self._execute(
            "DELETE FROM mark WHERE consumer = ? AND task NOT IN"
            " (SELECT id FROM task WHERE state = 'running' AND consumer = mark.consumer)",
            consumer,
        )

    def end_marked(self, consumer: int, tokens: Sequence[int], keep: float) -> list[tuple[int, int]]:
        """Those of the tokens whose tasks would run again, and were cancelled: they end; their queues, and they."""
        rows = self._execute(
            "SELECT mark.task, task.queue, task.token FROM mark JOIN task ON task.id = mark.task"
            " WHERE mark.consumer = ? AND task.consumer = mark.consumer AND task.state = 'running'",
            consumer,
        ).fetchall()
        ended = []
        for id_, queue, token in rows:
            if token in tokens:
                self._end_cancelled(consumer, id_, keep)
                ended.append((queue, token))
        return ended

    def orphaned(self, consumer: int, keep: float) -> None:
        """A consumer that ends: what it had and was cancelled never runs again."""
        for mark in self.marks(consumer):
            self._end_cancelled(consumer, mark.id, keep)
        self._execute("DELETE FROM mark WHERE consumer = ?", consumer)
        self._execute("DELETE FROM watch WHERE consumer = ?", consumer)

    def _end_cancelled(self, consumer: int, id_: str, keep: float) -> None:
        known = next(iter(self.statuses([id_])), None)
        taken = self._execute("DELETE FROM task WHERE id = ? AND consumer = ? RETURNING 1", id_, consumer)
        if known is not None and taken.fetchone():
            self.note([cancelled_running(known, time.time())], keep)

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

    def _purge(self, now: float, keep: float, count: int) -> None:
        old = self._execute("SELECT seq, id FROM record WHERE at < ? ORDER BY at LIMIT ?", now - keep, count).fetchall()
        for seq, id_ in old:
            if self._execute("SELECT 1 FROM task WHERE id = ?", id_).fetchone():
                self._execute("UPDATE record SET at = ? WHERE seq = ?", now, seq)
            else:
                self._execute("DELETE FROM record WHERE seq = ?", seq)

    def _recorded(self, id_: str) -> Status | None:
        row = self._execute("SELECT status FROM record WHERE id = ?", id_).fetchone()
        return None if row is None else _unpack(row[0])

    def _row(self, id_: str) -> Status | None:
        """Where the task is in the file."""
        row = self._execute(
            "SELECT state, queue.name, task.name, attempt, enqueued_at, due, last_error, reason, traceback, died_at,"
            " worker FROM task JOIN queue ON queue.id = task.queue WHERE task.id = ?",
            id_,
        ).fetchone()
        if row is None:
            return None
        state, queue, name, attempt, enqueued_at, due, error, reason, traceback, died_at, worker = row
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
                traceback=traceback or "",
                worker=worker,
            )
        at = enqueued_at or 0.0
        waiting: State = "retrying" if attempt > 1 else "delayed" if state == "delayed" else "queued"
        return Status(
            id_,
            "running" if state == "running" else waiting,
            at,
            queue,
            name,
            attempt,
            enqueued_at,
            due=due if state == "delayed" else None,
            error=error,
        )

    def _execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        return self._database.execute(sql, values)
