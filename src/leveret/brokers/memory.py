"""A broker in this process's memory: for tests, and the plainest statement of what a broker does.

Nothing survives the process. Several brokers on one `MemoryStore` see the same queues.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

import msgspec

from leveret.brokers.base import Capabilities, duplicates, in_use, no_limit, no_schedule
from leveret.brokers.feeds import Feed, Feeds, Following, Watch
from leveret.brokers.gate import Gate, Permits
from leveret.brokers.inbox import Inbox
from leveret.brokers.urls import censor
from leveret.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DuplicateTask,
    LeaseLost,
    QueueFull,
    QueueMismatch,
    QueueNotFound,
)
from leveret.model import (
    KEEP,
    MIDDLE_PRIORITY,
    CancelRequest,
    Change,
    DeadLetter,
    DeadLettered,
    Delivery,
    Envelope,
    KeyHolder,
    LimitUse,
    Outcome,
    PutOff,
    Queue,
    QueueStats,
    Released,
    Removed,
    RestLimit,
    Retrying,
    ScheduleRow,
    Settlement,
    Status,
    Succeeded,
    advance,
    asked,
    buried,
    cancelled_before,
    cancelled_running,
    enqueued,
    fair_key,
    freed_key,
    id_for,
    id_key,
    id_token,
    is_limited,
    limit_refs,
    limits_after,
    may_replace,
    newer,
    placed,
    purged,
    put_off,
    queue_limit,
    repeated,
    replaced,
    retried,
    revived,
    revived_again,
    this_process,
    told_of,
    unique_for,
    unique_key,
    waiting_key,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
    from typing import Self

    from leveret.brokers.base import (
        Consumer,
        Control,
        DeadLetters,
        Limits,
        OnConflict,
        Queues,
        ScheduleKeeper,
        Select,
        Statuses,
        UniqueKeys,
        WaitingState,
    )
    from leveret.brokers.inbox import Arrival
    from leveret.model import Describe, LimitRequest, LimitRow, ScheduleRequest, WorkerReport


class Call(Protocol):
    """Something that a clock is to do."""

    def cancel(self) -> object:
        """It is not to be done any more."""


class Clock(Protocol):
    """What a store has its time from: a test may give one that it moves itself."""

    def time(self) -> float:
        """Unix time, seconds."""

    def call_at(self, when: float, callback: Callable[[], None], /) -> Call:
        """Call it when that time has come; in the running loop, if there is one."""


class SystemClock:
    """The time of this machine."""

    def time(self) -> float:
        return time.time()

    def call_at(self, when: float, callback: Callable[[], None]) -> Call:
        return asyncio.get_running_loop().call_later(when - time.time(), callback)


class MemoryStore:
    """The queues and who takes from them."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.queues: dict[str, _Stored] = {}
        #: Of every task that is ready, delayed, running or dead.
        self.ids: set[str] = set()
        #: The id of the task that has each unique key.
        self.unique: dict[str, str] = {}
        #: Those that tasks have for a while, whatever becomes of them: the task's id, and until when (Unix time).
        self.kept: dict[str, tuple[str, float]] = {}
        #: Numbers deliveries, and the places of ready tasks.
        self.tokens = itertools.count(1)
        #: What was told of tasks, the longest unchanged first.
        self.statuses: dict[str, Status] = {}
        self.feeds = Feeds()
        #: Of the workers that consume now.
        self.describers: list[Describe] = []
        self.schedules: dict[str, ScheduleRow] = {}
        #: The tasks that wait for limits.
        self.gate: Gate[_Waiting] = Gate(Permits())
        #: When a limit has room again, and what happens then.
        self._alarm: tuple[float, Call] | None = None

    def forget(self, envelope: Envelope) -> None:
        """A task has ended for good."""
        self.ids.discard(envelope.id)
        self.free(envelope)
        self.gate.end(envelope.id)

    def define(self, rows: Mapping[str, LimitRow | None]) -> None:
        """Limits are so from now on."""
        self.gate.define(rows)
        for stored in self.queues.values():
            stored.limit_ready()
        self.deal(self.queues)

    def free(self, envelope: Envelope) -> None:
        """A task's unique key is free."""
        key = freed_key(envelope.headers)
        if key is not None and self.unique.get(key) == envelope.id:
            del self.unique[key]

    def claim(self, envelope: Envelope) -> str:
        """The id of the task that has this one's unique key from now on: its own, unless another has it."""
        key = freed_key(envelope.headers)
        return envelope.id if key is None else self.unique.setdefault(key, envelope.id)

    def holder(self, key: str) -> str | None:
        """The id of the task that has a key."""
        id_, until = self.kept.get(key, ("", 0.0))
        return id_ if until > self.clock.time() else self.unique.get(key)

    def deal(self, names: Iterable[str]) -> None:
        """Hand out what is ready in these queues, and what limits let go in any."""
        for name in names:
            self.queues[name].deal(self.tokens)
        # Whoever was served, or cannot use what a limit has left, passes it on: to another queue too.
        while waiting := [
            stored for name, stored in self.queues.items() if name in self.gate.queues() and stored.may_deal
        ]:
            for stored in waiting:
                stored.deal(self.tokens)
        self._set_alarm(self.gate.next_time())

    def _set_alarm(self, when: float | None) -> None:
        if self._alarm is not None:
            if self._alarm[0] == when:
                return
            self._alarm[1].cancel()
        self._alarm = None if when is None else (when, self.clock.call_at(when, self._ring))

    def _ring(self) -> None:
        self._alarm = None
        self.gate.ring(self.clock.time())  # also where nobody takes what may go then
        self.deal(self.queues)


