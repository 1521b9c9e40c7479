"""The RabbitMQ broker, through aio-pika: RabbitMQ 3.10 to 4.3, no plugin, no second server."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

import msgspec

from leveret.brokers.backoff import backoff
from leveret.brokers.rabbitmq import amqp, marks, tls
from leveret.brokers.rabbitmq.census import CANCELLING, PAUSING, Census, Notice, Tally
from leveret.brokers.rabbitmq.codec import (
    buried,
    dead_letter_id,
    retry_message,
    revived_message,
    routed,
    to_dead_letter,
    to_message,
    unranked,
)
from leveret.brokers.rabbitmq.consumer import RabbitMQConsumer, Session
from leveret.brokers.rabbitmq.counting import ReadyCounter
from leveret.brokers.rabbitmq.declare import (
    Notes,
    declare,
    declare_delay,
    is_paused,
    mark_paused,
    message_count,
    require_queue,
    unmark_paused,
)
from leveret.brokers.rabbitmq.events import Events
from leveret.brokers.rabbitmq.priorities import expires_in_order
from leveret.brokers.rabbitmq.publisher import Publisher
from leveret.brokers.rabbitmq.topology import RUNGS, UNAPPLIED, dead_queue, delay_queue, hosts
from leveret.errors import (
    BrokerUnavailable,
    EnqueueError,
    LeaseLost,
    LeveretError,
    QueueFull,
    QueueNotFound,
    TaskTooLarge,
)
from leveret.model import MIDDLE_PRIORITY, DeadLettered, Queue, QueueStats, Released, Retrying, Succeeded, log_fields
from leveret.status import KEEP, Mark, cancelled_before, revived_again, still

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from leveret.brokers.following import Feed
    from leveret.brokers.rabbitmq.codec import Message
    from leveret.inspection import Describe, WorkerReport
    from leveret.model import DeadLetter, Delivery, Envelope, Outcome, Settlement
    from leveret.status import Status

T = TypeVar("T")

#: RabbitMQ 3.10 does not tell the consumers of a deleted quorum queue when another one of its name is made within a few
#: milliseconds; they would wait for ever. So a deleted queue is made again a moment later (seconds).
_AFTER_DELETION = 0.5
#: For how long a question is asked again: a queue that was just made may have no leader yet (seconds).
_QUESTION = 2.0
#: How long no dead letter comes until the queue is asked for one (seconds), and how often it must have none.
_QUIET = 0.2
_ENDS = 2
#: How many dead letters are put back at once.
_BATCH = 200
#: How long workers may take to hear of a cancellation and say that they run the task (seconds).
_HEARD = 0.3
#: How long a failed task of a full queue is kept before it goes back (seconds).
_FULL = 1.0
#: How long until a copy over the server's limit is tried again: each try closes the publishing channel (seconds).
_TOO_LARGE = 60.0

log = logging.getLogger("leveret.rabbitmq")


class RabbitMQBroker:
    """See `leveret.brokers.Broker`. ``timeout``: seconds a publish may take before it raises."""

    def __init__(self, url: str, *, timeout: float, keep: float = KEEP) -> None:
        amqp.quieten_drivers()
        self._urls = hosts(url)
        if tls.is_unverified(self._urls[0]):
            log.warning(
                "no_verify_ssl: the server's certificate is not checked, so whoever is in between can read and change "
                "all that is sent, the password too; use cafile instead"
            )
        self._timeout = timeout
        self._publisher = Publisher(self._urls, timeout=timeout)
        self._census = Census(self._publisher)
        self._ready = ReadyCounter()
        self._events = Events(self._urls, self._publisher, keep=keep, timeout=timeout)
        self._queues: dict[str, Queue] = {}
        self._notes = Notes()
        self._delays: set[tuple[str, int]] = set()
        #: Of the server that made, or had, those delay queues.
        self._version: tuple[int, ...] = (0,)

    async def declare(self, queues: Sequence[Queue]) -> None:
        await self._declare(queues, dead=False)
        self._queues.update((queue.name, queue) for queue in queues)

    async def publish(self, envelopes: Sequence[Envelope]) -> None:
        messages = [to_message(self._ranked(envelope)) for envelope in envelopes]
        try:
            await self._store(messages)
        except QueueNotFound as error:
            # A queue that was deleted after it was declared is made again, unless it is the operator's to make.
            missing = [message for message in messages if message.id in set(error.ids)]
            queues = [self._queues.get(name) for name in {message.home for message in missing}]
            ours = [queue for queue in queues if queue is not None and queue.create]
            if len(ours) < len(queues):
                raise
            await self._make_again(ours, dead=False)
            await self._store(missing)

    @property
    def fixed_credit(self) -> bool:
        return True

    @asynccontextmanager
    async def consume(
        self, queues: Sequence[Queue], *, credit: int | None, describe: Describe | None = None
    ) -> AsyncGenerator[RabbitMQConsumer]:
        self._queues.update((queue.name, queue) for queue in queues)
        consumer = RabbitMQConsumer(
            self._urls, queues, credit, self._census, self._notes, self._postpone, self._publisher, describe
        )
        try:
            await consumer.start()
            yield consumer
        finally:
            await consumer.close()

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        await self._events.record(updates)
        done: dict[Session, dict[int, str]] = {}
        others: list[Settlement] = []
        for delivery, outcome in settlements:
            if isinstance(outcome, Succeeded) and isinstance(delivery.lease, Session):
                done.setdefault(delivery.lease, {})[delivery.tag] = delivery.envelope.id
            else:
                others.append((delivery, outcome))
        lost = [id_ for session, ids in done.items() for id_ in await _acknowledge(session, ids)]
        if others:
            kept = await asyncio.gather(*(self._settle(delivery, outcome) for delivery, outcome in others))
            lost += [delivery.envelope.id for (delivery, _), is_kept in zip(others, kept, strict=True) if not is_kept]
        if lost:
            raise LeaseLost(lost)

    async def tell(self, updates: Sequence[Status]) -> None:
        await self._events.tell(updates)

    async def statuses(self, ids: Sequence[str]) -> Sequence[Status]:
        return await self._events.statuses(ids)

    def follow(self, ids: Sequence[str]) -> AbstractAsyncContextManager[Feed]:
        return self._events.follow(ids)

    async def recent(self, limit: int) -> Sequence[Status]:
        return await self._events.recent(limit)

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Status]]]:
        return self._events.watch()

    async def workers(self) -> Sequence[WorkerReport]:
        return await self._insist("asking the workers", self._workers, _QUESTION)

    async def cancel(self, id_: str) -> Status | None:
        mark = Mark(id_, time.time())
        await self._insist("cancelling", lambda: self._mark(mark))
        await asyncio.sleep(_HEARD)
        status = next(iter(await self._events.statuses([id_])), None)
        if status is None or status.is_final or status.state == "running":
            return status
        cancelled = cancelled_before(status, mark.at)
        await self._events.record([cancelled])
        return cancelled

    async def stats(self, queues: Sequence[str] = ()) -> Sequence[QueueStats]:
        return await self._insist("counting", lambda: self._stats(queues), _QUESTION)

    async def ready(self, queues: Sequence[str]) -> int:
        async def ask() -> int:
            return await self._ready.count(await self._publisher.connection(), queues)

        return await self._ask("counting what is ready", ask, _QUESTION)

    async def dead_letters(self, queue: str, *, limit: int) -> Sequence[DeadLetter]:
        return await self._insist("reading dead letters", lambda: self._dead_letters(queue, limit), _QUESTION)

    async def revive(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        # A timeout for each batch: thousands may take long, and those that are put back stay so.
        limit = self._timeout * (1 + len(ids) / _BATCH)
        found: list[str] = []
        await self._insist("reviving dead letters", lambda: self._revive(queue, ids, found), _QUESTION, limit)
        return found

    async def discard(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        return await self._insist("discarding dead letters", lambda: self._discard(queue, ids), _QUESTION)

    async def pause(self, queue: str) -> None:
        await self._insist("pausing", lambda: self._set_paused(queue, mark_paused), _QUESTION)

    async def resume(self, queue: str) -> None:
        await self._insist("resuming", lambda: self._set_paused(queue, unmark_paused), _QUESTION)

    def abandon(self) -> None:
        """The sockets went with their loop."""

    async def close(self) -> None:
        await self._events.close()
        await self._publisher.close()

    def _ranked(self, envelope: Envelope) -> Envelope:
        """A task without a priority is like 4 everywhere: a classic queue takes a missing one as 0."""
        queue = self._queues.get(envelope.queue)
        if envelope.priority is not None or queue is None or queue.kind == "quorum":
            return envelope
        return msgspec.structs.replace(envelope, priority=MIDDLE_PRIORITY)

    async def _settle(self, delivery: Delivery, outcome: Outcome) -> bool:
        """Record one outcome; False when the delivery is not the caller's any more."""
        session = delivery.lease
        if not isinstance(session, Session):
            return False
        try:
            if isinstance(outcome, Released):
                return await session.give_back(delivery.tag)
            if isinstance(outcome, Retrying):
                await self._store_copy(session, delivery, retry_message(delivery, outcome, time.time()))
            elif isinstance(outcome, DeadLettered):
                await self._store_copy(session, delivery, buried(delivery, outcome, time.time()))
            return bool(await session.acknowledge([delivery.tag]))
        except QueueFull as error:
            log.warning(
                "task %s goes back uncounted, in a moment: %s",
                delivery.envelope.id,
                error,
                extra=log_fields(delivery.envelope),
            )
            await asyncio.sleep(_FULL)  # it goes to the head of its queue, and would be here again at once
            return await session.give_back(delivery.tag)
        except amqp.CONNECTION_LOST:
            return False

    async def _postpone(self, delivery: Delivery, message: Message) -> bool:
        """Put a task that is not due yet on its next rung; False when it is still to be held."""
        session = delivery.lease
        assert isinstance(session, Session)
        with suppress(*amqp.CONNECTION_LOST):
            try:
                if session.holds(delivery.tag):
                    await self._store([message])
                    await session.acknowledge([delivery.tag])
            except LeveretError as error:
                log.warning(
                    "task %s is not due yet and stays with this worker for now: %s",
                    delivery.envelope.id,
                    error,
                    extra=log_fields(delivery.envelope),
                )
                return False
        return True

    async def _store(self, messages: Sequence[Message]) -> None:
        """Publish, each to where it waits. A QueueNotFound names what is not stored."""
        try:
            if any(message.due is not None for message in messages):
                messages = await self._routed(messages)
            await self._publisher.publish(messages)
        except QueueNotFound as error:
            self._delays.clear()
            # For want of a delay queue nothing was sent, and whoever sends again must send all of it.
            error.ids = error.ids or tuple(message.id for message in messages)
            raise

    async def _routed(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Each for where it waits, having made the delay queues that are wanted for the first time."""
        while True:
            now = time.time()
            routes = [routed(message, now) for message in messages]
            waits = {(message.home, milliseconds) for message, milliseconds in routes if milliseconds is not None}
            missing = waits - self._delays
            if not missing:
                return [self._fit_to_wait(*route) for route in routes]
            await self._make_delays(missing)

    def _fit_to_wait(self, message: Message, milliseconds: int | None) -> Message:
        return message if milliseconds is None or expires_in_order(self._version) else unranked(message)

    async def _make_delays(self, missing: set[tuple[str, int]]) -> None:
        async def ask() -> float:
            connection = await self._publisher.connection()
            self._version = amqp.server_version(connection)
            return max([await declare_delay(connection, home, milliseconds) for home, milliseconds in missing])

        await asyncio.sleep(await self._insist("declaring delay queues", ask))
        self._delays |= {(home, one) for home, milliseconds in missing for one in RUNGS if one <= milliseconds}

    async def _store_copy(self, session: Session, delivery: Delivery, message: Message) -> None:
        """Store a copy durably, before its original is acknowledged; tried for as long as the lease is held."""
        for pause in backoff():
            if not session.holds(delivery.tag):
                return
            try:
                await self._store([message])
            except QueueFull:
                # Waiting for room could wait for ever: the room is made by consumers, and they may all wait here.
                raise
            except QueueNotFound:
                # It was deleted under its running task. The session mends what it consumes; this may come first.
                queue = delivery.envelope.queue
                with suppress(LeveretError):
                    await self._make_again([self._queues.get(queue, Queue(queue))], dead=True)
            except LeveretError as error:
                if isinstance(error, TaskTooLarge):
                    # The server's limit was lowered. Given back, it would run again and again, and RabbitMQ 4.0 to 4.2
                    # drops what came back twenty times.
                    pause = _TOO_LARGE
                log.warning(
                    "the outcome of task %s cannot be stored, trying again in %.1f s: %s",
                    delivery.envelope.id,
                    pause,
                    error,
                    extra=log_fields(delivery.envelope),
                )
            else:
                return
            await asyncio.sleep(pause)

    async def _make_again(self, queues: Sequence[Queue], *, dead: bool) -> None:
        await asyncio.sleep(_AFTER_DELETION)
        await self._declare(queues, dead=dead)

    async def _declare(self, queues: Sequence[Queue], *, dead: bool) -> None:
        async def ask() -> float:
            return await declare(await self._publisher.connection(), queues, self._notes, dead=dead)

        await asyncio.sleep(await self._insist("declaring queues", ask))

    async def _stats(self, names: Sequence[str]) -> list[QueueStats]:
        connection = await self._publisher.connection()
        counts = {name: await _count(connection, name) for name in names}
        expected = {name: count[1] for name, count in counts.items() if count is not None}
        paused = [name for name in counts if await is_paused(connection, name)]
        tally = await self._census.take(connection, expected, more=bool(paused))
        for name in tally.running.keys() - counts.keys():
            counts[name] = await _count(connection, name)
        return [
            await _queue_stats(connection, name, *count, tally)
            for name, count in sorted(counts.items())
            if count is not None
        ]

    async def _workers(self) -> list[WorkerReport]:
        return await self._census.workers(await self._publisher.connection())

    async def _set_paused(self, queue: str, change: Callable[[amqp.Connection, str], Awaitable[None]]) -> None:
        connection = await self._publisher.connection()
        await change(connection, queue)
        await self._census.announce(connection, Notice(kind=PAUSING, queue=queue))

    async def _mark(self, mark: Mark) -> None:
        connection = await self._publisher.connection()
        await marks.write(self._publisher, connection, mark)
        await self._census.announce(connection, Notice(kind=CANCELLING))

    async def _dead_letters(self, queue: str, limit: int) -> list[DeadLetter]:
        async with self._fetched_dead(queue, limit) as (_, messages):
            return [to_dead_letter(message, queue) for message in messages]

    async def _revive(self, queue: str, ids: Sequence[str], found: list[str]) -> None:
        """Put dead letters back, and add their ids to ``found`` as they are, which a later try does not see again."""
        async with self._chosen_dead(queue, ids) as (channel, chosen):
            for start in range(0, len(chosen), _BATCH):
                batch = chosen[start : start + _BATCH]
                now = time.time()
                copies = [revived_message(message, queue, now) for message in batch]
                refusal: EnqueueError | None = None
                try:
                    # Before they are stored: a worker may have the first, and tell of it, before the last one is.
                    async with self._told_revived([dead_letter_id(message) for message in batch], now):
                        await self._store(copies)
                except EnqueueError as error:
                    refusal = error
                    batch = [message for message, copy in zip(batch, copies, strict=True) if copy.id not in error.ids]
                await _remove(channel, dead_queue(queue), batch)
                found += [dead_letter_id(message) for message in batch]
                if refusal is not None:
                    raise refusal

    @asynccontextmanager
    async def _told_revived(self, ids: Sequence[str], now: float) -> AsyncGenerator[None]:
        """Say that they wait again; of those that cannot be stored, that they are dead still."""
        dead = await self._known_dead(ids)
        await self._events.record([revived_again(status, now) for status in dead])
        try:
            yield
        except LeveretError as error:
            left = error.ids if isinstance(error, EnqueueError) else ids
            await self._events.record([still(status, time.time()) for status in dead if status.id in left])
            raise

    async def _known_dead(self, ids: Sequence[str]) -> list[Status]:
        try:
            return [status for status in await self._events.statuses(ids) if status.state == "dead"]
        except LeveretError as error:
            log.warning("the statuses of %d tasks that are put back stay as they are: %s", len(ids), error)
            return []

    async def _discard(self, queue: str, ids: Sequence[str]) -> list[str]:
        async with self._chosen_dead(queue, ids) as (channel, chosen):
            await _remove(channel, dead_queue(queue), chosen)
            return [dead_letter_id(message) for message in chosen]

    @asynccontextmanager
    async def _chosen_dead(
        self, queue: str, ids: Sequence[str]
    ) -> AsyncGenerator[tuple[amqp.Channel, list[amqp.DeliveredMessage]]]:
        """Dead letters to decide about. Raises QueueNotFound."""
        wanted = frozenset(ids)
        async with self._fetched_dead(queue, None) as (channel, messages):
            if not messages:
                await require_queue(await self._publisher.connection(), queue)
            yield channel, [message for message in messages if dead_letter_id(message) in wanted]

    @asynccontextmanager
    async def _fetched_dead(
        self, queue: str, limit: int | None
    ) -> AsyncGenerator[tuple[amqp.Channel, list[amqp.DeliveredMessage]]]:
        """Dead letters, the oldest first; those that are not acknowledged go back to where they stood.

        By a connection of its own: the publisher gives its one up when the server is silent, and dead letters of
        which it has stored copies would stay where they are, and be put back twice.
        """
        line = await amqp.Line.open(self._urls, purpose="dead letters", confirms=False)
        try:
            count = await message_count(line.connection, dead_queue(queue))
            yield line.channel, [] if count is None else await _taken(line.channel, dead_queue(queue), limit, count[0])
        finally:
            await line.close()

    async def _insist(
        self,
        doing: str,
        question: Callable[[], Awaitable[T]],
        patience: float | None = None,
        limit: float | None = None,
    ) -> T:
        """Ask again while the broker is unavailable, for as long as ``patience`` (seconds; None: the timeout).

        ``limit``: for how long one answer may take (seconds; None: the timeout).
        """
        loop = asyncio.get_running_loop()
        seconds = self._timeout if patience is None else min(patience, self._timeout)
        deadline = loop.time() + seconds
        for pause in backoff():
            try:
                return await self._ask(
                    doing, question, (limit or self._timeout) if patience else deadline - loop.time()
                )
            except BrokerUnavailable as error:
                if loop.time() + pause > deadline:
                    raise BrokerUnavailable(f"not possible within {seconds:g} s: {error}") from error
            await asyncio.sleep(pause)
        raise AssertionError("backoff() never ends")

    async def _ask(self, doing: str, question: Callable[[], Awaitable[T]], limit: float) -> T:
        try:
            async with asyncio.timeout(limit):
                return await amqp.told(question())
        except asyncio.CancelledError as error:
            if amqp.is_cancelled():
                raise
            raise BrokerUnavailable(f"{doing}: the connection to RabbitMQ was lost") from error
        except TimeoutError as error:
            raise BrokerUnavailable(f"{doing}: RabbitMQ did not answer") from error
        except amqp.CONNECTION_LOST as error:
            raise amqp.translate(error, doing) from error


async def _acknowledge(session: Session, ids: Mapping[int, str]) -> list[str]:
    """Acknowledge deliveries (task ids by tag); the ids of those that are not the caller's any more."""
    try:
        ours = await session.acknowledge(list(ids))
    except amqp.CONNECTION_LOST:
        ours = []
    return [] if len(ours) == len(ids) else [id_ for tag, id_ in ids.items() if tag not in ours]


async def _taken(channel: amqp.Channel, queue: str, limit: int | None, count: int) -> list[amqp.DeliveredMessage]:
    """The messages of a queue, unacknowledged, the oldest first; not those that another program holds.

    By a consumer: to get them one by one costs a round trip each, and thousands of dead letters take minutes.
    ``count``: about so many are there. Nobody else sees or counts them meanwhile, so it shall not take long.
    """
    messages: list[amqp.DeliveredMessage] = []
    came = asyncio.Event()

    async def take(message: amqp.DeliveredMessage) -> None:
        if limit is None or len(messages) < limit:
            messages.append(message)
        came.set()

    await channel.basic_qos(prefetch_count=limit if limit and limit <= amqp.MOST_PREFETCH else 0)
    await channel.basic_consume(queue, take)
    ends = 0
    while ends < _ENDS and (limit is None or len(messages) < limit):
        came.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(_QUIET if len(messages) < count else 0.0):
                await came.wait()
                continue
        # Only the queue itself knows: RabbitMQ 3.10 counts what is in it every few seconds.
        message = await channel.basic_get(queue)
        if isinstance(message.delivery, amqp.GetEmpty):
            ends += 1
        else:
            await take(message)
    return messages


async def _remove(channel: amqp.Channel, queue: str, messages: Sequence[amqp.DeliveredMessage]) -> None:
    """Acknowledge messages of a quorum queue; returned means that it has applied that, and the channel may close."""
    for start in range(0, len(messages), UNAPPLIED):
        for message in messages[start : start + UNAPPLIED]:
            await channel.basic_ack(message.delivery_tag or 0, wait=False)
        # Answered from the queue's log, behind them.
        await channel.basic_get(queue)


async def _count(connection: amqp.Connection, name: str) -> tuple[int, int] | None:
    """Ready messages and consumers. A quorum queue that is slow to answer says 0 and 0, so that is asked again."""
    count = await message_count(connection, name)
    return count if count != (0, 0) else await message_count(connection, name)


async def _queue_stats(connection: amqp.Connection, name: str, ready: int, consumers: int, tally: Tally) -> QueueStats:
    dead = await _count(connection, dead_queue(name))
    silent = max(0, consumers - tally.consumers.get(name, 0))
    waiting = [await message_count(connection, delay_queue(name, milliseconds)) for milliseconds in RUNGS]
    return QueueStats(
        name=name,
        ready=ready,
        running=tally.running.get(name, 0),
        dead=dead[0] if dead else 0,
        consumers=silent + tally.workers.get(name, 0),
        delayed=sum(count[0] for count in waiting if count is not None),
        silent_consumers=silent,
        paused=await is_paused(connection, name),
    )
