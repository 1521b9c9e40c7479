"""Publishing with confirms: many outstanding, each told apart, across lost connections, within a deadline.

It has a connection of its own: an alarm that stops the server reading publishers must not stop acknowledgments.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING

from leveret.brokers.backoff import backoff
from leveret.brokers.rabbitmq import amqp
from leveret.brokers.rabbitmq.outbox import SILENCE
from leveret.brokers.rabbitmq.pipe import Pipe
from leveret.deadlines import Deadlines
from leveret.errors import (
    BrokerBlocked,
    BrokerRefused,
    BrokerUnavailable,
    EnqueueTimeout,
    LeveretError,
    QueueFull,
    TaskTooLarge,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from leveret.brokers.rabbitmq.codec import Message
    from leveret.brokers.rabbitmq.outbox import Parcel

log = logging.getLogger("leveret.rabbitmq.publisher")

_TOO_LARGE = re.compile(r"message size \d+ is larger than configured max size (?P<limit>\d+)")


class _Lost(Exception):
    """The connection went away before the confirm came: whether the message was stored is unknown."""


class _Effort:
    """One call's tries: what is not known to be stored, and what came in between."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self._messages = messages
        self._parcel: Parcel | None = None
        self._was_sent = False
        self.trouble: Exception | None = None

    @property
    def pending(self) -> Sequence[Message]:
        return self._messages if self._parcel is None else self._parcel.unstored

    @property
    def was_sent(self) -> bool:
        """Once something was sent it may be stored, whatever becomes of the connection afterwards."""
        return self._was_sent or (self._parcel is not None and self._parcel.written > 0)

    def hand_over(self, pipe: Pipe) -> Parcel:
        pending, self._was_sent = self.pending, self.was_sent
        self._parcel = pipe.outbox.post(pending)
        return self._parcel

    def note(self, trouble: Exception) -> None:
        if self.trouble is None or not self.was_sent:
            self.trouble = trouble


