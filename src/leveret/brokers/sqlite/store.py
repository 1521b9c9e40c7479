"""The SQL: what each operation does to the file, inside a transaction that its caller holds.

Used by one thread (`writer`). Consumers whose bells must be rung after the commit are collected in ``rings``.
"""

from __future__ import annotations

import os
import sqlite3
import time
from importlib import resources
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.brokers.sqlite.records import Records
from leveret.errors import DuplicateTask, QueueFull, QueueMismatch, QueueNotFound, StoreError
from leveret.model import (
    MIDDLE_PRIORITY,
    DeadLetter,
    DeadLettered,
    Envelope,
    Outcome,
    Queue,
    QueueStats,
    Released,
    Retrying,
    repeated,
    this_process,
)
from leveret.status import KEEP, Mark, Status, back, revived_again

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

#: "Lvrt", so that `file` and other programs can tell whose database it is.
APPLICATION_ID = 0x4C767274
SCHEMA_VERSION = 3
#: What makes a file of each version one of the next.
_UPGRADES = {
    1: (
        "ALTER TABLE queue ADD COLUMN paused INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE task ADD COLUMN priority INTEGER",
        "ALTER TABLE task ADD COLUMN worker TEXT",
        "DROP INDEX task_ready",
        "CREATE INDEX task_ready ON task (queue, coalesce(priority, 4) DESC, seq) WHERE state = 'ready'",
        "CREATE UNIQUE INDEX task_id ON task (id)",
    ),
    2: (
        "CREATE TABLE record (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, change INTEGER NOT NULL,"
        " at REAL NOT NULL, status BLOB NOT NULL)",
        "CREATE INDEX record_at ON record (at)",
        "CREATE TABLE watch (task TEXT NOT NULL, consumer INTEGER NOT NULL,"
        " PRIMARY KEY (task, consumer)) WITHOUT ROWID",
        "CREATE INDEX watch_consumer ON watch (consumer)",
        "CREATE TABLE mark (consumer INTEGER NOT NULL, task TEXT NOT NULL, at REAL NOT NULL,"
        " PRIMARY KEY (consumer, task)) WITHOUT ROWID",
    ),
}

_ENVELOPE = (
    "task.id, queue.name, task.name, body, content_type, attempt, enqueued_at, last_error, due, expires_at, headers,"
    " priority"
)
#: As the index has it, literally: else SQLite would sort all that is ready.
CLAIM = (
    "SELECT seq FROM task WHERE queue = ? AND state = 'ready'"  # noqa: S608 - a constant
    f" ORDER BY coalesce(priority, {MIDDLE_PRIORITY}) DESC, seq LIMIT ?"
)
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(dict[str, Any]).decode


class Claim(msgspec.Struct, frozen=True):
    """A task that was dealt to a consumer."""

    token: int
    returns: int
    envelope: Envelope


class Dealt(msgspec.Struct, frozen=True):
    """What a consumer was dealt, and when the next delayed task of the file is due (Unix time)."""

    claims: list[Claim]
    next_due: float | None
    #: All paused queues of the file.
    paused: frozenset[str] = frozenset()
    #: Of all tasks that it has and that were cancelled.
    marks: list[Mark] = []


class Settled(msgspec.Struct, frozen=True):
    """An outcome for the task that was dealt under that token."""

    token: int
    outcome: Outcome


def open_database(path: Path, *, timeout: float) -> sqlite3.Connection:
    """Open the file, or make it, readable by its owner only. ``timeout``: seconds to wait for another writer."""
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    database = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=True)
    try:
        _prepare(database, path)
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    _check_owner(database, path)
    database.execute("PRAGMA journal_mode = WAL")
    # FULL syncs the log at each commit: without it, a commit survives a crash of the process but not of the machine.
    database.execute("PRAGMA synchronous = FULL")
    database.execute("BEGIN IMMEDIATE")
    version = _check_owner(database, path)
    if version == 0:
        for statement in resources.files(__package__).joinpath("schema.sql").read_text().split(";\n"):
            database.execute(statement)
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    else:
        for older in range(version, SCHEMA_VERSION):
            for statement in _UPGRADES[older]:
                database.execute(statement)
    if version < SCHEMA_VERSION:
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    database.execute("COMMIT")


