"""What the checks of `conformance` work with: brokers on one store, a consumer's deliveries one by one, counts."""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from leveret.brokers import CancelRequests, Deliveries
from leveret.model import Delivery, Envelope, Outcome, Queue, new_id

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from leveret.brokers import Broker, Consumer
    from leveret.model import CancelRequest, QueueStats

Open: TypeAlias = Callable[[], "Broker"]
Check: TypeAlias = Callable[[Open], Awaitable[None]]

#: How long anything may take before a check fails (seconds).
PATIENCE = 15.0
#: How long nothing must happen before a check believes that nothing will (seconds).
QUIET = 0.3

CHECKS: list[Check] = []


class Bench:
    """What a check works with: brokers on one store, and a queue of its own."""

    def __init__(self, open_broker: Open, stack: AsyncExitStack) -> None:
        self._open = open_broker
        self._stack = stack
        self.queue = Queue(f"check-{secrets.token_hex(6)}")

    def broker(self) -> Broker:
        broker = self._open()
        self._stack.push_async_callback(broker.close)
        return broker

    def other_queue(self, **settings: int | bool | str) -> Queue:
        return Queue(f"check-{secrets.token_hex(6)}", **settings)  # type: ignore[arg-type]

    async def declared(self, queue: Queue | None = None) -> Broker:
        broker = self.broker()
        await broker.declare([queue or self.queue])
        return broker

    async def consumer(self, broker: Broker, *queues: Queue, credit: int | None = 10) -> Taken:
        return Taken(await self._stack.enter_async_context(broker.consume(queues or [self.queue], credit=credit)))

    async def enter(self, context: AbstractAsyncContextManager[object]) -> None:
        """Leave a context when the check has ended."""
        await self._stack.enter_async_context(context)

    def envelope(self, text: str, **changes: object) -> Envelope:
        return msgspec.structs.replace(Envelope(new_id(), self.queue.name, "check", text.encode()), **changes)

    def envelopes(self, *texts: str) -> list[Envelope]:
        return [self.envelope(text) for text in texts]


class Taken:
    """A consumer's deliveries, one by one."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self._batches = batches_of(consumer)
        self._pending: asyncio.Task[Sequence[Delivery]] | None = None
        self._waiting: list[Delivery] = []

    async def next(self, count: int = 1) -> list[Delivery]:
        """The next ones, in order; fails when they do not come."""
        while len(self._waiting) < count:
            assert await self._batch(PATIENCE), f"{count} deliveries were due, {len(self._waiting)} came"
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    async def next_within(self, seconds: float) -> list[Delivery]:
        """The next one, if it comes so soon."""
        if not self._waiting:
            await self._batch(seconds)
        taken, self._waiting = self._waiting[:1], self._waiting[1:]
        return taken

    async def texts(self, count: int) -> list[str]:
        return [text(delivery) for delivery in await self.next(count)]

    async def sees_paused(self, *queues: Queue) -> None:
        """Wait until exactly these queues are paused for the consumer."""
        names = {queue.name for queue in queues}
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while self.consumer.paused != names:
            assert asyncio.get_running_loop().time() < deadline, f"{names} were to be paused: {self.consumer.paused}"
            await self._batch(0.02)

    async def nothing(self) -> None:
        """Fails when something comes."""
        await self._batch(QUIET)
        assert not self._waiting, f"nothing was due, but {[text(delivery) for delivery in self._waiting]} came"

    async def _batch(self, within: float) -> bool:
        """Wait for a batch, without cancelling the iterator when it does not come."""
        if self._pending is None:
            self._pending = asyncio.ensure_future(self._advance())
        done, _ = await asyncio.wait([self._pending], timeout=within)
        if not done:
            return False
        batch, self._pending = self._pending.result(), None
        self._waiting.extend(batch)
        return bool(batch)

    async def _advance(self) -> Sequence[Delivery]:
        try:
            return await anext(self._batches)
        except StopAsyncIteration:
            return ()

    def abandon(self) -> None:
        if self._pending is not None:
            self._pending.cancel()


async def batches_of(consumer: Consumer) -> AsyncGenerator[Sequence[Delivery]]:
    """Of what arrives, the deliveries."""
    async for arrival in consumer:
        if isinstance(arrival, Deliveries):
            yield arrival.deliveries


async def cancel_requests(consumer: Consumer) -> AsyncGenerator[CancelRequest]:
    """Of what arrives, the cancellations, one by one; fails when a delivery arrives."""
    async for arrival in consumer:
        assert not isinstance(arrival, Deliveries), f"nothing was due, but {arrival} came"
        for request in arrival.requests if isinstance(arrival, CancelRequests) else ():
            yield request


def text(delivery: Delivery) -> str:
    return text_of(delivery.envelope)


def text_of(envelope: Envelope) -> str:
    return envelope.body.decode()


async def settle_all(broker: Broker, deliveries: Sequence[Delivery], outcome: Outcome) -> None:
    await broker.settle([(delivery, outcome) for delivery in deliveries])


async def stats_of(broker: Broker, queue: Queue) -> QueueStats:
    return next(stats for stats in await broker.queues.stats([queue.name]) if stats.name == queue.name)


async def becomes(broker: Broker, queue: Queue, **expected: int) -> None:
    """Wait until the queue's counts are as expected: a broker may count a moment later."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while True:
        stats = await stats_of(broker, queue)
        if all(getattr(stats, name) == value for name, value in expected.items()):
            return
        assert asyncio.get_running_loop().time() < deadline, f"expected {expected}, counted {stats}"
        await asyncio.sleep(0.05)


@contextmanager
def refused(kind: type[Exception]) -> Iterator[list[Exception]]:
    """Fails when what is inside does not raise such an error; gives the error in a list."""
    caught: list[Exception] = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
    else:
        raise AssertionError(f"{kind.__name__} was due, and nothing was raised")


def check(function: Callable[[Bench], Awaitable[None]]) -> Check:
    """Register a check; it gets a bench that is cleared up behind it."""

    @functools.wraps(function)
    async def run(open_broker: Open) -> None:
        async with AsyncExitStack() as stack:
            await function(Bench(open_broker, stack))

    CHECKS.append(run)
    return run