class Publisher:
    """One publishing connection, opened at its first use and again when it was lost. ``timeout``: seconds."""

    def __init__(self, urls: Sequence[str], *, timeout: float) -> None:
        self._urls = urls
        self._deadlines = Deadlines(timeout)
        self._opening = asyncio.Lock()
        self._pipe: Pipe | None = None
        #: Pipes that send and confirm what they have, and get no more.
        self._retiring: set[asyncio.Task[None]] = set()
        self._is_closed = False
        #: It could not be opened when that was tried last.
        self._is_away = False
        #: When a refusal was last doubted (the loop's time).
        self._doubted_at = float("-inf")

    async def publish(self, messages: Sequence[Message]) -> None:
        """Returned means confirmed. What a lost connection left unknown is sent again, under the same id.

        Raises QueueNotFound, QueueFull, TaskTooLarge, BrokerRefused; in time BrokerUnavailable when nothing could
        be sent, BrokerBlocked or EnqueueTimeout when it is not known whether it was stored.
        """
        if not messages:
            return
        effort = _Effort(messages)
        try:
            with self._deadlines.begin():
                for pause in backoff():
                    try:
                        pipe = await self._open_pipe()
                    except BrokerUnavailable as error:
                        effort.note(error)
                        if self._is_closed:
                            break
                    else:
                        if await self._send(pipe, effort):
                            return
                    await asyncio.sleep(pause)
        except TimeoutError:
            raise self._why_late(effort) from effort.trouble
        raise self._why_closed(effort) from effort.trouble

    async def connection(self) -> amqp.Connection:
        """The open connection, for questions. Raises BrokerUnavailable or BrokerRefused."""
        return (await self._open_pipe()).line.connection

    async def send(self, message: Message) -> None:
        """Publish without waiting for a confirm or asking for a queue: answers that nobody may be waiting for."""
        (await self._open_pipe()).outbox.post([message], mandatory=False)

    async def close(self) -> None:
        """For good: whoever publishes still would open a connection that nobody closes."""
        self._is_closed = True
        async with self._opening:
            await self._drop()
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)

    async def _open_pipe(self) -> Pipe:
        """The connection and its channel; opened anew when they are lost."""
        if self._pipe is not None and self._pipe.is_open:
            return self._pipe
        async with self._opening:
            if self._pipe is None or not self._pipe.is_open:
                await self._drop()
                self._pipe = await self._opened()
            return self._pipe

    async def _opened(self) -> Pipe:
        if self._is_closed:
            raise BrokerUnavailable("the connection was closed by this program")
        try:
            pipe = await Pipe.open(self._urls)
        except BrokerUnavailable as error:
            if not self._is_away:
                log.warning("RabbitMQ cannot be reached; it is tried again as long as somebody waits for it: %s", error)
            self._is_away = True
            raise
        self._is_away = False
        return pipe

    async def _drop(self) -> None:
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            await pipe.line.close()

    async def _send(self, pipe: Pipe, effort: _Effort) -> bool:
        """Send what is pending; False when it must be sent again. Raises when any was refused."""
        parcel = effort.hand_over(pipe)
        await parcel.done
        if parcel.refusals and (set(map(type, parcel.refusals.values())) != {QueueFull} or not self._doubts(pipe)):
            refusal = parcel.refusals[min(parcel.refusals)]
            refusal.ids = tuple(message.id for message in effort.pending)
            raise refusal
        if parcel.pending:
            _raise_reason(pipe.line.parting, parcel.pending.values())
            effort.note(_Lost("the connection was lost, or silent, before the confirm came"))
        return not (parcel.refusals or parcel.pending)

    def _doubts(self, pipe: Pipe) -> bool:
        """Whether a refusal is to be asked for again, on a new connection: at most once in a while.

        A channel of RabbitMQ 3.10 that publishes while its quorum queue elects a leader may refuse everything from
        then on, although the queue has neither a limit nor, soon, a lack of a leader.
        """
        if pipe is not self._pipe:
            return True  # doubted by now
        now = asyncio.get_running_loop().time()
        if now - self._doubted_at < SILENCE:
            return False
        self._doubted_at = now
        self._pipe = None
        task = asyncio.create_task(self._retire(pipe))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return True

    async def _retire(self, pipe: Pipe) -> None:
        """What is on the way is other callers': given up, it would be sent again, and most of it is stored."""
        try:
            await pipe.outbox.retire()
        finally:
            await pipe.line.close()

    def _why_closed(self, effort: _Effort) -> LeveretError:
        ids = [message.id for message in effort.pending]
        if not effort.was_sent:
            return BrokerUnavailable("the connection was closed by this program; nothing was stored")
        return EnqueueTimeout(
            f"the connection was closed by this program before RabbitMQ confirmed {len(ids)} tasks; they may be stored",
            ids,
        )

    def _why_late(self, effort: _Effort) -> LeveretError:
        within = f"within {self._deadlines.seconds:g} s"
        ids = [message.id for message in effort.pending]
        if isinstance(effort.trouble, BrokerUnavailable) and not effort.was_sent:
            return BrokerUnavailable(f"RabbitMQ could not be reached {within}; nothing was stored: {effort.trouble}")
        if self._pipe is not None and self._pipe.outbox.is_blocked:
            return BrokerBlocked(
                f"RabbitMQ takes no publishes now (a memory or disk alarm) and confirmed nothing {within}; "
                f"{len(ids)} tasks may be stored when the alarm ends",
                ids,
            )
        return EnqueueTimeout(f"RabbitMQ did not confirm {len(ids)} tasks {within}; they may be stored later", ids)


def _raise_reason(parting: amqp.AMQPError | None, pending: Iterable[Message]) -> None:
    """Raise what the closing of a channel means for these messages; return when it means nothing."""
    limit = _TOO_LARGE.search(str(parting))
    for message in pending:
        if isinstance(parting, amqp.ChannelAccessRefused):
            raise BrokerRefused(f"publishing to queue {message.queue!r}: {parting}")
        if limit is not None and len(message.body) > int(limit["limit"]):
            raise TaskTooLarge(
                f"the task's body is {len(message.body)} bytes, over this RabbitMQ's limit of {limit['limit']}; "
                "store the data elsewhere and pass a reference"
            )