class _Stored:
    def __init__(self, queue: Queue, store: MemoryStore) -> None:
        self.queue = queue
        self._clock = store.clock
        self._gate = store.gate
        self._deal_all = store.deal
        #: A heap: the first is the next to be dealt.
        self.ready: list[_Waiting] = []
        self.dead: list[DeadLetter] = []
        #: What is not due, under a number of its own.
        self.delayed: dict[int, Envelope] = {}
        self._ripening: dict[int, Call] = {}
        self.paused = False
        #: In turn: whoever was dealt to last stands last.
        self.takers: deque[_Taker] = deque()

    def put(self, envelope: Envelope, tokens: itertools.count[int]) -> None:
        """Make a task ready, now or when it is due."""
        if envelope.due is None or envelope.due <= self._clock.time():
            rank = MIDDLE_PRIORITY if envelope.priority is None else envelope.priority
            waiting = _Waiting(-rank, next(tokens), envelope)
            if self._is_limited(envelope):
                self._wait(waiting)
            else:
                heapq.heappush(self.ready, waiting)
            return

        number = next(tokens)

        def become_ready() -> None:
            del self._ripening[number]
            del self.delayed[number]
            self.put(envelope, tokens)
            self._deal_all([self.queue.name])

        self.delayed[number] = envelope
        self._ripening[number] = self._clock.call_at(envelope.due, become_ready)

    def deal(self, tokens: itertools.count[int]) -> None:
        """Hand tasks to takers with free credit, in turn."""
        while not self.paused:
            taker = next((taker for taker in self.takers if taker.has_credit), None)
            waiting = None if taker is None else self._take_next()
            if taker is None or waiting is None:
                return
            self.takers.remove(taker)
            self.takers.append(taker)
            taker.give(next(tokens), waiting)

    @property
    def may_deal(self) -> bool:
        """Whether somebody may have what is ready."""
        return not self.paused and any(taker.has_credit for taker in self.takers)

    @property
    def limited(self) -> list[_Waiting]:
        """What waits for limits."""
        return self._gate.waiting(self.queue.name)

    def limit_ready(self) -> None:
        """What became ready before the queue had a limit waits for it, too."""
        if queue_limit(self.queue.name) in self._gate.permits.rows:
            free = [one for one in self.ready if one.envelope.id not in self._gate.permits.held]
            self.ready = [one for one in self.ready if one.envelope.id in self._gate.permits.held]
            heapq.heapify(self.ready)
            for waiting in sorted(free):
                self._wait(waiting)

    def _is_limited(self, envelope: Envelope) -> bool:
        own = self.queue.is_limited or queue_limit(self.queue.name) in self._gate.permits.rows
        return own or is_limited(envelope.headers)

    def _wait(self, waiting: _Waiting) -> None:
        envelope = waiting.envelope
        refs, fair = limit_refs(envelope.headers), fair_key(envelope.headers)
        self._gate.add(envelope.id, self.queue.name, refs, fair, -waiting.rank, waiting)

    def _take_next(self) -> _Waiting | None:
        """By priority, then in order; of what waits for limits, what they let go next."""
        now = self._clock.time()
        limited = self._gate.first(self.queue.name, now)
        if limited is not None and (not self.ready or limited < self.ready[0]):
            return self._gate.admit(self.queue.name, 1, now)[0][1]
        return heapq.heappop(self.ready) if self.ready else None

    def put_back(self, waiting: _Waiting) -> None:
        """Where it stood."""
        heapq.heappush(self.ready, waiting)

    def withdraw(self, id_: str) -> Envelope | None:
        """Take out a task that waits."""
        number = self._delayed_number(id_)
        if number is not None:
            self._ripening.pop(number).cancel()
            return self.delayed.pop(number)
        limited = self._gate.remove(id_) if any(one.envelope.id == id_ for one in self.limited) else None
        if limited is not None:
            return limited.envelope
        waiting = next((waiting for waiting in self.ready if waiting.envelope.id == id_), None)
        if waiting is None:
            return None
        self.ready.remove(waiting)
        heapq.heapify(self.ready)
        return waiting.envelope

    def replace(self, id_: str, by: Envelope, tokens: itertools.count[int]) -> None:
        """Give a task that is here the arguments of a later call, if it may have them. What runs has them next time."""
        envelope = self.envelope(id_)
        if envelope is None or not may_replace(envelope, by):
            return
        changed = replaced(envelope, by)
        for taker in self.takers:
            for token, held in taker.holding.items():
                if held.envelope is envelope:
                    changed = msgspec.structs.replace(changed, due=envelope.due)
                    taker.holding[token] = msgspec.structs.replace(held, envelope=changed)
                    return
        places = [place for place, waiting in enumerate(self.ready) if waiting.envelope is envelope]
        limited = next((one for one in self.limited if one.envelope is envelope), None)
        if places and changed.due == envelope.due:
            self.ready[places[0]] = msgspec.structs.replace(self.ready[places[0]], envelope=changed)
        elif limited is not None and changed.due == envelope.due:
            self._gate.swap(id_, msgspec.structs.replace(limited, envelope=changed))
        else:
            self.withdraw(id_)
            self._gate.end(id_)  # what came back to be ready has a permit
            self.put(changed, tokens)

    def envelope(self, id_: str) -> Envelope | None:
        """A task that waits or runs here."""
        held = [waiting.envelope for taker in self.takers for waiting in taker.holding.values()]
        waiting = [one.envelope for one in (*self.ready, *self.limited)]
        return next((one for one in (*held, *waiting, *self.delayed.values()) if one.id == id_), None)

    def is_held(self, id_: str) -> bool:
        """Whether a consumer has the task."""
        return any(waiting.envelope.id == id_ for taker in self.takers for waiting in taker.holding.values())

    def clear(self) -> list[Envelope]:
        """Take out all that waits."""
        waiting = [one.envelope for one in (*self.ready, *self._gate.clear(self.queue.name))]
        waiting += self.delayed.values()
        for call in self._ripening.values():
            call.cancel()
        self.ready.clear()
        self.delayed.clear()
        self._ripening.clear()
        return waiting

    def _delayed_number(self, id_: str) -> int | None:
        return next((number for number, envelope in self.delayed.items() if envelope.id == id_), None)

    def status(self, id_: str) -> Status | None:
        """Where the task is, if it is here."""
        now = self._clock.time()
        number = self._delayed_number(id_)
        if number is not None:
            return enqueued(self.delayed[number], now)
        letter = next((letter for letter in self.dead if letter.envelope.id == id_), None)
        if letter is not None:
            return buried(letter)
        held = [waiting for taker in self.takers for waiting in taker.holding.values()]
        for waiting in (*self.ready, *self.limited, *held):
            if waiting.envelope.id == id_:
                status = enqueued(waiting.envelope, now)
                return msgspec.structs.replace(status, state="running") if waiting in held else status
        return None


