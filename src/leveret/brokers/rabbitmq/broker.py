"""The RabbitMQ broker, through aio-pika: RabbitMQ 3.10 to 4.3, no plugin, no second server."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager, suppress
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import msgspec

from leveret.brokers.backoff import backoff
from leveret.brokers.base import Capabilities, in_use
from leveret.brokers.flights import Flights
from leveret.brokers.rabbitmq.amqp import Hosts
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.consumer import RabbitMQConsumer, Session
from leveret.brokers.rabbitmq.control import CANCELLING, MOST_QUEUES, PAUSING, ControlBus, Signal, Tally
from leveret.brokers.rabbitmq.control import cancel_log as marks
from leveret.brokers.rabbitmq.holding import Holding
from leveret.brokers.rabbitmq.queues import (
    DELAY_STEPS,
    Fetched,
    OnceLogger,
    Publisher,
    ReadyCounter,
    buried,
    dead_letter_id,
    dead_queue,
    declare,
    declare_delay,
    delay_queue,
    delete_queue,
    expires_in_order,
    is_paused,
    mark_paused,
    message_count,
    pause_marker,
    pause_marks,
    purge_queue,
    require_queue,
    retry_message,
    revived_message,
    routed,
    to_dead_letter,
    to_message,
    unmark_paused,
    unranked,
)
from leveret.brokers.rabbitmq.statuses import StatusLog
from leveret.errors import (
    BrokerUnavailable,
    EnqueueError,
    LeaseLost,
    LeveretError,
    QueueMismatch,
    QueueNotFound,
)
from leveret.model import (
    KEEP,
    MIDDLE_PRIORITY,
    CancelRequest,
    DeadLettered,
    Queue,
    QueueStats,
    Released,
    Retrying,
    Succeeded,
    cancelled_before,
    log_fields,
    revived_again,
    still,
)
from leveret.model.printable import in_line
from leveret.observe import LimitedLog

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from leveret.brokers.base import Select
    from leveret.brokers.feeds import Feed
    from leveret.brokers.rabbitmq.amqp import Incoming, Message
    from leveret.model import (
        DeadLetter,
        Delivery,
        Describe,
        Envelope,
        Outcome,
        Removed,
        Settlement,
        Status,
        WorkerReport,
    )

T = TypeVar("T")
#: A queue to be declared, and whether its dead letters' too.
_Wanted: TypeAlias = tuple[Queue, bool]

#: How many declare at once: each uses a channel, of which a connection has some 2,000 and may have few.
_DECLARERS = 4
#: How many cancellations are written in one.
_CANCELLERS = 200
#: RabbitMQ 3.10 does not tell the consumers of a deleted quorum queue when another one of its name is made within a few
#: milliseconds; they would wait for ever. So a deleted queue is made again a moment later (seconds).
_AFTER_DELETION = 0.5
#: For how long a question is asked again: a queue that was just made may have no leader yet (seconds).
_QUESTION = 2.0
#: How often it is seen whether an alarm keeps an answer back that takes longer (seconds).
_LOOK = 0.2
#: How long a look at dead letters may take: there may be many (seconds). A silent server is noticed by its heartbeat.
_LOOKING = 600.0
#: How many dead letters are put back at once.
_BATCH = 200
#: How long workers may take to hear of a cancellation and say that they run the task (seconds).
_HEARD = 0.3
#: How many tasks a line of the log names.
_MOST_NAMED = 20

log = logging.getLogger("leveret.rabbitmq")


class RabbitMQBroker:
    """See `leveret.brokers.Broker`. ``timeout``: seconds a publish may take before it raises."""

    capabilities = Capabilities(adjustable_credit=False, unique_ids=False, shared=True)

    def __init__(self, url: str, *, timeout: float, keep: float = KEEP) -> None:
        amqp.quieten_drivers()
        self._hosts = Hosts(url, timeout=timeout)
        if self._hosts.is_unverified:
            log.warning(
                "no_verify_ssl: the server's certificate is not checked, so whoever is in between can read and change "
                "all that is sent, the password too; use cafile instead"
            )
        self._timeout = timeout
        self._publisher = Publisher(self._hosts, timeout=timeout)
        #: Queues, and delay queues of them, that are being declared.
        self._declaring: Flights[_Wanted] = Flights()
        self._delaying: Flights[tuple[str, int]] = Flights()
        self._declarers = asyncio.Semaphore(_DECLARERS)
        self._marking = asyncio.Lock()
        #: Cancellations that are not written yet, by any key.
        self._unmarked: dict[object, CancelRequest] = {}
        self._census = ControlBus(self._publisher)
        self._ready = ReadyCounter()
        self._events = StatusLog(self._hosts, self._publisher, keep=keep, timeout=timeout)
        self._queues: dict[str, Queue] = {}
        self._notes = OnceLogger(self._publisher.limits)
        self._warnings = LimitedLog(log)
        self._holding = Holding(self._store, self._mend_queues)
        self._delays: set[tuple[str, int]] = set()
        #: Of the server that made, or had, those delay queues.
        self._version: tuple[int, ...] = (0,)

    async def declare(self, queues: Sequence[Queue]) -> None:
        await self._declare(queues, dead=False)
        self._learn(queues)

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

    @asynccontextmanager
    async def consume(
        self, queues: Sequence[Queue], *, credit: int | None, describe: Describe | None = None
    ) -> AsyncGenerator[RabbitMQConsumer]:
        self._learn(queues)
        consumer = RabbitMQConsumer(
            self._hosts, queues, credit, self._census, self._notes, self._postpone, self._publisher, describe
        )
        try:
            await consumer.start()
            yield consumer
        finally:
            await consumer.close()
            if ids := self._holding.given_up():
                log.warning(
                    "%d outcomes could not be stored until this worker stopped; their tasks go back to their queues, "
                    "and run again: %s",
                    len(ids),
                    ", ".join(map(in_line, ids[:_MOST_NAMED])) + (" and more" if len(ids) > _MOST_NAMED else ""),
                )

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
        mark = CancelRequest(id_, time.time())
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

    async def dead_letters(self, queue: str, *, limit: int, select: Select | None = None) -> Sequence[DeadLetter]:
        return await self._insist(
            "reading dead letters", lambda: self._dead_letters(queue, limit, select), _QUESTION, _LOOKING
        )

    async def retry_dead(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        # A timeout for each batch: thousands may take long, and those that are put back stay so.
        limit = max(_LOOKING, self._timeout * (1 + len(ids) / _BATCH))
        found: list[str] = []
        await self._insist("reviving dead letters", lambda: self._retry_dead(queue, ids, found), _QUESTION, limit)
        return found

    async def drop_dead(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        return await self._insist("discarding dead letters", lambda: self._discard(queue, ids), _QUESTION, _LOOKING)

    async def pause(self, queue: str) -> None:
        await self._insist("pausing", lambda: self._set_paused(queue, mark_paused), _QUESTION)

    async def resume(self, queue: str) -> None:
        await self._insist("resuming", lambda: self._set_paused(queue, unmark_paused), _QUESTION)

    async def purge(self, queue: str, *, force: bool = False) -> Removed:
        return await self._insist("purging", lambda: self._clear(queue, force=force, whole=False), _QUESTION)

    async def delete(self, queue: str, *, force: bool = False) -> Removed:
        removed = await self._insist("deleting", lambda: self._clear(queue, force=force, whole=True), _QUESTION)
        self._delays = {(home, milliseconds) for home, milliseconds in self._delays if home != queue}
        return removed

    def abandon(self) -> None:
        """The sockets went with their loop."""

    async def close(self) -> None:
        error = BrokerUnavailable("the connection was closed by this program; nothing was stored")
        self._declaring.close(error)
        self._delaying.close(error)
        await self._events.close()
        await self._publisher.close()
        self._warnings.flush()

    def _learn(self, queues: Sequence[Queue]) -> None:
        for queue in queues:
            self._queues[queue.name] = queue
            if queue.max_length is not None:
                self._publisher.limits.add(queue.name)

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
                await self._holding.store(session, delivery, retry_message(delivery, outcome, time.time()))
            elif isinstance(outcome, DeadLettered):
                await self._holding.store(session, delivery, buried(delivery, outcome, time.time()))
            return bool(await session.acknowledge([delivery.tag]))
        except amqp.CONNECTION_LOST:
            return False

    async def _postpone(self, delivery: Delivery, message: Message) -> bool:
        """Put a task that is not due yet on its next step; False when it is still to be held."""
        session = delivery.lease
        assert isinstance(session, Session)
        with suppress(*amqp.CONNECTION_LOST):
            try:
                if session.holds(delivery.tag):
                    await self._store([message])
                    await session.acknowledge([delivery.tag])
            except LeveretError as error:
                self._warnings.warning(
                    "task %s is not due yet and stays with this worker for now: %s",
                    in_line(delivery.envelope.id),
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
        # With all the shorter ones, which its tasks climb down to.
        steps = [(home, step) for home, longest in missing for step in DELAY_STEPS if step <= longest]
        try:
            await self._delaying.join([one for one in steps if one not in self._delays], self._make_steps)
        except QueueNotFound as error:
            raise QueueNotFound(str(error)) from error  # whoever waits names tasks of its own in it

    async def _make_steps(self, steps: Sequence[tuple[str, int]]) -> None:
        async def ask() -> float:
            connection = await self._publisher.connection()
            self._version = amqp.server_version(connection)
            homes = dict.fromkeys(home for home, _ in steps)
            return max(
                [await declare_delay(connection, one, [step for home, step in steps if home == one]) for one in homes]
            )

        async with self._declarers:
            wait = await self._insist("declaring delay queues", ask)
        await asyncio.sleep(wait)
        self._delays.update(steps)

    async def _mend_queues(self, delivery: Delivery) -> None:
        queue = delivery.envelope.queue
        with suppress(LeveretError):
            await self._make_again([self._queues.get(queue, Queue(queue))], dead=True)

    async def _make_again(self, queues: Sequence[Queue], *, dead: bool) -> None:
        await asyncio.sleep(_AFTER_DELETION)
        await self._declare(queues, dead=dead)

    async def _declare(self, queues: Sequence[Queue], *, dead: bool) -> None:
        """Each once, for however many want it now, and as long as it is not to be used yet."""
        await self._declaring.join([(queue, dead) for queue in queues], self._declare_now)

    async def _declare_now(self, wanted: Sequence[_Wanted]) -> None:
        queues = [queue for queue, _ in wanted]
        dead = any(dead for _, dead in wanted)

        async def ask() -> float:
            return await declare(await self._publisher.connection(), queues, self._notes, dead=dead)

        async with self._declarers:
            wait = await self._insist("declaring queues", ask)
        await asyncio.sleep(wait)

    async def _stats(self, names: Sequence[str]) -> list[QueueStats]:
        connection = await self._publisher.connection()
        counts = {name: await _count(connection, name) for name in names}
        expected = {name: count[1] for name, count in counts.items() if count is not None}
        paused = [name for name in counts if await is_paused(connection, name)]
        tally = await self._census.take(connection, expected, more=bool(paused))
        for name in sorted(tally.running.keys() - counts.keys())[:MOST_QUEUES]:
            # Anybody may answer, and name what nobody may look at.
            with suppress(QueueMismatch, amqp.AMQPChannelError):
                counts[name] = await _count(connection, name)
        found = [await _queue_stats(connection, name, count, tally) for name, count in sorted(counts.items())]
        return [stats for stats in found if stats is not None]

    async def _workers(self) -> list[WorkerReport]:
        return await self._census.workers(await self._publisher.connection())

    async def _set_paused(self, queue: str, change: Callable[[amqp.Connection, str], Awaitable[None]]) -> None:
        connection = await self._publisher.connection()
        await change(connection, queue)
        await self._census.announce(connection, Signal(kind=PAUSING, queue=queue))

    async def _clear(self, queue: str, *, force: bool, whole: bool) -> Removed:
        connection = await self._publisher.connection()
        count = await _count(connection, queue)
        if count is None:
            raise QueueNotFound(f"queue {queue!r} does not exist")
        consumers = count[1]
        if consumers and not force:
            raise in_use(queue, consumers=consumers, running=(await self._stats([queue]))[0].running)
        removed = await (delete_queue if whole else purge_queue)(connection, queue)
        return msgspec.structs.replace(removed, kept=whole and bool(consumers))

    async def _mark(self, mark: CancelRequest) -> None:
        """Write the mark, and tell the workers: in one with all that came while others were being written."""
        key = object()
        self._unmarked[key] = mark
        try:
            async with self._marking:
                if key not in self._unmarked:
                    return  # it went with another's
                batch = {key: mark, **dict(islice(self._unmarked.items(), _CANCELLERS))}
                connection = await self._publisher.connection()
                await marks.write(self._publisher, connection, list(batch.values()))
                await self._census.announce(connection, Signal(kind=CANCELLING))
                for one in batch:
                    self._unmarked.pop(one, None)
        finally:
            # Who gives up has nothing cancelled later.
            self._unmarked.pop(key, None)

    async def _dead_letters(self, queue: str, limit: int, select: Select | None) -> list[DeadLetter]:
        def keep(message: Incoming) -> tuple[float, DeadLetter | None]:
            letter = to_dead_letter(message, queue)
            return letter.died_at or 0.0, letter if select is None else select(letter)

        async with self._fetched_dead(queue, limit, keep) as fetched:
            # Those that were not selected too: the limit is for what is looked through.
            oldest = sorted(fetched.kept, key=lambda kept: kept[0])[:limit]
            return [letter for _, letter in oldest if letter is not None]

    async def _retry_dead(self, queue: str, ids: Sequence[str], found: list[str]) -> None:
        """Put dead letters back, and add their ids to ``found`` as they are, which a later try does not see again."""
        async with self._chosen_dead(queue, ids) as (fetched, chosen):
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
                await fetched.remove(batch)
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
        async with self._chosen_dead(queue, ids) as (fetched, chosen):
            await fetched.remove(chosen)
            return [dead_letter_id(message) for message in chosen]

    @asynccontextmanager
    async def _chosen_dead(
        self, queue: str, ids: Sequence[str]
    ) -> AsyncGenerator[tuple[Fetched[Incoming], list[Incoming]]]:
        """Dead letters to decide about. Raises QueueNotFound."""
        wanted = frozenset(ids)

        def keep(message: Incoming) -> Incoming | None:
            return message if dead_letter_id(message) in wanted else None

        async with self._fetched_dead(queue, None, keep) as fetched:
            if not fetched.count:
                await require_queue(await self._publisher.connection(), queue)
            yield fetched, fetched.kept

    @asynccontextmanager
    async def _fetched_dead(
        self, queue: str, limit: int | None, keep: Callable[[Incoming], T | None]
    ) -> AsyncGenerator[Fetched[T]]:
        """Dead letters, the oldest first; those that are not removed go back to where they stood.

        ``keep``: what is kept of each; None: nothing.

        By a connection of its own: the publisher gives its one up when the server is silent, and dead letters of
        which it has stored copies would stay where they are, and be put back twice.
        """
        line = await amqp.Link.open(self._hosts, purpose="dead letters", confirms=False)
        try:
            count = await message_count(line.connection, dead_queue(queue))
            fetched = Fetched(line, dead_queue(queue), keep)
            if count is None:
                yield fetched
                return
            try:
                await fetched.take(limit, count[0])
                yield fetched
            finally:
                with suppress(*amqp.CONNECTION_LOST):  # they are back, then
                    await fetched.put_back(self._publisher)
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
        began = loop.time()
        deadline = began + seconds
        for pause in backoff():
            try:
                return await self._ask(
                    doing, question, (limit or self._timeout) if patience else deadline - loop.time(), deadline
                )
            except BrokerUnavailable as error:
                if loop.time() + pause > deadline:
                    # One answer may take longer than it is asked for again.
                    waited = max(seconds, loop.time() - began)
                    raise BrokerUnavailable(f"not possible within {waited:.2g} s: {error}") from error
            await asyncio.sleep(pause)
        raise AssertionError("backoff() never ends")

    async def _ask(
        self, doing: str, question: Callable[[], Awaitable[T]], limit: float, deadline: float | None = None
    ) -> T:
        """``deadline``: until when an answer is waited for during an alarm, when none comes (the loop's time)."""
        loop = asyncio.get_running_loop()
        watch: asyncio.TimerHandle | None = None

        def look() -> None:
            nonlocal watch
            if self._publisher.is_blocked:
                within.reschedule(loop.time())
            else:
                watch = loop.call_later(_LOOK, look)

        try:
            async with asyncio.timeout(limit) as within:
                if deadline is not None:
                    watch = loop.call_at(deadline, look)
                try:
                    return await amqp.told(question())
                finally:
                    if watch is not None:
                        watch.cancel()
        except asyncio.CancelledError as error:
            if amqp.is_cancelled():
                raise
            raise BrokerUnavailable(f"{doing}: the connection to RabbitMQ was lost") from error
        except TimeoutError as error:
            raise BrokerUnavailable(f"{doing}: {self._publisher.why_silent()}") from error
        except amqp.CONNECTION_LOST as error:
            raise amqp.translate(error, doing) from error


async def _acknowledge(session: Session, ids: Mapping[int, str]) -> list[str]:
    """Acknowledge deliveries (task ids by tag); the ids of those that are not the caller's any more."""
    try:
        ours = await session.acknowledge(list(ids))
    except amqp.CONNECTION_LOST:
        ours = []
    return [] if len(ours) == len(ids) else [id_ for tag, id_ in ids.items() if tag not in ours]


async def _count(connection: amqp.Connection, name: str) -> tuple[int, int] | None:
    """Ready messages and consumers. A quorum queue that is slow to answer says 0 and 0, so that is asked again."""
    count = await message_count(connection, name)
    return count if count != (0, 0) else await message_count(connection, name)


async def _queue_stats(
    connection: amqp.Connection, name: str, count: tuple[int, int] | None, tally: Tally
) -> QueueStats | None:
    """None for a queue that is not there, and was not."""
    dead = await _count(connection, dead_queue(name))
    if count is None and dead is None:
        return None
    ready, consumers = count or (0, 0)
    silent = max(0, consumers - tally.consumers.get(name, 0))
    workers = tally.workers.get(name, 0)
    waiting = {one: await message_count(connection, delay_queue(name, one)) for one in DELAY_STEPS}
    longest = max((one for one, there in waiting.items() if there is not None), default=0)
    marks = await pause_marks(connection, name)
    # A worker makes the dead-letter queue, and whoever makes a delay queue makes the shorter ones too.
    missing = {
        name: count is None,
        dead_queue(name): dead is None and workers > 0,
        **{delay_queue(name, one): there is None and one < longest for one, there in waiting.items()},
        pause_marker(name).name: marks == (True, False),
    }
    return QueueStats(
        name=name,
        ready=ready,
        running=tally.running.get(name, 0),
        dead=dead[0] if dead else 0,
        consumers=silent + workers,
        delayed=sum(there[0] for there in waiting.values() if there is not None),
        silent_consumers=silent,
        paused=any(marks),
        missing=tuple(queue for queue, is_missing in missing.items() if is_missing),
    )
