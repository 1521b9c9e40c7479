"""Taking from RabbitMQ: one session a connection, and a supervisor that opens the next one when it is lost.

What a lost session had delivered is the broker's again: its lease ends, and settling it raises LeaseLost.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from leveret.brokers.backoff import backoff
from leveret.brokers.base import HoldLimit
from leveret.brokers.inbox import Inbox
from leveret.brokers.rabbitmq.amqp import Message, acks, nack
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.control import CANCELLING, PAUSING, CancelLog, Report
from leveret.brokers.rabbitmq.queues import (
    UNAPPLIED,
    OnceLogger,
    consumer_arguments,
    declare,
    delay_step,
    has_exchanges,
    has_single_active_consumer,
    is_paused,
    message_count,
    pause_marker,
    postponed,
    received,
    together,
    warn_of_priorities,
)
from leveret.brokers.rabbitmq.replacing import Replacing
from leveret.errors import BrokerError, BrokerRefused, BrokerUnavailable, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence

    from leveret.brokers.inbox import Arrival
    from leveret.brokers.rabbitmq.amqp import Hosts, Incoming
    from leveret.brokers.rabbitmq.control import ControlBus, Listening, Signal
    from leveret.brokers.rabbitmq.gating import Gating
    from leveret.brokers.rabbitmq.queues import Declaration, Publisher
    from leveret.brokers.rabbitmq.replacing import Begin
    from leveret.model import Delivery, Describe, Queue

log = logging.getLogger("leveret.rabbitmq")

#: Stores a copy of a delivery that is not due yet, and settles it; False when that is not possible now.
Postpone: TypeAlias = "Callable[[Delivery, Message], Coroutine[object, object, bool]]"

#: How long the broker may take to confirm that it delivers no more (seconds).
_CANCEL_TIMEOUT = 5.0
#: How long declaring and starting to consume may take (seconds).
_OPEN_TIMEOUT = 60.0
#: The server's default for how long a delivery may be unacknowledged (seconds).
_CONSUMER_TIMEOUT = 1_800.0
#: How long a queue may take to apply what is acknowledged (seconds).
_APPLYING = 1.0
#: A node of a cluster may learn of a pause a little later than of its notice (seconds).
_SECOND_LOOK = 1.0
#: How often a worker looks by itself at what notices tell, about (seconds), with many queues so much for each; and
#: when that went wrong.
_LOOK_AROUND = 5.0
_LOOK_AT_ONE = 0.025
_LOOK_AGAIN = 1.0
#: How long a copy that is being stored as its worker leaves may take; its original would come back beside it (seconds).
_PUTTING_OFF = 1.0
#: A node that is starting may refuse for a moment; one that refuses so often at a worker's start means it.
_REFUSALS = 3
#: So many deliveries of a queue are made up for; then it gets slower, and at last it stands still.
_MOST_STUCK = 1_000
#: One more consumer for each eighth that is missing, as each is one on the server; for less after a moment (seconds).
_SHARE = 8
#: Short tasks may end for so long before a consumer is given what they had of the credit (seconds).
_RUNNING_OUT = 0.02
#: So many consumers that were cancelled are known, in case that a delivery of theirs comes late.
_MOST_FORMER = 1_000
_GATHERED = 0.25


class RabbitMQConsumer:
    """See `leveret.brokers.Consumer`."""

    def __init__(
        self,
        hosts: Hosts,
        queues: Sequence[Queue],
        credit: int | None,
        most: int | None,
        bus: ControlBus,
        notes: OnceLogger,
        postpone: Postpone,
        publisher: Publisher,
        describe: Describe | None,
        gating: Gating,
        begin: Begin,
    ) -> None:
        self._hosts = hosts
        self._gating = gating
        self._queues = queues
        self._credit = min(credit or 0, amqp.MOST_PREFETCH)
        self._most = min(most or self._credit, amqp.MOST_PREFETCH)
        self._bus = bus
        self._notes = notes
        self._postpone = postpone
        self._describe = describe
        self._postponing: set[asyncio.Task[None]] = set()
        self._replacing = Replacing(begin, self._hand_on)
        self._inbox = Inbox()
        self._cancel_log = CancelLog(publisher, notes, self._inbox.cancel)
        self._stopped = False
        self._session: Session | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._losses = 0

    @property
    def hold_limit(self) -> HoldLimit | None:
        return self._session.hold_limit() if self._session is not None else None

    @property
    def connected(self) -> bool:
        return self._session is not None and self._session.held

    @property
    def losses(self) -> int:
        return self._losses

    async def start(self) -> None:
        """Take from now on. A broker that is away is waited for; one that refuses raises."""
        self._session = await self._open(refusals=_REFUSALS)
        self._supervisor = asyncio.create_task(self._supervise(self._session))

    def __aiter__(self) -> AsyncIterator[Arrival]:
        return self._inbox

    @property
    def paused(self) -> frozenset[str]:
        return self._inbox.paused

    @property
    def adjusts_credit(self) -> bool:
        return self._session is not None and self._session.adjusts_credit

    async def set_credit(self, credit: int) -> None:
        self._credit = credit
        if self._session is not None:
            await self._adjust(self._session)

    async def _adjust(self, session: Session) -> None:
        """A session that is lost, or is being lost, is followed by one that begins with that credit."""
        if session.adjusts_credit:
            with suppress(*amqp.CONNECTION_LOST):
                await session.set_credit(self._credit)

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

    async def close(self) -> None:
        """Close the connection; what is unsettled goes back to its queue."""
        self._stopped = True
        self._inbox.close()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        await self._replacing.close()
        if self._postponing:
            await asyncio.wait(self._postponing, timeout=_PUTTING_OFF)
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
                self._losses += 1
                log.warning(
                    "the connection to RabbitMQ was lost%s; %d deliveries go back to it",
                    session.why(),
                    session.outstanding,
                )
                await session.close()
                session = self._session = await self._open(refusals=None)
                log.info("connected to RabbitMQ again")
                await self._adjust(session)  # it was asked for meanwhile
        except Exception as error:
            self._inbox.fail(error)
            raise

    async def _open(self, *, refusals: int | None) -> Session:
        """The next session, however long that takes; raises the last of so many refusals (None: of any number)."""
        pauses = backoff()
        while True:
            try:
                return await self._open_session()
            except (BrokerUnavailable, BrokerRefused) as error:
                if isinstance(error, BrokerRefused) and refusals is not None:
                    refusals -= 1
                    if refusals == 0:
                        raise
                pause = next(pauses)
                log.warning("%s; trying again in %.1f s", error, pause)
            await asyncio.sleep(pause)

    async def _open_session(self) -> Session:
        line = await amqp.Link.open(self._hosts, purpose="worker", confirms=False)
        session = Session(line, self._queues, self._deliver, self._inbox.pause, self._notes, self._cancel_log)
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT):
                await line.run(session.begin(self._credit, self._most, self._bus, self._describe))
        except BaseException as error:
            await session.close()
            if isinstance(error, (*amqp.CONNECTION_LOST, TimeoutError)):
                raise amqp.translate(error, "starting to consume") from error
            raise
        return session

    def _deliver(self, deliveries: Sequence[Delivery]) -> None:
        admitted: list[Delivery] = []
        stopped: list[Delivery] = []
        for delivery in self._due(deliveries):
            (stopped if self._gating.stops(delivery) else admitted).append(delivery)
        self._let_begin(admitted)
        if stopped:
            self._start(self._pass_on(stopped))

    async def _pass_on(self, deliveries: Sequence[Delivery]) -> None:
        """What waits for its limits leaves this consumer."""
        self._let_begin(await self._gating.pass_on(deliveries))

    def _let_begin(self, deliveries: Sequence[Delivery]) -> None:
        """Limits hold them up no more: what is asked of the claims log is asked as late as can be."""
        if ready := self._replacing.without(deliveries):
            self._inbox.deliver(ready)

    def _hand_on(self, deliveries: Sequence[Delivery]) -> None:
        ready = self._due(one for one in deliveries if one.lease.held)
        if ready:
            self._inbox.deliver(ready)

    def _due(self, deliveries: Iterable[Delivery]) -> Sequence[Delivery]:
        """Those that may run now; the others are put off."""
        now = time.time()
        ready = []
        for delivery in deliveries:
            due = delivery.envelope.due
            if due is None or due <= now:
                ready.append(delivery)
            else:
                self._put_off(delivery, due - now)
        return ready

    def _put_off(self, delivery: Delivery, seconds: float) -> None:
        if delay_step(seconds) is None:
            self._deliver_later(delivery, seconds)
            return
        self._start(self._put_on_a_step(delivery))

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._postponing.add(task)
        task.add_done_callback(self._postponing.discard)

    async def _put_on_a_step(self, delivery: Delivery) -> None:
        if not await self._postpone(delivery, postponed(delivery)):
            # Its queue may be full, and its consumers, who make room, may all wait here: at the latest it runs when it
            # is due. Until then a few more tries, as many as it has steps to climb down.
            session = delivery.lease
            if isinstance(session, Session):
                session.lend(delivery.tag)
            remaining = max(0.0, (delivery.envelope.due or 0.0) - time.time())
            self._deliver_later(delivery, remaining / 2)

    def _deliver_later(self, delivery: Delivery, seconds: float) -> None:
        def deliver() -> None:
            if delivery.lease.held:
                self._deliver([delivery])

        asyncio.get_running_loop().call_later(seconds, deliver)


class _Repairs:
    """What a session does besides, in the background, and whether some of it went wrong for good."""

    def __init__(self) -> None:
        self.failed = asyncio.Event()
        self.running: set[asyncio.Task[None]] = set()
        self.is_closed = False

    def mend(self, queue: Queue, work: Callable[[Queue], Coroutine[object, object, None]]) -> None:
        self.start(self._or_fail(queue, work))

    def start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _or_fail(self, queue: Queue, work: Callable[[Queue], Coroutine[object, object, None]]) -> None:
        try:
            await work(queue)
        except (BrokerError, ConfigurationError, *amqp.CONNECTION_LOST) as error:
            log.warning("queue %r could not be consumed again on this connection: %s", queue.name, error)
            self.failed.set()

    async def close(self) -> None:
        self.is_closed = True
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)


class _Consuming:
    """A session's consumers, one or more for each queue that is not paused, and the credit of each queue."""

    def __init__(
        self,
        line: amqp.Link,
        queues: Sequence[Queue],
        unsettled: Mapping[int, str],
        pausing: Callable[[frozenset[str]], None],
        notes: OnceLogger,
        repairs: _Repairs,
    ) -> None:
        self._line = line
        self._queues = queues
        self._unsettled = unsettled
        #: Told which queues are paused.
        self._tell_paused = pausing
        self._notes = notes
        self._repairs = repairs
        self._paused: frozenset[str] = frozenset()
        self._pausing = asyncio.Lock()
        #: What its queues were declared as.
        self.found: dict[str, Declaration] = {}
        #: The queue of each consumer that there was lately.
        self.queue_of: dict[bytes, str] = {}
        self.credits: dict[str, QueueCredit] = {}
        #: The queues that are being given what their credit lacks.
        self._giving: set[str] = set()
        self._tags: dict[str, Queue] = {}
        self._numbers = itertools.count(1)
        #: Asked for no more deliveries.
        self.cancelled = False

    async def begin(self, credit: int) -> None:
        async with self._pausing:  # a notice may have come by now
            paused = await together([partial(self._is_paused, queue) for queue in self._queues])
            self._paused = frozenset(queue.name for queue, is_so in zip(self._queues, paused, strict=True) if is_so)
            await self._line.channel.basic_qos(prefetch_count=credit)
            for queue in self._queues:
                if queue.name not in self._paused:
                    await self._start_consumer(queue, credit)
            self._tell_paused(self._paused)

    async def declare(self, queues: Sequence[Queue]) -> None:
        """Raises QueueMismatch or QueueNotFound."""
        wait, found = await declare(self._line.connection, queues, self._notes, dead=True)
        self.found.update(found)
        await asyncio.sleep(wait)

    @property
    def adjusts_credit(self) -> bool:
        """A queue that deals to one consumer alone would deal to another program's if this one's left."""
        return not any(map(has_single_active_consumer, self.found.values()))

    def prepare(self, credit: int) -> None:
        """Before a notice can come."""
        self.credits = {queue.name: QueueCredit(credit) for queue in self._queues}
        self._line.channel.on_consumer_cancel_callbacks.add(self._on_cancel)

    def counts(self) -> Counter[str]:
        """How many consumers each queue has."""
        return Counter(queue.name for queue in self._tags.values())

    def settled(self, names: Mapping[int, str]) -> None:
        """Deliveries are settled, given with their queues. Needs to be told only while some credit is uneven."""
        for tag, name in names.items():
            self.credits[name].settled(tag)
        for name in dict.fromkeys(names.values()):
            self._give(name)

    def stuck(self, tag: int, name: str) -> None:
        """A delivery of a queue stays unsettled, nobody knows how long: others shall come all the same."""
        self.credits[name].stuck(tag)
        self._give(name)

    async def set_credit(self, credit: int) -> None:
        """One consumer in place of all: RabbitMQ deals to several in turn, a few messages at a time.

        What is held in excess stays this session's until it is settled.
        """
        async with self._pausing:
            for one in self.credits.values():
                one.ask(credit)
            pairs = [(queue, self.credits[queue.name]) for queue in self._queues if queue.name not in self._paused]
            changing = [(queue, one) for queue, one in pairs if one.missing]
            is_more = any(one.missing > 0 for _, one in changing)
            for queue, one in changing:
                await self._cancel_consumers(queue)
                one.cancelled(self._unsettled_of(queue))
            if is_more and any(one.is_uneven for _, one in changing):
                await asyncio.sleep(_RUNNING_OUT)
            for queue, one in changing:
                if one.missing > 0 and not self.cancelled:
                    await self._consume(queue, one.missing)

    def _give(self, name: str) -> None:
        if name not in self._giving and self.credits[name].missing > 0:
            self._giving.add(name)
            queue = next(queue for queue in self._queues if queue.name == name)
            self._repairs.mend(queue, self._consume_more)

    async def cancel(self) -> None:
        """Ask for no more deliveries, and wait until none is on the way."""
        self.cancelled = True
        tags, self._tags = list(self._tags), {}
        if self._repairs.is_closed or self._line.is_lost:
            return
        # Never cancelled: aiormq closes the channel, and with it every lease, when a call is given up.
        cancels = [self._line.start(self._line.channel.basic_cancel(tag)) for tag in tags]
        if cancels:
            done, _ = await asyncio.wait(cancels, timeout=_CANCEL_TIMEOUT)
            for cancel in done:
                if not cancel.cancelled():
                    cancel.exception()

    async def _consume(self, queue: Queue, credit: int) -> None:
        await self._line.channel.basic_qos(prefetch_count=credit)
        await self._start_consumer(queue, credit)

    async def _start_consumer(self, queue: Queue, credit: int) -> None:
        """With the prefetch that the channel was told last, which is that credit."""
        if self.cancelled:
            return  # meanwhile: what is delivered from now on nobody would take
        # A new tag each time: RabbitMQ 4.3 may hold on to one that it cancelled.
        tag = f"leveret-{next(self._numbers)}"
        self._tags[tag] = queue
        if len(self.queue_of) > 2 * len(self._tags) + _MOST_FORMER:
            self.queue_of = {one.encode(): consumed.name for one, consumed in self._tags.items()}
        self.queue_of[tag.encode()] = queue.name
        self.credits[queue.name].consumed(credit)
        arguments = consumer_arguments(self._line.connection, self.found[queue.name])
        await self._line.channel.basic_consume(queue.name, _not_called, consumer_tag=tag, arguments=arguments)

    def _on_cancel(self, frame: amqp.Cancel) -> None:
        """The broker ended a consumer: its queue was deleted, or moved."""
        queue = self._tags.get(frame.consumer_tag or "")
        self._tags = {tag: consumed for tag, consumed in self._tags.items() if consumed is not queue}
        if queue is not None and not (self._repairs.is_closed or self.cancelled):
            self._repairs.mend(queue, self._replace)

    async def look_whether_paused(self, queue: Queue, pauses: Sequence[float] = (0.0, _SECOND_LOOK)) -> None:
        for pause in pauses:
            await asyncio.sleep(pause)
            async with self._pausing:
                paused = await self._is_paused(queue)
                if paused != (queue.name in self._paused):
                    await (self._pause(queue) if paused else self._resume(queue))
                    self._tell_paused(self._paused)

    async def look_around(self) -> None:
        """Look for pauses and their ends that nobody told of.

        Only for the exchange, which every pause makes: for each mark that is not there the server closes a channel.
        """
        marked = await has_exchanges(self._line.connection, [pause_marker(queue.name).name for queue in self._queues])
        for queue, is_marked in zip(self._queues, marked, strict=True):
            if is_marked != (queue.name in self._paused):
                await self.look_whether_paused(queue, [0.0])

    async def _is_paused(self, queue: Queue) -> bool:
        try:
            return await is_paused(self._line.connection, queue.name)
        except amqp.ChannelAccessRefused as error:
            self._notes.warn_of_refusal(f"it cannot be seen whether queue {queue.name!r} is paused", error)
            return False

    async def _cancel_consumers(self, queue: Queue) -> None:
        for tag in self._consumers(queue):
            if self._tags.pop(tag, None) is not None:  # a stop may have come before
                await self._line.run(self._line.channel.basic_cancel(tag))

    def _consumers(self, queue: Queue) -> list[str]:
        return [tag for tag, consumed in self._tags.items() if consumed is queue]

    def _unsettled_of(self, queue: Queue) -> set[int]:
        return {tag for tag, name in self._unsettled.items() if name == queue.name}

    async def _pause(self, queue: Queue) -> None:
        await self._cancel_consumers(queue)
        # Not before: what is handed back as long as it consumes would be delivered to it again.
        self._paused |= {queue.name}

    async def _resume(self, queue: Queue) -> None:
        # It may have been deleted meanwhile; to consume from a queue that is not there closes the channel.
        await self.declare([queue])
        self._paused -= {queue.name}
        older = self._unsettled_of(queue)
        if has_single_active_consumer(self.found[queue.name]):
            older = set()  # a second consumer, for what they give back, would get nothing
        await self._consume_anew(queue, older)

    async def _consume_anew(self, queue: Queue, older: set[int]) -> None:
        """Nothing consumes it. ``older``: deliveries that keep their part of the credit."""
        credit = self.credits[queue.name]
        credit.cancelled(older)
        if not self.cancelled and (credit.missing > 0 or not credit.total):
            await self._consume(queue, max(0, credit.missing))

    async def _consume_more(self, queue: Queue) -> None:
        """Each gift is one more consumer on the server, so that a small one waits a moment for more."""
        credit = self.credits[queue.name]
        try:
            while credit.missing > 0 and not self.cancelled:
                if not credit.is_much_missing:
                    await asyncio.sleep(_GATHERED)
                async with self._pausing:
                    if queue.name in self._paused or self.cancelled:
                        return
                    if credit.missing > 0:
                        await self._give_missing(queue)
        finally:
            self._giving.discard(queue.name)

    async def _give_missing(self, queue: Queue) -> None:
        credit = self.credits[queue.name]
        if not has_single_active_consumer(self.found[queue.name]):
            await self._consume(queue, credit.missing)
            return
        older = self._consumers(queue)
        credit.take_back()
        await self._consume(queue, credit.total)
        for tag in older:
            if self._tags.pop(tag, None) is not None:
                await self._line.run(self._line.channel.basic_cancel(tag))

    async def _replace(self, queue: Queue) -> None:
        async with self._pausing:
            if queue.name in self._paused or self.cancelled:
                return
            if await message_count(self._line.connection, queue.name) is not None:
                # A consumer timeout (RabbitMQ 4.3) or a move. The server may keep the cancelled consumer and deliver to
                # it, where nobody listens (4.3.6); only a new connection is free of it.
                log.warning("RabbitMQ cancelled the consumer of queue %r, which is still there", queue.name)
                self._repairs.failed.set()
                return
            log.warning("RabbitMQ cancelled the consumer of queue %r, which was deleted; making it again", queue.name)
            await self.declare([queue])
            await self._consume_anew(queue, set())


