"""The stream of statuses, which is made by the first that is told, and again when it was deleted.

It is read on a connection of its own: an alarm stops those that publish.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.queues import Requester, make_stream
from leveret.brokers.rabbitmq.statuses.streams import Batch, events_declaration, message_of, to_message
from leveret.errors import BrokerError, BrokerRefused, BrokerUnavailable, QueueNotFound
from leveret.model import KEEP

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine

    from leveret.brokers.rabbitmq.amqp import Hosts, Message
    from leveret.brokers.rabbitmq.queues import Declaration, Publisher
    from leveret.brokers.rabbitmq.statuses.streams import Place, Reading

T = TypeVar("T")


def lacks_permission(error: Exception) -> bool:
    """Whether this was refused, and not the connection: that may be for a moment, while a password is changed, say."""
    return isinstance(error, BrokerRefused) and (
        error.__cause__ is None or isinstance(error.__cause__, amqp.ChannelAccessRefused)
    )


class StatusStream:
    """The way to it and from it, with RabbitMQ's errors as Leveret's. ``keep``, ``timeout``: seconds.

    ``declaration``: of another stream, in its place.
    """

    def __init__(
        self,
        hosts: Hosts,
        publisher: Publisher,
        *,
        timeout: float,
        keep: float = KEEP,
        declaration: Declaration | None = None,
    ) -> None:
        self.keep = keep
        self.timeout = timeout
        self._hosts = hosts
        self._publisher = publisher
        self._requester = Requester(publisher, timeout=timeout)
        self._declaration = declaration or events_declaration(keep)
        self._is_made = False
        self._making = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._line: amqp.Link | None = None

    @property
    def name(self) -> str:
        return self._declaration.name

    async def send(self, batch: Batch) -> None:
        """Store a message in it. Raises BrokerError."""
        await self._store(to_message(self.name, batch))

    async def store(self, body: bytes) -> None:
        """Store a message of another form in it. Raises BrokerError."""
        await self._store(message_of(self.name, body))

    async def _store(self, message: Message) -> None:
        for _ in range(2):
            async with self._making:  # once for all that are told at first
                if not self._is_made:
                    await self._make()
            try:
                return await self._publisher.publish([message])
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

        await self._requester.once(f"making the stream {self.name!r}", ask, self.timeout)
        self._is_made = True

    async def open(self) -> amqp.Link:
        async with self._opening:
            if self._line is None or self._line.is_lost:
                if self._line is not None:
                    await self._line.close()
                await self.make()
                self._line = await amqp.Link.open(self._hosts, purpose="reader", confirms=False)
            return self._line

    @asynccontextmanager
    async def reading(self, line: amqp.Link, reading: Reading, place: Place, doing: str) -> AsyncGenerator[None]:
        """Have it read from that place on, until the context is left. Raises BrokerError."""
        try:
            try:
                await self.run(line, reading.begin(place), doing)
            except BrokerUnavailable as error:
                if isinstance(error.__cause__, amqp.ChannelNotFoundEntity):
                    await self.make()  # it was deleted, and nobody may have anything to write to it
                raise
            yield
        finally:
            if not line.is_lost:
                with suppress(*amqp.CONNECTION_LOST):
                    await reading.end()

    async def hear(self, line: amqp.Link, reading: Reading, came: asyncio.Future[int], doing: str) -> int:
        """The offset of a sentinel that is stored. Raises BrokerUnavailable; then the next try is by another host."""
        try:
            return await self.run(line, reading.hear(came), doing)
        except BrokerError:
            if not line.is_lost and not reading.is_over:
                await self.give_up(line)
            raise

    async def give_up(self, line: amqp.Link) -> None:
        """Its node may be parted from the others still: the next one is opened to another."""
        line.host_failed()
        await line.close()

    async def run(self, line: amqp.Link, operation: Coroutine[object, object, T], doing: str) -> T:
        try:
            return await line.run(operation)
        except amqp.CONNECTION_LOST as error:
            raise amqp.translate(error, doing) from error

    def may_pass(self, error: BrokerError) -> bool:
        """Whether trying again may help: once there was a connection, its refusal is like its loss."""
        return not isinstance(error, BrokerRefused) or (self._line is not None and not lacks_permission(error))

    async def close(self) -> None:
        if self._line is not None:
            await self._line.close()
