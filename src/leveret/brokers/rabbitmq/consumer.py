"""Taking from RabbitMQ: one session a connection, and a supervisor that opens the next one when it is lost.

What a lost session had delivered is the broker's again: its lease ends, and settling it raises LeaseLost.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from leveret.brokers import HoldLimit
from leveret.brokers.backoff import backoff
from leveret.brokers.rabbitmq import amqp
from leveret.brokers.rabbitmq.codec import Message, postponed, to_delivery
from leveret.brokers.rabbitmq.declare import Notes, declare, message_count, tell_priorities
from leveret.brokers.rabbitmq.topology import rung
from leveret.errors import BrokerError, BrokerRefused, BrokerUnavailable, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from leveret.brokers.rabbitmq.census import Census
    from leveret.model import Delivery, Queue

log = logging.getLogger("leveret.rabbitmq")

#: Stores a copy of a delivery that is not due yet, and settles it.
Postpone: TypeAlias = "Callable[[Delivery, Message], Coroutine[object, object, None]]"

#: How long the broker may take to confirm that it delivers no more (seconds).
_CANCEL_TIMEOUT = 5.0
#: How long declaring and starting to consume may take (seconds).
_OPEN_TIMEOUT = 60.0
#: The server's default for how long a delivery may be unacknowledged (seconds), and ours, where a consumer may choose:
#: a year (milliseconds). A worker that lives has a reason to hold its tasks, however long they run.
_CONSUMER_TIMEOUT = 1_800.0
_NEVER = 366 * 86_400 * 1_000
#: A node that is starting may refuse for a moment; one that refuses so often at a worker's start means it.
_REFUSALS = 3


class RabbitMQConsumer:
    """See `leveret.brokers.Consumer`."""

    def __init__(
        self,
        urls: Sequence[str],
        queues: Sequence[Queue],
        credit: int | None,
        census: Census,
        notes: Notes,
        postpone: Postpone,
    ) -> None:
        self._urls = urls
        self._queues = queues
        self._credit = min(credit or 0, amqp.MOST_PREFETCH)
        self._census = census
        self._notes = notes
        self._postpone = postpone
        self._postponing: set[asyncio.Task[None]] = set()
        self._batch: list[Delivery] = []
        self._wake = asyncio.Event()
        self._stopped = False
        self._session: Session | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def hold_limit(self) -> HoldLimit | None:
        return self._session.hold_limit() if self._session is not None else None

    async def start(self) -> None:
        """Take from now on. A broker that is away is waited for; one that refuses raises."""
        self._session = await self._open(refusals=_REFUSALS)
        self._supervisor = asyncio.create_task(self._supervise(self._session))

    async def __aiter__(self) -> AsyncIterator[Sequence[Delivery]]:
        while not (self._stopped and not self._batch):
            await self._wake.wait()
            self._wake.clear()
            batch, self._batch = self._batch, []
            if batch:
                yield batch
            if self._supervisor is not None and self._supervisor.done() and not self._supervisor.cancelled():
                self._supervisor.result()

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        if self._session is None or not self._session.held:
            # Away from the broker: it must not begin to consume again when that is back.
            if self._supervisor is not None:
                self._supervisor.cancel()
        else:
            await self._session.cancel()
        self._wake.set()

    async def close(self) -> None:
        """Close the connection; what is unsettled goes back to its queue."""
        self._stopped = True
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        for task in self._postponing:
            task.cancel()
        await asyncio.gather(*self._postponing, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _supervise(self, session: Session) -> None:
        try:
            while True:
                await session.over()
                if self._stopped:
                    return
                log.warning(
                    "the connection to RabbitMQ was lost%s; %d deliveries go back to it",
                    session.why(),
                    session.outstanding,
                )
                await session.close()
                session = self._session = await self._open(refusals=None)
                log.info("connected to RabbitMQ again")
        finally:
            self._wake.set()

    async def _open(self, *, refusals: int | None) -> Session:
        """The next session, however long that takes; raises the last of so many refusals (None: of any number)."""
        for pause in backoff():
            try:
                return await self._open_session()
            except (BrokerUnavailable, BrokerRefused) as error:
                if isinstance(error, BrokerRefused) and refusals is not None:
                    refusals -= 1
                    if refusals == 0:
                        raise
                log.warning("%s; trying again in %.1f s", error, pause)
            await asyncio.sleep(pause)
        raise AssertionError("backoff() never ends")

    async def _open_session(self) -> Session:
        line = await amqp.Line.open(self._urls, purpose="worker", confirms=False)
        session = Session(line, self._queues, self._deliver, self._notes)
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT):
                await line.run(session.begin(self._credit, self._census))
        except BaseException as error:
            await line.close()
            if isinstance(error, (*amqp.CONNECTION_LOST, TimeoutError)):
                raise amqp.translate(error, "starting to consume") from error
            raise
        return session

    def _deliver(self, delivery: Delivery) -> None:
        now = time.time()
        due = delivery.envelope.due
        if due is None or due <= now:
            self._hand_over(delivery)
            return
        if rung(due - now) is None:
            asyncio.get_running_loop().call_later(due - now, self._hand_over, delivery)
            return
        task = asyncio.create_task(self._postpone(delivery, postponed(delivery)))
        self._postponing.add(task)
        task.add_done_callback(self._postponing.discard)

    def _hand_over(self, delivery: Delivery) -> None:
        self._batch.append(delivery)
        self._wake.set()


class Session:
    """One connection's consumers; also the lease of all that they were given."""

    def __init__(
        self,
        line: amqp.Line,
        queues: Sequence[Queue],
        deliver: Callable[[Delivery], None],
        notes: Notes,
    ) -> None:
        self._line = line
        self._notes = notes
        self._queues = queues
        self._deliver = deliver
        self._unsettled: dict[int, str] = {}
        self._tags: dict[str, Queue] = {}
        self._numbers = itertools.count(1)
        self._closed = False
        self._cancelled = False
        self._failed = asyncio.Event()
        self._mending: set[asyncio.Task[None]] = set()

    async def begin(self, credit: int, census: Census) -> None:
        """Declare and consume. Raises QueueMismatch, QueueNotFound or what aio-pika raises."""
        channel, connection = self._line.channel, self._line.connection
        await asyncio.sleep(await declare(connection, self._queues, self._notes, dead=True))
        await tell_priorities(connection, self._queues, self._notes)
        await channel.basic_qos(prefetch_count=credit)
        channel.on_consumer_cancel_callbacks.add(self._on_cancel)
        await census.answer_on(connection, self.running)
        for queue in self._queues:
            await self._consume(queue)

    @property
    def held(self) -> bool:
        return not (self._closed or self._line.is_lost)

    @property
    def outstanding(self) -> int:
        return len(self._unsettled)

    def running(self) -> dict[str, int]:
        """How many deliveries of each queue are unsettled."""
        counts = dict.fromkeys((queue.name for queue in self._queues), 0)
        for name in self._unsettled.values():
            counts[name] += 1
        return counts

    def holds(self, tag: int) -> bool:
        return self.held and tag in self._unsettled

    async def acknowledge(self, tag: int) -> bool:
        """True when it was this session's to acknowledge. A second one for a tag would close the channel."""
        if not self._take(tag):
            return False
        await self._line.run(self._line.channel.basic_ack(tag, wait=False))
        return True

    async def give_back(self, tag: int) -> bool:
        """Return a delivery to where it stood in its queue. Uncounted since RabbitMQ 4.3; before, a return counts."""
        if not self._take(tag):
            return False
        await self._line.run(self._line.channel.basic_nack(tag, requeue=True, wait=False))
        return True

    def _take(self, tag: int) -> bool:
        return self.held and self._unsettled.pop(tag, None) is not None

    def why(self) -> str:
        """What the server said when it ended this session, in brackets; nothing if it said nothing."""
        return f" ({self._line.farewell})" if self._line.farewell else ""

    def hold_limit(self) -> HoldLimit | None:
        """A consumer may choose its timeout since RabbitMQ 4.3."""
        version = amqp.server_version(self._line.connection)
        if version >= (4, 3):
            return None
        number = ".".join(str(part) for part in version)
        return HoldLimit(
            _CONSUMER_TIMEOUT,
            f"RabbitMQ {number} gives a task that is not settled within its consumer_timeout, 30 minutes unless set "
            "otherwise, to another worker; set consumer_timeout (milliseconds) in the server's rabbitmq.conf",
        )

    async def over(self) -> None:
        """Wait until this session can deliver no more."""
        failed = asyncio.ensure_future(self._failed.wait())
        lost = asyncio.ensure_future(self._line.lost())
        try:
            await asyncio.wait([failed, lost], return_when=asyncio.FIRST_COMPLETED)
        finally:
            failed.cancel()
            lost.cancel()

    async def cancel(self) -> None:
        """Ask for no more deliveries, and wait until none is on the way. What is unsettled stays this session's."""
        self._cancelled = True
        tags, self._tags = list(self._tags), {}
        if not self.held:
            return
        # Never cancelled: aiormq closes the channel, and with it every lease, when a call is given up.
        cancels = [self._line.start(self._line.channel.basic_cancel(tag)) for tag in tags]
        if cancels:
            done, _ = await asyncio.wait(cancels, timeout=_CANCEL_TIMEOUT)
            for cancel in done:
                if not cancel.cancelled():
                    cancel.exception()

    async def close(self) -> None:
        self._closed = True
        for task in self._mending:
            task.cancel()
        await asyncio.gather(*self._mending, return_exceptions=True)
        await self._line.close()

    async def _consume(self, queue: Queue) -> None:
        # A new tag each time: RabbitMQ 4.3 may hold on to one that it cancelled.
        tag = f"leveret-{next(self._numbers)}"
        self._tags[tag] = queue
        await self._line.channel.basic_consume(
            queue.name,
            partial(self._on_message, queue.name),
            consumer_tag=tag,
            arguments={"x-consumer-timeout": _NEVER},
        )

    async def _on_message(self, queue: str, message: amqp.DeliveredMessage) -> None:
        """Only hands over: aiormq cancels its callbacks when the channel closes."""
        delivery = to_delivery(message, queue, self)
        self._unsettled[delivery.tag] = queue
        self._deliver(delivery)

    def _on_cancel(self, frame: amqp.Cancel) -> None:
        """The broker ended a consumer: its queue was deleted, or moved."""
        queue = self._tags.pop(frame.consumer_tag or "", None)
        if queue is not None and not self._closed and not self._cancelled:
            task = asyncio.get_running_loop().create_task(self._mend(queue))
            self._mending.add(task)
            task.add_done_callback(self._mending.discard)

    async def _mend(self, queue: Queue) -> None:
        try:
            if await message_count(self._line.connection, queue.name) is not None:
                # A consumer timeout (RabbitMQ 4.3) or a move. The server may keep the cancelled consumer and deliver to
                # it, where nobody listens (4.3.6); only a new connection is free of it.
                log.warning("RabbitMQ cancelled the consumer of queue %r, which is still there", queue.name)
                self._failed.set()
                return
            log.warning("RabbitMQ cancelled the consumer of queue %r, which was deleted; making it again", queue.name)
            await asyncio.sleep(await declare(self._line.connection, [queue], self._notes, dead=True))
            await self._consume(queue)
        except (BrokerError, ConfigurationError, *amqp.CONNECTION_LOST) as error:
            log.warning("queue %r could not be consumed again on this connection: %s", queue.name, error)
            self._failed.set()