class _Waiting(msgspec.Struct, frozen=True, order=True):
    """A task with its place in the queue: the smaller is dealt first, and no two have the same."""

    rank: int
    place: int
    envelope: Envelope
    returns: int = 0
    #: While somebody held it: it does not run again.
    cancelled: bool = False


class _Taker:
    """One consumer's share of one queue; also the lease of what it was given."""

    def __init__(self, consumer: _MemoryConsumer, credit: int | None) -> None:
        self.consumer = consumer
        self._credit = credit
        self.held = True
        self.holding: dict[int, _Waiting] = {}

    @property
    def has_credit(self) -> bool:
        return self.held and not self.consumer.stopped and (self._credit is None or len(self.holding) < self._credit)

    def set_credit(self, consumer: _MemoryConsumer, credit: int) -> None:
        if self.consumer is consumer:
            self._credit = credit

    def give(self, token: int, waiting: _Waiting) -> None:
        self.holding[token] = waiting
        self.consumer.inbox.deliver([Delivery(waiting.envelope, self, token, waiting.returns)])

    def release(self, token: int) -> _Waiting | None:
        """What was given under the token; None when it is not this taker's any more."""
        return self.holding.pop(token, None) if self.held else None

    def look_up(self) -> None:
        self.consumer.look_up()

    def told(self, mark: CancelRequest) -> bool:
        """Tell the consumer of a mark, if the task is one that it holds."""
        token = next((token for token, waiting in self.holding.items() if waiting.envelope.id == mark.id), None)
        if token is None:
            return False
        self.holding[token] = msgspec.structs.replace(self.holding[token], cancelled=True)
        self.consumer.inbox.cancel([mark])
        return True


