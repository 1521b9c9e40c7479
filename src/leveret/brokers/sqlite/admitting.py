"""Who goes next of those that wait for limits, in one transaction. The rules are those of `leveret.brokers.gate`.

Tasks that are alike in queue, limits and fairness key stand in one lane, and only the first of a lane is looked at. A
lane that a limit holds up is marked with it until that limit has room: then one lane of each queue may try, and whoever
is served or cannot use what there is passes it on.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from leveret.brokers.sqlite.sql import Statements, array
from leveret.model import MIDDLE_PRIORITY, LimitRow, decoded

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from leveret.model import LimitRef

#: So many lanes are read at first of those that may go; then twice as many, and so on.
_LANES = 16
#: So many tasks of a lane are read at first, and at most.
_FEW, _MANY = 2, 500
#: So many turns are had from the file at once, at most.
_TURNS = 1_000
_BEFORE_ALL = (-(2**31), -1, -1)
_LANE = "SELECT id, queue, uses, fair, rank, turn, held_by FROM lane"
# Both as their indexes have them.
_USED = "SELECT id, uses FROM lane WHERE id IN (SELECT value FROM json_each(?))"
_OPEN = (
    f"{_LANE} WHERE queue = ? AND rank IS NOT NULL AND held_by IS NULL AND (rank, turn, id) > (?, ?, ?)"
    " ORDER BY rank, turn, id LIMIT ?"
)
_FIRST_HELD = f"{_LANE} WHERE held_by = ? AND queue = ? ORDER BY rank, turn, id LIMIT 1"
_NEXT_QUEUE = "SELECT min(queue) FROM lane WHERE held_by = ? AND queue > ?"
_TASKS = (
    f"SELECT seq, -coalesce(priority, {MIDDLE_PRIORITY}) FROM task WHERE lane = ? AND state = 'limited'"  # noqa: S608
    f" ORDER BY coalesce(priority, {MIDDLE_PRIORITY}) DESC, seq LIMIT ? OFFSET ?"
)
_USES = (
    "SELECT limit_use.id, limit_use.name, limit_use.key, admitted, full_at, wake_at, row,"
    " EXISTS (SELECT 1 FROM lane WHERE held_by = limit_use.id) FROM json_each(?) AS wanted"
    " CROSS JOIN limit_use ON limit_use.id = wanted.value LEFT JOIN limit_row ON limit_row.name = limit_use.name"
)
_unpack = msgspec.json.Decoder(LimitRow).decode
_numbers = msgspec.json.Decoder(list[int]).decode
#: Where a lane stands: its first task's priority, turned round, its turn, and its number.
_Place: TypeAlias = "tuple[int, int, int]"


class _Use:
    """A limit with a key, and what is admitted of it."""

    __slots__ = ("admitted", "full_at", "holds", "id", "key", "row", "wake_at")

    def __init__(
        self, id_: int, ref: LimitRef, row: LimitRow | None, admitted: int, full_at: float, wake_at: float | None
    ) -> None:
        self.id = id_
        self.key = ref[1]
        self.row = row
        self.admitted = admitted
        self.full_at = full_at
        #: When it has room by the clock, and lanes wait for that.
        self.wake_at = wake_at
        #: Whether it holds lanes up.
        self.holds = False

    def held_until(self, now: float) -> float | None:
        return None if self.row is None else self.row.held_until(self.key, self.admitted, self.full_at, now)

    def take(self, now: float) -> None:
        self.admitted += 1
        rate = None if self.row is None else self.row.rule.rate
        if rate is not None:
            self.full_at = rate.started(self.full_at, now)


class _Lane:
    """Tasks that are alike."""

    __slots__ = ("fair", "held_by", "id", "is_whole", "queue", "rank", "read", "tasks", "turn", "uses")

    id: int
    queue: int
    #: For whom its tasks are.
    fair: str | None
    #: The priority of its first task, turned round; None: none waits.
    rank: int | None
    turn: int
    #: The use that holds it up.
    held_by: int | None

    def __init__(self, row: Sequence[Any], uses: list[_Use]) -> None:
        self.id, self.queue, _, self.fair, self.rank, self.turn, self.held_by = row
        self.uses = uses
        #: Of its tasks those that are read and not taken, how many were read, and whether those were all.
        self.tasks: deque[tuple[int, int]] = deque()
        self.read = 0
        self.is_whole = False

    @property
    def group(self) -> tuple[int, str] | int:
        """Who is served in turn."""
        return self.id if self.fair is None else (self.queue, self.fair)


class Admitting(Statements):
    """``ticks``: so many numbers that nothing had before."""

    def __init__(self, database: sqlite3.Connection, ticks: Callable[[int], range]) -> None:
        super().__init__(database)
        self._ticks = ticks
        self._now = 0.0
        #: What is read of the file, until `finish`; and what of it has changed.
        self._uses: dict[int, _Use] = {}
        self._lanes: dict[int, _Lane] = {}
        self._used: set[_Use] = set()
        self._moved: set[_Lane] = set()
        #: The turns of those who were served.
        self._turns: dict[tuple[int, str] | int, int] = {}
        self._free_turns: Iterator[int] = iter(())
        self._reserve = _TURNS
        #: The queue that is dealt, its lanes that may go and are read, the last of these, how many are read next.
        self._queue = -1
        self._line: list[_Place] = []
        self._last: _Place | None = None
        self._chunk = _LANES
        #: The other queues that have lanes which may go now.
        self._opened: set[int] = set()
        #: Whether a limit is to be looked at earlier than was known.
        self.is_timed = False

    def merge(self, queue: int, ready: Sequence[tuple[int, int]], most: int) -> list[int]:
        """The tasks that go next, limited and ready, by priority and then in order: at most so many (-1: any number).

        ``ready``: those that wait for nothing, each with its priority turned round.
        """
        self._now = time.time()
        self._queue, self._line, self._last, self._chunk = queue, [], _BEFORE_ALL, _LANES
        # Those of another transaction would be older than what others were given meanwhile.
        self._free_turns, self._reserve = iter(()), most if 0 < most < _TURNS else _TURNS
        found: list[int] = []
        plain = 0
        while len(found) != most:
            lane = self._next()
            other = ready[plain] if plain < len(ready) else None
            if lane is not None and (other is None or lane.tasks[0][::-1] < other[::-1]):
                found.append(self._take(lane))
            elif other is not None:
                found.append(other[0])
                plain += 1
            else:
                break
        return found

    def give_back(self, ended: Mapping[int, int], roused: Iterable[int]) -> None:
        """So many tasks of these lanes have ended, and these uses may have room."""
        self._now, self._queue = time.time(), -1
        given: Counter[int] = Counter()
        for id_, uses in self.execute(_USED, array(list(ended))):
            given.update(dict.fromkeys(_used(uses), ended[id_]))
        self._load({*given, *roused})
        for use in self._uses.values():
            if use.id in given:
                use.admitted = max(0, use.admitted - given[use.id])
                self._used.add(use)
        for use in list(self._uses.values()):
            if use.holds:
                self._wake(use)

    def finish(self) -> set[int]:
        """Write down what has changed; the queues that have lanes which may go now."""
        self._write_lanes()
        if self._used:
            rows = [(use.admitted, use.full_at, use.wake_at, use.id) for use in self._used]
            self.database.executemany("UPDATE limit_use SET admitted = ?, full_at = ?, wake_at = ? WHERE id = ?", rows)
        opened = self._opened
        self.forget()
        return opened

    def forget(self) -> None:
        """What is read is not so any more."""
        for known in (self._used, self._moved, self._uses, self._lanes, self._turns):
            known.clear()
        self._opened = set()

    def _write_lanes(self) -> None:
        if self._moved:
            rows = [(lane.rank, self._turn_of(lane), lane.held_by, lane.id) for lane in self._moved]
            self.database.executemany("UPDATE lane SET rank = ?, turn = ?, held_by = ? WHERE id = ?", rows)
            shared = {(self._turn_of(lane), lane.queue, lane.fair) for lane in self._moved if lane.fair is not None}
            self.database.executemany("UPDATE lane SET turn = ?1 WHERE queue = ?2 AND fair = ?3 AND turn < ?1", shared)
            self._moved.clear()

    def _next(self) -> _Lane | None:
        """The lane that goes next; it stands first in the line. Those that cannot are set aside."""
        while True:
            while self._last is not None and (not self._line or self._line[0] > self._last):
                self._read_lanes(self._last)
            if not self._line:
                return None
            place = self._line[0]
            lane = self._lanes[place[2]]
            if lane.held_by is not None or lane.rank is None:
                heapq.heappop(self._line)
            elif not lane.tasks and not self._has_task(lane):
                heapq.heappop(self._line)
                self._pass_on(lane)
            elif (now := self._place(lane)) != place:
                # Its group was served elsewhere: another that its limits hold up may come before it by now.
                heapq.heapreplace(self._line, now)
                self._pass_on(lane)
            elif self._is_held(lane):
                heapq.heappop(self._line)
                self._pass_on(lane)
            else:
                return lane

    def _read_lanes(self, after: _Place) -> None:
        rows = self.execute(_OPEN, self._queue, *after, self._chunk).fetchall()
        for lane in self._lanes_of(rows):
            heapq.heappush(self._line, self._place(lane))
        self._last = (rows[-1][4], rows[-1][5], rows[-1][0]) if len(rows) == self._chunk else None
        self._chunk *= 2

    def _lanes_of(self, rows: Sequence[Sequence[Any]]) -> list[_Lane]:
        wanted = {row[0]: _used(row[2]) for row in rows if row[0] not in self._lanes}
        self._load({use for uses in wanted.values() for use in uses})
        for row in rows:
            if row[0] in wanted:
                uses = [self._uses[use] for use in wanted[row[0]] if use in self._uses]
                self._lanes[row[0]] = _Lane(row, uses)
        return [self._lanes[row[0]] for row in rows]

    def _load(self, uses: set[int]) -> None:
        missing = uses - self._uses.keys()
        if not missing:
            return
        for id_, name, key, admitted, full_at, wake_at, row, holds in self.execute(_USES, array(sorted(missing))):
            found = None if row is None else decoded(_unpack, row)
            self._uses[id_] = use = _Use(id_, (name, key), found, admitted, full_at, wake_at)
            use.holds = bool(holds)

    def _has_task(self, lane: _Lane) -> bool:
        """Read the lane's first task; it may be another one than is written at the lane."""
        if not lane.tasks and not lane.is_whole:
            wanted = min(_MANY, max(_FEW, 2 * lane.read))
            lane.tasks.extend(self.execute(_TASKS, lane.id, wanted, lane.read).fetchall())
            lane.read += len(lane.tasks)
            lane.is_whole = len(lane.tasks) < wanted
        rank = lane.tasks[0][1] if lane.tasks else None
        if rank != lane.rank:
            lane.rank = rank
            self._moved.add(lane)
        return rank is not None

    def _is_held(self, lane: _Lane) -> bool:
        for use in lane.uses:
            until = use.held_until(self._now)
            if until is not None:
                lane.held_by = use.id
                use.holds = True
                self._moved.add(lane)
                self._set_time(use, until)
                return True
        return False

    def _take(self, lane: _Lane) -> int:
        seq, _ = lane.tasks.popleft()
        self._turns[lane.group] = self._turn()
        self._moved.add(lane)
        self._has_task(lane)
        for use in lane.uses:
            use.take(self._now)
            self._used.add(use)
        self._pass_on(lane)
        return seq

    def _pass_on(self, lane: _Lane) -> None:
        """What it has left of its limits, or cannot use, others may."""
        for use in lane.uses:
            if use.holds and use.id != lane.held_by:
                until = use.held_until(self._now)
                if until is None:
                    self._wake(use)
                else:
                    self._set_time(use, until)

    def _wake(self, use: _Use) -> None:
        """The first lane of each queue that a limit holds up may try."""
        self._write_lanes()
        use.holds = False
        queue = -1
        while (queue := self._next_queue(use, queue)) >= 0:
            (lane,) = self._lanes_of(self.execute(_FIRST_HELD, use.id, queue).fetchall())
            lane.held_by = None
            self._moved.add(lane)
            # Perhaps there are more.
            use.holds = True
            if queue != self._queue:
                self._opened.add(queue)
            elif lane.rank is not None:
                heapq.heappush(self._line, self._place(lane))

    def _next_queue(self, use: _Use, queue: int) -> int:
        (found,) = self.execute(_NEXT_QUEUE, use.id, queue).fetchone()
        return -1 if found is None else int(found)

    def _set_time(self, use: _Use, until: float) -> None:
        if until and (use.wake_at is None or until < use.wake_at):
            use.wake_at = until
            self._used.add(use)
            self.is_timed = True

    def _turn(self) -> int:
        turn = next(self._free_turns, None)
        if turn is None:
            self._free_turns = iter(self._ticks(self._reserve))
            turn = next(self._free_turns)
        return turn

    def _turn_of(self, lane: _Lane) -> int:
        return self._turns.get(lane.group, lane.turn)

    def _place(self, lane: _Lane) -> _Place:
        return (lane.rank or 0, self._turn_of(lane), lane.id)


def _used(uses: object) -> list[int]:
    """The uses that a lane names; none if another program has written it."""
    return decoded(_numbers, uses) or [] if isinstance(uses, str) else []
