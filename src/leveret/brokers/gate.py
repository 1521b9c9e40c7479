"""Which of the tasks that wait for limits go next: counted, timed and in turn, in memory. No I/O.

Tasks with the same queue, limits and fairness key stand in one *lane*, and only the first of a lane is looked at. A
lane that a limit holds up is set aside until that limit has room: so what an admission costs does not grow with the
number of lanes that wait.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

import msgspec

from leveret.model import BUILT_IN, LimitRef, LimitUse, queue_limit

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping

    from leveret.model import LimitRow

T = TypeVar("T")
#: Tasks of a lane are alike in these: the queue, the limits, and for whom they are.
_Key: TypeAlias = "tuple[str, tuple[LimitRef, ...], str | None]"
#: Who is served in turn: a queue's fairness key, or else a lane.
_Group: TypeAlias = "tuple[str, str] | _Key"

#: So many turns and rates are remembered before those that are old are looked for.
_MANY = 20_000


class Permit(msgspec.Struct, frozen=True):
    """What an admitted task counts for."""

    queue: str
    refs: tuple[LimitRef, ...]


class Permits:
    """The limits, and what is admitted of each.

    ``began``: when whoever decides began to (Unix time). What had started by then is known of no rate but those that
    `restore` told of, so each of the others is taken to be spent then. None: nothing had started. ``told``: of rates
    with at least so long between two starts (seconds), `restore_rate` tells of all that had.
    """

    def __init__(self, began: float | None = None, told: float = float("inf")) -> None:
        self._began = began
        self._told = told
        self.rows: dict[str, LimitRow] = dict(BUILT_IN)
        #: Of the tasks that are admitted and have not ended, by id.
        self.held: dict[str, Permit] = {}
        self.admitted: Counter[LimitRef] = Counter()
        #: When a whole burst of a rate may start again (Unix time): see `leveret.model.Rate`.
        self._full_at: dict[LimitRef, float] = {}
        self._prune_at = _MANY

    def define(self, rows: Mapping[str, LimitRow | None]) -> None:
        """Limits are so from now on; None: there is no such limit any more."""
        for name, row in rows.items():
            row = BUILT_IN.get(name) if row is None else row
            if row is None:
                self.rows.pop(name, None)
            else:
                self.rows[name] = row

    def restore(self, id_: str, permit: Permit) -> None:
        """A task has a permit since before."""
        if id_ not in self.held:
            self.held[id_] = permit
            self.admitted.update(permit.refs)

    def restore_rate(self, ref: LimitRef, full_at: float) -> None:
        """When a whole burst of a rate may start, as it was known before."""
        self._full_at[ref] = max(full_at, self._full_at.get(ref, 0.0))

    def full_at(self, ref: LimitRef) -> float:
        known = self._full_at.get(ref)
        if known is not None:
            return known
        row = self.rows.get(ref[0])
        if self._began is None or row is None or row.rule.rate is None or row.rule.rate.interval >= self._told:
            return 0.0
        return row.rule.rate.spent(self._began)

    def take(self, id_: str, permit: Permit, now: float) -> None:
        """A task is admitted."""
        self.held[id_] = permit
        self.admitted.update(permit.refs)
        for ref in permit.refs:
            row = self.rows.get(ref[0])
            if row is not None and row.rule.rate is not None:
                self._full_at[ref] = row.rule.rate.started(self.full_at(ref), now)
        if len(self._full_at) > self._prune_at:
            self._prune(now)

    def end(self, id_: str) -> Permit | None:
        """A task gives back what it had."""
        permit = self.held.pop(id_, None)
        if permit is not None:
            self.admitted.subtract(permit.refs)
            for ref in permit.refs:
                if not self.admitted[ref]:
                    del self.admitted[ref]
        return permit

    def held_until(self, ref: LimitRef, now: float) -> float | None:
        """Until when a limit has no room (Unix time; 0: that does not depend on the time); None: it has room."""
        row = self.rows.get(ref[0])
        return None if row is None else row.held_until(ref[1], self.admitted[ref], self.full_at(ref), now)

    def _prune(self, now: float) -> None:
        """Forget rates that say no more than the absence of what is known does."""
        known, self._full_at = self._full_at, {}
        self._full_at = {ref: full_at for ref, full_at in known.items() if full_at > max(now, self.full_at(ref))}
        self._prune_at = 2 * len(self._full_at) + _MANY


class _Lane(Generic[T]):
    """Tasks that are alike: the first goes next."""

    def __init__(self, key: _Key) -> None:
        self.key = key
        queue, refs, fair = key
        self.queue = queue
        own = (queue_limit(queue), "")
        self.permit = Permit(queue, refs if own in refs else (*refs, own))
        self.group: _Group = key if fair is None else (queue, fair)
        #: By priority, then in order.
        self.tasks: list[tuple[int, int, str, T]] = []
        #: The number of its last entry among the lanes that may go; those before are void.
        self.entry = 0
        #: The limit that holds it up.
        self.held_by: LimitRef | None = None


#: A lane in a heap: by priority, turn, and the number that makes an entry void when the lane has a later one.
_Entry: TypeAlias = "tuple[int, int, int, _Lane[T]]"


class _Lanes(Generic[T]):
    """Where lanes stand: among those of their queue that may go, or with the limit that holds them up."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self._numbers = numbers
        #: The lanes that may go, by queue.
        self._ready: dict[str, list[_Entry[T]]] = {}
        #: Those that a limit holds up, by limit and queue: each queue is asked for by itself.
        self._held: dict[LimitRef, dict[str, list[_Entry[T]]]] = {}
        #: When a limit that holds lanes up has room again, the first first; and the time that counts for each.
        self._alarms: list[tuple[float, LimitRef]] = []
        self._alarm_of: dict[LimitRef, float] = {}
        self._turns: dict[_Group, int] = {}
        self._by_key: dict[_Key, _Lane[T]] = {}

    def __iter__(self) -> Iterator[_Lane[T]]:
        return iter(self._by_key.values())

    def of(self, key: _Key) -> _Lane[T]:
        """The lane of such tasks."""
        lane = self._by_key.get(key)
        if lane is None:
            lane = self._by_key[key] = _Lane(key)
        return lane

    def remove(self, lane: _Lane[T]) -> None:
        """An empty lane."""
        self._by_key.pop(lane.key, None)

    def holds(self, ref: LimitRef) -> bool:
        """Whether a limit holds lanes up."""
        return ref in self._held

    def held_by(self, names: Container[str]) -> list[LimitRef]:
        """Those of these limits that hold lanes up."""
        return [ref for ref in self._held if ref[0] in names]

    def queues(self) -> list[str]:
        """The queues that have lanes which may go, as far as is known."""
        return [queue for queue, lanes in self._ready.items() if lanes]

    def next_time(self) -> float | None:
        """See `Gate.next_time`."""
        return self._alarms[0][0] if self._alarms else None

    def served(self, lane: _Lane[T]) -> None:
        """It comes after all others now."""
        self._turns[lane.group] = next(self._numbers)
        if len(self._turns) > 2 * _MANY:
            # Who has not been served for long goes first, known or not.
            self._turns = dict(sorted(self._turns.items(), key=lambda item: item[1])[_MANY:])

    def next(self, queue: str) -> _Lane[T] | None:
        """Take out the lane of a queue that is next, which may be empty."""
        return self._first(self._ready.get(queue, []))

    def put_back(self, lane: _Lane[T]) -> None:
        """A lane that `next` gave goes on standing where it stood."""
        heapq.heappush(self._ready[lane.queue], (*self._place(lane), lane.entry, lane))

    def stand(self, lane: _Lane[T]) -> None:
        """Among those that may go, or that its limit holds up."""
        queues = self._ready if lane.held_by is None else self._held.setdefault(lane.held_by, {})
        lane.entry = next(self._numbers)
        heapq.heappush(queues.setdefault(lane.queue, []), (*self._place(lane), lane.entry, lane))

    def wake(self, ref: LimitRef) -> None:
        """The first lane of each queue that a limit holds up may try."""
        queues = self._held.get(ref, {})
        for queue, heap in list(queues.items()):
            while (lane := self._first(heap)) is not None:
                if lane.tasks:
                    lane.held_by = None
                    self.stand(lane)
                    break
                self.remove(lane)
            if not heap:
                del queues[queue]
        if not queues:
            self._held.pop(ref, None)

    def set_alarm(self, ref: LimitRef, until: float) -> None:
        """A limit has room at a time (Unix time; 0: that does not depend on the time)."""
        if until and until < self._alarm_of.get(ref, float("inf")):
            self._alarm_of[ref] = until
            heapq.heappush(self._alarms, (until, ref))

    def ring(self, now: float) -> None:
        """Lanes that were held up until now may try."""
        while self._alarms and self._alarms[0][0] <= now:
            when, ref = heapq.heappop(self._alarms)
            if self._alarm_of.get(ref) == when:
                del self._alarm_of[ref]
                self.wake(ref)

    def _first(self, heap: list[_Entry[T]]) -> _Lane[T] | None:
        """Take out the first lane, which may be empty."""
        while heap:
            rank, turn, entry, lane = heapq.heappop(heap)
            if entry == lane.entry:
                if not lane.tasks or (rank, turn) == self._place(lane):
                    return lane
                self.stand(lane)
                # Its group was served elsewhere: another lane that its limits hold up may come before it by now.
                for ref in lane.permit.refs if lane.held_by is None else ():
                    self.wake(ref)
        return None

    def _place(self, lane: _Lane[T]) -> tuple[int, int]:
        return lane.tasks[0][0], self._turns.get(lane.group, 0)


