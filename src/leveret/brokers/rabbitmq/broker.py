"""The RabbitMQ broker, through aio-pika: RabbitMQ 3.10 to 4.3, no plugin, no second server."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.base import Capabilities, duplicates
from leveret.brokers.rabbitmq.amqp import Hosts
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.consumer import RabbitMQConsumer, Session
from leveret.brokers.rabbitmq.control import ControlBus, RabbitMQControl, RabbitMQDeadLetters, RabbitMQQueues
from leveret.brokers.rabbitmq.coordination import Claims, FencedTable, claimed_keys, mark_of
from leveret.brokers.rabbitmq.gating import Gating
from leveret.brokers.rabbitmq.holding import Holding
from leveret.brokers.rabbitmq.limits import REQUESTS as LIMIT_REQUESTS
from leveret.brokers.rabbitmq.limits import TABLE as LIMITS
from leveret.brokers.rabbitmq.limits import RabbitMQLimits
from leveret.brokers.rabbitmq.queues import (
    Declarations,
    DelayedPublisher,
    Publisher,
    RabbitMQDelivery,
    Requester,
    buried,
    put_off_message,
    retry_message,
    to_message,
    to_wait,
)
from leveret.brokers.rabbitmq.schedules import TABLE as SCHEDULES
from leveret.brokers.rabbitmq.schedules import RabbitMQSchedules
from leveret.brokers.rabbitmq.statuses import StatusLog
from leveret.errors import (
    BrokerUnavailable,
    DuplicateTask,
    EnqueueError,
    LeaseLost,
    LeveretError,
    LimitNotFound,
    QueueNotFound,
)
from leveret.model import (
    KEEP,
    Cancelled,
    DeadLettered,
    PutOff,
    Queue,
    Released,
    RestLimit,
    Retrying,
    Succeeded,
    following,
    freed_key,
    id_key,
    id_token,
    log_fields,
    put_off,
    repeated,
    told_of,
)
from leveret.model.printable import in_line
from leveret.observe import LimitedLog

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from leveret.brokers.base import OnConflict
    from leveret.brokers.rabbitmq.amqp import Message
    from leveret.model import Delivery, Describe, Envelope, Outcome, Settlement, Status

#: How many tasks a line of the log names.
_MOST_NAMED = 20

log = logging.getLogger("leveret.rabbitmq")


class RabbitMQBroker:
    """See `leveret.brokers.Broker`. ``timeout``: seconds a publish may take before it raises."""

    capabilities = Capabilities(shared=True)

    def __init__(self, url: str, *, timeout: float, keep: float = KEEP) -> None:
        amqp.quieten_drivers()
        self._hosts = Hosts(url, timeout=timeout)
        if self._hosts.is_unverified:
            log.warning(
                "no_verify_ssl: the server's certificate is not checked, so whoever is in between can read and change "
                "all that is sent, the password too; use cafile instead"
            )
        self._publisher = Publisher(self._hosts, timeout=timeout)
        self._warnings = LimitedLog(log)
        self._bus = ControlBus(self._publisher)
        requester = Requester(self._publisher, timeout=timeout)
        self._declarations = Declarations(self._publisher, requester)
        self._delayed = DelayedPublisher(
            self._publisher, requester, self._declarations.turn, self._declarations.max_length
        )
        self._holding = Holding(self._delayed.publish, self._declarations.mend)
        self.statuses = StatusLog(self._hosts, self._publisher, keep=keep, timeout=timeout)
        self._claims = Claims(
            self._hosts, self._publisher, timeout=timeout, knows=self._declarations.knows, store=self._publish
        )
        self.unique = self._claims
        self._limit_table = FencedTable(self._hosts, self._publisher, requester, LIMITS, LIMIT_REQUESTS)
        self.limits = RabbitMQLimits(self._limit_table, self._delayed, lambda queue: self.queues.look_into(queue))
        self.queues = RabbitMQQueues(
            self._hosts, self._publisher, requester, self._bus, self._delayed.forget, self._claims, self.limits
        )
        self.dead_letters = RabbitMQDeadLetters(
            self._hosts, self._publisher, self._delayed, requester, self.statuses, self._claims
        )
        self.control = RabbitMQControl(self._publisher, requester, self._bus, self.statuses, self._claims)
        self._table = FencedTable(self._hosts, self._publisher, requester, SCHEDULES)
        self.schedules = RabbitMQSchedules(self._table, self.statuses, self._message, self._store_one)

    async def declare(self, queues: Sequence[Queue]) -> None:
        await self._declarations.declare(queues)

    async def publish(
        self, envelopes: Sequence[Envelope], *, on_conflict: OnConflict = "raise"
    ) -> Mapping[str, str] | None:
        if limited := {one.queue for one in envelopes if one.due is None and self._declarations.waits(one)}:
            await self.limits.tell(limited)
        if not [one for one in envelopes if claimed_keys(one)]:
            await self._publish(envelopes)
            return None
        if twice := repeated([one.id for one in envelopes if id_token(one.headers) is not None]):
            raise DuplicateTask(twice)
        existing = await self._claims.publish(envelopes, on_conflict=on_conflict)
        if existing and on_conflict == "raise":
            raise duplicates(existing)
        return existing or None

    async def _publish(self, envelopes: Sequence[Envelope]) -> None:
        messages = [self._message(envelope) for envelope in envelopes]
        mark = self.statuses.lately.mark
        await self._store(messages)
        self.statuses.lately.note_stored(envelopes, mark)

    def _message(self, envelope: Envelope) -> Message:
        message = to_message(self._declarations.ranked(envelope))
        # Where nobody is known to admit its tasks, a worker that is dealt it has it wait, and admits it.
        waits = envelope.due is None and self._declarations.waits(envelope) and self.limits.are_served(envelope.queue)
        return to_wait(message) if waits else message

    async def _store_one(self, message: Message) -> None:
        await self._store([message])

    async def _store(self, messages: Sequence[Message]) -> None:
        try:
            await self._delayed.publish(messages)
        except QueueNotFound as error:
            # A queue that was deleted after it was declared is made again, unless it is the operator's to make.
            missing = [message for message in messages if message.id in set(error.ids)]
            if not await self._declarations.restore({message.home for message in missing}):
                raise
            await self._delayed.publish(missing)

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
    ) -> AsyncGenerator[RabbitMQConsumer]:
        self._declarations.learn(queues)
        notes = self._declarations.notes
        gating = Gating(queues, self.limits, self._postpone)
        consumer = RabbitMQConsumer(
            *(self._hosts, queues, credit, most, self._bus, notes, self._postpone, self._publisher, describe),
            *(gating, self._claims.begin),
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
        # Before anybody hears of the end, and may enqueue the next one.
        await self._claims.ended(*_freed(settlements))
        refused = await self._record(settlements, updates)
        done: dict[Session, dict[int, str]] = {}
        others: list[Settlement] = []
        for delivery, outcome in settlements:
            left = _left(outcome, refused) if refused else outcome
            is_done = isinstance(left, Succeeded) and (not refused or not left.follow_ups)
            if is_done and isinstance(delivery.lease, Session):
                done.setdefault(delivery.lease, {})[delivery.tag] = delivery.envelope.id
            else:
                others.append((delivery, left))
        # Before the deliveries are gone: what comes back is asked whether it has its permit still.
        await self._end_permits([delivery for delivery, outcome in settlements if isinstance(outcome, Succeeded)])
        lost = [id_ for session, ids in done.items() for id_ in await _acknowledge(session, ids)]
        if others:
            kept = await asyncio.gather(*(self._settle(delivery, outcome) for delivery, outcome in others))
            lost += [delivery.envelope.id for (delivery, _), is_kept in zip(others, kept, strict=True) if not is_kept]
        if lost:
            raise LeaseLost(lost)

    async def _record(self, settlements: Sequence[Settlement], updates: Sequence[Status]) -> frozenset[str]:
        """Store what becomes of tasks, and what follows them; the ids of those that are refused for now."""
        if not (follow_ups := following([one for one in settlements if one[0].lease.held])):
            await self.statuses.record(updates)
            return frozenset()
        told = [*updates, *told_of(follow_ups, time.time())]
        refused, _ = await asyncio.gather(self._refused(follow_ups), self.statuses.record(told))
        return refused

    async def _refused(self, envelopes: Sequence[Envelope]) -> frozenset[str]:
        """Store tasks; the ids of those that are not known to be stored."""
        try:
            await self._publish(envelopes)
        except LeveretError as error:
            log.debug("what follows some tasks is refused for now: %s", error)
            ids = error.ids if isinstance(error, EnqueueError) else ()
            return frozenset(ids or [one.id for one in envelopes])
        return frozenset()

    async def _follow_up(self, session: Session, delivery: Delivery, outcome: Succeeded) -> None:
        """Store what follows a task, however long that takes: its queue is missing, full, or refuses."""
        for one in outcome.follow_ups:
            try:
                await self._publish([one])
            except LeveretError as error:
                if isinstance(error, QueueNotFound) and not self._declarations.knows(one.queue):
                    with suppress(LeveretError):
                        await self._declarations.declare([Queue(one.queue)])
                await self._holding.store(session, delivery, self._message(one))

    async def _end_permits(self, deliveries: Sequence[Delivery]) -> None:
        """What is not the caller's any more keeps its permit for whoever has it now."""
        held = [one for one in deliveries if isinstance(one, RabbitMQDelivery) and one.permit and one.lease.held]
        if held:
            await self.limits.end([one.permit for one in held])

    async def _end_permit_of_what_waits_anew(self, delivery: Delivery) -> None:
        """A later call put an admitted task off. If nobody takes the permit back now, its leak is found."""
        try:
            await self._end_permits([delivery])
        except LeveretError as error:
            log.debug("the permit of task %s, which waits anew, is not given back: %s", delivery.envelope.id, error)

    def abandon(self) -> None:
        """The sockets went with their loop."""

    async def close(self) -> None:
        error = BrokerUnavailable("the connection was closed by this program; nothing was stored")
        self._declarations.close(error)
        self._delayed.close(error)
        await self._table.close()
        await self._limit_table.close()
        await self._claims.close()
        await self.statuses.close()
        await self._publisher.close()
        self._warnings.flush()

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
            elif isinstance(outcome, Succeeded):
                await self._follow_up(session, delivery, outcome)
            elif isinstance(outcome, PutOff):
                await self._holding.store(session, delivery, await self._put_off(delivery, outcome))
            await self._end_permits([delivery])
            return bool(await session.acknowledge([delivery.tag]))
        except amqp.CONNECTION_LOST:
            return False

    async def _put_off(self, delivery: Delivery, outcome: PutOff) -> Message:
        """The message as it waits again. What it put off rests from now on."""
        now = time.time()
        rests = True
        try:
            await self.limits.ask(RestLimit(outcome.limit, outcome.key, now + outcome.delay))
        except LimitNotFound:
            rests = False
        again = put_off(delivery.envelope, outcome, now, rests=rests)
        message = put_off_message(delivery, again)
        return to_wait(message) if again.due is None else message

    async def _postpone(self, delivery: Delivery, message: Message) -> bool:
        """Put a task that is not due yet on its next step; False when it is still to be held."""
        session = delivery.lease
        assert isinstance(session, Session)
        with suppress(*amqp.CONNECTION_LOST):
            try:
                if session.holds(delivery.tag):
                    await self._delayed.publish([message])
                    if message.due is not None:
                        await self._end_permit_of_what_waits_anew(delivery)
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