class _MemoryConsumer:
    def __init__(self, queues: Sequence[_Stored], tokens: itertools.count[int]) -> None:
        self._queues = queues
        self._tokens = tokens
        self.inbox = Inbox()
        self.stopped = False
        self.look_up()

    def __aiter__(self) -> AsyncIterator[Arrival]:
        return self.inbox

    @property
    def paused(self) -> frozenset[str]:
        return self.inbox.paused

    def look_up(self) -> None:
        self.inbox.pause(frozenset(stored.queue.name for stored in self._queues if stored.paused))

    @property
    def hold_limit(self) -> None:
        return None

    @property
    def connected(self) -> bool:
        return True

    @property
    def losses(self) -> int:
        return 0

    @property
    def adjusts_credit(self) -> bool:
        return True

    async def set_credit(self, credit: int) -> None:
        for stored in self._queues:
            for taker in stored.takers:
                taker.set_credit(self, credit)
            stored.deal(self._tokens)

    async def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self.stopped = True
        self.inbox.close()


class MemoryStatuses:
    """See `leveret.brokers.Statuses`. ``keep``: how long they are kept (seconds)."""

    def __init__(self, store: MemoryStore, keep: float) -> None:
        self._store = store
        self._keep = keep
        self._feeds = Feeds()

    async def notify(self, updates: Sequence[Status]) -> None:
        self.note(updates)

    async def read(self, ids: Sequence[str]) -> Sequence[Status]:
        found = [placed(self._store.statuses.get(id_), self._where(id_)) for id_ in dict.fromkeys(ids)]
        return [status for status in found if status is not None]

    def follow(self, ids: Sequence[str]) -> Following[Feed]:
        feed = Feed(ids)

        async def join() -> None:
            await self.join(feed)
            feed.notify(await self.read(ids))

        return Following(feed, join, lambda: self.leave(feed))

    async def recent(self, limit: int) -> Sequence[Status]:
        return await self.read(list(itertools.islice(reversed(self._store.statuses), limit)))

    def watch(self) -> Following[Watch]:
        watch = Watch()
        return Following(watch, lambda: self.join(watch), lambda: self.leave(watch))

    async def join(self, feed: Feed) -> None:
        for feeds in (self._feeds, self._store.feeds):
            feeds.add(feed)

    async def leave(self, feed: Feed) -> None:
        for feeds in (self._feeds, self._store.feeds):
            feeds.remove(feed)

    def close(self) -> None:
        self._feeds.fail(BrokerUnavailable("the connection was closed by this program"))

    def note(self, updates: Sequence[Status]) -> None:
        """Add them to what is known, and tell those who follow."""
        statuses = self._store.statuses
        for update in updates:
            known = statuses.pop(update.id, None)
            statuses[update.id] = newer(known, update)
        self._store.feeds.notify(updates)
        # Updates carry the time of day, whatever clock the store goes by.
        before = time.time() - self._keep
        for id_ in [id_ for id_, status in itertools.islice(statuses.items(), 2 * len(updates)) if status.at < before]:
            del statuses[id_]

    def _where(self, id_: str) -> Status | None:
        return next(filter(None, (stored.status(id_) for stored in self._store.queues.values())), None)


class _Facet:
    def __init__(self, store: MemoryStore, statuses: MemoryStatuses) -> None:
        self._store = store
        self._statuses = statuses