def _check_owner(database: sqlite3.Connection, path: Path) -> int:
    """The schema's version, 0 for an empty file. Raises StoreError before anything is written to a foreign file."""
    (owner,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if tables and owner != APPLICATION_ID:
        raise StoreError(f"{path} is another program's SQLite file; name a file of Leveret's own in the URL")
    if version > SCHEMA_VERSION:
        raise StoreError(f"{path} was written by a newer Leveret (schema {version}); upgrade this one")
    return int(version)


class Store:
    """The operations. Each is atomic with whatever else its caller's transaction holds."""

    def __init__(self, database: sqlite3.Connection, *, keep: float = KEEP) -> None:
        self._database = database
        self._keep = keep
        self.rings: set[str] = set()
        self.records = Records(database, lambda bell: self.rings.add(bell))

    def declare(self, queues: Sequence[Queue]) -> None:
        missing = [queue for queue in {queue.name: queue for queue in queues}.values() if not self._adopts(queue)]
        self._database.executemany(
            "INSERT INTO queue (name, max_length) VALUES (?, ?)", [(queue.name, queue.max_length) for queue in missing]
        )

    def insert(self, envelopes: Sequence[Envelope]) -> None:
        by_queue: dict[str, list[Envelope]] = {}
        for envelope in envelopes:
            by_queue.setdefault(envelope.queue, []).append(envelope)
        now = time.time()
        ids = {name: self._room_for(name, mine, envelopes) for name, mine in by_queue.items()}
        self._insert([_row(ids[envelope.queue], envelope, now) for envelope in envelopes])
        self._deal(ids.values())

    def _insert(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """All of the rows, or none. Raises DuplicateTask."""
        self._execute("SAVEPOINT tasks")
        try:
            self._database.executemany(
                "INSERT INTO task (id, queue, state, name, body, content_type, attempt, enqueued_at, last_error, due,"
                " expires_at, headers, priority) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
        except sqlite3.IntegrityError as error:
            # The transaction is shared with other requests, which go on.
            self._execute("ROLLBACK TO tasks")
            self._execute("RELEASE tasks")
            taken = self._taken([row[0] for row in rows])
            if not taken:
                raise
            raise DuplicateTask(taken) from error
        self._execute("RELEASE tasks")

    def _taken(self, ids: Sequence[str]) -> list[str]:
        """Those of the ids that are in the file, or there twice."""
        stored = [id_ for id_ in ids if self._execute("SELECT 1 FROM task WHERE id = ?", id_).fetchone()]
        return list(dict.fromkeys([*stored, *repeated(ids)]))

    def note(self, updates: Sequence[Status]) -> None:
        """Record what became of tasks."""
        self.records.note(updates, self._keep)

    def cancel(self, id_: str) -> Status | None:
        """See `leveret.brokers.Broker.cancel`."""
        return self.records.cancel(id_, self._keep)

    def register_watcher(self, bell: str) -> tuple[int, int]:
        """A consumer that takes nothing, and wants to know: its number, and that of the last change."""
        number = self._execute("INSERT INTO consumer (bell) VALUES (?)", bell).lastrowid
        (last,) = self._execute("SELECT tick FROM clock").fetchone()
        return int(number or 0), int(last)

    def register(self, bell: str, queues: Sequence[Queue], credit: int | None) -> int:
        """A new consumer of the queues; its number."""
        self.declare(queues)
        consumer = self._execute("INSERT INTO consumer (bell) VALUES (?)", bell).lastrowid
        ids = [self._queue_id(name) for name in dict.fromkeys(queue.name for queue in queues)]
        for queue in ids:
            self._execute("INSERT INTO taker VALUES (?, ?, ?, ?)", queue, consumer, credit, self._ticks(1)[0])
        self._deal(ids)
        return int(consumer or 0)

    def dealt(self, consumer: int, after: int) -> Dealt | None:
        """Deal what has become due; what the consumer has since token ``after``; None when it is not registered."""
        next_due = self._promote()
        rows = self._execute(
            f"SELECT token, returns, {_ENVELOPE} FROM task JOIN queue ON queue.id = task.queue"  # noqa: S608
            " WHERE state = 'running' AND consumer = ? AND token > ? ORDER BY token",
            consumer,
            after,
        ).fetchall()
        if not rows and not self._execute("SELECT 1 FROM consumer WHERE id = ?", consumer).fetchone():
            return None
        claims = [Claim(token, returns, _envelope(rest)) for token, returns, *rest in rows]
        paused = self._execute("SELECT name FROM queue WHERE paused").fetchall()
        return Dealt(claims, next_due, frozenset(name for (name,) in paused), self.records.marks(consumer))

    def _promote(self) -> float | None:
        """Make ready what is due, and deal it; when the next task is due (Unix time)."""
        due = self._execute(
            "UPDATE task SET state = 'ready' WHERE state = 'delayed' AND due <= ? RETURNING queue", time.time()
        ).fetchall()
        self._deal({queue for (queue,) in due})
        (following,) = self._execute("SELECT min(due) FROM task WHERE state = 'delayed'").fetchone()
        return None if following is None else float(following)

    def settle(self, consumer: int, settled: Sequence[Settled], updates: Sequence[Status] = ()) -> list[int]:
        """Record outcomes and deal again; the tokens that were not this consumer's any more."""
        self.note(updates)
        lost, freed = [], dict[int, int]()
        for item in settled:
            queue = self._end(consumer, item)
            if queue is None:
                lost.append(item.token)
            else:
                freed[queue] = freed.get(queue, 0) + 1
        for queue, count in freed.items():
            self._execute("UPDATE taker SET free = free + ? WHERE queue = ? AND consumer = ?", count, queue, consumer)
        self.records.settled(consumer)
        self._deal(freed)
        return lost

    def stop_taking(self, consumer: int) -> None:
        """Deal it nothing more; what it has stays its own."""
        self._execute("DELETE FROM taker WHERE consumer = ?", consumer)

    def remove(self, consumers: Iterable[int]) -> None:
        """Consumers that are gone: what they had goes back to where it stood, for the others."""
        queues: set[int] = set()
        for consumer in consumers:
            self.records.orphaned(consumer, self._keep)
            returned = self._execute(
                "UPDATE task SET state = 'ready', consumer = NULL, token = NULL, returns = returns + 1"
                " WHERE state = 'running' AND consumer = ? RETURNING queue, id",
                consumer,
            ).fetchall()
            queues.update(queue for queue, _ in returned)
            now = time.time()
            self.records.amend((id_ for _, id_ in returned), lambda status: back(status, now), self._keep)  # noqa: B023
            self._execute("DELETE FROM taker WHERE consumer = ?", consumer)
            self._execute("DELETE FROM consumer WHERE id = ?", consumer)
        self._deal(queues)

    def consumers(self) -> list[tuple[int, str]]:
        """Every registered consumer and its bell."""
        return self._execute("SELECT id, bell FROM consumer").fetchall()

    def stats(self) -> list[QueueStats]:
        rows = self._execute(
            "SELECT name,"
            " (SELECT count(*) FROM task WHERE queue = queue.id AND state = 'ready'),"
            " (SELECT count(*) FROM consumer CROSS JOIN task ON task.consumer = consumer.id"
            "   WHERE task.queue = queue.id AND state = 'running'),"
            " (SELECT count(*) FROM task WHERE queue = queue.id AND state = 'dead'),"
            " (SELECT count(*) FROM taker WHERE queue = queue.id),"
            " (SELECT count(*) FROM task WHERE queue = queue.id AND state = 'delayed'),"
            " paused"
            " FROM queue ORDER BY name"
        )
        return [
            QueueStats(name, ready, running, dead, consumers, delayed, paused=bool(paused))
            for name, ready, running, dead, consumers, delayed, paused in rows
        ]

    def set_paused(self, queue: str, *, paused: bool) -> None:
        number = self._queue_id(queue)
        self._execute("UPDATE queue SET paused = ? WHERE id = ?", paused, number)
        takers = self._execute("SELECT bell FROM taker JOIN consumer ON consumer.id = consumer WHERE queue = ?", number)
        self.rings.update(bell for (bell,) in takers.fetchall())
        self._deal([number])

    def dead_letters(self, queue: str, limit: int) -> list[DeadLetter]:
        rows = self._execute(
            f"SELECT reason, traceback, died_at, worker, {_ENVELOPE} FROM task JOIN queue ON queue.id = task.queue"  # noqa: S608
            " WHERE state = 'dead' AND queue.name = ? ORDER BY seq LIMIT ?",
            queue,
            limit,
        )
        return [
            DeadLetter(_envelope(rest), reason, traceback, died_at, worker)
            for reason, traceback, died_at, worker, *rest in rows
        ]

    def revive(self, queue: str, ids: Sequence[str]) -> list[str]:
        number = self._queue_id(queue)
        found = self._each_dead(
            "UPDATE task SET seq = (SELECT max(seq) + 1 FROM task), state = 'ready', attempt = 1, returns = 0,"
            " due = NULL, expires_at = NULL, reason = NULL, traceback = NULL, died_at = NULL, worker = NULL",
            number,
            ids,
        )
        now = time.time()
        self.records.amend(found, lambda status: revived_again(status, now), self._keep)
        self._deal([number])
        return found

    def discard(self, queue: str, ids: Sequence[str]) -> list[str]:
        return self._each_dead("DELETE FROM task", self._queue_id(queue), ids)

    def _each_dead(self, change: str, queue: int, ids: Sequence[str]) -> list[str]:
        """Apply a change to the dead letters of these ids, in order; those found."""
        where = "WHERE queue = ? AND state = 'dead' AND id = ? RETURNING id"
        found = [self._execute(f"{change} {where}", queue, id_).fetchall() for id_ in ids]
        return [id_ for rows in found for (id_,) in rows]

    def _execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        return self._database.execute(sql, values)

    def _ticks(self, count: int) -> range:
        """That many numbers that no delivery and no turn had before."""
        (last,) = self._execute("UPDATE clock SET tick = tick + ? RETURNING tick", count).fetchone()
        return range(last - count + 1, last + 1)

    def _adopts(self, queue: Queue) -> bool:
        row = self._execute("SELECT max_length FROM queue WHERE name = ?", queue.name).fetchone()
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

    def _queue_id(self, name: str) -> int:
        row = self._execute("SELECT id FROM queue WHERE name = ?", name).fetchone()
        if row is None:
            raise QueueNotFound(f"queue {name!r} does not exist; declare it first")
        return int(row[0])

    def _room_for(self, name: str, mine: Sequence[Envelope], all_of_them: Sequence[Envelope]) -> int:
        ids = [envelope.id for envelope in all_of_them]
        row = self._execute("SELECT id, max_length FROM queue WHERE name = ?", name).fetchone()
        if row is None:
            raise QueueNotFound(f"queue {name!r} does not exist; declare it first", ids)
        queue, limit = row
        if limit is not None:
            (ready,) = self._execute(
                "SELECT count(*) FROM (SELECT 1 FROM task WHERE queue = ? AND state = 'ready' LIMIT ?)", queue, limit
            ).fetchone()
            if ready + len(mine) > limit:
                raise QueueFull(f"queue {name!r} holds {ready} ready tasks of at most {limit}; nothing was stored", ids)
        return int(queue)

    def _end(self, consumer: int, item: Settled) -> int | None:
        """Apply one outcome; the queue's number, or None when the task has another token by now."""
        sql, values = _change(item.outcome)
        cursor = self._execute(sql, *values, consumer, item.token)
        row = cursor.fetchone()
        cursor.close()
        return None if row is None else int(row[0])

    def _deal(self, queues: Iterable[int]) -> None:
        """Hand ready tasks to the consumers with free credit, in turn."""
        for queue in queues:
            takers = self._execute(
                "SELECT consumer, free, bell FROM taker JOIN consumer ON consumer.id = taker.consumer"
                " JOIN queue ON queue.id = taker.queue"
                " WHERE queue = ? AND NOT paused AND (free IS NULL OR free > 0) ORDER BY turn",
                queue,
            ).fetchall()
            if takers:
                self._deal_in_turn(queue, takers)

    def _deal_in_turn(self, queue: int, takers: list[tuple[int, int | None, str]]) -> None:
        limit = -1 if any(free is None for _, free, _ in takers) else sum(free or 0 for _, free, _ in takers)
        ready = self._execute(CLAIM, queue, limit).fetchall()
        hands, last = share([free for _, free, _ in takers], len(ready))
        for index in last:
            consumer, _, bell = takers[index]
            tokens = self._ticks(len(hands[index]))
            self._database.executemany(
                "UPDATE task SET state = 'running', consumer = ?, token = ? WHERE seq = ?",
                [(consumer, token, *ready[card]) for token, card in zip(tokens, hands[index], strict=True)],
            )
            self._execute(
                "UPDATE taker SET free = free - ?, turn = ? WHERE queue = ? AND consumer = ?",
                len(tokens),
                tokens[-1],
                queue,
                consumer,
            )
            self.rings.add(bell)


_FENCE = "WHERE consumer = ? AND token = ? AND state = 'running' RETURNING queue"
_SUCCEED = f"DELETE FROM task {_FENCE}"  # noqa: S608 - constants
_RELEASE = f"UPDATE task SET state = 'ready', consumer = NULL, token = NULL {_FENCE}"  # noqa: S608
_RETRY = (
    "UPDATE task SET seq = (SELECT max(seq) + 1 FROM task), state = ?, due = ?, consumer = NULL, token = NULL,"  # noqa: S608
    f" returns = 0, attempt = attempt + 1, last_error = ? {_FENCE}"
)
_BURY = (
    "UPDATE task SET state = 'dead', consumer = NULL, token = NULL, reason = ?, traceback = ?, died_at = ?,"  # noqa: S608
    f" worker = ? {_FENCE}"
)


def _change(outcome: Outcome) -> tuple[str, tuple[Any, ...]]:
    """The statement for an outcome and its first values; the fence's follow."""
    if isinstance(outcome, Retrying):
        if outcome.delay:
            return _RETRY, ("delayed", time.time() + outcome.delay, outcome.error)
        return _RETRY, ("ready", None, outcome.error)
    if isinstance(outcome, DeadLettered):
        return _BURY, (outcome.reason, outcome.traceback, time.time(), this_process())
    return _RELEASE if isinstance(outcome, Released) else _SUCCEED, ()


def share(credit_of: Sequence[int | None], cards: int) -> tuple[list[list[int]], list[int]]:
    """Deal ``cards`` one at a time, in turn, to whoever has credit left (None: no limit).

    Each player's cards, and the players that got any, in the order in which their last card came.
    """
    left = list(credit_of)
    hands: list[list[int]] = [[] for _ in credit_of]
    last: dict[int, None] = {}
    card = 0
    while card < cards and any(credit is None or credit > 0 for credit in left):
        for player, credit in enumerate(left):
            if card < cards and (credit is None or credit > 0):
                hands[player].append(card)
                left[player] = None if credit is None else credit - 1
                last.pop(player, None)
                last[player] = None
                card += 1
    return hands, list(last)


def _row(queue: int, envelope: Envelope, now: float) -> tuple[Any, ...]:
    return (
        envelope.id,
        queue,
        "delayed" if envelope.due is not None and envelope.due > now else "ready",
        envelope.task,
        envelope.body,
        envelope.content_type,
        envelope.attempt,
        envelope.enqueued_at,
        envelope.last_error,
        envelope.due,
        envelope.expires_at,
        _pack(envelope.headers) if envelope.headers else None,
        envelope.priority,
    )


def _envelope(row: Sequence[Any]) -> Envelope:
    id_, queue, name, body, content_type, attempt, enqueued_at, last_error, due, expires_at, headers, priority = row
    return Envelope(
        id_,
        queue,
        name,
        body,
        content_type,
        attempt,
        enqueued_at,
        last_error,
        due,
        expires_at,
        _unpack(headers) if headers else {},
        priority,
    )