def _left(outcome: Outcome, refused: frozenset[str]) -> Outcome:
    """An outcome with what is still to be stored behind it."""
    if not isinstance(outcome, Succeeded):
        return outcome
    return msgspec.structs.replace(outcome, follow_ups=tuple(one for one in outcome.follow_ups if one.id in refused))


def _freed(settlements: Sequence[Settlement]) -> tuple[list[tuple[str, str]], list[tuple[str, str, bool]]]:
    """The unique keys that are free now that their tasks have ended, and the ids that their producers chose."""
    freed: list[tuple[str, str]] = []
    ended: list[tuple[str, str, bool]] = []
    for delivery, outcome in settlements:
        envelope, session = delivery.envelope, delivery.lease
        if not envelope.headers or not isinstance(outcome, (Succeeded, DeadLettered, Cancelled)):
            continue
        if not (isinstance(session, Session) and session.holds(delivery.tag)):
            continue
        if (key := freed_key(envelope.headers)) is not None:
            freed.append((key, mark_of(envelope)))
        if (token := id_token(envelope.headers)) is not None:
            ended.append((id_key(envelope.id), token, isinstance(outcome, DeadLettered)))
    return freed, ended


async def _acknowledge(session: Session, ids: Mapping[int, str]) -> list[str]:
    """Acknowledge deliveries (task ids by tag); the ids of those that are not the caller's any more."""
    try:
        ours = await session.acknowledge(list(ids))
    except amqp.CONNECTION_LOST:
        ours = []
    return [] if len(ours) == len(ids) else [id_ for tag, id_ in ids.items() if tag not in ours]
