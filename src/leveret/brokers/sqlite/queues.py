"""The queues of the file: declared, counted, paused, cleared."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from leveret.brokers.base import WaitingState, in_use
from leveret.brokers.sqlite.rows import ENVELOPE, envelope_of, text
from leveret.brokers.sqlite.sql import Statements, array
from leveret.errors import QueueFull, QueueMismatch, QueueNotFound, StoreError
from leveret.model import MIDDLE_PRIORITY, Envelope, Queue, QueueStats, Removed, purged

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from leveret.brokers.sqlite.dealing import Dealing
    from leveret.brokers.sqlite.statuses import Records, Watches

#: So many ready tasks of a queue are counted for a worker that asks whether it is too small: it takes the file's time.
_COUNTED = 10_000
#: Up to this limit of a queue, counting costs next to nothing; longer ones are not counted at each enqueue.
_FEW = 1_000
#: So many priorities are looked at; most queues have one.
_PRIORITIES = 10
_RANK = f"coalesce(priority, {MIDDLE_PRIORITY})"
_WAITS = "('ready', 'delayed', 'limited')"
_COUNT = "SELECT count(*) FROM (SELECT 1 FROM task WHERE queue = ? AND state = 'ready' LIMIT ?)"
_FIRST = (
    f"SELECT {_RANK}, seq FROM task WHERE queue = ? AND state = 'ready' AND {_RANK} < ?"  # noqa: S608 - constants
    f" ORDER BY {_RANK} DESC, seq LIMIT 1"
)
_LAST = f"SELECT max(seq) FROM task WHERE queue = ? AND state = 'ready' AND {_RANK} = ?"  # noqa: S608 - constants

_WAITING = f"SELECT {ENVELOPE} FROM task JOIN queue ON queue.id = task.queue WHERE task.queue = ?"  # noqa: S608
_PEEK: dict[WaitingState, str] = {
    "ready": f"{_WAITING} AND state = 'ready' ORDER BY {_RANK} DESC, seq LIMIT ?",
    "delayed": f"{_WAITING} AND state = 'delayed' ORDER BY due, seq LIMIT ?",
}


class Queues(Statements):
    """``declared``: the queues that this process has declared, by name, also in a file that was here before: one that
    lacks any gets it when it is used.
    """

    def __init__(self, dealing: Dealing, records: Records, watches: Watches, declared: dict[str, Queue]) -> None:
        super().__init__(dealing.database)
        self._dealing = dealing
        self._records = records
        self._watches = watches
        self._declared = declared

    def declare(self, queues: Sequence[Queue]) -> None:
        missing = [queue for queue in {queue.name: queue for queue in queues}.values() if not self._adopts(queue)]
        self.database.executemany(
            "INSERT INTO queue (name, max_length) VALUES (?, ?)", [(queue.name, queue.max_length) for queue in missing]
        )
        self._declared.update({queue.name: queue for queue in queues})

    def _adopts(self, queue: Queue) -> bool:
        row = self.execute("SELECT max_length FROM queue WHERE name = ?", queue.name).fetchone()
        if row is None and not queue.create:
            raise QueueNotFound(f"queue {queue.name!r} does not exist, and create=False forbids to make it")
        if row is not None and queue.max_length not in (None, row[0]):
            raise QueueMismatch(
                queue.name,
                found={"max_length": row[0]},
                wanted={"max_length": queue.max_length},
                remedy="use another name, or the max_length that it has",
            )
        return row is not None

    def id_of(self, name: str) -> int:
        return self._find(name)[0]

    def made(self, name: str) -> int:
        """The number of a queue, which is made if it is missing."""
        try:
            return self.id_of(name)
        except QueueNotFound:
            self.database.execute("INSERT INTO queue (name) VALUES (?)", (name,))
            return self.id_of(name)

    def _find(self, name: str, wanted: Sequence[Envelope] = ()) -> tuple[int, int | None]:
        """Its number, and how many ready tasks it may hold. ``wanted``: what is to be stored."""
        # Asked each time: another program may have deleted it, or made it again under another number.
        found: tuple[int, int | None] | None = self.execute(
            "SELECT id, max_length FROM queue WHERE name = ?", name
        ).fetchone()
        if found is None:
            if name in self._declared:
                self.declare([self._declared[name]])  # in the file that was here before
                found = self.execute("SELECT id, max_length FROM queue WHERE name = ?", name).fetchone()
            if found is None:
                ids = [envelope.id for envelope in wanted]
                raise QueueNotFound(f"queue {name!r} does not exist; declare it first", ids)
        if not (found[1] is None or type(found[1]) is int):
            raise StoreError(
                f"queue {name!r} has the max_length {found[1]!r} in the file; it must be a number, or NULL"
            )
        return found

    def room_for(self, name: str, count: int, wanted: Sequence[Envelope]) -> int:
        """The queue's number. Raises QueueFull unless so many more may be ready in it. ``wanted``: in all queues."""
        queue, limit = self._find(name, wanted)
        if limit is not None:
            self._dealing.promote()
            self._dealing.deal_all()
            ready = _ready_about(self.database, queue, limit, count) + self._dealing.limits.count(queue, limit)
            if ready + count > limit:
                raise QueueFull(
                    f"queue {name!r} holds {ready} ready tasks of at most {limit}; nothing of this call was stored",
                    [envelope.id for envelope in wanted],
                )
        return queue

    def stats(self) -> list[QueueStats]:
        self._dealing.promote()
        self._dealing.deal_all()
        # Each of these in one pass: what they count has no index by its queue.
        running = self.execute(
            "SELECT queue, count(*) FROM consumer CROSS JOIN task ON task.consumer = consumer.id"
            " WHERE state = 'running' GROUP BY queue"
        )
        running_in = dict(running.fetchall())
        delayed = self.execute("SELECT queue, count(*) FROM task WHERE state = 'delayed' GROUP BY queue")
        delayed_in = dict(delayed.fetchall())
        limited_in = self._dealing.limits.counts()
        rows = self.execute(
            "SELECT id, name,"
            " (SELECT count(*) FROM task WHERE queue = queue.id AND state = 'ready'),"
            " (SELECT count(*) FROM task WHERE queue = queue.id AND state = 'dead'),"
            " (SELECT count(*) FROM taker WHERE queue = queue.id),"
            " paused"
            " FROM queue ORDER BY name"
        )
        return [
            QueueStats(
                text(name),
                *(ready, running_in.get(id_, 0), dead, consumers, delayed_in.get(id_, 0)),
                paused=bool(paused),
                limited=limited_in[id_],
            )
            for id_, name, ready, dead, consumers, paused in rows
        ]

    def ready(self, queues: Sequence[str]) -> int:
        # Nobody else does so while there is no consumer, and none is started for what is not ready.
        self._dealing.promote()
        self._dealing.deal_all()
        found = self.execute("SELECT id FROM queue WHERE name IN (SELECT value FROM json_each(?))", array(list(queues)))
        return sum(
            self.execute(_COUNT, queue, _COUNTED).fetchone()[0]
            + self._dealing.limits.count(queue, _COUNTED, may_go=True)
            for (queue,) in found.fetchall()
        )

    def peek(self, queue: str, state: WaitingState, limit: int) -> list[Envelope]:
        """What waits, in the order in which it is taken or due."""
        number = self.id_of(queue)
        self._dealing.promote()
        self._dealing.deal_all()
        rows = self.execute(_PEEK[state], number, limit)
        return [envelope_of(row) for row in rows]

    def set_paused(self, queue: str, *, paused: bool) -> None:
        number = self.id_of(queue)
        self.execute("UPDATE queue SET paused = ? WHERE id = ?", paused, number)
        takers = self.execute("SELECT consumer FROM taker WHERE queue = ?", number).fetchall()
        self._dealing.woken.update(consumer for (consumer,) in takers)
        self._dealing.deal([number])

    def clear(self, queue: str, *, force: bool, whole: bool) -> Removed:
        """Delete what waits in a queue; with ``whole`` its dead letters too, and the queue itself if nobody uses it."""
        number = self.id_of(queue)
        (consumers,) = self.execute("SELECT count(*) FROM taker WHERE queue = ?", number).fetchone()
        counted = self.execute("SELECT state, count(*) FROM task WHERE queue = ? GROUP BY state", number)
        counts = dict(counted.fetchall())
        used = bool(consumers or counts.get("running"))
        if used and not force:
            raise in_use(queue, consumers=consumers, running=counts.get("running", 0))
        self._purged(number)
        self._dealing.limits.ended_in(number)
        self.execute(f"DELETE FROM task WHERE queue = ? AND state IN {_WAITS}", number)  # noqa: S608 - a constant
        if whole:
            self.execute("DELETE FROM task WHERE queue = ? AND state = 'dead'", number)
            self.execute("UPDATE queue SET paused = 0 WHERE id = ?", number)
        if whole and not used:
            self._dealing.limits.forget(number)
            self.execute("DELETE FROM queue WHERE id = ?", number)
        dead = counts.get("dead", 0) if whole else 0
        ready = counts.get("ready", 0) + counts.get("limited", 0)
        return Removed(ready, counts.get("delayed", 0), dead, kept=whole and used)

    def _purged(self, queue: int) -> None:
        """Tell of all tasks that wait in a queue, and are deleted, as far as anybody knows or follows them."""
        known = " AND (id IN (SELECT id FROM record) OR id IN (SELECT task FROM watch))"
        which = "" if self._watches.is_watched() else known
        ids = self.execute(
            f"SELECT id FROM task WHERE queue = ? AND state IN {_WAITS}{which}",  # noqa: S608 - constants
            queue,
        ).fetchall()
        now = time.time()
        self._records.note([purged(status, now) for status in self._records.statuses(id_ for (id_,) in ids)])


def _ready_about(database: sqlite3.Connection, queue: int, limit: int, more: int) -> int:
    """How many are ready, no more than ``limit``; or a larger number, if there is room for ``more`` even so."""
    if limit > _FEW:
        most = _ready_at_most(database, queue)
        if most is not None and most + more <= limit:
            return most
    return int(database.execute(_COUNT, (queue, limit)).fetchone()[0])


def _ready_at_most(database: sqlite3.Connection, queue: int) -> int | None:
    """By the ends of each priority's line: there are other tasks between them, so never fewer. None: too many lines."""
    most, below = 0, float("inf")
    for _ in range(_PRIORITIES):
        first = database.execute(_FIRST, (queue, below)).fetchone()
        if first is None:
            return most
        below, seq = first
        (last,) = database.execute(_LAST, (queue, below)).fetchone()
        most += last - seq + 1
    return None
