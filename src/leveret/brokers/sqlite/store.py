"""The SQL: what each operation does to the file, inside a transaction that its caller holds.

Used by one thread (`writer`). It asks for the `letters` before it commits: what the consumers of this process were
dealt is read in the transaction that dealt it, and those of other processes are rung after the commit.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from leveret.brokers.base import in_use
from leveret.brokers.sqlite.capacity import ready_about
from leveret.brokers.sqlite.questions import Questions
from leveret.brokers.sqlite.rows import (
    ENVELOPE,
    INSERT,
    INSERT_ALL,
    MOST_NUMBER,
    NO_OTHERS,
    count,
    envelope_of,
    others,
    read,
    row,
    text,
)
from leveret.brokers.sqlite.statuses import Records
from leveret.errors import DuplicateTask, QueueFull, QueueMismatch, QueueNotFound, StoreError
from leveret.model import (
    KEEP,
    LATEST,
    MIDDLE_PRIORITY,
    Cancelled,
    CancelRequest,
    DeadLetter,
    DeadLettered,
    Envelope,
    Outcome,
    Queue,
    QueueStats,
    Released,
    Removed,
    Retrying,
    Status,
    Succeeded,
    back,
    new_id,
    repeated,
    revived_again,
    this_process,
    unix_time,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from leveret.brokers.base import Select

#: Takes what a consumer was dealt, in the writer's thread.
Receiver: TypeAlias = "Callable[[Dealt | None], None]"

#: As the index has it, literally: else SQLite would sort all that is ready.
CLAIM = (
    "SELECT seq FROM task WHERE queue = ? AND state = 'ready'"  # noqa: S608 - a constant
    f" ORDER BY coalesce(priority, {MIDDLE_PRIORITY}) DESC, seq LIMIT ?"
)
#: So many ready tasks of a queue are counted for a worker that asks whether it is too small: it takes the file's time.
_COUNTED = 10_000
#: More consumers than a file ever had.
_FAR = 2**32


class Claim(msgspec.Struct, frozen=True):
    """A task that was dealt to a consumer."""

    token: int
    returns: int
    envelope: Envelope
    #: Why it cannot run, if its row cannot be read.
    defect: str = ""


class Dealt(msgspec.Struct, frozen=True):
    """What a consumer was dealt, and when the next delayed task of the file is due (Unix time)."""

    claims: list[Claim]
    next_due: float | None
    #: All paused queues of the file.
    paused: frozenset[str] = frozenset()
    #: Of all tasks that it has and that were cancelled.
    marks: list[CancelRequest] = []
    #: Who asks what the consumer does.
    askers: frozenset[int] = frozenset()


class Letters(msgspec.Struct, frozen=True):
    """What is to be told when the transaction is committed."""

    #: To the consumers of this process; None: it is not registered any more.
    own: list[tuple[Receiver, Dealt | None]]
    #: The bells of the other processes' consumers.
    bells: list[str]


class Settled(msgspec.Struct, frozen=True):
    """An outcome for the task that was dealt under that token."""

    token: int
    id: str
    outcome: Outcome


class Store:
    """The operations. Each is atomic with whatever else its caller's transaction holds.

    ``declared``: the queues that this process has declared, by name, also in a file that was here before: one that
    lacks any gets it when it is used. A consumer's number means nothing in another store: others have it there.
    """

    def __init__(
        self, database: sqlite3.Connection, *, keep: float = KEEP, declared: dict[str, Queue] | None = None
    ) -> None:
        self._database = database
        self._keep = keep
        self._declared = {} if declared is None else declared
        #: Consumers, watchers and askers that this store has registered.
        self._own: set[int] = set()
        self._registering: set[int] = set()
        #: The consumers of this process: who takes what they are dealt, and the newest token that was handed over.
        self._receivers: dict[int, Receiver] = {}
        self._newest: dict[int, int] = {}
        # Of this transaction: which queues have tasks or credit to deal, whom it concerns, what its commit makes true.
        self._undealt: set[int] = set()
        self._rung: set[int] = set()
        self.records = Records(database, self._rung.add)
        self.questions = Questions(database, self._rung.add)
        self._joining: dict[int, Receiver] = {}
        self._read: dict[int, int] = {}

    def letters(self) -> Letters:
        """What this transaction has for whom: the last that is done before its commit."""
        self._deal_all()
        receivers = {**self._receivers, **self._joining}
        next_due = None
        if not receivers.keys().isdisjoint(self._rung):
            next_due = self._promote()
            self._deal_all()
        own: list[tuple[Receiver, Dealt | None]] = []
        bells: list[str] = []
        for consumer in self._rung:
            receiver = receivers.get(consumer)
            if receiver is None:
                bells.extend(bell for (bell,) in self._execute("SELECT bell FROM consumer WHERE id = ?", consumer))
            else:
                own.append((receiver, self._dealt(consumer, next_due)))
        return Letters(own, bells)

    def committed(self) -> None:
        self._receivers.update(self._joining)
        self._newest.update(self._read)
        self._own |= self._registering
        self._begin_anew()

    def rolled_back(self) -> None:
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._undealt.clear()
        self._rung.clear()
        self._joining.clear()
        self._registering.clear()
        self._read.clear()

    def receivers(self) -> list[Receiver]:
        """Of the consumers of this process."""
        return list(self._receivers.values())

    def declare(self, queues: Sequence[Queue]) -> None:
        missing = [queue for queue in {queue.name: queue for queue in queues}.values() if not self._adopts(queue)]
        self._database.executemany(
            "INSERT INTO queue (name, max_length) VALUES (?, ?)", [(queue.name, queue.max_length) for queue in missing]
        )
        self._declared.update({queue.name: queue for queue in queues})

    def insert(self, envelopes: Sequence[Envelope]) -> bool:
        """Store tasks; whether anybody wants to know of every task."""
        by_queue: dict[str, list[Envelope]] = {}
        for envelope in envelopes:
            by_queue.setdefault(envelope.queue, []).append(envelope)
        now = time.time()
        ids = {name: self._room_for(name, mine, envelopes) for name, mine in by_queue.items()}
        rows = [row(ids[envelope.queue], envelope, now) for envelope in envelopes]
        more = [others(envelope) for envelope in envelopes]
        if any(more):
            self._insert(INSERT_ALL, [(*one, *(other or NO_OTHERS)) for one, other in zip(rows, more, strict=True)])
        else:
            self._insert(INSERT, rows)
        self._deal(ids.values())
        return self.records.is_watched()

    def _insert(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """All of the rows, or none. Raises DuplicateTask."""
        # One statement is atomic by itself; the transaction is shared with other requests, which go on.
        alone = len(rows) == 1
        if not alone:
            self._execute("SAVEPOINT tasks")
        try:
            self._database.executemany(sql, rows)
        except sqlite3.IntegrityError as error:
            if not alone:
                self._execute("ROLLBACK TO tasks")
                self._execute("RELEASE tasks")
            taken = self._taken([row[0] for row in rows])
            if not taken:
                raise
            raise DuplicateTask(taken) from error
        if not alone:
            self._execute("RELEASE tasks")

    def _taken(self, ids: Sequence[str]) -> list[str]:
        """Those of the ids that are in the file, or there twice."""
        stored = [id_ for id_ in ids if self._execute("SELECT 1 FROM task WHERE id = ?", id_).fetchone()]
        return list(dict.fromkeys([*stored, *repeated(ids)]))

    def register_watcher(self, bell: str) -> tuple[int, int]:
        """A consumer that takes nothing, and wants to know: its number, and that of the last change."""
        self._number_consumers_anew()
        number = int(self._execute("INSERT INTO consumer (bell) VALUES (?)", bell).lastrowid or 0)
        self._registering.add(number)
        (last,) = self._execute("SELECT tick FROM clock").fetchone()
        return number, int(last)

    def has(self, consumer: int) -> bool:
        """Whether this store has registered it, and not another that was here before."""
        return consumer in self._own

    def register(
        self, bell: str, queues: Sequence[Queue], credit: int | None, receiver: Receiver, *, describes: bool = False
    ) -> int:
        """A new consumer of the queues, in this process; its number. ``describes``: it tells what it does if asked."""
        self.declare(queues)
        self._number_consumers_anew()
        inserted = self._execute("INSERT INTO consumer (bell, describes) VALUES (?, ?)", bell, describes)
        consumer = int(inserted.lastrowid or 0)
        self._joining[consumer] = receiver
        self._registering.add(consumer)
        ids = [self._queue_id(name) for name in dict.fromkeys(queue.name for queue in queues)]
        for queue in ids:
            self._execute("INSERT INTO taker VALUES (?, ?, ?, ?)", queue, consumer, credit, self._ticks(1)[0])
        self._deal(ids)
        return consumer

    def look(self, consumer: int) -> None:
        """Deal what has become due, and have the consumer told what it has and how things are."""
        self._rung.add(consumer)

    def look_around(self, consumer: int) -> list[tuple[int, object]]:
        """The same; every registered consumer and its bell."""
        self.look(consumer)
        self._free_stuck()
        return self.consumers()

    def _free_stuck(self) -> None:
        """What other programs' hands made, and no event would ever move: it is dealt, and dies of what is wrong."""
        stuck = [
            *self._execute(f"{_STUCK} AND due IS NULL RETURNING queue"),
            *self._execute(f"{_STUCK} AND due > ? RETURNING queue", LATEST),
        ]
        self._number_anew()
        self._deal(queue for (queue,) in stuck)

    def _number_anew(self) -> None:
        """No number follows the last one: what another program gave such a number gets an ordinary one."""
        if self._execute("SELECT 1 FROM task WHERE seq >= ? LIMIT 1", MOST_NUMBER).fetchone():
            for (seq,) in self._execute("SELECT seq FROM task WHERE seq >= ? ORDER BY seq", MOST_NUMBER).fetchall():
                self._execute(
                    "UPDATE task SET seq = coalesce((SELECT max(seq) FROM task WHERE seq < ?), 0) + 1 WHERE seq = ?",
                    *(MOST_NUMBER, seq),
                )

    def _number_consumers_anew(self) -> None:
        """The same for consumers, whose last number SQLite keeps: it would say that the disk is full."""
        if self._execute("SELECT 1 FROM sqlite_sequence WHERE name = 'consumer' AND seq >= ?", MOST_NUMBER).fetchone():
            # Far above all that there were: a number is never given again.
            self.remove([id_ for (id_,) in self._execute("SELECT id FROM consumer WHERE id >= ?", MOST_NUMBER)])
            (last,) = self._execute("SELECT coalesce(max(id), 0) FROM consumer").fetchone()
            self._execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'consumer'", last + _FAR)

    def _dealt(self, consumer: int, next_due: float | None) -> Dealt | None:
        """What the consumer was dealt since it was last told; None when it is not registered."""
        rows = self._execute(
            f"SELECT token, returns, {ENVELOPE} FROM task JOIN queue ON queue.id = task.queue"  # noqa: S608
            " WHERE state = 'running' AND consumer = ? AND token BETWEEN ? AND ? ORDER BY token",
            consumer,
            self._newest.get(consumer, 0) + 1,
            MOST_NUMBER,
        ).fetchall()
        if rows:
            self._read[consumer] = rows[-1][0]
        elif not self._execute("SELECT 1 FROM consumer WHERE id = ?", consumer).fetchone():
            return None
        claims = [self._claim(token, returns, rest) for token, returns, *rest in rows]
        paused = self._execute("SELECT name FROM queue WHERE paused").fetchall()
        return Dealt(
            claims,
            next_due,
            frozenset(name for (name,) in paused),
            self.records.marks(consumer),
            self.questions.unanswered(consumer),
        )

    def _claim(self, token: int, returns: object, columns: Sequence[Any]) -> Claim:
        envelope, defect = read(columns)
        if type(columns[0]) is not str:
            # By its id alone it can be looked at, put back and dropped.
            envelope = msgspec.structs.replace(envelope, id=new_id())
            self._execute("UPDATE task SET id = ? WHERE state = 'running' AND token = ?", envelope.id, token)
        return Claim(token, count(returns), envelope, defect)

    def _promote(self) -> float | None:
        """Make ready what is due, and deal it; when the next task is due (Unix time)."""
        now = time.time()
        next_due = self._next_due()
        if next_due is None or next_due > now:
            return next_due
        due = self._execute(
            "SELECT seq, queue FROM task WHERE state = 'delayed' AND due <= ? ORDER BY due", now
        ).fetchall()
        self._execute(_RIPEN, _array([seq for seq, _ in due]))
        self._deal({queue for _, queue in due})
        return self._next_due()

    def _next_due(self) -> float | None:
        (due,) = self._execute("SELECT min(due) FROM task WHERE state = 'delayed'").fetchone()
        return unix_time(due)

    def settle(
        self, consumer: int, settled: Sequence[Settled], updates: Sequence[Status] = (), *, bell: str | None = None
    ) -> set[int]:
        """Record outcomes and deal again; the tokens that were this consumer's still."""
        if bell is not None and not self._registered(consumer, bell):
            return set()  # another file has come, where the number is nobody's or another's
        done = [item.token for item in settled if isinstance(item.outcome, (Succeeded, Cancelled))]
        ended = self._execute(_SUCCEED, consumer, _array(done)).fetchall() if done else []
        again = {item.token for item in settled if isinstance(item.outcome, (Retrying, Released))}
        marked = self.records.marked(consumer, again) if again else {}
        ended += [(queue, token) for token, (queue, _) in marked.items()]
        for item in settled:
            if not isinstance(item.outcome, (Succeeded, Cancelled)) and item.token not in marked:
                ended += self._end(consumer, item)
        kept = {token for _, token in ended}
        self.records.note(updates if len(kept) == len(settled) else _of_kept(updates, settled, kept))
        for _, id_ in marked.values():
            self.records.end_cancelled(consumer, id_)
        if updates:
            # By the workers alone: how long is their application's to say, and others may not know it.
            self.records.purge(self._keep, len(updates))
        freed = Counter(queue for queue, _ in ended)
        for queue, more in freed.items():
            self._execute("UPDATE taker SET free = free + ? WHERE queue = ? AND consumer = ?", more, queue, consumer)
        self._deal(freed)
        return kept

    def set_credit(self, consumer: int, credit: int) -> None:
        """Change its credit for each queue; as long as it holds more, it is dealt nothing."""
        if consumer not in self._own:
            return
        queues = self._execute(
            "UPDATE taker SET free = ? - (SELECT count(*) FROM task WHERE state = 'running'"
            " AND task.consumer = taker.consumer AND task.queue = taker.queue) WHERE consumer = ? RETURNING queue",
            credit,
            consumer,
        )
        self._deal(queue for (queue,) in queues.fetchall())

    def stop_taking(self, consumer: int) -> None:
        """Deal it nothing more; what it has stays its own."""
        if consumer in self._own:
            self._execute("DELETE FROM taker WHERE consumer = ?", consumer)

    def leave(self, consumer: int) -> None:
        """One of this process ends."""
        self.forget(consumer)
        if consumer in self._own:
            self._own.discard(consumer)
            self.remove([consumer])

    def take_back(self, bell: str) -> None:
        """A registration of this process that nobody waits for any more: if it was made, it ends."""
        for (consumer,) in self._execute("SELECT id FROM consumer WHERE bell = ?", bell).fetchall():
            self.leave(consumer)

    def forget(self, consumer: int) -> None:
        """One of this process is told nothing more."""
        self._receivers.pop(consumer, None)
        self._newest.pop(consumer, None)

    def remove_dead(self, dead: Iterable[tuple[int, object]]) -> None:
        """Those of the consumers, given with their bells, that are in this file: it may be another one by now."""
        self.remove(number for number, bell in dead if self._registered(number, bell))

    def _registered(self, consumer: int, bell: object) -> bool:
        row = self._execute("SELECT 1 FROM consumer WHERE id = ? AND bell = ?", consumer, bell).fetchone()
        return row is not None

    def remove_lost(self) -> None:
        """Give back what belongs to consumers that are not registered: the file was mended, or meddled with."""
        lost = self._execute(
            "SELECT DISTINCT consumer FROM task WHERE state = 'running'"
            " AND NOT EXISTS (SELECT 1 FROM consumer WHERE consumer.id = task.consumer)"
        ).fetchall()
        self._execute("DELETE FROM taker WHERE NOT EXISTS (SELECT 1 FROM consumer WHERE consumer.id = taker.consumer)")
        self.remove(number for (number,) in lost)

    def remove(self, consumers: Iterable[int]) -> None:
        """Consumers that are gone: what they had goes back to where it stood, for the others."""
        queues: set[int] = set()
        for consumer in consumers:
            self.records.orphaned(consumer)
            self.questions.gone(consumer)
            returned = self._execute(
                "UPDATE task SET state = 'ready', consumer = NULL, token = NULL, returns = returns + 1"
                " WHERE state = 'running' AND consumer IS ? RETURNING queue, id",
                consumer,
            ).fetchall()
            queues.update(queue for queue, _ in returned)
            self.records.amend([id_ for _, id_ in returned], partial(back, now=time.time()))
            self._execute("DELETE FROM taker WHERE consumer = ?", consumer)
            self._execute("DELETE FROM consumer WHERE id = ?", consumer)
        self._deal(queues)

    def consumers(self) -> list[tuple[int, object]]:
        """Every registered consumer and its bell."""
        return self._execute("SELECT id, bell FROM consumer").fetchall()

    def stats(self) -> list[QueueStats]:
        self._promote()
        self._deal_all()
        # Each of these in one pass: what they count has no index by its queue.
        running = self._execute(
            "SELECT queue, count(*) FROM consumer CROSS JOIN task ON task.consumer = consumer.id"
            " WHERE state = 'running' GROUP BY queue"
        )
        running_in = dict(running.fetchall())
        delayed = self._execute("SELECT queue, count(*) FROM task WHERE state = 'delayed' GROUP BY queue")
        delayed_in = dict(delayed.fetchall())
        rows = self._execute(
            "SELECT id, name,"
            " (SELECT count(*) FROM task WHERE queue = queue.id AND state = 'ready'),"
            " (SELECT count(*) FROM task WHERE queue = queue.id AND state = 'dead'),"
            " (SELECT count(*) FROM taker WHERE queue = queue.id),"
            " paused"
            " FROM queue ORDER BY name"
        )
        return [
            QueueStats(
                text(name), ready, running_in.get(id_, 0), dead, consumers, delayed_in.get(id_, 0), paused=bool(paused)
            )
            for id_, name, ready, dead, consumers, paused in rows
        ]

    def ready(self, queues: Sequence[str]) -> int:
        self._promote()  # nobody else does so while there is no consumer, and none is started for what is not ready
        counts = [
            self._execute(
                "SELECT count(*) FROM (SELECT 1 FROM task WHERE state = 'ready'"
                " AND queue = (SELECT id FROM queue WHERE name = ?) LIMIT ?)",
                name,
                _COUNTED,
            ).fetchone()[0]
            for name in queues
        ]
        return sum(counts)

    def set_paused(self, queue: str, *, paused: bool) -> None:
        number = self._queue_id(queue)
        self._execute("UPDATE queue SET paused = ? WHERE id = ?", paused, number)
        takers = self._execute("SELECT consumer FROM taker WHERE queue = ?", number).fetchall()
        self._rung.update(consumer for (consumer,) in takers)
        self._deal([number])

    def clear(self, queue: str, *, force: bool, whole: bool) -> Removed:
        """Delete what waits in a queue; with ``whole`` its dead letters too, and the queue itself if nobody uses it."""
        number = self._queue_id(queue)
        (consumers,) = self._execute("SELECT count(*) FROM taker WHERE queue = ?", number).fetchone()
        counted = self._execute("SELECT state, count(*) FROM task WHERE queue = ? GROUP BY state", number)
        counts = dict(counted.fetchall())
        used = bool(consumers or counts.get("running"))
        if used and not force:
            raise in_use(queue, consumers=consumers, running=counts.get("running", 0))
        self.records.purged(number)
        self._execute("DELETE FROM task WHERE queue = ? AND state IN ('ready', 'delayed')", number)
        if whole:
            self._execute("DELETE FROM task WHERE queue = ? AND state = 'dead'", number)
            self._execute("UPDATE queue SET paused = 0 WHERE id = ?", number)
        if whole and not used:
            self._execute("DELETE FROM queue WHERE id = ?", number)
        dead = counts.get("dead", 0) if whole else 0
        return Removed(counts.get("ready", 0), counts.get("delayed", 0), dead, kept=whole and used)

    def dead_letters(self, queue: str, limit: int, select: Select | None = None) -> list[DeadLetter]:
        rows = self._execute(
            # An id that is no UTF-8 is read with escapes, and no other look would find it.
            f"SELECT seq, CAST(task.id AS BLOB), reason, traceback, died_at, worker, {ENVELOPE} FROM task"  # noqa: S608
            " JOIN queue ON queue.id = task.queue WHERE state = 'dead' AND queue.name = ? ORDER BY seq LIMIT ?",
            queue,
            limit,
        )
        letters: list[DeadLetter] = []
        renamed: list[tuple[str, int]] = []
        # One after the other: all of them may be too large to be there together.
        for seq, id_, *columns in rows:
            letter = _dead_letter(*columns)
            if letter.envelope.id.encode(errors="replace") != id_:
                renamed.append((letter.envelope.id, seq))
            chosen = letter if select is None else select(letter)
            if chosen is not None:
                letters.append(chosen)
        self._database.executemany("UPDATE OR IGNORE task SET id = ? WHERE seq = ?", renamed)
        return letters

    def retry_dead(self, queue: str, ids: Sequence[str]) -> list[str]:
        number, now = self._queue_id(queue), time.time()
        self._number_anew()
        found = self._each_dead(
            "UPDATE task SET seq = (SELECT max(seq) + 1 FROM task), state = 'ready', attempt = 1, returns = 0,"
            " enqueued_at = ?, due = NULL, expires_at = NULL, reason = NULL, traceback = NULL, died_at = NULL,"
            " worker = NULL",
            number,
            ids,
            now,
        )
        self.records.amend(found, partial(revived_again, now=now))
        self._deal([number])
        return found

    def drop_dead(self, queue: str, ids: Sequence[str]) -> list[str]:
        return self._each_dead("DELETE FROM task", self._queue_id(queue), ids)

    def _each_dead(self, change: str, queue: int, ids: Sequence[str], *values: Any) -> list[str]:
        """Apply a change, with its values, to the dead letters of these ids, in order; those found."""
        where = "WHERE queue = ? AND state = 'dead' AND id = ? RETURNING id"
        found = [self._execute(f"{change} {where}", *values, queue, id_).fetchall() for id_ in ids]
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
        return self._queue(name)[0]

    def _queue(self, name: str, ids: Sequence[str] = ()) -> tuple[int, int | None]:
        """Its number, and how many ready tasks it may hold."""
        # Asked each time: another program may have deleted it, or made it again under another number.
        found: tuple[int, int | None] | None = self._execute(
            "SELECT id, max_length FROM queue WHERE name = ?", name
        ).fetchone()
        if found is None:
            if name in self._declared:
                self.declare([self._declared[name]])  # in the file that was here before
                found = self._execute("SELECT id, max_length FROM queue WHERE name = ?", name).fetchone()
            if found is None:
                raise QueueNotFound(f"queue {name!r} does not exist; declare it first", ids)
        if not (found[1] is None or type(found[1]) is int):
            raise StoreError(
                f"queue {name!r} has the max_length {found[1]!r} in the file; it must be a number, or NULL"
            )
        return found

    def _room_for(self, name: str, mine: Sequence[Envelope], all_of_them: Sequence[Envelope]) -> int:
        ids = [envelope.id for envelope in all_of_them]
        queue, limit = self._queue(name, ids)
        if limit is not None:
            self._promote()
            self._deal_all()
            ready = ready_about(self._database, queue, limit, len(mine))
            if ready + len(mine) > limit:
                raise QueueFull(
                    f"queue {name!r} holds {ready} ready tasks of at most {limit}; nothing of this call was stored", ids
                )
        return queue

    def _end(self, consumer: int, item: Settled) -> list[tuple[int, int]]:
        """Apply one outcome; the queue's number and the token, or nothing when the task has another token by now."""
        sql, values = _change(item.outcome)
        return [(queue, item.token) for (queue,) in self._execute(sql, *values, consumer, item.token).fetchall()]

    def _deal(self, queues: Iterable[int]) -> None:
        """Hand ready tasks to the consumers with free credit, in turn: once, at the end of the transaction."""
        self._undealt.update(queues)

    def _deal_all(self) -> None:
        for queue in self._undealt:
            takers = self._execute(_TAKERS, queue).fetchall()
            if takers:
                self._deal_in_turn(queue, takers)
        self._undealt.clear()

    def _deal_in_turn(self, queue: int, takers: list[tuple[int, int | None]]) -> None:
        limit = -1 if any(free is None for _, free in takers) else sum(free or 0 for _, free in takers)
        ready = self._execute(CLAIM, queue, limit).fetchall()
        hands, last = share([free for _, free in takers], len(ready))
        for index in last:
            consumer, _ = takers[index]
            tokens = self._ticks(len(hands[index]))
            hand = [ready[card][0] for card in hands[index]]
            self._execute(_HAND, consumer, tokens[0], _array(hand))
            self._execute(
                "UPDATE taker SET free = free - ?, turn = ? WHERE queue = ? AND consumer = ?",
                len(tokens),
                tokens[-1],
                queue,
                consumer,
            )
            self._rung.add(consumer)


