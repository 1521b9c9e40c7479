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

from leveret.errors import DuplicateTask, LeaseLost, QueueFull, QueueMismatch, QueueNotFound
from leveret.model import (
    MIDDLE_PRIORITY,
    DeadLetter,
    DeadLettered,
    Delivery,
    Envelope,
    Outcome,
    Queue,
    QueueStats,
    Released,
    Retrying,
    Settlement,
    repeated,
    retried,
    revived,
    this_process,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from leveret.brokers import Consumer


class Clock(Protocol):
    """What a store has its time from: a test may give one that it moves itself."""

    def time(self) -> float:
        """Unix time, seconds."""

    def call_at(self, when: float, callback: Callable[[], None], /) -> object:
        """Call it when that time has come; in the running loop, if there is one."""


class SystemClock:
    """The time of this machine."""

    def time(self) -> float:
        return time.time()

    def call_at(self, when: float, callback: Callable[[], None]) -> object:
        return asyncio.get_running_loop().call_later(when - time.time(), callback)


class MemoryStore:
    """The queues and who takes from them."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.queues: dict[str, _Stored] = {}
        #: Of every task that is ready, delayed, running or dead.
        self.ids: set[str] = set()
        #: Numbers deliveries, and the places of ready tasks.
        self.tokens = itertools.count(1)


class _Stored:
    def __init__(self, queue: Queue, clock: Clock) -> None:
        self.queue = queue
        self._clock = clock
        #: A heap: the first is the next to be dealt.
        self.ready: list[_Waiting] = []
        self.dead: list[DeadLetter] = []
        #: A number for each task that is not due.
        self.delayed: set[int] = set()
        self.paused = False
        #: In turn: whoever was dealt to last stands last.
        self.takers: deque[_Taker] = deque()

    def put(self, envelope: Envelope, tokens: itertools.count[int]) -> None:
        """Make a task ready, now or when it is due."""
        if envelope.due is None or envelope.due <= self._clock.time():
            rank = MIDDLE_PRIORITY if envelope.priority is None else envelope.priority
            heapq.heappush(self.ready, _Waiting(-rank, next(tokens), envelope))
            return

        number = next(tokens)

        def become_ready() -> None:
            self.delayed.discard(number)
            self.put(envelope, tokens)
            self.deal(tokens)

        self.delayed.add(number)
        self._clock.call_at(envelope.due, become_ready)

    def deal(self, tokens: itertools.count[int]) -> None:
        """Hand ready tasks to takers with free credit, in turn."""
        while self.ready and not self.paused:
            taker = next((taker for taker in self.takers if taker.has_credit), None)
            if taker is None:
                return
            self.takers.remove(taker)
            self.takers.append(taker)
            taker.give(next(tokens), heapq.heappop(self.ready))

    def put_back(self, waiting: _Waiting) -> None:
        """Where it stood."""
        heapq.heappush(self.ready, waiting)


class _Waiting(msgspec.Struct, frozen=True, order=True):
    """A task with its place in the queue: the smaller is dealt first, and no two have the same."""

    rank: int
    place: int
    envelope: Envelope
    returns: int = 0


class _Taker:
    """One consumer's share of one queue; also the lease of what it was given."""

    def __init__(self, consumer: _MemoryConsumer, credit: int | None) -> None:
        self._consumer = consumer
        self._credit = credit
        self.held = True
        self.holding: dict[int, _Waiting] = {}

    @property
    def has_credit(self) -> bool:
        return self.held and not self._consumer.stopped and (self._credit is None or len(self.holding) < self._credit)

    def give(self, token: int, waiting: _Waiting) -> None:
        self.holding[token] = waiting
        self._consumer.give(Delivery(waiting.envelope, self, token, waiting.returns))

    def release(self, token: int) -> _Waiting | None:
        """What was given under the token; None when it is not this taker's any more."""
        return self.holding.pop(token, None) if self.held else None

    def look_up(self) -> None:
        self._consumer.look_up()


class _MemoryConsumer:
    def __init__(self, queues: Sequence[_Stored]) -> None:
        self._queues = queues
        self._batch: list[Delivery] = []
        self._told: frozenset[str] = frozenset()
        self._wake = asyncio.Event()
        self.stopped = False

    @property
    def paused(self) -> frozenset[str]:
        return frozenset(stored.queue.name for stored in self._queues if stored.paused)

    def give(self, delivery: Delivery) -> None:
        self._batch.append(delivery)
        self._wake.set()

    def look_up(self) -> None:
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[Sequence[Delivery]]:
        while not self.stopped or self._batch:
            await self._wake.wait()
            self._wake.clear()
            batch, self._batch = self._batch, []
            before, self._told = self._told, self.paused
            if batch or before != self._told:
                yield batch

    @property
    def hold_limit(self) -> None:
        return None

    async def stop(self) -> None:
        self.stopped = True
        self._wake.set()


class MemoryBroker:
    """See `leveret.brokers.Broker`."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        self._store = store or MemoryStore()

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
            self._store.queues.setdefault(queue.name, _Stored(queue, self._store.clock))

    async def publish(self, envelopes: Sequence[Envelope]) -> None:
        for name in {envelope.queue for envelope in envelopes}:
            stored = self._store.queues.get(name)
            mine = [envelope for envelope in envelopes if envelope.queue == name]
            ids = [envelope.id for envelope in envelopes]
            if stored is None:
                raise QueueNotFound(f"queue {name!r} does not exist; declare it first", ids)
            limit = stored.queue.max_length
            if limit is not None and len(stored.ready) + len(mine) > limit:
                raise QueueFull(f"queue {name!r} holds {len(stored.ready)} ready tasks of at most {limit}", ids)
        ids = [envelope.id for envelope in envelopes]
        taken = list(dict.fromkeys([*(id_ for id_ in ids if id_ in self._store.ids), *repeated(ids)]))
        if taken:
            raise DuplicateTask(taken)
        self._store.ids.update(ids)
        for envelope in envelopes:
            self._store.queues[envelope.queue].put(envelope, self._store.tokens)
        self._deal({envelope.queue for envelope in envelopes})

    @asynccontextmanager
    async def consume(self, queues: Sequence[Queue], *, credit: int | None) -> AsyncGenerator[Consumer]:
        await self.declare(queues)
        consumer = _MemoryConsumer([self._store.queues[queue.name] for queue in queues])
        consumer.look_up()
        takers = {queue.name: _Taker(consumer, credit) for queue in queues}
        for name, taker in takers.items():
            self._store.queues[name].takers.append(taker)
        self._deal(takers)
        try:
            yield consumer
        finally:
            for name, taker in takers.items():
                taker.held = False
                stored = self._store.queues[name]
                stored.takers.remove(taker)
                for waiting in taker.holding.values():
                    stored.put_back(msgspec.structs.replace(waiting, returns=waiting.returns + 1))
            self._deal(takers)

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        lost = []
        for delivery, outcome in settlements:
            taker = delivery.lease
            waiting = taker.release(delivery.tag) if isinstance(taker, _Taker) else None
            if waiting is None:
                lost.append(delivery.envelope.id)
            else:
                self._settle(waiting, outcome)
        self._deal({delivery.envelope.queue for delivery, _ in settlements})
        if lost:
            raise LeaseLost(lost)

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
            )
            for name, stored in sorted(self._store.queues.items())
        ]

    async def dead_letters(self, queue: str, *, limit: int) -> Sequence[DeadLetter]:
        stored = self._store.queues.get(queue)
        return stored.dead[:limit] if stored else []

    async def revive(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        letters = self._take_dead(queue, ids)
        for letter in letters:
            self._store.queues[queue].put(revived(letter.envelope), self._store.tokens)
        self._deal([queue] if letters else [])
        return [letter.envelope.id for letter in letters]

    async def discard(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        dropped = [letter.envelope.id for letter in self._take_dead(queue, ids)]
        self._store.ids.difference_update(dropped)
        return dropped

    async def pause(self, queue: str) -> None:
        self._set_paused(queue, paused=True)

    async def resume(self, queue: str) -> None:
        self._set_paused(queue, paused=False)
        self._deal([queue])

    def _set_paused(self, queue: str, *, paused: bool) -> None:
        stored = self._store.queues.get(queue)
        if stored is None:
            raise QueueNotFound(f"queue {queue!r} does not exist, so it cannot be paused or resumed")
        stored.paused = paused
        for taker in stored.takers:
            taker.look_up()

    def _take_dead(self, queue: str, ids: Sequence[str]) -> list[DeadLetter]:
        stored = self._store.queues.get(queue)
        if stored is None:
            return []
        taken = [letter for letter in stored.dead if letter.envelope.id in ids]
        stored.dead = [letter for letter in stored.dead if letter.envelope.id not in ids]
        return taken

    def abandon(self) -> None:
        """Nothing is open."""

    async def close(self) -> None:
        """Nothing to give back."""

    def _settle(self, waiting: _Waiting, outcome: Outcome) -> None:
        stored, envelope = self._store.queues[waiting.envelope.queue], waiting.envelope
        if isinstance(outcome, Retrying):
            stored.put(retried(envelope, outcome, self._store.clock.time()), self._store.tokens)
        elif isinstance(outcome, DeadLettered):
            now = self._store.clock.time()
            stored.dead.append(DeadLetter(envelope, outcome.reason, outcome.traceback, now, this_process()))
        elif isinstance(outcome, Released):
            stored.put_back(waiting)
        else:
            self._store.ids.discard(envelope.id)

    def _deal(self, names: Sequence[str] | set[str] | dict[str, _Taker]) -> None:
        for name in names:
            self._store.queues[name].deal(self._store.tokens)
