"""What is said to all workers: a fanout exchange to which each consuming session binds a queue of its own.

A *question* names direct reply-to, and each session answers with what it holds: AMQP does not tell unacknowledged
counts without a plugin. A *notice* is a small JSON object that wants no answer.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.rabbitmq import amqp
from leveret.brokers.rabbitmq.codec import Message
from leveret.brokers.rabbitmq.declare import make_control_exchange
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


NOTICE_VERSION = 1


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """Something that workers should look at. They ignore a newer version, a kind and a member that they do not know."""

    v: int = NOTICE_VERSION
    kind: str
    queue: str | None = None


#: A queue was paused or resumed; its marker says which.
PAUSING = "pausing"
#: A task was cancelled; the stream of marks says which.
CANCELLING = "cancelling"


class Report(msgspec.Struct, frozen=True):
    """One consuming session's answer: unsettled deliveries by queue, and its consumers of each if they are not one."""

    running: dict[str, int]
    consumers: dict[str, int] = {}


class Tally(msgspec.Struct):
    """The answers so far."""

    running: dict[str, int] = {}
    #: As RabbitMQ counts them.
    consumers: dict[str, int] = {}
    #: Sessions, those too that are paused.
    workers: dict[str, int] = {}

    def add(self, report: Report) -> None:
        for queue, count in report.running.items():
            self.running[queue] = self.running.get(queue, 0) + count
            self.consumers[queue] = self.consumers.get(queue, 0) + report.consumers.get(queue, 1)
            self.workers[queue] = self.workers.get(queue, 0) + 1

    def covers(self, expected: Mapping[str, int]) -> bool:
        return all(self.consumers.get(queue, 0) >= count for queue, count in expected.items())


class Census:
    """Both sides. Answers go out by the publisher: an alarm must not block the connection that acknowledges."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def listen_on(
        self, connection: amqp.Connection, report: Callable[[], Report], noticed: Callable[[Notice], None]
    ) -> None:
        """Answer questions and pass notices on for as long as the connection lives."""
        await make_control_exchange(connection)
        channel = await amqp.open_channel(connection, confirms=False)
        queue = (await channel.queue_declare("", exclusive=True, auto_delete=True)).queue or ""
        await channel.queue_bind(queue, CONTROL_EXCHANGE)

        async def answer(question: amqp.DeliveredMessage) -> None:
            properties = question.header.properties
            if properties.reply_to:
                body = msgspec.json.encode(report())
                reply = amqp.Properties(correlation_id=properties.correlation_id, delivery_mode=1)
                await self._publisher.send(Message(properties.reply_to, body, reply))
                return
            with suppress(msgspec.MsgspecError):
                notice = msgspec.json.decode(question.body, type=Notice)
                if notice.v == NOTICE_VERSION:
                    noticed(notice)

        await channel.basic_consume(queue, answer, no_ack=True)

    async def announce(self, connection: amqp.Connection, notice: Notice) -> None:
        """Tell all workers that are connected now; returned means that the broker has it."""
        await make_control_exchange(connection)
        channel = await amqp.open_channel(connection, confirms=True)
        properties = amqp.Properties(content_type="application/json", delivery_mode=1)
        await channel.basic_publish(msgspec.json.encode(notice), exchange=CONTROL_EXCHANGE, properties=properties)
        await channel.close()

    async def take(self, connection: amqp.Connection, expected: Mapping[str, int], *, more: bool) -> Tally:
        """Ask all workers; listen until as many consumers as ``expected`` of each queue answered, at most `WAIT`.

        With nothing expected, listen for `LISTEN`: whoever answers tells which queues there are. At least so long with
        ``more``: workers may answer that RabbitMQ does not count as consumers.
        """
        await make_control_exchange(connection)
        channel = await amqp.open_channel(connection, confirms=False)
        tally, changed = Tally(), asyncio.Event()

        async def count(answer: amqp.DeliveredMessage) -> None:
            with suppress(msgspec.MsgspecError):
                tally.add(msgspec.json.decode(answer.body, type=Report))
                changed.set()

        await channel.basic_consume(_REPLY_TO, count, no_ack=True)
        question = amqp.Properties(reply_to=_REPLY_TO, delivery_mode=1)
        await channel.basic_publish(b"", exchange=CONTROL_EXCHANGE, properties=question, wait=False)
        if more:
            await asyncio.sleep(LISTEN)
        with suppress(TimeoutError):
            async with asyncio.timeout(WAIT if expected else LISTEN):
                while not (expected and tally.covers(expected)):
                    await changed.wait()
                    changed.clear()
        await channel.close()
        return tally
