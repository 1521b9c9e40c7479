"""The memory broker of a test: it notes what is enqueued, has the test's clock, and lets go wrong what is asked for."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import msgspec

from leveret.brokers import CancelRequests, Deliveries, Feed, Following, Paused, Watch
from leveret.brokers.memory import MemoryBroker, MemorySchedules, MemoryStatuses, MemoryStore
from leveret.errors import BrokerUnavailable, EnqueueTimeout
from leveret.model import (
    UNIQUE_LATEST,
    Delivery,
    Envelope,
    Outcome,
    Queue,
    Released,
    Settlement,
    latest_due,
    limits_after,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence

    from leveret.brokers import Arrival, Consumer, Control, OnConflict
    from leveret.client import Task
    from leveret.errors import BrokerError
    from leveret.model import CancelRequest, Change, DeclareLimits, Describe, ScheduleRequest, ScheduleRow, Status
    from leveret.testing.clock import ManualClock

T = TypeVar("T")
Fault: TypeAlias = Literal[
    "crash_before_settle", "duplicate_delivery", "lost_connection", "enqueue_fails", "lost_confirm"
]


class Faults:
    """What is to go wrong, and how often. A fault that was asked for and did not happen fails the test at its end."""

    def __init__(self) -> None:
        self._planned: Counter[tuple[Fault, str]] = Counter()

    def crash_before_settle(self, task: Task[..., Any], *, times: int = 1) -> None:
        """The worker dies when the task has run and before its outcome is recorded: the task runs again.

        Args:
            task: The task.
            times: How often, at least 1.
        """
        self._plan("crash_before_settle", task, times)

    def duplicate_delivery(self, task: Task[..., Any], *, times: int = 1) -> None:
        """The task is there twice, under one id, and both run: as when a confirm or an acknowledgment is lost.

        Args:
            task: The task.
            times: How often, at least 1.
        """
        self._plan("duplicate_delivery", task, times)

    def lost_connection(self, task: Task[..., Any], *, times: int = 1) -> None:
        """The worker loses its connection while the task runs.

        Another worker gets it: both run at the same time, and the outcome of the first is thrown away.

        Args:
            task: The task.
            times: How often, at least 1.
        """
        self._plan("lost_connection", task, times)

    def enqueue_fails(self, task: Task[..., Any], *, times: int = 1) -> None:
        """``enqueue`` raises BrokerUnavailable, and nothing is stored.

        Args:
            task: The task.
            times: How often, at least 1.
        """
        self._plan("enqueue_fails", task, times)

    def lost_confirm(self, task: Task[..., Any], *, times: int = 1) -> None:
        """``enqueue`` raises EnqueueTimeout, which says that nobody knows; the task is stored all the same.

        Args:
            task: The task.
            times: How often, at least 1.
        """
        self._plan("lost_confirm", task, times)

    def happens(self, fault: Fault, task: str | None) -> bool:
        """Whether it was asked for; then it has happened once."""
        key = fault, task or ""
        if not self._planned[key]:
            return False
        self._planned[key] -= 1
        return True

    @property
    def outstanding(self) -> Sequence[str]:
        """What was asked for and did not happen."""
        return [f"{fault} of {task!r} ({count} times)" for (fault, task), count in self._planned.items() if count]

    def _plan(self, fault: Fault, task: Task[..., Any], times: int) -> None:
        if times < 1:
            raise ValueError(f"{fault} is asked for {times} times; it must be at least 1")
        self._planned[fault, task.name] += times


class FaultyBroker(MemoryBroker):
    """See `leveret.brokers.Broker`. Times are translated where they pass: outside is now, inside is the test's clock.

    ``on_crash``: told of the run whose worker just died; ``on_cut``: that a consumer has lost its connection.
    """

    def __init__(
        self, clock: ManualClock, *, on_crash: Callable[[Delivery, Outcome], None], on_cut: Callable[[], None]
    ) -> None:
        super().__init__(MemoryStore(clock))
        self.clock = clock
        self.faults = Faults()
        #: In order, with times of the test's clock; those too that have run since.
        self.published: list[Envelope] = []
        #: The loop on which a worker runs now: what other threads do is done there.
        self.home: asyncio.AbstractEventLoop | None = None
        self.statuses = _StatusesAtHome(self._statuses, self)
        self.control = _ControlAtHome(self.control, self)
        self.schedules: _Schedules = _Schedules(self)
        self._on_crash = on_crash
        self._on_cut = on_cut
        self._unanswered: list[asyncio.Future[None]] = []

    async def publish(
        self, envelopes: Sequence[Envelope], *, on_conflict: OnConflict = "raise"
    ) -> Mapping[str, str] | None:
        return await self.at_home(self._publish(envelopes, on_conflict))

    async def declare(self, queues: Sequence[Queue]) -> None:
        await self.at_home(super().declare(queues))

    @asynccontextmanager
    async def consume(
        self,
        queues: Sequence[Queue],
        *,
        credit: int | None,
        most: int | None = None,
        describe: Describe | None = None,
    ) -> AsyncGenerator[Consumer]:
        async with AsyncExitStack() as connection:
            consuming = super().consume(queues, credit=credit, most=most, describe=describe)
            inner = await connection.enter_async_context(consuming)
            yield _FaultyConsumer(self, inner, connection)

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        for delivery, outcome in settlements:
            recordable = delivery.lease.held and not isinstance(outcome, Released)
            if recordable and self.faults.happens("crash_before_settle", delivery.envelope.task):
                unanswered = asyncio.get_running_loop().create_future()
                self._unanswered.append(unanswered)
                self._on_crash(delivery, outcome)
                await unanswered
        await super().settle(settlements, updates)

    def bury(self) -> None:
        """End what a worker that has died still waits for."""
        for unanswered in self._unanswered:
            unanswered.cancel()
        self._unanswered.clear()

    @property
    def names(self) -> Sequence[str]:
        """Its queues."""
        return list(self._store.queues)

    def is_busy(self, queues: Sequence[str]) -> bool:
        """Whether a task of these queues is running, or could."""
        every = [self._store.queues[name] for name in queues]
        return any(
            ((stored.ready or self._store.gate.may_go(stored.queue.name)) and not stored.paused)
            or any(taker.holding for taker in stored.takers)
            for stored in every
        )

    def declare_limits(self, declaration: DeclareLimits) -> None:
        """As a worker does before it takes tasks."""
        self._store.define(limits_after(declaration, self._store.gate.permits.rows, self._store.clock.time()) or {})

    def repeat(self, delivery: Delivery) -> None:
        """Put a task that is being handed out into its queue once more."""
        stored = self._store.queues[delivery.envelope.queue]
        stored.put(self.inward(delivery.envelope), self._store.tokens)
        stored.deal(self._store.tokens)

    def cut(self) -> None:
        self._on_cut()

    def inward(self, envelope: Envelope) -> Envelope:
        """With its times by the test's clock."""
        return _shifted(envelope, self.clock.time() - time.time())

    def outward(self, envelope: Envelope) -> Envelope:
        """With its times as tasks and workers know them."""
        return _shifted(envelope, time.time() - self.clock.time())

    def outward_mark(self, mark: CancelRequest) -> CancelRequest:
        """With its time as workers know it, who compare it with an envelope's."""
        return msgspec.structs.replace(mark, at=mark.at + time.time() - self.clock.time())

    async def _publish(self, envelopes: Sequence[Envelope], on_conflict: OnConflict) -> Mapping[str, str] | None:
        if self._goes_wrong("enqueue_fails", envelopes):
            raise BrokerUnavailable("the broker is away: a fault that the test asked for (enqueue_fails)")
        inward = [self.inward(envelope) for envelope in envelopes]
        existing = await super().publish(inward, on_conflict=on_conflict)
        if existing and on_conflict == "replace":
            self._note_replaced(set(existing.values()))
        if self._goes_wrong("lost_confirm", envelopes):
            raise EnqueueTimeout(
                "not confirmed in time: a fault that the test asked for (lost_confirm)", [e.id for e in envelopes]
            )
        return existing

    def _note_replaced(self, ids: set[str]) -> None:
        """Later calls gave these tasks other arguments."""
        found = {id_: one for id_ in ids for queue in self._store.queues.values() if (one := queue.envelope(id_))}
        self.published = [found.get(one.id, one) for one in self.published]

    def _put(self, envelopes: Sequence[Envelope]) -> None:
        super()._put(envelopes)
        self.published.extend(envelopes)

    def _follow_up(self, envelopes: Sequence[Envelope]) -> Sequence[Envelope]:
        stored = super()._follow_up([self.inward(envelope) for envelope in envelopes])
        self.published.extend(stored)
        return stored

    @property
    def store(self) -> MemoryStore:
        return self._store

    @property
    def told(self) -> MemoryStatuses:
        return self._statuses

    def _goes_wrong(self, fault: Fault, envelopes: Sequence[Envelope]) -> bool:
        return bool([envelope for envelope in envelopes if self.faults.happens(fault, envelope.task)])

    async def at_home(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it on the loop that a worker runs on, if there is one: the store is not for two threads at once."""
        home = self.home
        if home is None or home is asyncio.get_running_loop():
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, home))


class _StatusesAtHome:
    def __init__(self, inner: MemoryStatuses, broker: FaultyBroker) -> None:
        self._inner = inner
        self._at_home = broker.at_home

    async def notify(self, updates: Sequence[Status]) -> None:
        await self._at_home(self._inner.notify(updates))

    async def read(self, ids: Sequence[str]) -> Sequence[Status]:
        return await self._at_home(self._inner.read(ids))

    async def recent(self, limit: int) -> Sequence[Status]:
        return await self._at_home(self._inner.recent(limit))

    def follow(self, ids: Sequence[str]) -> Following[Feed]:
        feed = Feed(ids)
        relay = _Relay(feed)

        async def join() -> None:
            await self._at_home(self._inner.join(relay))
            feed.notify(await self.read(ids))

        return Following(feed, join, lambda: self._at_home(self._inner.leave(relay)))

    def watch(self) -> Following[Watch]:
        watch = Watch()
        relay = _Relay(watch)
        return Following(
            watch, lambda: self._at_home(self._inner.join(relay)), lambda: self._at_home(self._inner.leave(relay))
        )


class _Schedules(MemorySchedules):
    """Those of the test: nothing is due until the test wants it to be."""

    def __init__(self, broker: FaultyBroker) -> None:
        super().__init__(broker.store, broker.told, broker._put)  # noqa: SLF001 - one thing in two parts
        self._at_home = broker.at_home
        #: Whether what is due is stored.
        self.is_kept = False

    async def read(self) -> Sequence[ScheduleRow]:
        return await self._at_home(super().read())

    async def ask(self, request: ScheduleRequest) -> Change:
        return await self._at_home(super().ask(request))

    async def due(self) -> tuple[Sequence[ScheduleRow], float | None]:
        return await super().due() if self.is_kept else ((), None)

    @property
    def is_due(self) -> bool:
        """Whether a task is to be stored now."""
        now = self._store.clock.time()
        every = [row.due for row in self._store.schedules.values()]
        return self.is_kept and any(due is not None and due <= now for due in every)


class _ControlAtHome:
    def __init__(self, inner: Control, broker: FaultyBroker) -> None:
        self._at_home = broker.at_home
        self._inner = inner
        self.workers = inner.workers

    async def cancel(self, id_: str) -> Status | None:
        return await self._at_home(self._inner.cancel(id_))


class _Relay(Feed):
    """Stands in a feed's place where news are told, and tells it on the loop that reads it: it may be a thread's."""

    def __init__(self, feed: Feed) -> None:
        super().__init__(feed.ids)
        self._feed = feed
        self._loop = asyncio.get_running_loop()

    def notify(self, updates: Iterable[Status]) -> None:
        self._hand_over(partial(self._feed.notify, list(updates)))

    def fail(self, error: BrokerError) -> None:
        self._hand_over(partial(self._feed.fail, error))

    def _hand_over(self, call: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it whoever reads
            self._loop.call_soon_threadsafe(call)


class _FaultyConsumer:
    """Hands on what a consumer gets, until its connection is cut."""

    def __init__(self, broker: FaultyBroker, inner: Consumer, connection: AsyncExitStack) -> None:
        self._broker = broker
        self._inner = inner
        self._connection = connection
        self._stopped = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[Arrival]:
        async for arrival in self._inner:
            match arrival:
                case CancelRequests(requests):
                    yield CancelRequests(tuple(map(self._broker.outward_mark, requests)))
                case Deliveries(deliveries):
                    yield Deliveries(tuple(map(self._handed_out, deliveries)))
                case Paused():
                    yield arrival
            came = arrival.deliveries if isinstance(arrival, Deliveries) else ()
            if [one for one in came if self._broker.faults.happens("lost_connection", one.envelope.task)]:
                await self._connection.aclose()
                self._broker.cut()
                await self._stopped.wait()
                return

    @property
    def paused(self) -> frozenset[str]:
        return self._inner.paused

    @property
    def hold_limit(self) -> None:
        return None

    @property
    def connected(self) -> bool:
        return self._inner.connected

    @property
    def losses(self) -> int:
        return self._inner.losses

    @property
    def adjusts_credit(self) -> bool:
        return self._inner.adjusts_credit

    async def set_credit(self, credit: int) -> None:
        await self._inner.set_credit(credit)

    async def stop(self) -> None:
        self._stopped.set()
        await self._inner.stop()

    def _handed_out(self, delivery: Delivery) -> Delivery:
        if self._broker.faults.happens("duplicate_delivery", delivery.envelope.task):
            self._broker.repeat(delivery)
        return msgspec.structs.replace(delivery, envelope=self._broker.outward(delivery.envelope))


def _shifted(envelope: Envelope, seconds: float) -> Envelope:
    def shifted(moment: float | None) -> float | None:
        return None if moment is None else moment + seconds

    latest = latest_due(envelope.headers)
    changed = envelope if latest is None else envelope.with_headers({UNIQUE_LATEST: ceil((latest + seconds) * 1000)})
    return msgspec.structs.replace(
        changed,
        enqueued_at=shifted(envelope.enqueued_at),
        due=shifted(envelope.due),
        expires_at=shifted(envelope.expires_at),
    )