class QueueCredit:
    """How much one queue's living consumers in one session were given, and how much of what was asked for that lacks.

    A consumer's credit is for good. What the deliveries of cancelled ones keep of it is given as they are settled, and
    what is unsettled for long is given once more.
    """

    def __init__(self, credit: int) -> None:
        #: 0: no limit.
        self._asked = credit
        self._given = 0
        #: Unsettled deliveries of consumers that were cancelled.
        self._older: set[int] = set()
        #: Deliveries of living consumers that end nobody knows when.
        self._stuck: set[int] = set()

    def ask(self, credit: int) -> None:
        """Have it be so much from now on."""
        self._asked = credit

    def consumed(self, credit: int) -> None:
        """One more consumer has so much."""
        self._given += credit

    def take_back(self) -> None:
        """Its consumers leave, and the next one is to have all of it."""
        self._given = 0

    def cancelled(self, older: set[int]) -> None:
        """Nothing consumes any more. ``older``: its unsettled deliveries."""
        self._given = 0
        self._older = older - self._stuck
        self._stuck = set()

    @property
    def total(self) -> int:
        """What all its consumers are to have together, if nothing was delivered before them; 0: no limit."""
        return self._asked + min(len(self._stuck), _MOST_STUCK) if self._asked else 0

    @property
    def missing(self) -> int:
        """Less than 0: they have too much."""
        return self.total - len(self._older) - self._given if self._asked else 0

    @property
    def is_much_missing(self) -> bool:
        return self.missing >= max(1, self.total // _SHARE)

    @property
    def is_uneven(self) -> bool:
        """Whether anything is to be given, or taken into account, as deliveries are settled."""
        return bool(self._older or self._stuck)

    def settled(self, tag: int) -> None:
        self._stuck.discard(tag)
        self._older.discard(tag)

    def stuck(self, tag: int) -> None:
        """A delivery will not end soon."""
        if tag in self._older:
            self._older.discard(tag)
        else:
            self._stuck.add(tag)


class Session:
    """One connection's consumers; also the lease of all that they were given."""

    def __init__(
        self,
        line: amqp.Link,
        queues: Sequence[Queue],
        deliver: Callable[[Sequence[Delivery]], None],
        pausing: Callable[[frozenset[str]], None],
        notes: OnceLogger,
        cancel_log: CancelLog,
    ) -> None:
        self._line = line
        self._cancel_log = cancel_log
        self._notes = notes
        self._queues = queues
        self._deliver = deliver
        #: In the order of the tags, and with every delivery of the channel: `acks` rests on both.
        self._unsettled: dict[int, str] = {}
        self.repairs = _Repairs()
        self._consuming = _Consuming(line, queues, self._unsettled, pausing, notes, self.repairs)
        #: Of each queue; 0: no limit.
        self._credit = 0
        #: Settled since it asked for no more.
        self._settled_since = 0

    async def begin(self, credit: int, most: int, bus: ControlBus, describe: Describe | None) -> None:
        """Declare and consume; with ``most`` what can't be given more later. Raises QueueMismatch, QueueNotFound or
        what aio-pika raises.
        """
        connection = self._line.connection
        await self._consuming.declare(self._queues)
        warn_of_priorities(connection, self._queues, self._consuming.found, self._notes)
        self._credit = credit if self.adjusts_credit else most
        self._consuming.prepare(self._credit)
        self._line.take_deliveries(self._on_messages)
        listening = None
        try:
            listening = await bus.listen_on(connection, self.report, describe, self._on_notice)
        except amqp.ChannelAccessRefused as error:
            lack = "a pause is seen some seconds late, and `leveret queues` cannot count what this worker runs"
            self._notes.warn_of_refusal(lack, error)
        await self._cancel_log.read_on(self._line)
        await self._consuming.begin(self._credit)
        self.repairs.start(self._look_around(listening))

    @property
    def adjusts_credit(self) -> bool:
        return self._consuming.adjusts_credit

    async def set_credit(self, credit: int) -> None:
        """Raises what aio-pika raises."""
        if credit != self._credit and self.held:
            self._credit = credit
            await self._line.run(self._consuming.set_credit(credit))

    @property
    def held(self) -> bool:
        return not (self.repairs.is_closed or self._line.is_lost)

    @property
    def outstanding(self) -> int:
        return len(self._unsettled)

    def report(self) -> Report:
        """How many deliveries of each queue are unsettled, and what consumes it."""
        counts = dict.fromkeys((queue.name for queue in self._queues), 0)
        for name in self._unsettled.values():
            counts[name] += 1
        consumed = self._consuming.counts()
        return Report(counts, {name: consumed[name] for name in counts if consumed[name] != 1})

    def holds(self, tag: int) -> bool:
        return self.held and tag in self._unsettled

    async def acknowledge(self, tags: Sequence[int]) -> list[int]:
        """Those that were this session's to acknowledge. A second one for a tag would close the channel."""
        ours = self._take(tags)
        if ours:
            await self._line.write(acks(self._line.channel.number, ours, next(iter(self._unsettled), None)))
        return ours

    async def give_back(self, tag: int) -> bool:
        """Return a delivery to where it stood in its queue. Uncounted since RabbitMQ 4.3; before, a return counts."""
        if not self._take([tag]):
            return False
        await self._line.write(nack(self._line.channel.number, tag))
        return True

    def _take(self, tags: Sequence[int]) -> list[int]:
        """Note that deliveries are settled; those that were not. Their frames must be next on the line."""
        if not self.held:
            return []
        names = {tag: self._unsettled.pop(tag) for tag in tags if tag in self._unsettled}
        consuming = self._consuming
        if any(one.is_uneven for one in consuming.credits.values()):
            consuming.settled(names)
        self._settled_since += len(names) if consuming.cancelled else 0
        return list(names)

    def lend(self, tag: int) -> None:
        """A delivery stays unsettled, nobody knows how long: others of its queue shall come all the same."""
        name = self._unsettled.get(tag)
        if name is not None:
            self._consuming.stuck(tag, name)

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
        failed = asyncio.ensure_future(self.repairs.failed.wait())
        lost = asyncio.ensure_future(self._line.lost())
        try:
            await asyncio.wait([failed, lost], return_when=asyncio.FIRST_COMPLETED)
        finally:
            failed.cancel()
            lost.cancel()

    async def cancel(self) -> None:
        """Ask for no more deliveries, and wait until none is on the way. What is unsettled stays this session's."""
        await self._consuming.cancel()

    async def close(self) -> None:
        await self.repairs.close()
        if self._settled_since > UNAPPLIED and not self._line.is_lost:
            await asyncio.sleep(_APPLYING)
        await self._line.close()

    def _on_messages(self, messages: Sequence[Incoming]) -> None:
        queue_of = self._consuming.queue_of
        deliveries = [received(message, queue_of[message.consumer], self) for message in messages]
        self._unsettled.update((delivery.tag, delivery.envelope.queue) for delivery in deliveries)
        self._deliver(deliveries)

    def _on_notice(self, notice: Signal) -> None:
        if notice.kind == CANCELLING:
            for queue in self._queues[:1]:
                self.repairs.mend(queue, self._read_cancel_log)
        for queue in self._queues:
            if notice.kind == PAUSING and notice.queue == queue.name:
                self.repairs.mend(queue, self._consuming.look_whether_paused)

    async def _read_cancel_log(self, _: Queue) -> None:
        await self._cancel_log.read_on(self._line)

    async def _look_around(self, listening: Listening | None) -> None:
        """What notices tell is looked for besides, now and then: they are lost when an operator deletes what brings
        them, or when a node is parted from the others for a while.
        """
        while self.held:
            seconds = max(_LOOK_AROUND, _LOOK_AT_ONE * len(self._queues)) * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
            await (asyncio.sleep(seconds) if listening is None else listening.deleted(seconds))
            try:
                if listening is not None and await self._line.run(listening.mend()):
                    log.warning("the exchange or the queue by which workers are told was deleted; made again")
                await self._line.run(self._consuming.look_around())
                await self._line.run(self._cancel_log.read_on(self._line))
            except amqp.CONNECTION_LOST as error:
                log.debug("this worker could not look whether it was told all: %s", error)
                await asyncio.sleep(_LOOK_AGAIN)
            except (BrokerError, ConfigurationError) as error:
                log.warning("what was paused could not be consumed again on this connection: %s", error)
                self.repairs.failed.set()


async def _not_called(message: amqp.DeliveredMessage) -> None:
    """aiormq wants a callback for each consumer."""
    raise AssertionError(f"delivery {message.delivery_tag} came by way of aiormq")