class Gate(Generic[T]):
    """The tasks that wait, in turn. ``T``: what stands for a task."""

    def __init__(self, permits: Permits) -> None:
        self.permits = permits
        self._numbers = itertools.count(1)
        self._lanes: _Lanes[T] = _Lanes(self._numbers)
        self._lane_of: dict[str, _Lane[T]] = {}

    def __len__(self) -> int:
        """How many wait."""
        return len(self._lane_of)

    def define(self, rows: Mapping[str, LimitRow | None]) -> None:
        """Limits are so from now on; None: there is no such limit any more."""
        self.permits.define(rows)
        for ref in self._lanes.held_by(rows):
            self._lanes.wake(ref)

    def add(self, id_: str, queue: str, refs: tuple[LimitRef, ...], fair: str | None, rank: int, task: T) -> None:
        """A task waits. ``rank``: its priority, the higher first. One that waits already stays as it is."""
        if id_ in self._lane_of:
            return
        lane = self._lanes.of((queue, refs, fair))
        heapq.heappush(lane.tasks, (-rank, next(self._numbers), id_, task))
        self._lane_of[id_] = lane
        if lane.tasks[0][2] == id_:
            self._lanes.stand(lane)

    def remove(self, id_: str) -> T | None:
        """A task waits no more; what stands for it."""
        lane = self._lane_of.pop(id_, None)
        if lane is None:
            return None
        place = next(place for place, entry in enumerate(lane.tasks) if entry[2] == id_)
        task = lane.tasks.pop(place)[3]
        heapq.heapify(lane.tasks)
        return task

    def swap(self, id_: str, task: T) -> None:
        """Something else stands for a task that waits."""
        tasks = self._lane_of[id_].tasks
        place = next(place for place, entry in enumerate(tasks) if entry[2] == id_)
        tasks[place] = (*tasks[place][:3], task)

    def clear(self, queue: str) -> list[T]:
        """Nothing of a queue waits any more; what stood for that, in order."""
        lanes = [lane for lane in self._lanes if lane.queue == queue]
        entries = sorted((entry for lane in lanes for entry in lane.tasks), key=lambda entry: entry[1])
        for lane in lanes:
            lane.tasks.clear()
        for _, _, id_, _ in entries:
            del self._lane_of[id_]
        return [task for _, _, _, task in entries]

    def waiting(self, queue: str) -> list[T]:
        """What stands for the tasks of a queue that wait, in order."""
        entries = [entry for lane in self._lanes if lane.queue == queue for entry in lane.tasks]
        return [task for _, _, _, task in sorted(entries, key=lambda entry: entry[:2])]

    def end(self, id_: str) -> bool:
        """A task gives its permit back; whether it had one."""
        permit = self.permits.end(id_)
        for ref in () if permit is None else permit.refs:
            self._lanes.wake(ref)
        return permit is not None

    def admit(self, queue: str, most: int, now: float) -> list[tuple[str, T]]:
        """Give permits to at most so many of a queue, in turn: their ids and what stands for them."""
        self.ring(now)
        found: list[tuple[str, T]] = []
        while len(found) < most and (lane := self._next(queue, now)) is not None:
            found.append(self._take(lane, now))
        return found

    def first(self, queue: str, now: float) -> T | None:
        """What stands for the task of a queue that `admit` gives next; None: none."""
        self.ring(now)
        lane = self._next(queue, now)
        if lane is None:
            return None
        self._lanes.put_back(lane)
        return lane.tasks[0][3]

    def queues(self) -> list[str]:
        """The queues that have lanes which may go, as far as is known."""
        return self._lanes.queues()

    def may_go(self, queue: str) -> int:
        """How many tasks of a queue wait, and are not known to be held up by a limit."""
        return sum(len(lane.tasks) for lane in self._lanes if lane.queue == queue and lane.held_by is None)

    def next_time(self) -> float | None:
        """When a limit that holds tasks up has room by the clock alone (Unix time); None: none is known to."""
        return self._lanes.next_time()

    def ring(self, now: float) -> None:
        """Lanes that were held up until now may try."""
        self._lanes.ring(now)

    def uses(self) -> list[LimitUse]:
        """Each limit with what it does now, by name."""
        keys: dict[str, set[str]] = {}
        waiting: Counter[str] = Counter()
        for lane in self._lanes:
            for name, key in lane.permit.refs if lane.tasks else ():
                waiting[name] += len(lane.tasks)
                keys.setdefault(name, set()).add(key)
        admitted: Counter[str] = Counter()
        for (name, key), count in self.permits.admitted.items():
            admitted[name] += count
            keys.setdefault(name, set()).add(key)
        rows = sorted(self.permits.rows.items())
        uses = [LimitUse(row, admitted[name], waiting[name], len(keys.get(name, ()))) for name, row in rows]
        return [use for use in uses if use.keys or use.row != BUILT_IN.get(use.row.name)]

    def _next(self, queue: str, now: float) -> _Lane[T] | None:
        """Take out the lane of a queue that goes next. Those that cannot are set aside."""
        while (lane := self._lanes.next(queue)) is not None:
            if not lane.tasks:
                self._lanes.remove(lane)
                self._pass_on(lane, now)
            elif not self._is_held(lane, now):
                return lane
        return None

    def _take(self, lane: _Lane[T], now: float) -> tuple[str, T]:
        _, _, id_, task = heapq.heappop(lane.tasks)
        del self._lane_of[id_]
        self.permits.take(id_, lane.permit, now)
        self._lanes.served(lane)
        if lane.tasks:
            self._lanes.stand(lane)
        else:
            self._lanes.remove(lane)
        self._pass_on(lane, now)
        return id_, task

    def _is_held(self, lane: _Lane[T], now: float) -> bool:
        """Set it aside if a limit has no room for it."""
        for ref in lane.permit.refs:
            until = self.permits.held_until(ref, now)
            if until is not None:
                lane.held_by = ref
                self._lanes.stand(lane)
                self._lanes.set_alarm(ref, until)
                self._pass_on(lane, now)
                return True
        return False

    def _pass_on(self, lane: _Lane[T], now: float) -> None:
        """What it has left of its limits, or cannot use, others may."""
        for ref in lane.permit.refs:
            if ref != lane.held_by and self._lanes.holds(ref):
                until = self.permits.held_until(ref, now)
                if until is None:
                    self._lanes.wake(ref)
                else:
                    self._lanes.set_alarm(ref, until)