class MemoryQueues(_Facet):
    """See `leveret.brokers.Queues`."""

    async def stats(self, queues: Sequence[str] = ()) -> Sequence[QueueStats]:
        del queues  # all are known
        return [
            QueueStats(
                name=name,
                ready=len(stored.ready),
                running=sum(len(taker.holding) for taker in stored.takers),
                dead=len(stored.dead),
                consumers=len(stored.takers),
                delayed=len(stored.delayed),
                paused=stored.paused,
                limited=len(stored.limited),
            )
            for name, stored in sorted(self._store.queues.items())
        ]

    async def ready(self, queues: Sequence[str]) -> int:
        counts = [
            len(stored.ready) + self._store.gate.may_go(name)
            for name, stored in self._store.queues.items()
            if name in queues
        ]
        return sum(counts)

    async def peek(self, queue: str, state: WaitingState, *, limit: int) -> Sequence[Envelope]:
        stored = self._store.queues.get(queue)
        if stored is None:
            raise QueueNotFound(f"queue {queue!r} does not exist")
        if state == "ready":
            return [waiting.envelope for waiting in heapq.nsmallest(limit, stored.ready)]
        return heapq.nsmallest(limit, stored.delayed.values(), key=lambda one: one.due or 0.0)

    async def pause(self, queue: str) -> None:
        self._set_paused(queue, paused=True)

    async def resume(self, queue: str) -> None:
        self._set_paused(queue, paused=False)
        self._store.deal([queue])

    async def purge(self, queue: str, *, force: bool = False) -> Removed:
        return self._clear(queue, force=force)[0]

    async def delete(self, queue: str, *, force: bool = False) -> Removed:
        removed, stored = self._clear(queue, force=force)
        dead = [letter.envelope.id for letter in stored.dead]
        stored.dead.clear()
        stored.paused = False
        for taker in stored.takers:
            taker.look_up()
        self._store.ids.difference_update(dead)
        if not stored.takers:
            del self._store.queues[queue]
        return msgspec.structs.replace(removed, dead=len(dead), kept=bool(stored.takers))

    def _clear(self, queue: str, *, force: bool) -> tuple[Removed, _Stored]:
        stored = self._store.queues.get(queue)
        if stored is None:
            raise QueueNotFound(f"queue {queue!r} does not exist")
        if stored.takers and not force:
            running = sum(len(taker.holding) for taker in stored.takers)
            raise in_use(queue, consumers=len(stored.takers), running=running)
        removed = Removed(len(stored.ready) + len(stored.limited), len(stored.delayed))
        now = self._store.clock.time()
        for envelope in stored.clear():
            self._store.forget(envelope)
            known = self._store.statuses.get(envelope.id) or enqueued(envelope, now)
            self._statuses.note([purged(known, now)])
        self._store.deal([])
        return removed, stored

    def _set_paused(self, queue: str, *, paused: bool) -> None:
        stored = self._store.queues.get(queue)
        if stored is None:
            raise QueueNotFound(f"queue {queue!r} does not exist, so it cannot be paused or resumed")
        stored.paused = paused
        for taker in stored.takers:
            taker.look_up()


