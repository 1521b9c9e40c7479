"""The SQL: what each operation does to the file, inside a transaction that its caller holds.

Used by one thread (`writer`). It asks for the letters (`recipients`) before it commits: what the consumers of this
process were dealt is read in the transaction that dealt it, and those of other processes are woken after the commit.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.brokers.base import duplicates
from leveret.brokers.sqlite.cancellations import Cancellations
from leveret.brokers.sqlite.dead_letters import DeadLetters
from leveret.brokers.sqlite.dealing import AGAIN, Dealing
from leveret.brokers.sqlite.questions import Questions
from leveret.brokers.sqlite.queues import Queues
from leveret.brokers.sqlite.recipients import Recipients
from leveret.brokers.sqlite.registrations import Registrations
from leveret.brokers.sqlite.rows import ENVELOPE, insertion, read, replacement, text, waits_in
from leveret.brokers.sqlite.schedules import Schedules
from leveret.brokers.sqlite.sql import Statements, array
from leveret.brokers.sqlite.statuses import Records, Watches
from leveret.errors import DuplicateTask
from leveret.model import (
    ID_FOR,
    KEEP,
    UNIQUE_FOR,
    Cancelled,
    DeadLettered,
    Envelope,
    KeyHolder,
    Outcome,
    PutOff,
    Queue,
    Released,
    Retrying,
    Status,
    Succeeded,
    id_for,
    id_key,
    id_token,
    may_replace,
    repeated,
    replaced,
    this_process,
    told_of,
    unique_for,
    unique_key,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from leveret.brokers.base import OnConflict


class Settled(msgspec.Struct, frozen=True):
    """An outcome for the task that was dealt under that token."""

    token: int
    id: str
    outcome: Outcome


class Store(Statements):
    """The operations. Each is atomic with whatever else its caller's transaction holds.

    ``declared``: see `Queues`. ``keep``: how long it is known what became of a task (seconds).
    """

    def __init__(
        self, database: sqlite3.Connection, *, keep: float = KEEP, declared: dict[str, Queue] | None = None
    ) -> None:
        super().__init__(database)
        self._keep = keep
        self.dealing = dealing = Dealing(database)
        self.limits = dealing.limits
        wake = dealing.woken.add
        self.watches = Watches(database, wake)
        self.records = Records(self.watches)
        self.cancellations = Cancellations(self.records, dealing)
        self.questions = Questions(database, wake)
        self.queues = Queues(dealing, self.records, self.watches, {} if declared is None else declared)
        self.dead_letters = DeadLetters(dealing, self.queues, self.records)
        self.schedules = Schedules(database, self.insert, self.records)
        self.recipients = Recipients(dealing, self.cancellations, self.questions)
        self.registrations = Registrations(
            dealing, self.queues, self.recipients, self.records, self.watches, self.cancellations, self.questions
        )

    def end(self, *, committed: bool) -> None:
        """The transaction has ended, in one way or the other."""
        self.dealing.end()
        self.recipients.end(committed=committed)
        self.registrations.end(committed=committed)

    def insert(self, envelopes: Sequence[Envelope], on_conflict: OnConflict = "raise") -> Mapping[str, str] | None:
        """Store tasks. Raises QueueNotFound, QueueFull or DuplicateTask; then it has written nothing.

        The ids of those whose unique keys are taken, which are not stored, each with that of the one that is there.
        """
        if on_conflict == "replace":
            self._free_taken(envelopes)
        existing = self._existing(envelopes)
        later: list[Envelope] = []
        if existing:
            if on_conflict == "raise":
                raise duplicates(existing)
            if on_conflict == "replace":
                later = [one for one in envelopes if one.id in existing]
            envelopes = [one for one in envelopes if one.id not in existing]
        if envelopes:
            self._insert_all(envelopes)
        for one in later:
            self._replace(existing[one.id], one)
        return existing or None

    def _insert_all(self, envelopes: Sequence[Envelope], *, is_bound: bool = True) -> None:
        """``is_bound``: to a queue's limit, and to the queues that there are."""
        by_queue: dict[str, int] = {}
        for envelope in envelopes:
            by_queue[envelope.queue] = by_queue.get(envelope.queue, 0) + 1
        if is_bound:
            ids = {name: self.queues.room_for(name, count, envelopes) for name, count in by_queue.items()}
        else:
            ids = {name: self.queues.made(name) for name in by_queue}
        lanes = self.limits.lanes_of(envelopes, ids)
        self._insert(*insertion(envelopes, ids, time.time(), lanes))
        if lanes:
            self.limits.wait((lanes[one.id], one.priority) for one in envelopes if one.id in lanes)
        if any(one.headers and (UNIQUE_FOR in one.headers or ID_FOR in one.headers) for one in envelopes):
            self._keep_keys(envelopes, time.time())
        self.dealing.deal(ids.values())

    def _replace(self, id_: str, by: Envelope) -> None:
        """Give a task the arguments of a later call, if it may have them. What runs has them when it runs again."""
        row = self.execute(_ROW, id_).fetchone()
        if row is None:
            return
        *columns, state, lane, queue = row
        held, problem = read(columns)
        if problem or not may_replace(held, by):
            return
        changed = replaced(held, by)
        if state == "running":
            changed = msgspec.structs.replace(changed, due=held.due)
        elif changed.due is not None and changed.due > time.time():
            if state == "ready" and lane is not None:
                self.limits.ended([lane])
            state = "delayed"
        self.execute(_REPLACE, *replacement(changed), state, id_)
        self.dealing.deal([queue])

    def _free_taken(self, envelopes: Sequence[Envelope]) -> None:
        """Tasks that have their keys until they are taken, and were: their workers are about to say so."""
        wanted = array([key for one in envelopes if (key := unique_key(one.headers)) is not None])
        for key, id_, headers in self.execute(_RUNNING_HOLDERS, wanted).fetchall():
            if waits_in(headers):
                self.free([(key, id_)])

    def _keep_keys(self, envelopes: Sequence[Envelope], now: float) -> None:
        """Keys and ids that their tasks have for a while; some that are free again are forgotten."""
        kept = [
            (key, one.id, now + period)
            for one in envelopes
            if (key := unique_key(one.headers)) is not None and (period := unique_for(one.headers)) is not None
        ]
        kept += [
            (id_key(one.id), one.id, now + period)
            for one in envelopes
            if id_token(one.headers) is not None and (period := id_for(one.headers)) is not None
        ]
        self.database.executemany("INSERT OR REPLACE INTO unique_hold (key, id, until) VALUES (?, ?, ?)", kept)
        old = self.execute("SELECT key FROM unique_hold WHERE until < ? LIMIT ?", now, 2 * len(kept)).fetchall()
        self.database.executemany("DELETE FROM unique_hold WHERE key = ?", old)

    def _existing(self, envelopes: Sequence[Envelope]) -> dict[str, str]:
        """Those whose unique keys or own ids are taken, each with the id of the task that is there, or before it in the
        call.
        """
        own = [one.id for one in envelopes if one.headers and id_token(one.headers) is not None]
        taken = {id_: id_ for id_ in self._taken_ids(own)} if own else {}
        keys = {one.id: key for one in envelopes if one.headers and (key := unique_key(one.headers)) is not None}
        if not keys:
            return taken
        wanted, now = array(list(keys.values())), time.time()
        rows = self.execute(_HOLDERS, wanted).fetchall()
        if self.execute("SELECT 1 FROM unique_hold LIMIT 1").fetchone():  # few have any
            rows += self.execute(_KEPT, wanted, now).fetchall()
        holders = {key: text(id_) for key, id_ in rows}
        found = {id_: holders.setdefault(key, id_) for id_, key in keys.items()}
        return taken | {id_: holder for id_, holder in found.items() if holder != id_}

    def _taken_ids(self, ids: Sequence[str]) -> list[str]:
        """Those of tasks that are there, or were not long ago."""
        holds = {id_key(id_): id_ for id_ in ids}
        kept = self.execute(_KEPT, array(list(holds)), time.time()).fetchall()
        return [*(holds[key] for key, _ in kept), *(text(id_) for (id_,) in self.execute(_THERE, array(list(ids))))]

    def holders(self, limit: int) -> list[KeyHolder]:
        rows = self.execute(
            "SELECT unique_key, task.id, queue.name FROM task JOIN queue ON queue.id = task.queue"
            " WHERE unique_key IS NOT NULL UNION SELECT key, unique_hold.id, coalesce(queue.name, '') FROM unique_hold"
            " LEFT JOIN task ON task.id = unique_hold.id LEFT JOIN queue ON queue.id = task.queue WHERE until > ?"
            " ORDER BY 1 LIMIT ?",
            *(time.time(), limit),
        )
        return [KeyHolder(*map(text, row)) for row in rows]

    def free(self, keys: Sequence[tuple[str, str]]) -> None:
        """Free keys, each of the task with that id."""
        self.database.executemany("UPDATE task SET unique_key = NULL WHERE unique_key = ? AND id = ?", keys)

    def release(self, key: str) -> str | None:
        """Free a key; the id of the task that had it."""
        row = self.execute("UPDATE task SET unique_key = NULL WHERE unique_key = ? RETURNING id", key).fetchone()
        if row is None:
            kept = "DELETE FROM unique_hold WHERE key = ? AND until > ? RETURNING id"
            row = self.execute(kept, key, time.time()).fetchone()
        return None if row is None else text(row[0])

    def _insert(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """All of the rows, or none. Raises DuplicateTask."""
        # One statement is atomic by itself; the transaction is shared with other requests, which go on.
        alone = len(rows) == 1
        if not alone:
            self.execute("SAVEPOINT tasks")
        try:
            self.database.executemany(sql, rows)
        except sqlite3.IntegrityError as error:
            if not alone:
                self.execute("ROLLBACK TO tasks")
                self.execute("RELEASE tasks")
            taken = self._taken([row[0] for row in rows])
            if not taken:
                raise
            raise DuplicateTask(taken) from error
        if not alone:
            self.execute("RELEASE tasks")

    def _taken(self, ids: Sequence[str]) -> list[str]:
        """Those of the ids that are in the file, or there twice."""
        stored = [id_ for id_ in ids if self.execute("SELECT 1 FROM task WHERE id = ?", id_).fetchone()]
        return list(dict.fromkeys([*stored, *repeated(ids)]))

    def settle(
        self, consumer: int, settled: Sequence[Settled], updates: Sequence[Status] = (), *, wake_up: str | None = None
    ) -> set[int]:
        """Record outcomes and deal again; the tokens that were this consumer's still."""
        if wake_up is not None and not self.registrations.is_registered(consumer, wake_up):
            return set()  # another file has come, where the number is nobody's or another's
        done = [item.token for item in settled if isinstance(item.outcome, (Succeeded, Cancelled))]
        rows = self.execute(_SUCCEED, consumer, array(done)).fetchall() if done else []
        ended = [(queue, token) for queue, token, _ in rows]
        self.limits.ended(lane for _, _, lane in rows if lane is not None)
        again = {item.token for item in settled if isinstance(item.outcome, (Retrying, Released, PutOff))}
        marked = self.cancellations.marked(consumer, again) if again else {}
        ended += [(queue, token) for token, (queue, _) in marked.items()]
        for item in settled:
            if not isinstance(item.outcome, (Succeeded, Cancelled)) and item.token not in marked:
                ended += self._end(consumer, item)
        kept = {token for _, token in ended}
        self.records.note(updates if len(kept) == len(settled) else _of_kept(updates, settled, kept))
        for _, id_ in marked.values():
            self.cancellations.end(consumer, id_)
        if updates:
            # By the workers alone: how long is their application's to say, and others may not know it.
            self.records.purge(self._keep, len(updates))
        self._follow_up(settled, kept)
        freed = Counter(queue for queue, _ in ended)
        for queue, more in freed.items():
            self.execute("UPDATE taker SET free = free + ? WHERE queue = ? AND consumer = ?", more, queue, consumer)
        self.dealing.deal(freed)
        return kept

    def _follow_up(self, settled: Sequence[Settled], kept: set[int]) -> None:
        """Store what outcomes set going, unless it is there."""
        following = [
            one
            for item in settled
            if isinstance(item.outcome, Succeeded) and item.outcome.follow_ups and item.token in kept
            for one in item.outcome.follow_ups
        ]
        if not following:
            return
        there = {text(id_) for (id_,) in self.execute(_THERE, array([one.id for one in following]))}
        fresh = {one.id: one for one in following if one.id not in there}
        if fresh:
            self._insert_all(list(fresh.values()), is_bound=False)
            if self.watches.is_watched():
                self.records.note(told_of(list(fresh.values()), time.time()))

    def _end(self, consumer: int, item: Settled) -> list[tuple[int, int]]:
        """Apply one outcome; the queue's number and the token, or nothing when the task has another token by now."""
        delay = self._delay(consumer, item)
        sql, values = _change(item.outcome, delay)
        rows = self.execute(sql, *values, consumer, item.token).fetchall()
        for _, lane, priority in rows if not isinstance(item.outcome, Released) else ():
            if lane is not None:
                self.limits.ended([lane])
                if not delay and not isinstance(item.outcome, DeadLettered):
                    self.limits.wait([(lane, priority)])
        return [(queue, item.token) for queue, _, _ in rows]

    def _delay(self, consumer: int, item: Settled) -> float:
        """How long a task that is to run again is delayed. One that is put off waits for the limit that rests."""
        if not isinstance(item.outcome, PutOff):
            return item.outcome.delay if isinstance(item.outcome, Retrying) else 0.0
        row = self.execute(_LANE, consumer, item.token).fetchone()
        return item.outcome.delay if row is None or not self.limits.put_off(item.outcome, row[0]) else 0.0


_HOLDERS = (
    "SELECT unique_key, task.id FROM json_each(?) AS wanted"
    " CROSS JOIN task ON unique_key IS NOT NULL AND unique_key = wanted.value"
)
_THERE = "SELECT task.id FROM json_each(?) AS wanted CROSS JOIN task ON task.id = wanted.value"
_RUNNING_HOLDERS = (
    "SELECT unique_key, task.id, headers FROM json_each(?) AS wanted"
    " CROSS JOIN task ON unique_key IS NOT NULL AND unique_key = wanted.value WHERE state = 'running'"
)
_ROW = (
    f"SELECT {ENVELOPE}, state, lane, queue.id FROM task JOIN queue ON queue.id = task.queue"  # noqa: S608 - a constant
    " WHERE task.id = ? AND state <> 'dead'"
)
_REPLACE = "UPDATE task SET body = ?, content_type = ?, due = ?, expires_at = ?, headers = ?, state = ? WHERE id = ?"
_KEPT = (
    "SELECT unique_hold.key, unique_hold.id FROM json_each(?) AS wanted"
    " CROSS JOIN unique_hold ON unique_hold.key = wanted.value WHERE until > ?"
)
_HELD = "WHERE consumer = ? AND token = ? AND state = 'running'"
_LANE = f"SELECT lane FROM task {_HELD}"  # noqa: S608 - a constant
_FENCE = f"{_HELD} RETURNING queue, lane, priority"
#: Of many at once: they are most.
_SUCCEED = (
    "DELETE FROM task WHERE consumer = ? AND token IN (SELECT value FROM json_each(?)) AND state = 'running'"
    " RETURNING queue, token, lane"
)
_RELEASE = f"UPDATE task SET state = 'ready', consumer = NULL, token = NULL {_FENCE}"  # noqa: S608 - constants
_STATE = f"CASE WHEN ?1 IS NULL THEN {AGAIN} ELSE 'delayed' END"
_RETRY = (
    "UPDATE task SET seq = (SELECT max(seq) + 1 FROM task), consumer = NULL, token = NULL, due = ?1,"  # noqa: S608
    f" state = {_STATE}, returns = 0, attempt = attempt + 1, last_error = ? {_FENCE}"
)
_PUT_OFF = f"UPDATE task SET consumer = NULL, token = NULL, due = ?1, state = {_STATE} {_FENCE}"  # noqa: S608
_BURY = (
    "UPDATE task SET state = 'dead', consumer = NULL, token = NULL, unique_key = NULL, reason = ?, traceback = ?,"  # noqa: S608
    f" died_at = ?, worker = ? {_FENCE}"
)


def _change(outcome: Outcome, delay: float) -> tuple[str, tuple[Any, ...]]:
    """The statement for an outcome and its first values; the fence's follow."""
    due = time.time() + delay if delay else None
    if isinstance(outcome, Retrying):
        return _RETRY, (due, outcome.error)
    if isinstance(outcome, PutOff):
        return _PUT_OFF, (due,)
    if isinstance(outcome, DeadLettered):
        return _BURY, (outcome.reason, outcome.traceback, time.time(), this_process())
    return _RELEASE, ()


def _of_kept(updates: Sequence[Status], settled: Sequence[Settled], kept: set[int]) -> list[Status]:
    """Without those of tasks that were lost: whoever has them tells. What is not settled here is the caller's own."""
    ids = {item.id for item in settled if item.token in kept}
    lost = {item.id for item in settled} - ids
    return [update for update in updates if update.id not in lost]
