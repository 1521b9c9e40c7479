"""Task queues and their delay queues: made when they are wanted, and made again when they were deleted."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from leveret.brokers.flights import Flights
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.queues.codec import on_step, unranked
from leveret.brokers.rabbitmq.queues.declare import (
    OnceLogger,
    declare,
    declare_delays,
    make_queues,
    message_count,
)
from leveret.brokers.rabbitmq.queues.ladder import Ladder
from leveret.brokers.rabbitmq.queues.topology import (
    expires_in_order,
    gate_declaration,
    gate_queue,
    steps_made_with,
)
from leveret.errors import LeveretError, QueueNotFound
from leveret.model import GATE_SUFFIX, MIDDLE_PRIORITY, Queue, is_limited

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

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

    def max_length(self, queue: str) -> int | None:
        known = self._queues.get(queue)
        return None if known is None else known.max_length

    def waits(self, envelope: Envelope) -> bool:
        """Whether it waits for limits, its own or its queue's."""
        if envelope.headers and is_limited(envelope.headers):
            return True
        queue = self._queues.get(envelope.queue)
        return queue is not None and queue.is_limited

    def knows(self, queue: str) -> bool:
        """Whether it is one of this program's."""
        return queue in self._queues

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
            wait, _ = await declare(await self._publisher.connection(), queues, self.notes, dead=dead)
            return wait

        async with self.turn:
            wait = await self._requester.ask("declaring queues", ask, patience=None)
        await asyncio.sleep(wait)


class DelayedPublisher:
    """Publishes each task to where it waits: its queue, a delay queue, or where it waits for limits.

    ``turn``: held while one is declared. ``length``: the length limit of a task queue, or None.
    """

    def __init__(
        self,
        publisher: Publisher,
        requester: Requester,
        turn: asyncio.Semaphore,
        length: Callable[[str], int | None] = lambda _: None,
    ) -> None:
        self._publisher = publisher
        self._requester = requester
        self._turn = turn
        self._length = length
        #: Task queues whose limited tasks have where to wait.
        self._gates: set[str] = set()
        self._making_gates: Flights[str] = Flights()
        #: By task queue.
        self._ladders: defaultdict[str, Ladder] = defaultdict(Ladder)
        #: Task queue and milliseconds.
        self._making: Flights[tuple[str, int]] = Flights()
        #: Of the server that made, or had, those delay queues.
        self._version: tuple[int, ...] = (0,)

    async def publish(self, messages: Sequence[Message]) -> None:
        """Publish, each to where it waits. A QueueNotFound names what is not stored."""
        try:
            if gated := {one.home for one in messages if one.queue != one.home and one.queue.endswith(GATE_SUFFIX)}:
                await self.make_gates(gated)
            if any(message.due is not None for message in messages):
                messages = await self._on_steps(messages)
            await self._publisher.publish(messages)
        except QueueNotFound as error:
            self._ladders.clear()
            self._gates.clear()
            # For want of a delay queue nothing was sent, and whoever sends again must send all of it.
            error.ids = error.ids or tuple(message.id for message in messages)
            raise

    def forget(self, queue: str) -> None:
        """It was deleted, with its delay queues."""
        self._ladders.pop(queue, None)
        self._gates.discard(queue)

    async def make_gates(self, homes: Collection[str]) -> None:
        """Make where limited tasks of these queues wait."""
        if missing := [home for home in homes if home not in self._gates]:
            await self._making_gates.join(missing, self._make_gates_now)

    async def count(self, queue: str) -> tuple[int, int] | None:
        """How many messages are ready in any queue, and how many consumers it has; None: there is no such queue.

        Raises BrokerError.
        """

        async def ask() -> tuple[int, int] | None:
            return await message_count(await self._publisher.connection(), queue)

        return await self._requester.ask(f"looking for queue {queue!r}", ask)

    def close(self, error: BrokerUnavailable) -> None:
        self._making.close(error)
        self._making_gates.close(error)

    async def _make_gates_now(self, homes: Sequence[str]) -> None:
        declarations = [gate_declaration(home, self._length(home)) for home in homes]

        async def ask() -> None:
            await make_queues(await self._publisher.connection(), declarations, scratch_beside=homes[0])

        async with self._turn:
            await self._requester.ask("declaring where tasks wait for limits", ask, patience=None)
        self._gates.update(homes)
        for home in homes:
            if self._length(home) is not None:
                self._publisher.limits.add(gate_queue(home))

    async def _on_steps(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Each for where it waits, having made the delay queues that are wanted for the first time."""
        clock: float | None = time.monotonic()
        while True:
            now = time.time()
            steps = [self._step(message, now, clock) for message in messages]
            wanted = {(one.home, step) for one, step in zip(messages, steps, strict=True) if step is not None}
            missing = [(home, step) for home, step in wanted if step not in self._ladders[home].steps]
            if not missing:
                return [self._on_step(one, step) for one, step in zip(messages, steps, strict=True)]
            await self._make(missing)
            clock = None

    def _step(self, message: Message, now: float, clock: float | None) -> int | None:
        return None if message.due is None else self._ladders[message.home].step(message.due - now, clock)

    def _on_step(self, message: Message, milliseconds: int | None) -> Message:
        if milliseconds is None:
            return message
        return on_step(message if expires_in_order(self._version) else unranked(message), milliseconds)

    async def _make(self, missing: Sequence[tuple[str, int]]) -> None:
        wanted = dict.fromkeys((home, step) for home, one in missing for step in steps_made_with(one))
        try:
            unknown = [(home, step) for home, step in wanted if step not in self._ladders[home].steps]
            await self._making.join(unknown, self._make_now)
        except QueueNotFound as error:
            raise QueueNotFound(str(error)) from error  # whoever waits names tasks of its own in it

    async def _make_now(self, steps: Sequence[tuple[str, int]]) -> None:
        async def ask() -> None:
            connection = await self._publisher.connection()
            self._version = amqp.server_version(connection)
            await declare_delays(connection, steps)

        async with self._turn:
            await self._requester.ask("declaring delay queues", ask, patience=None)
        for home, step in steps:
            self._ladders[home].steps.add(step)
