"""What is said to all workers: a fanout exchange to which each consuming session binds a queue of its own.

A *question* names direct reply-to, and each session answers with what it holds: AMQP does not tell unacknowledged
counts without a plugin. Asked for it in the question's body, a worker also tells what it does. A *notice* is a small
JSON object that wants no answer.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import msgspec

from leveret.brokers.rabbitmq.amqp import Message
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.queues import CONTROL_EXCHANGE, make_control_exchange
from leveret.model import Count, Name, WorkerReport, decoded, is_name

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping

    from leveret.brokers.rabbitmq.queues import Publisher
    from leveret.model import Describe

log = logging.getLogger("leveret.rabbitmq")

#: The pseudo-queue of direct reply-to (RabbitMQ 3.4 and later).
_REPLY_TO = "amq.rabbitmq.reply-to"
#: How long workers may take to answer (seconds).
WAIT = 1.0
#: How long to listen when it is not known how many will answer (seconds).
LISTEN = 0.3


NOTICE_VERSION = 1
#: Queues that one session may answer for, and that are counted besides those that were asked for.
MOST_QUEUES = 1_000
_FEW = msgspec.Meta(max_length=MOST_QUEUES)


class Signal(msgspec.Struct, frozen=True, kw_only=True):
    """Something that workers should look at. They ignore a newer version, a kind and a member that they do not know."""

    v: int = NOTICE_VERSION
    kind: str
    queue: str | None = None


#: A queue was paused or resumed; its marker says which.
PAUSING = "pausing"
#: A task was cancelled; the stream of marks says which.
CANCELLING = "cancelling"


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked beyond the counts. Whoever answers ignores a newer version, and a kind that it does not know."""

    v: int = NOTICE_VERSION
    kind: str


#: What the worker does.
WORKERS = "workers"


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """One consuming session's answer: unsettled deliveries by queue, and its consumers of each if they are not one."""

    running: Annotated[dict[Name, Count], _FEW]
    consumers: Annotated[dict[Name, Count], _FEW] = {}
    #: Only if it was asked for.
    worker: WorkerReport | None = None

    @property
    def is_plausible(self) -> bool:
        """Whether RabbitMQ could be asked for what it names."""
        return all(map(is_name, self.running)) and (self.worker is None or self.worker.is_plausible)


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


