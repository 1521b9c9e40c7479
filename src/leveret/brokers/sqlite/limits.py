"""Limits in the file, and the tasks that wait for them, in lanes.

A task is admitted in the transaction that deals it, so its start follows at once. It has its permit while it is
running, and while it is ready again since its worker left it. One of a lane that is delayed, limited or dead has none.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.brokers.base import no_limit
from leveret.brokers.sqlite.admitting import Admitting
from leveret.brokers.sqlite.rows import headers_in
from leveret.brokers.sqlite.sql import Statements, array
from leveret.model import (
    BUILT_IN,
    FAIR_KEY,
    LIMITS,
    MIDDLE_PRIORITY,
    DeclareLimits,
    LimitRow,
    LimitUse,
    RestLimit,
    decoded,
    fair_key,
    is_limited,
    limit_refs,
    limits_after,
    queue_limit,
    unix_time,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from leveret.model import Envelope, LimitRef, LimitRequest, PutOff

#: When so many lanes were made, empty ones are forgotten, but for so many that were served last: whoever is not known
#: goes first.
_MORE, _KEPT = 5_000, 20_000
#: Whether lanes of a queue may go, and whether the queue has a limit.
_CONCERNS = (
    "SELECT EXISTS (SELECT 1 FROM lane WHERE queue = ?1 AND rank IS NOT NULL AND held_by IS NULL),"
    " EXISTS (SELECT 1 FROM limit_row WHERE name = 'queue:' || (SELECT name FROM queue WHERE id = ?1))"
)
_WAITING = "SELECT lane, count(*) AS tasks FROM task WHERE state = 'limited' GROUP BY lane"
_COUNT = (
    "SELECT count(*) FROM (SELECT 1 FROM lane CROSS JOIN task ON task.lane = lane.id AND state = 'limited'"
    " WHERE lane.queue = ?{} LIMIT ?)"
)
_ROWS = "SELECT name, row FROM limit_row"
_NAMED = f"{_ROWS} WHERE name IN (SELECT value FROM json_each(?))"  # noqa: S608 - a constant
_FORGET_LANES = (
    "DELETE FROM lane WHERE id IN (SELECT id FROM lane WHERE rank IS NULL"
    " AND NOT EXISTS (SELECT 1 FROM task WHERE task.lane = lane.id) ORDER BY turn DESC LIMIT -1 OFFSET ?)"
)
_FORGET_USES = (
    "DELETE FROM limit_use WHERE admitted = 0 AND full_at < ?"
    " AND id NOT IN (SELECT wanted.value FROM lane, json_each(lane.uses) AS wanted)"
)
_HOLDING = "SELECT id FROM limit_use WHERE name = ? AND EXISTS (SELECT 1 FROM lane WHERE held_by = limit_use.id)"
_HAS_USE = (
    "SELECT 1 FROM lane, json_each(uses) AS used JOIN limit_use ON limit_use.id = used.value"
    " WHERE lane.id = ? AND name = ? AND limit_use.key = ?"
)
_pack = msgspec.json.Encoder().encode
_unpack = msgspec.json.Decoder(LimitRow).decode
_numbers = msgspec.json.Decoder(list[int]).decode


class Limits(Statements):
    """``deal``: have queues dealt in this transaction. ``ticks``: so many numbers that nothing had before."""

    def __init__(
        self,
        database: sqlite3.Connection,
        deal: Callable[[Iterable[int]], None],
        ticks: Callable[[int], range],
    ) -> None:
        super().__init__(database)
        self._deal = deal
        #: Permits that ended in this transaction, by lane; and the uses that are to wake lanes.
        self._ended: Counter[int] = Counter()
        self._roused: set[int] = set()
        #: Lanes may be forgotten, when all that is to wait in them is stored.
        self._are_many = False
        self._admitting = Admitting(database, ticks)

    def end(self) -> None:
        """The transaction has ended."""
        self._ended.clear()
        self._roused.clear()
        self._are_many = False
        self._admitting.forget()  # what an error left half done

    # What is asked of limits.

    def all(self) -> Sequence[LimitUse]:
        waiting: Counter[str] = Counter()
        keys: dict[str, set[str]] = {}
        refs: dict[int, LimitRef] = {}
        admitted: Counter[str] = Counter()
        for id_, name, key, count in self.execute("SELECT id, name, key, admitted FROM limit_use").fetchall():
            refs[id_] = (name, key)
            admitted[name] += count
            if count:
                keys.setdefault(name, set()).add(key)
        sql = f"SELECT uses, sum(tasks) FROM ({_WAITING}) JOIN lane ON lane.id = lane GROUP BY uses"  # noqa: S608
        for uses, count in self.execute(sql).fetchall():
            for name, key in (refs[id_] for id_ in decoded(_numbers, uses) or () if id_ in refs):
                waiting[name] += count
                keys.setdefault(name, set()).add(key)
        rows = sorted(self._rows(_ROWS).items())
        return [LimitUse(row, admitted[name], waiting[name], len(keys.get(name, ()))) for name, row in rows]

    def ask(self, request: LimitRequest) -> None:
        """Raises LimitNotFound; then it has written nothing."""
        if not self._change(request, time.time()):
            raise no_limit(request)
        # A queue that has a limit from now on lets what is ready wait for it.
        self._deal([id_ for (id_,) in self.execute("SELECT id FROM queue").fetchall()])

    def _change(self, request: LimitRequest, now: float) -> bool:
        names = list(request.rules) if isinstance(request, DeclareLimits) else [request.name]
        rows = self._rows(_NAMED, array(names))
        changed = limits_after(request, rows, now)
        if changed is None:
            return False
        for name, row in changed.items():
            if row is None:
                self.execute("DELETE FROM limit_row WHERE name = ?", name)
            else:
                self.execute("INSERT OR REPLACE INTO limit_row (name, row) VALUES (?, ?)", name, _pack(row))
            self._roused.update(id_ for (id_,) in self.execute(_HOLDING, name).fetchall())
        return True

    def put_off(self, outcome: PutOff, lane: int | None) -> bool:
        """A task says that a limit has no room for a while; whether it waits for that limit itself."""
        now = time.time()
        rests = self._change(RestLimit(outcome.limit, outcome.key, now + outcome.delay), now)
        return rests and self.execute(_HAS_USE, lane, outcome.limit, outcome.key).fetchone() is not None

    def _rows(self, sql: str, *values: object) -> dict[str, LimitRow]:
        """Those that Leveret wrote; another program may have written others."""
        found = {name: decoded(_unpack, row) for name, row in self.execute(sql, *values).fetchall()}
        return {name: row for name, row in found.items() if row is not None}

    # Who waits.

    def lanes_of(self, envelopes: Sequence[Envelope], queues: Mapping[str, int]) -> dict[str, int]:
        """Where those tasks wait that have limits, by id. ``queues``: the numbers of the queues, by name."""
        found: dict[str, int] = {}
        known: dict[bytes, int] = {}
        for one in envelopes:
            if one.headers and is_limited(one.headers):
                alike = _pack((one.queue, one.headers.get(LIMITS), one.headers.get(FAIR_KEY)))
                lane = known.get(alike) or self._lane(queues[one.queue], one.queue, one.headers)
                known[alike] = found[one.id] = lane
        return found

    def wait(self, tasks: Iterable[tuple[int, int | None]]) -> None:
        """Tasks wait from now on: of each its lane and its priority."""
        ranks: dict[int, int] = {}
        for lane, priority in tasks:
            rank = -MIDDLE_PRIORITY if priority is None else -priority
            ranks[lane] = min(rank, ranks.get(lane, rank))
        rows = [(rank, lane) for lane, rank in ranks.items()]
        self.database.executemany("UPDATE lane SET rank = ?1 WHERE id = ?2 AND (rank IS NULL OR rank > ?1)", rows)

    def ended(self, lanes: Iterable[int]) -> None:
        """Tasks of these lanes give their permits back."""
        self._ended.update(lanes)

    def ended_in(self, queue: int) -> None:
        """All that is ready in a queue gives its permits back."""
        sql = "SELECT lane FROM task WHERE queue = ? AND state = 'ready' AND lane IS NOT NULL"
        self.ended(lane for (lane,) in self.execute(sql, queue))

    def forget(self, queue: int) -> None:
        """A queue is deleted."""
        self.begin()
        self.execute("DELETE FROM lane WHERE queue = ?", queue)

    def _lane(self, queue: int, name: str, headers: Mapping[str, Any]) -> int:
        refs, fair = limit_refs(headers), fair_key(headers)
        key = _pack((refs, fair)).decode()
        found = self.execute("SELECT id FROM lane WHERE queue = ? AND key = ?", queue, key).fetchone()
        if found is not None:
            return int(found[0])
        uses = [self._use(ref) for ref in dict.fromkeys([*refs, (queue_limit(name), "")])]
        turn = (
            None
            if fair is None
            else self.execute("SELECT max(turn) FROM lane WHERE queue = ? AND fair = ?", queue, fair).fetchone()[0]
        )
        made = self.execute(
            "INSERT INTO lane (queue, key, uses, fair, turn) VALUES (?, ?, ?, ?, ?)",
            queue,
            key,
            array(uses),
            fair,
            turn or 0,
        )
        lane = int(made.lastrowid or 0)
        self._are_many |= lane % _MORE == 0
        return lane

    def _use(self, ref: LimitRef) -> int:
        found = self.execute("SELECT id FROM limit_use WHERE name = ? AND key = ?", *ref).fetchone()
        if found is not None:
            return int(found[0])
        if (row := BUILT_IN.get(ref[0])) is not None:
            self.execute("INSERT OR IGNORE INTO limit_row (name, row) VALUES (?, ?)", row.name, _pack(row))
        return int(self.execute("INSERT INTO limit_use (name, key) VALUES (?, ?)", *ref).lastrowid or 0)

    def count(self, queue: int, most: int, *, may_go: bool = False) -> int:
        """How many wait in a queue, no more than ``most``. ``may_go``: of those that no limit is known to hold up."""
        which = " AND rank IS NOT NULL AND held_by IS NULL" if may_go else ""
        (count,) = self.execute(_COUNT.format(which), queue, most).fetchone()
        return int(count)

    def counts(self) -> Counter[int]:
        """How many wait, by queue."""
        waiting = self.execute(_WAITING).fetchall()
        found: Counter[int] = Counter()
        if waiting:
            queue_of = dict(self.execute("SELECT id, queue FROM lane").fetchall())
            for lane, count in waiting:
                if lane in queue_of:
                    found[queue_of[lane]] += count
        return found

    # Who goes next.

    def next_time(self) -> float | None:
        """When a limit that holds tasks up has room by the clock alone (Unix time)."""
        (wake_at,) = self.execute("SELECT min(wake_at) FROM limit_use WHERE wake_at IS NOT NULL").fetchone()
        return unix_time(wake_at)

    def ring(self, now: float) -> None:
        """Lanes that were held up until now may try."""
        rung = self.execute("UPDATE limit_use SET wake_at = NULL WHERE wake_at <= ? RETURNING id", now).fetchall()
        self._roused.update(id_ for (id_,) in rung)

    def begin(self) -> None:
        """Permits that have ended are others' to have. The queues that this concerns are dealt."""
        if self._ended or self._roused:
            self._admitting.give_back(self._ended, self._roused)
            self._ended.clear()
            self._roused.clear()
            self._deal(self._admitting.finish())
        if self._are_many:
            self._are_many = False
            self.execute(_FORGET_LANES, _KEPT)
            self.execute(_FORGET_USES, time.time())

    def may_admit(self, queue: int) -> bool:
        """Whether what waits in a queue may go. What is ready in a queue that has a limit waits from now on."""
        may_go, has_limit = self.execute(_CONCERNS, queue).fetchone()
        return bool((has_limit and self._limit_ready(queue)) or may_go)

    def admit(self, queue: int, ready: Sequence[tuple[int, int]], most: int) -> tuple[list[int], bool]:
        """See `Admitting.merge`; and whether a limit is to be looked at earlier than was known."""
        found = self._admitting.merge(queue, ready, most)
        self._deal(self._admitting.finish())
        is_timed, self._admitting.is_timed = self._admitting.is_timed, False
        return found, is_timed

    def _limit_ready(self, queue: int) -> bool:
        """What is ready in a queue that has a limit, and has no permit, waits for it; whether there was such a task."""
        rows = self.execute(
            "SELECT seq, priority, headers FROM task WHERE queue = ? AND state = 'ready' AND lane IS NULL", queue
        ).fetchall()
        if not rows:
            return False
        (name,) = self.execute("SELECT name FROM queue WHERE id = ?", queue).fetchone()
        lanes = [self._lane(queue, name, headers_in(headers)) for _, _, headers in rows]
        self.database.executemany(
            "UPDATE task SET state = 'limited', lane = ? WHERE seq = ?",
            [(lane, row[0]) for lane, row in zip(lanes, rows, strict=True)],
        )
        self.wait((lane, row[1]) for lane, row in zip(lanes, rows, strict=True))
        return True
