"""What the workers hold, asked of themselves: AMQP does not tell unacknowledged counts without a plugin.

Whoever asks publishes to a fanout exchange and names direct reply-to; every consuming session answers with its counts.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.rabbitmq import amqp
from leveret.brokers.rabbitmq.codec import Message
from leveret.brokers.rabbitmq.topology import CONTROL_EXCHANGE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from leveret.brokers.rabbitmq.publisher import Publisher

#: The pseudo-queue of direct reply-to (RabbitMQ 3.4 and later).
_REPLY_TO = "amq.rabbitmq.reply-to"
#: How long workers may take to answer (seconds).
WAIT = 1.0
#: How long to listen when it is not known how many will answer (seconds).
LISTEN = 0.3


class Report(msgspec.Struct, frozen=True):
    """One consuming session's answer: unsettled deliveries by queue."""

    running: dict[str, int]


class Tally(msgspec.Struct):
    """The answers so far."""

    running: dict[str, int] = {}
    consumers: dict[str, int] = {}

    def add(self, report: Report) -> None:
        for queue, count in report.running.items():
            self.running[queue] = self.running.get(queue, 0) + count
            self.consumers[queue] = self.consumers.get(queue, 0) + 1

    def covers(self, expected: Mapping[str, int]) -> bool:
        return all(self.consumers.get(queue, 0) >= count for queue, count in expected.items())


class Census:
    """Both sides. Answers go out by the publisher: an alarm must not block the connection that acknowledges."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def answer_on(self, connection: amqp.Connection, running: Callable[[], dict[str, int]]) -> None:
        """Answer questions for as long as the connection lives."""
        channel = await amqp.open_channel(connection, confirms=False)
        await channel.exchange_declare(CONTROL_EXCHANGE, exchange_type="fanout", durable=True)
        queue = (await channel.queue_declare("", exclusive=True, auto_delete=True)).queue or ""
        await channel.queue_bind(queue, CONTROL_EXCHANGE)

        async def answer(question: amqp.DeliveredMessage) -> None:
            properties = question.header.properties
            if properties.reply_to:
                body = msgspec.json.encode(Report(running()))
                reply = amqp.Properties(correlation_id=properties.correlation_id, delivery_mode=1)
                await self._publisher.send(Message(properties.reply_to, body, reply))

        await channel.basic_consume(queue, answer, no_ack=True)

    async def take(self, connection: amqp.Connection, expected: Mapping[str, int]) -> Tally:
        """Ask all workers; listen until as many consumers as ``expected`` of each queue answered, at most `WAIT`.

        With nothing expected, listen for `LISTEN`: whoever answers tells which queues there are.
        """
        channel = await amqp.open_channel(connection, confirms=False)
        tally, changed = Tally(), asyncio.Event()

        async def count(answer: amqp.DeliveredMessage) -> None:
            with suppress(msgspec.MsgspecError):
                tally.add(msgspec.json.decode(answer.body, type=Report))
                changed.set()

        await channel.exchange_declare(CONTROL_EXCHANGE, exchange_type="fanout", durable=True)
        await channel.basic_consume(_REPLY_TO, count, no_ack=True)
        question = amqp.Properties(reply_to=_REPLY_TO, delivery_mode=1)
        await channel.basic_publish(b"", exchange=CONTROL_EXCHANGE, properties=question, wait=False)
        with suppress(TimeoutError):
            async with asyncio.timeout(WAIT if expected else LISTEN):
                while not (expected and tally.covers(expected)):
                    await changed.wait()
                    changed.clear()
        await channel.close()
        return tally