class ControlBus:
    """Both sides. Answers go out by the publisher: an alarm must not block the connection that acknowledges."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        #: How many workers answered the last question for them; None: it was not asked yet.
        self._workers: int | None = None

    async def listen_on(
        self,
        connection: amqp.Connection,
        report: Callable[[], Report],
        describe: Describe | None,
        noticed: Callable[[Signal], None],
    ) -> Listening:
        """Answer questions and pass notices on for as long as the connection lives."""

        async def hear(question: amqp.DeliveredMessage) -> None:
            properties = question.header.properties
            if properties.reply_to:
                answer = report()
                if describe is not None and asks_for_workers(question.body):
                    answer = msgspec.structs.replace(answer, worker=describe())
                body = msgspec.json.encode(answer)
                reply = amqp.Properties(correlation_id=properties.correlation_id, delivery_mode=1)
                await self._publisher.send(Message(properties.reply_to, body, reply))
                return
            notice = decoded(_decode_notice, question.body)
            if notice is not None and notice.v == NOTICE_VERSION:
                noticed(notice)

        listening = Listening(connection, hear)
        await listening.mend()
        return listening

    async def announce(self, connection: amqp.Connection, notice: Signal) -> None:
        """Tell all workers that can be reached now; returned means that the broker has it.

        One that cannot (RabbitMQ says so when its node is parted from the others) looks by itself, some seconds later.
        """
        await make_control_exchange(connection)
        channel = await amqp.open_channel(connection, confirms=True)
        properties = amqp.Properties(content_type="application/json", delivery_mode=1)
        body = msgspec.json.encode(notice)
        try:
            async with asyncio.timeout(WAIT):
                await channel.basic_publish(body, exchange=CONTROL_EXCHANGE, properties=properties)
        except (amqp.DeliveryError, TimeoutError) as error:
            log.info("not all workers could be told at once, and will see some seconds later: %r", error)
        finally:
            await amqp.close_channel(channel)

    async def take(self, connection: amqp.Connection, expected: Mapping[str, int], *, more: bool) -> Tally:
        """Ask all workers; listen until as many consumers as ``expected`` of each queue answered, at most `WAIT`.

        With nothing expected, listen for `LISTEN`: whoever answers tells which queues there are. At least so long with
        ``more``: workers may answer that RabbitMQ does not count as consumers.
        """
        tally, changed = Tally(), asyncio.Event()

        def count(report: Report) -> None:
            tally.add(report)
            changed.set()

        async with _asking(connection, b"", count):
            if more:
                await asyncio.sleep(LISTEN)
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT if expected else LISTEN):
                    while not (expected and tally.covers(expected)):
                        await changed.wait()
                        changed.clear()
        return tally

    async def workers(self, connection: amqp.Connection) -> list[WorkerReport]:
        """Ask all workers what they do: for `WAIT` the first time, then for `LISTEN` if as many answer as the last."""
        workers: list[WorkerReport] = []
        changed = asyncio.Event()

        def note(report: Report) -> None:
            if report.worker is not None:
                workers.append(report.worker)
                changed.set()

        async with _asking(connection, msgspec.json.encode(Question(kind=WORKERS)), note):
            await asyncio.sleep(LISTEN)
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT - LISTEN):
                    while self._workers is None or len(workers) < self._workers:
                        await changed.wait()
                        changed.clear()
        self._workers = len(workers)
        return workers


class Listening:
    """One session's queue at the control exchange. Both are made again when somebody has deleted them."""

    def __init__(
        self, connection: amqp.Connection, hear: Callable[[amqp.DeliveredMessage], Coroutine[object, object, None]]
    ) -> None:
        self._connection = connection
        self._hear = hear
        self._channel: amqp.Channel | None = None
        self._queue = ""
        self._deleted = asyncio.Event()

    async def mend(self) -> bool:
        """Whether something was missing, so that notices may have been missed. Raises what aio-pika raises."""
        is_missing = await make_control_exchange(self._connection)
        if self._channel is None or self._channel.is_closed or self._deleted.is_set():
            is_missing = True
            await self._begin()
        else:
            # An exchange that was deleted may have been made again since by another program, and has no bindings.
            await self._channel.queue_bind(self._queue, CONTROL_EXCHANGE)
        return is_missing

    async def deleted(self, within: float) -> None:
        """Wait until RabbitMQ tells that the queue was deleted, or for so long (seconds)."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._deleted.wait()

    async def _begin(self) -> None:
        if self._channel is not None and not self._channel.is_closed:
            await self._channel.close()
        self._deleted.clear()
        channel = self._channel = await amqp.open_channel(self._connection, confirms=False)
        channel.on_consumer_cancel_callbacks.add(lambda _: self._deleted.set())
        self._queue = (await channel.queue_declare("", exclusive=True, auto_delete=True)).queue or ""
        await channel.queue_bind(self._queue, CONTROL_EXCHANGE)
        await channel.basic_consume(self._queue, self._hear, no_ack=True)


_decode_notice = msgspec.json.Decoder(Signal).decode
_decode_question = msgspec.json.Decoder(Question).decode
_decode_report = msgspec.json.Decoder(Report).decode


@asynccontextmanager
async def _asking(connection: amqp.Connection, body: bytes, take: Callable[[Report], None]) -> AsyncGenerator[None]:
    """Ask all workers, and take what they answer."""
    await make_control_exchange(connection)
    channel = await amqp.open_channel(connection, confirms=False)

    async def hear(answer: amqp.DeliveredMessage) -> None:
        report = decoded(_decode_report, answer.body)
        if report is not None and report.is_plausible:
            take(report)

    try:
        await channel.basic_consume(_REPLY_TO, hear, no_ack=True)
        properties = amqp.Properties(reply_to=_REPLY_TO, delivery_mode=1)
        await channel.basic_publish(body, exchange=CONTROL_EXCHANGE, properties=properties, wait=False)
        yield
    finally:
        # Whoever asks may give up, and the connection goes on.
        await amqp.close_channel(channel)


def asks_for_workers(body: bytes) -> bool:
    question = decoded(_decode_question, body)
    return question is not None and (question.v, question.kind) == (NOTICE_VERSION, WORKERS)