_TAKERS = (
    "SELECT consumer, free FROM taker WHERE queue = ? AND (free IS NULL"
    " OR (typeof(free) = 'integer' AND free BETWEEN 1 AND 4294967295))"
    " AND NOT (SELECT paused FROM queue WHERE queue.id = taker.queue) ORDER BY turn"
)
#: Tokens in the order of the array. One statement for all of them: this thread gives the GIL away at each.
_HAND = (
    "UPDATE task SET state = 'running', consumer = ?, token = ? + hand.key FROM json_each(?) AS hand"
    " WHERE seq = hand.value"
)
#: To the ends of their queues, in the order of the array: what was enqueued while they were not due stands before them.
_RIPEN = (
    "UPDATE task SET state = 'ready', seq = (SELECT max(seq) FROM task) + 1 + due.key FROM json_each(?) AS due"
    " WHERE seq = due.value"
)
_STUCK = "UPDATE task SET state = 'ready' WHERE state = 'delayed'"
_FENCE = "WHERE consumer = ? AND token = ? AND state = 'running' RETURNING queue"
#: Of many at once: they are most.
_SUCCEED = (
    "DELETE FROM task WHERE consumer = ? AND token IN (SELECT value FROM json_each(?)) AND state = 'running'"
    " RETURNING queue, token"
)
_RELEASE = f"UPDATE task SET state = 'ready', consumer = NULL, token = NULL {_FENCE}"  # noqa: S608 - constants
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
    return _RELEASE, ()


def _of_kept(updates: Sequence[Status], settled: Sequence[Settled], kept: set[int]) -> list[Status]:
    """Without those of tasks that were lost: whoever has them tells. What is not settled here is the caller's own."""
    ids = {item.id for item in settled if item.token in kept}
    lost = {item.id for item in settled} - ids
    return [update for update in updates if update.id not in lost]


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


def _array(numbers: Sequence[int]) -> str:
    """For `json_each`: as text, since SQLite 3.45.0 takes bytes for its own binary JSON."""
    return msgspec.json.encode(numbers).decode()


def _dead_letter(reason: object, traceback: object, died_at: object, worker: object, *columns: object) -> DeadLetter:
    envelope = envelope_of(columns)
    if type(columns[0]) is not str:
        envelope = msgspec.structs.replace(envelope, id=new_id())
    return DeadLetter(
        envelope,
        *("" if reason is None else text(reason), "" if traceback is None else text(traceback)),
        *(unix_time(died_at), None if worker is None else text(worker)),
    )