class MemoryDeadLetters(_Facet):
    """See `leveret.brokers.DeadLetters`."""

    async def read(self, queue: str, *, limit: int, select: Select | None = None) -> Sequence[DeadLetter]:
        stored = self._store.queues.get(queue)
        letters = stored.dead[:limit] if stored else []
        return letters if select is None else [one for one in map(select, letters) if one is not None]

    async def retry(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        letters = self._take(queue, ids, lambda envelope: self._store.claim(envelope) == envelope.id)
        now = self._store.clock.time()
        for letter in letters:
            again = revived(letter.envelope, now)
            self._store.queues[queue].put(again, self._store.tokens)
            known = self._store.statuses.get(again.id)
            if known is not None:
                self._statuses.note([revived_again(known, now)])
        self._store.deal([queue] if letters else [])
        return [letter.envelope.id for letter in letters]

    async def drop(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        dropped = [letter.envelope.id for letter in self._take(queue, ids, lambda _: True)]
        self._store.ids.difference_update(dropped)
        return dropped

    def _take(self, queue: str, ids: Sequence[str], may: Callable[[Envelope], bool]) -> list[DeadLetter]:
        stored = self._store.queues.get(queue)
        if stored is None:
            raise QueueNotFound(f"queue {queue!r} does not exist, so it has no dead letters")
        taken = [letter for letter in stored.dead if letter.envelope.id in ids and may(letter.envelope)]
        stored.dead = [letter for letter in stored.dead if letter not in taken]
        return taken


class MemorySchedules:
    """See `leveret.brokers.Schedules`. ``enqueue``: stores tasks, all or none."""

    def __init__(
        self, store: MemoryStore, statuses: MemoryStatuses, enqueue: Callable[[Sequence[Envelope]], None]
    ) -> None:
        self._store = store
        self._statuses = statuses
        self._enqueue = enqueue

    async def read(self) -> Sequence[ScheduleRow]:
        return [row for _, row in sorted(self._store.schedules.items())]

    async def ask(self, request: ScheduleRequest) -> Change:
        return self.do(request)

    def do(self, request: ScheduleRequest) -> Change:
        change = asked(request, self._store.schedules, self._store.clock.time())
        if change is None:
            raise no_schedule(request)
        return self._make(change)

    @asynccontextmanager
    async def keep(self) -> AsyncGenerator[ScheduleKeeper]:
        yield self

    async def due(self) -> tuple[Sequence[ScheduleRow], float | None]:
        now = self._store.clock.time()
        moments = {row.name: row.due for row in self._store.schedules.values() if not row.rests(now)}
        due = [self._store.schedules[name] for name, due in moments.items() if due is not None and due <= now]
        return due, min((due - now for due in moments.values() if due is not None and due > now), default=None)

    async def advance(self, name: str, unfinished: Mapping[str, bool]) -> Change:
        row = self._store.schedules.get(name)
        return Change() if row is None else self._make(advance(row, self._store.clock.time(), unfinished))

    async def wait(self, seconds: float) -> None:
        woken = asyncio.Event()
        call = self._store.clock.call_at(self._store.clock.time() + seconds, woken.set)
        try:
            await woken.wait()
        finally:
            call.cancel()

    def _make(self, change: Change) -> Change:
        if change.tasks:
            tasks = [task for task in change.tasks if task.id not in self._store.ids]
            self._enqueue(tasks)
            self._statuses.note(told_of(tasks, self._store.clock.time()))
        for name, row in change.rows.items():
            if row is None:
                self._store.schedules.pop(name, None)
            else:
                self._store.schedules[name] = row
        return change


class MemoryLimits(_Facet):
    """See `leveret.brokers.Limits`."""

    async def read(self) -> Sequence[LimitUse]:
        return self._store.gate.uses()

    async def ask(self, request: LimitRequest) -> None:
        rows = limits_after(request, self._store.gate.permits.rows, self._store.clock.time())
        if rows is None:
            raise no_limit(request)
        self._store.define(rows)

    @asynccontextmanager
    async def keep(self) -> AsyncGenerator[None]:
        yield  # what limits let go is admitted when it is dealt


class MemoryControl(_Facet):
    """See `leveret.brokers.Control`."""

    async def cancel(self, id_: str) -> Status | None:
        mark = CancelRequest(id_, self._store.clock.time())
        queues = self._store.queues.values()
        for stored in queues:
            envelope = stored.withdraw(id_)
            if envelope is not None:
                self._store.forget(envelope)
                self._statuses.note([cancelled_before(enqueued(envelope, mark.at), mark.at)])
                self._store.deal([])
            elif any(taker.told(mark) for taker in stored.takers):
                break
        known = next(iter(await self._statuses.read([id_])), None)
        if id_ not in self._store.ids and (known is None or not known.is_final):
            # Acknowledged before it ran: whoever has it hears of it, as everybody does.
            for consumer in {taker.consumer for stored in queues for taker in stored.takers}:
                consumer.inbox.cancel([mark])
        return known

    async def workers(self) -> Sequence[WorkerReport]:
        return [describe() for describe in self._store.describers]


class MemoryUniqueKeys(_Facet):
    """See `leveret.brokers.UniqueKeys`."""

    async def holders(self, limit: int) -> Sequence[KeyHolder]:
        keys = sorted({*self._store.unique, *self._store.kept})
        taken = [(key, id_) for key in keys if (id_ := self._store.holder(key)) is not None][:limit]
        return [KeyHolder(key, id_, self._queue_of(id_)) for key, id_ in taken]

    async def free(self, keys: Sequence[tuple[str, str]]) -> None:
        for key, id_ in keys:
            if self._store.unique.get(key) == id_:
                del self._store.unique[key]

    async def release(self, key: str) -> str | None:
        holder = self._store.holder(key)
        self._store.unique.pop(key, None)
        self._store.kept.pop(key, None)
        return holder

    def _queue_of(self, id_: str) -> str:
        return next((name for name, stored in self._store.queues.items() if stored.status(id_) is not None), "")


class MemoryBroker:
    """See `leveret.brokers.Broker`."""

    capabilities = Capabilities(shared=False)

    def __init__(self, store: MemoryStore | None = None, *, keep: float = KEEP) -> None:
        self._store = store or MemoryStore()
        self._statuses = MemoryStatuses(self._store, keep)
        self.queues: Queues = MemoryQueues(self._store, self._statuses)
        self.statuses: Statuses = self._statuses
        self.dead_letters: DeadLetters = MemoryDeadLetters(self._store, self._statuses)
        self.control: Control = MemoryControl(self._store, self._statuses)
        self.schedules: MemorySchedules = MemorySchedules(self._store, self._statuses, self._put)
        self.limits: Limits = MemoryLimits(self._store, self._statuses)
        self.unique: UniqueKeys = MemoryUniqueKeys(self._store, self._statuses)
        #: Made again if somebody deletes them.
        self._declared: dict[str, Queue] = {}

    @classmethod
    def from_url(cls, url: str, *, keep: float = KEEP) -> Self:
        """``memory://``."""
        if url.partition(":")[2] not in ("", "//"):
            raise ConfigurationError(
                f"{censor(url)!r}: the memory broker takes neither a name nor parameters; write memory://"
            )
        return cls(keep=keep)

    async def declare(self, queues: Sequence[Queue]) -> None:
        for queue in queues:
            stored = self._store.queues.get(queue.name)
            if stored is None and not queue.create:
                raise QueueNotFound(f"queue {queue.name!r} does not exist, and create=False forbids to make it")
            if stored is not None and queue.max_length not in (None, stored.queue.max_length):
                raise QueueMismatch(
                    queue.name,
                    found={"max_length": stored.queue.max_length},
                    wanted={"max_length": queue.max_length},
                    remedy="use another name",
                )
        for queue in queues:
            self._store.queues.setdefault(queue.name, _Stored(queue, self._store))
            self._declared[queue.name] = queue

    async def publish(
        self, envelopes: Sequence[Envelope], *, on_conflict: OnConflict = "raise"
    ) -> Mapping[str, str] | None:
        if on_conflict == "replace":
            self._free_taken(envelopes)
        existing = self._existing(envelopes)
        if existing and on_conflict == "raise":
            raise duplicates(existing)
        later = [(existing[one.id], one) for one in envelopes if one.id in existing and on_conflict == "replace"]
        envelopes = _newest([envelope for envelope in envelopes if envelope.id not in existing], later)
        for name in {envelope.queue for envelope in envelopes}:
            if name not in self._store.queues and name in self._declared:
                await self.declare([self._declared[name]])
        self._put(envelopes)
        mine = {envelope.id for envelope in envelopes}
        for id_, one in later:
            for stored in self._store.queues.values() if id_ not in mine else ():
                stored.replace(id_, one, self._store.tokens)
        if later:
            self._store.deal(self._store.queues)
        return existing or None

    def _free_taken(self, envelopes: Sequence[Envelope]) -> None:
        """A task that has its key until it is taken, and was: its worker is about to say so."""
        for key in filter(None, (unique_key(envelope.headers) for envelope in envelopes)):
            id_ = self._store.unique.get(key, "")
            for stored in self._store.queues.values():
                held = stored.envelope(id_) if stored.is_held(id_) else None
                if held is not None and waiting_key(held.headers) == key:
                    del self._store.unique[key]

    def _put(self, envelopes: Sequence[Envelope]) -> None:
        for name in {envelope.queue for envelope in envelopes}:
            stored = self._store.queues.get(name)
            mine = [envelope for envelope in envelopes if envelope.queue == name]
            ids = [envelope.id for envelope in envelopes]
            if stored is None:
                raise QueueNotFound(f"queue {name!r} does not exist; declare it first", ids)
            limit = stored.queue.max_length
            ready = 0 if limit is None else len(stored.ready) + len(stored.limited)
            if limit is not None and ready + len(mine) > limit:
                raise QueueFull(f"queue {name!r} holds {ready} ready tasks of at most {limit}", ids)
        ids = [envelope.id for envelope in envelopes]
        taken = list(dict.fromkeys([*(id_ for id_ in ids if id_ in self._store.ids), *repeated(ids)]))
        if taken:
            raise DuplicateTask(taken)
        self._store.ids.update(ids)
        for envelope in envelopes:
            self._store.claim(envelope)
            key, period = unique_key(envelope.headers), unique_for(envelope.headers)
            if key is not None and period is not None:
                self._store.kept[key] = envelope.id, self._store.clock.time() + period
            if id_token(envelope.headers) is not None and (period := id_for(envelope.headers)) is not None:
                self._store.kept[id_key(envelope.id)] = envelope.id, self._store.clock.time() + period
            self._store.queues[envelope.queue].put(envelope, self._store.tokens)
        self._store.deal({envelope.queue for envelope in envelopes})

    def _existing(self, envelopes: Sequence[Envelope]) -> dict[str, str]:
        """Those whose unique keys or own ids are taken, each with the id of the task that is there."""
        own = [one.id for one in envelopes if id_token(one.headers) is not None]
        taken = [id_ for id_ in own if id_ in self._store.ids or self._store.holder(id_key(id_)) is not None]
        mine: dict[str, str] = {}
        existing: dict[str, str] = {}
        for envelope in envelopes:
            key = unique_key(envelope.headers)
            if key is not None:
                holder = self._store.holder(key) or mine.setdefault(key, envelope.id)
                if holder != envelope.id:
                    existing[envelope.id] = holder
        return {**{id_: id_ for id_ in taken}, **existing}

    def publish_blocking(
        self, envelopes: Sequence[Envelope], *, notify: bool, on_conflict: OnConflict = "raise"
    ) -> Mapping[str, str] | None:
        raise NotImplementedError

    @asynccontextmanager
    async def consume(
        self,
        queues: Sequence[Queue],
        *,
        credit: int | None,
        most: int | None = None,
        describe: Describe | None = None,
    ) -> AsyncGenerator[Consumer]:
        del most  # what is asked for later is had then
        await self.declare(queues)
        consumer = _MemoryConsumer([self._store.queues[queue.name] for queue in queues], self._store.tokens)
        takers = {queue.name: _Taker(consumer, credit) for queue in queues}
        for name, taker in takers.items():
            self._store.queues[name].takers.append(taker)
        self._store.deal(takers)
        if describe is not None:
            self._store.describers.append(describe)
        try:
            yield consumer
        finally:
            consumer.close()
            if describe is not None:
                self._store.describers.remove(describe)
            for name, taker in takers.items():
                taker.held = False
                stored = self._store.queues[name]
                stored.takers.remove(taker)
                for waiting in taker.holding.values():
                    if waiting.cancelled:
                        self._end_cancelled(waiting)
                    else:
                        stored.put_back(msgspec.structs.replace(waiting, returns=waiting.returns + 1))
            self._store.deal(takers)

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        kept: list[tuple[_Waiting, Outcome]] = []
        lost = []
        for delivery, outcome in settlements:
            taker = delivery.lease
            waiting = taker.release(delivery.tag) if isinstance(taker, _Taker) else None
            if waiting is None:
                lost.append(delivery.envelope.id)
            else:
                kept.append((waiting, outcome))
        # Of what was lost, whoever has it tells.
        others = set(lost) - {waiting.envelope.id for waiting, _ in kept}
        self._statuses.note([update for update in updates if update.id not in others])
        for waiting, outcome in kept:
            if waiting.cancelled and isinstance(outcome, (Retrying, Released, PutOff)):
                self._end_cancelled(waiting)
            else:
                self._settle(waiting, outcome)
        self._store.deal({delivery.envelope.queue for delivery, _ in settlements})
        self._follow_up([one for _, outcome in kept if isinstance(outcome, Succeeded) for one in outcome.follow_ups])
        if lost:
            raise LeaseLost(lost)

    def _follow_up(self, envelopes: Sequence[Envelope]) -> Sequence[Envelope]:
        """Store what outcomes set going, unless it is there; what was stored."""
        envelopes = [one for one in envelopes if one.id not in self._store.ids]
        for one in envelopes:
            self._store.queues.setdefault(one.queue, _Stored(Queue(one.queue), self._store))
            self._store.ids.add(one.id)
            self._store.queues[one.queue].put(one, self._store.tokens)
        if envelopes:
            self._statuses.note(told_of(envelopes, self._store.clock.time()))
            self._store.deal({one.queue for one in envelopes})
        return envelopes

    def abandon(self) -> None:
        """Nothing is open."""

    async def close(self) -> None:
        self._statuses.close()

    def _settle(self, waiting: _Waiting, outcome: Outcome) -> None:
        stored, envelope = self._store.queues[waiting.envelope.queue], waiting.envelope
        if isinstance(outcome, Released):
            stored.put_back(waiting)
            return
        now = self._store.clock.time()
        self._store.gate.end(envelope.id)
        if isinstance(outcome, Retrying):
            stored.put(retried(envelope, outcome, now), self._store.tokens)
        elif isinstance(outcome, PutOff):
            request = RestLimit(outcome.limit, outcome.key, now + outcome.delay)
            rows = limits_after(request, self._store.gate.permits.rows, now)
            self._store.gate.define(rows or {})
            stored.put(put_off(envelope, outcome, now, rests=rows is not None), self._store.tokens)
        elif isinstance(outcome, DeadLettered):
            self._store.free(envelope)
            stored.dead.append(DeadLetter(envelope, outcome.reason, outcome.traceback, now, this_process()))
        else:
            self._store.forget(envelope)

    def _end_cancelled(self, waiting: _Waiting) -> None:
        now, envelope = self._store.clock.time(), waiting.envelope
        self._store.forget(envelope)
        known = self._store.statuses.get(envelope.id) or enqueued(envelope, now)
        self._statuses.note([cancelled_running(known, now)])


def _newest(envelopes: Sequence[Envelope], later: Sequence[tuple[str, Envelope]]) -> list[Envelope]:
    """Tasks with the arguments that later ones of the same call give them, by id."""
    found = list(envelopes)
    places = {envelope.id: place for place, envelope in enumerate(found)} if later else {}
    for id_, one in later:
        place = places.get(id_)
        if place is not None and may_replace(found[place], one):
            found[place] = replaced(found[place], one)
    return found
