"""The connection that the stream of statuses is read on: one of its own, as an alarm stops those that publish."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.errors import BrokerError, BrokerRefused, BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from leveret.brokers.rabbitmq.amqp import Hosts
    from leveret.brokers.rabbitmq.statuses.status_stream import StatusStream
    from leveret.brokers.rabbitmq.statuses.streams import Place, Reading

T = TypeVar("T")


def lacks_permission(error: Exception) -> bool:
    """Whether this was refused, and not the connection: that may be for a moment, while a password is changed, say."""
    return isinstance(error, BrokerRefused) and (
        error.__cause__ is None or isinstance(error.__cause__, amqp.ChannelAccessRefused)
    )


class StreamLink:
    """Opened at its first use, and again when it was lost; with what is done on it, and its errors as Leveret's."""

    def __init__(self, hosts: Hosts, stream: StatusStream) -> None:
        self._hosts = hosts
        self._stream = stream
        self._opening = asyncio.Lock()
        self._line: amqp.Link | None = None

    async def open(self) -> amqp.Link:
        async with self._opening:
            if self._line is None or self._line.is_lost:
                if self._line is not None:
                    await self._line.close()
                await self._stream.make()
                self._line = await amqp.Link.open(self._hosts, purpose="reader", confirms=False)
            return self._line

    async def begin(self, line: amqp.Link, reading: Reading, place: Place, doing: str) -> None:
        try:
            await self.run(line, reading.begin(place), doing)
        except BrokerUnavailable as error:
            if isinstance(error.__cause__, amqp.ChannelNotFoundEntity):
                await self._stream.make()  # it was deleted, and nobody may have anything to write to it
            raise

    async def hear(self, line: amqp.Link, reading: Reading, came: asyncio.Future[int], doing: str) -> int:
        """The offset of a sentinel that is stored. Raises BrokerUnavailable; then the next try is by another host."""
        try:
            return await line.run(reading.hear(came))
        except amqp.CONNECTION_LOST as error:
            if not line.is_lost and not reading.is_over:
                await self.give_up(line)
            raise amqp.translate(error, doing) from error

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
