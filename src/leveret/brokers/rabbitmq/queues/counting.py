"""What is ready in queues, asked again and again: on one channel that is kept, as each one opened leaves a trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leveret.brokers.rabbitmq.amqp import connections as amqp

if TYPE_CHECKING:
    from collections.abc import Sequence


class ReadyCounter:
    """Not for two questions at once."""

    def __init__(self) -> None:
        self._channel: amqp.Channel | None = None

    async def count(self, connection: amqp.Connection, names: Sequence[str]) -> int:
        """All queues together; one that is not there has none. Raises what aio-pika raises."""
        return sum([await self._ready(connection, name) for name in names])

    async def _ready(self, connection: amqp.Connection, name: str) -> int:
        if self._channel is None or self._channel.is_closed:
            self._channel = await amqp.open_channel(connection, confirms=False)
        try:
            answer = await self._channel.queue_declare(name, passive=True)
        except amqp.ChannelNotFoundEntity:
            return 0
        return answer.message_count or 0
