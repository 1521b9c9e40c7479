"""The delay queues of task queues, which are made when something is first to wait in them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from leveret.brokers.flights import Flights
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.queues.codec import routed, unranked
from leveret.brokers.rabbitmq.queues.declare import declare_delay
from leveret.brokers.rabbitmq.queues.priorities import expires_in_order
from leveret.brokers.rabbitmq.queues.topology import DELAY_STEPS
from leveret.errors import QueueNotFound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers.rabbitmq.amqp import Message
    from leveret.brokers.rabbitmq.queues.publisher import Publisher
    from leveret.brokers.rabbitmq.queues.requests import Requester
    from leveret.errors import BrokerUnavailable


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
            wait = await self._requester.insist("declaring delay queues", ask)
        await asyncio.sleep(wait)
        self._delays.update(steps)
