"""Task queues and their delay queues: made when they are wanted, and made again when they were deleted."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from leveret.brokers.flights import Flights
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.queues.codec import routed, unranked
from leveret.brokers.rabbitmq.queues.declare import OnceLogger, declare, declare_delay
from leveret.brokers.rabbitmq.queues.topology import DELAY_STEPS, expires_in_order
from leveret.errors import LeveretError, QueueNotFound
from leveret.model import MIDDLE_PRIORITY, Queue

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from leveret.brokers.rabbitmq.amqp import Message
    from leveret.brokers.rabbitmq.queues.publisher import Publisher
    from leveret.brokers.rabbitmq.queues.requests import Requester
    from leveret.errors import BrokerUnavailable
    from leveret.model import Delivery, Envelope

#: A queue to be declared, and whether its dead letters' too.
_Wanted: TypeAlias = tuple[Queue, bool]

#: How many declare at once: each uses a channel, of which a connection has some 2,000 and may have few.
_DECLARERS = 4
#: RabbitMQ 3.10 does not tell the consumers of a deleted quorum queue when another one of its name is made within a few
#: milliseconds; they would wait for ever. So a deleted queue is made again a moment later (seconds).
_AFTER_DELETION = 0.5


class Declarations:
    """Declares each queue once, for however many want it."""

    def __init__(self, publisher: Publisher, requester: Requester) -> None:
        self._publisher = publisher
        self._requester = requester
        self._queues: dict[str, Queue] = {}
        self._declaring: Flights[_Wanted] = Flights()
        self.notes = OnceLogger(publisher.limits)
        #: To be held while something is declared.
        self.turn = asyncio.Semaphore(_DECLARERS)

    async def declare(self, queues: Sequence[Queue]) -> None:
        await self._declare(queues, dead=False)
        self.learn(queues)

    def learn(self, queues: Sequence[Queue]) -> None:
        for queue in queues:
            self._queues[queue.name] = queue
            if queue.max_length is not None:
                self._publisher.limits.add(queue.name)

    async def restore(self, names: Collection[str]) -> bool:
        """Make queues again that were deleted after they were declared; False: one is the operator's to make."""
        queues = [self._queues.get(name) for name in names]
        ours = [queue for queue in queues if queue is not None and queue.create]
        if len(ours) < len(queues):
            return False
        await self._make_again(ours, dead=False)
        return True

    async def mend(self, delivery: Delivery) -> None:
        """Make a delivery's queue again, and its dead letters'."""
        queue = delivery.envelope.queue
        with suppress(LeveretError):
            await self._make_again([self._queues.get(queue, Queue(queue))], dead=True)

    def ranked(self, envelope: Envelope) -> Envelope:
        """A task without a priority is like 4 everywhere: a classic queue takes a missing one as 0."""
        queue = self._queues.get(envelope.queue)
        if envelope.priority is not None or queue is None or queue.kind == "quorum":
            return envelope
        return msgspec.structs.replace(envelope, priority=MIDDLE_PRIORITY)

    def close(self, error: BrokerUnavailable) -> None:
        self._declaring.close(error)

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
            return await declare(await self._publisher.connection(), queues, self.notes, dead=dead)

        async with self.turn:
            wait = await self._requester.ask("declaring queues", ask, patience=None)
        await asyncio.sleep(wait)


class DelayedPublisher:
    """Publishes each task to where it waits: its queue, or a delay queue. ``turn``: held while one is declared."""

    def __init__(self, publisher: Publisher, requester: Requester, turn: asyncio.Semaphore) -> None:
        self._publisher = publisher
        self._requester = requester
        self._turn = turn
        #: Task queue and milliseconds, of those that are there.
        self._delays: set[tuple[str, int]] = set()
        self._delaying: Flights[tuple[str, int]] = Flights()
        #: Of the server that made, or had, those delay queues.
        self._version: tuple[int, ...] = (0,)

    async def publish(self, messages: Sequence[Message]) -> None:
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

    def forget(self, queue: str) -> None:
        """It was deleted, with its delay queues."""
        self._delays = {(home, milliseconds) for home, milliseconds in self._delays if home != queue}

    def close(self, error: BrokerUnavailable) -> None:
        self._delaying.close(error)

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

        async with self._turn:
            wait = await self._requester.ask("declaring delay queues", ask, patience=None)
        await asyncio.sleep(wait)
        self._delays.update(steps)
