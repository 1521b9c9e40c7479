"""The SQL of what became of tasks: one row each, kept for a while, and who wants to know of which."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.feeds import EVERY
from leveret.brokers.sqlite.rows import text
from leveret.brokers.sqlite.sql import Statements, array
from leveret.model import State, Status, kept_body, newer, placed, status_of, unix_time

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Sequence

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
_pack = msgspec.json.Encoder().encode


class Changes(msgspec.Struct, frozen=True):
    """What changed, and the number of the last change."""

    statuses: list[Status]
    last: int


class Watches(Statements):
    """Who wants to know of which tasks. ``wake``: told of each consumer that has something to see."""

    def __init__(self, database: sqlite3.Connection, wake: Callable[[int], object]) -> None:
        super().__init__(database)
        self._wake = wake

    def add(self, consumer: int, ids: Sequence[str]) -> None:
        """Have the consumer woken when one of these changes."""
        self.database.executemany(
            "INSERT OR IGNORE INTO watch (task, consumer) VALUES (?, ?)", [(id_, consumer) for id_ in ids]
        )

    def remove(self, consumer: int, ids: Sequence[str]) -> None:
        self.database.executemany("DELETE FROM watch WHERE task = ? AND consumer = ?", [(id_, consumer) for id_ in ids])

    def changes(self, consumer: int, after: int, followed: int) -> Changes | None:
        """What changed of the so many tasks that the consumer watches since change ``after``; None: not registered."""
        (last,) = self.execute("SELECT tick FROM clock").fetchone()
        if self._watches(EVERY, consumer):
            rows = self.execute("SELECT status FROM record WHERE change > ? ORDER BY change", after).fetchall()
        elif followed < last - after:
            rows = self.execute(OF_FEW, consumer, after).fetchall()
        else:
            rows = self.execute(OF_MANY, consumer, after).fetchall()
        if not rows and not self.execute("SELECT 1 FROM consumer WHERE id = ?", consumer).fetchone():
            return None
        statuses = [status_of(status) for (status,) in rows]
        return Changes([status for status in statuses if status is not None], last)

    def is_watched(self) -> bool:
        """Whether anybody wants to know of every task."""
        return self.execute("SELECT 1 FROM watch WHERE task = ? LIMIT 1", EVERY).fetchone() is not None

    def _watches(self, id_: str, consumer: int) -> bool:
        row = self.execute("SELECT 1 FROM watch WHERE task = ? AND consumer = ?", id_, consumer).fetchone()
        return row is not None

    def ring_for(self, updates: Sequence[Status]) -> None:
        if self.execute("SELECT 1 FROM watch LIMIT 1").fetchone() is None:
            return
        for id_ in (EVERY, *(update.id for update in updates)):
            for (consumer,) in self.execute("SELECT consumer FROM watch WHERE task = ?", id_).fetchall():
                self._wake(consumer)

    def remove_all(self, consumer: int) -> None:
        self.execute("DELETE FROM watch WHERE consumer = ?", consumer)


class Records(Statements):
    """What became of each task."""

    def __init__(self, watches: Watches) -> None:
        super().__init__(watches.database)
        self.watches = watches

    def note(self, updates: Sequence[Status]) -> None:
        """Record updates."""
        if not updates:
            return
        latest = self._latest(updates)
        (last,) = self.execute("UPDATE clock SET tick = tick + ? RETURNING tick", len(latest)).fetchone()
        self.database.executemany(
            "INSERT INTO record (id, change, at, status) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET change = excluded.change, at = excluded.at, status = excluded.status",
            [
                (id_, change, status.at, _pack(status))
                for change, (id_, status) in enumerate(latest.items(), start=last - len(latest) + 1)
            ],
        )
        self.watches.ring_for(updates)

    def _latest(self, updates: Sequence[Status]) -> dict[str, Status]:
        """What is known of each task with its updates, in the order of the last one of each."""
        known = self._known([update.id for update in updates])
        latest: dict[str, Status] = {}
        for update in updates:
            latest[update.id] = newer(latest.pop(update.id, None) or known.get(update.id), update)
        return latest

    def _known(self, ids: Sequence[str]) -> dict[str, Status]:
        """What is recorded of each."""
        rows = self.execute(
            "SELECT record.id, record.status FROM json_each(?) CROSS JOIN record ON record.id = json_each.value",
            array(ids),
        )
        found = ((id_, status_of(status)) for id_, status in rows)
        return {id_: status for id_, status in found if status is not None}

    def amend(self, ids: Iterable[str], change: Callable[[Status], Status]) -> None:
        """Tell something new of those of the tasks that are recorded."""
        self.note([change(status) for status in self._known(list(ids)).values()])

    def statuses(self, ids: Iterable[str]) -> list[Status]:
        found = [placed(self.recorded(id_), self._row(id_)) for id_ in dict.fromkeys(ids)]
        return [status for status in found if status is not None]

    def recent(self, limit: int) -> list[Status]:
        """The tasks that changed last: of those that are recorded, and of those that were stored last."""
        recorded = self.execute("SELECT id FROM record ORDER BY change DESC LIMIT ?", limit).fetchall()
        stored = self.execute("SELECT id FROM task ORDER BY seq DESC LIMIT ?", limit).fetchall()
        found = self.statuses(id_ for (id_,) in (*recorded, *stored))
        return sorted(found, key=lambda status: status.at, reverse=True)[:limit]

    def purge(self, keep: float, recorded: int) -> None:
        """Forget what is older than ``keep`` seconds: some, now that so many were recorded."""
        now, count = time.time(), _PURGE * recorded
        old = self.execute("SELECT seq, id FROM record WHERE at < ? ORDER BY at LIMIT ?", now - keep, count).fetchall()
        for seq, id_ in old:
            if self.execute("SELECT 1 FROM task WHERE id = ?", id_).fetchone():
                self.execute("UPDATE record SET at = ? WHERE seq = ?", now, seq)
            else:
                self.execute("DELETE FROM record WHERE seq = ?", seq)

    def recorded(self, id_: str) -> Status | None:
        row = self.execute("SELECT status FROM record WHERE id = ?", id_).fetchone()
        return None if row is None else status_of(row[0])

    def _row(self, id_: str) -> Status | None:
        """Where the task is in the file."""
        row = self.execute(
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
