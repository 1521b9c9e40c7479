"""The stream of statuses, which is made by the first that is told, and again when it was deleted."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from leveret.brokers.rabbitmq.queues import Requester, make_stream
from leveret.brokers.rabbitmq.statuses.streams import Batch, events_declaration, to_message
from leveret.errors import BrokerUnavailable, QueueNotFound

if TYPE_CHECKING:
    from leveret.brokers.rabbitmq.queues import Publisher


class StatusStream:
    """Its name, and the way to it. ``keep``, ``timeout``: seconds."""

    def __init__(self, publisher: Publisher, *, keep: float, timeout: float) -> None:
        self.keep = keep
        self.timeout = timeout
        self._publisher = publisher
        self._requester = Requester(publisher, timeout=timeout)
        self._declaration = events_declaration(keep)
        self._is_made = False
        self._making = asyncio.Lock()

    @property
    def name(self) -> str:
        return self._declaration.name

    async def send(self, batch: Batch) -> None:
        """Store a message in it. Raises BrokerError."""
        for _ in range(2):
            async with self._making:  # once for all that are told at first
                if not self._is_made:
                    await self._make()
            try:
                return await self._publisher.publish([to_message(self.name, batch)])
            except QueueNotFound:
                self._is_made = False
        raise BrokerUnavailable(f"the stream {self.name!r} is deleted again and again")

    async def make(self) -> None:
        """Have the stream be there. Raises BrokerError."""
        async with self._making:
            await self._make()

    async def _make(self) -> None:
        async def ask() -> None:
            await make_stream(await self._publisher.connection(), self._declaration)

        await self._requester.ask(f"making the stream {self.name!r}", ask, self.timeout)
        self._is_made = True
