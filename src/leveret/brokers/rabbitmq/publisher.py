"""Publishing with confirms: many outstanding, each told apart, across lost connections, within a deadline.

It has a connection of its own: an alarm that stops the server reading publishers must not stop acknowledgments.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from leveret.brokers.backoff import backoff
from leveret.brokers.rabbitmq import amqp
from leveret.brokers.rabbitmq.codec import fitted
from leveret.errors import (
    BrokerBlocked,
    BrokerRefused,
    BrokerUnavailable,
    EnqueueError,
    EnqueueTimeout,
    LeveretError,
    QueueFull,
    QueueNotFound,
    TaskTooLarge,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers.rabbitmq.codec import Message

#: Most unconfirmed messages of one publisher; more wait. RabbitMQ's documentation advises 100 to 1,000.
_OUTSTANDING = 512
#: A connection that confirms nothing for so long, and is not blocked, is given up (seconds).
_SILENCE = 5.0
_TOO_LARGE = re.compile(r"message size \d+ is larger than configured max size (?P<limit>\d+)")


class _Lost(Exception):
    """The connection went away before the confirm came: whether the message was stored is unknown."""


class Publisher:
    """One publishing connection, opened at its first use and again when it was lost. ``timeout``: seconds."""

    def __init__(self, urls: Sequence[str], *, timeout: float) -> None:
        self._urls = urls
        self._timeout = timeout
        self._opening = asyncio.Lock()
        self._line: amqp.Line | None = None
        self._room = asyncio.Semaphore(_OUTSTANDING)
        self._in_flight: dict[str, asyncio.Event] = {}
        #: When this publisher last got a confirm, for whichever call (the loop's time).
        self._confirmed_at = 0.0
        #: When a refusal was last doubted (the loop's time).
        self._doubted_at = float("-inf")

    async def publish(self, messages: Sequence[Message]) -> None:
        """Returned means confirmed. What a lost connection left unknown is sent again, under the same id.

        Raises QueueNotFound, QueueFull, TaskTooLarge, BrokerRefused; in time BrokerUnavailable when nothing could
        be sent, BrokerBlocked or EnqueueTimeout when it is not known whether it was stored.
        """
        pending: Sequence[Message] = messages
        trouble: Exception | None = None
        sent = False
        try:
            async with asyncio.timeout(self._timeout):
                for pause in backoff():
                    try:
                        line = await self._opened_line()
                        await amqp.unblocked(line.connection)
                        sent = True
                        pending, trouble = await self._send_all(line, pending)
                    except BrokerUnavailable as error:
                        # Once something was sent it may be stored, whatever becomes of the connection afterwards.
                        trouble = trouble or error
                    if not pending:
                        return
                    await asyncio.sleep(pause)
        except TimeoutError:
            raise await self._why_late([message.id for message in pending], trouble, sent=sent) from trouble

    async def connection(self) -> amqp.Connection:
        """The open connection, for questions. Raises BrokerUnavailable or BrokerRefused."""
        return (await self._opened_line()).connection

    async def send(self, message: Message) -> None:
        """Publish without waiting for a confirm or asking for a queue: answers that nobody may be waiting for."""
        line = await self._opened_line()
        await amqp.unblocked(line.connection)
        await line.run(
            line.channel.basic_publish(
                message.body, routing_key=message.queue, properties=message.properties, wait=False
            )
        )

    async def close(self) -> None:
        async with self._opening:
            await self._drop(self._line)

    async def _opened_line(self) -> amqp.Line:
        """The connection and its channel; opened anew when they are lost."""
        async with self._opening:
            if self._line is None or self._line.is_lost:
                await self._drop(self._line)
                self._line = await amqp.Line.open(self._urls, purpose="producer", confirms=True)
            return self._line

    async def _drop(self, line: amqp.Line | None) -> None:
        if line is not None and line is self._line:
            self._line = None
            await line.close()

    async def _send_all(
        self, line: amqp.Line, messages: Sequence[Message]
    ) -> tuple[Sequence[Message], Exception | None]:
        """Send all at once; those that must be sent again, and why. Raises when any was refused."""
        sending = [line.start(self._send(line.channel, message)) for message in messages]
        try:
            await self._watch(line, sending)
        finally:
            for task in sending:
                task.cancel()
        results = [_result(outcome) for outcome in await asyncio.gather(*sending, return_exceptions=True)]
        again = [message for message, result in zip(messages, results, strict=True) if isinstance(result, _Lost)]
        refusals = [result for result in results if isinstance(result, LeveretError)]
        if refusals:
            if all(isinstance(refusal, QueueFull) for refusal in refusals) and await self._doubts(line):
                return [one for one, result in zip(messages, results, strict=True) if result is not None], None
            ids = [message.id for message, result in zip(messages, results, strict=True) if result is not None]
            raise _refused(refusals[0], ids)
        for result in results:
            if result is not None and not isinstance(result, _Lost):
                raise result
        return again, next((result for result in results if isinstance(result, _Lost)), None)

    async def _doubts(self, line: amqp.Line) -> bool:
        """Whether a refusal is to be asked for again, on a new connection: at most once in a while.

        A channel of RabbitMQ 3.10 that publishes while its quorum queue elects a leader may refuse everything from
        then on, although the queue has neither a limit nor, soon, a lack of a leader.
        """
        now = asyncio.get_running_loop().time()
        if now - self._doubted_at < _SILENCE:
            return False
        self._doubted_at = now
        async with self._opening:
            await self._drop(line)
        return True

    async def _watch(self, line: amqp.Line, sending: Sequence[asyncio.Task[None]]) -> None:
        """Until all are done, or the connection is given up because it confirms nothing any more.

        A quorum queue of RabbitMQ 3.10 may never confirm what is published while its node starts, before the queue
        has a leader: only sending it again on a new connection helps.
        """
        pending = set(sending)
        clock = asyncio.get_running_loop().time
        while pending:
            done, pending = await asyncio.wait(pending, timeout=_SILENCE)
            silent = clock() - self._confirmed_at >= _SILENCE
            if not done and silent and not await amqp.is_blocked(line.connection):
                async with self._opening:
                    await self._drop(line)
                return

    async def _send(self, channel: amqp.Channel, message: Message) -> None:
        """Publish one message and wait for its confirm."""
        async with self._room:
            # aiormq tells returned messages apart by their id, so no two with the same id may be on the way at once.
            while (other := self._in_flight.get(message.id)) is not None:
                await other.wait()
            confirmed = self._in_flight[message.id] = asyncio.Event()
            message = fitted(message, channel.connection.connection_tune.frame_max or 0)
            try:
                await amqp.told(
                    channel.basic_publish(
                        message.body,
                        routing_key=message.queue,
                        properties=message.properties,
                        mandatory=True,
                        wait=False,
                    )
                )
            except amqp.CONNECTION_LOST as error:
                raise _explain(error, message) from error
            else:
                self._confirmed_at = asyncio.get_running_loop().time()
            finally:
                del self._in_flight[message.id]
                confirmed.set()

    async def _why_late(self, ids: Sequence[str], trouble: Exception | None, *, sent: bool) -> LeveretError:
        within = f"within {self._timeout:g} s"
        if isinstance(trouble, BrokerUnavailable) and not sent:
            return BrokerUnavailable(f"RabbitMQ could not be reached {within}; nothing was stored: {trouble}")
        if self._line is not None and await amqp.is_blocked(self._line.connection):
            return BrokerBlocked(
                f"RabbitMQ takes no publishes now (a memory or disk alarm) and confirmed nothing {within}; "
                f"{len(ids)} tasks may be stored when the alarm ends",
                ids,
            )
        return EnqueueTimeout(f"RabbitMQ did not confirm {len(ids)} tasks {within}; they may be stored later", ids)


def _result(outcome: BaseException | None) -> BaseException | None:
    if isinstance(outcome, asyncio.CancelledError):
        # By the line when it was lost, by aiormq for the same reason, or because nothing was confirmed any more.
        return _Lost("the connection was lost, or silent, before the confirm came")
    return outcome


def _explain(error: BaseException, message: Message) -> Exception:
    """What an exception of basic_publish means for this message."""
    if isinstance(error, amqp.PublishError):
        return QueueNotFound(
            f"RabbitMQ has no queue {message.queue!r} (any more); the task was not stored", [message.id]
        )
    if isinstance(error, amqp.DeliveryError):
        return QueueFull(
            f"RabbitMQ refused a task for queue {message.queue!r}: it is at its length limit; nothing was dropped",
            [message.id],
        )
    if isinstance(error, amqp.ChannelAccessRefused):
        return BrokerRefused(f"publishing to queue {message.queue!r}: {error}")
    limit = _TOO_LARGE.search(str(error))
    if limit is not None and len(message.body) > int(limit["limit"]):
        return TaskTooLarge(
            f"the task's body is {len(message.body)} bytes, over this RabbitMQ's limit of {limit['limit']}; "
            "store the data elsewhere and pass a reference"
        )
    return _Lost(f"the connection was lost before the confirm came: {error}")


def _refused(error: LeveretError, ids: Sequence[str]) -> LeveretError:
    """The first refusal of a batch, naming every task of it that is not known to be stored."""
    if isinstance(error, EnqueueError):
        error.ids = tuple(ids)
    return error
