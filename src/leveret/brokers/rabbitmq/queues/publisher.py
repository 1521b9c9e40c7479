"""Publishing with confirms: many outstanding, each told apart, across lost connections, within a deadline.

It has a connection of its own: an alarm that stops the server reading publishers must not stop acknowledgments.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING

from leveret.brokers.backoff import backoff
from leveret.brokers.deadlines import Deadlines
from leveret.brokers.flights import Flights
from leveret.brokers.rabbitmq.amqp import SILENCE, ConfirmChannel, Limits, Message
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.queues.codec import fitted
from leveret.brokers.rabbitmq.queues.declare import message_count
from leveret.brokers.urls import censor
from leveret.errors import (
    BrokerBlocked,
    BrokerRefused,
    BrokerUnavailable,
    EnqueueTimeout,
    LeveretError,
    QueueFull,
    QueueUnavailable,
    TaskTooLarge,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from leveret.brokers.rabbitmq.amqp import Hosts, PublishCall

log = logging.getLogger("leveret.rabbitmq.publisher")

_TOO_LARGE = re.compile(r"message size \d+ is larger than configured max size (?P<limit>\d+)")


#: A queue without a limit that we know of is full when so many channels, each of them new, were refused one after the
#: other while it said that messages are ready in it. A queue without a leader says that none are.
_REFUSALS = 3
#: How long a channel that was refused stays in use (seconds): many may be refused at once.
_DOUBTED = 0.5
#: How many reasons why it cannot be reached are told, until it is reached again.
_MOST_REASONS = 5
#: How long a limit is remembered that only showed (seconds): a policy's, which may change.
_REMEMBERED = 60.0


class _Lost(Exception):
    """The connection went away before the confirm came: whether the message was stored is unknown."""


class _Effort:
    """One call's tries: what is not known to be stored, and what came in between."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self._messages = messages
        self._call: PublishCall | None = None
        self._was_sent = False
        #: The channels that refused it while its queue had messages, see `_REFUSALS`.
        self.refused_by: set[ConfirmChannel] = set()
        self.trouble: Exception | None = None

    @property
    def pending(self) -> Sequence[Message]:
        return self._messages if self._call is None else self._call.unstored

    @property
    def was_sent(self) -> bool:
        """Once something was sent it may be stored, whatever becomes of the connection afterwards."""
        return self._was_sent or (self._call is not None and self._call.written > 0)

    @property
    def is_refused(self) -> bool:
        """Nothing is known to be stored, and nothing may be: what is left was refused."""
        return self._call is not None and bool(self._call.refusals) and not self._call.pending

    def hand_over(self, channel: ConfirmChannel) -> PublishCall:
        pending, self._was_sent = self.pending, self.was_sent
        self._call = channel.tracker.post(pending)
        return self._call

    def note(self, trouble: Exception) -> None:
        if self.trouble is None or not self.was_sent:
            self.trouble = trouble


class Publisher:
    """One publishing connection, opened at its first use and again when it was lost. ``timeout``: seconds."""

    def __init__(self, hosts: Hosts, *, timeout: float) -> None:
        self._hosts = hosts
        self.limits = Limits()
        self._deadlines = Deadlines(timeout)
        #: The opening of a channel outlives the call that began it: else short timeouts would begin it again and again.
        self._opening: Flights[str] = Flights()
        self._looking: Flights[str] = Flights()
        #: Whether a queue had messages when it was asked last, and its channel was refused.
        self._had_messages: dict[str, bool] = {}
        self._channel: ConfirmChannel | None = None
        #: Pipes that send and confirm what they have, and get no more.
        self._retiring: set[asyncio.Task[None]] = set()
        self._is_closed = False
        #: Why it could not be opened since it was open last, as far as that was logged; and why the last time.
        self._reasons: set[str] = set()
        self._last_reason: str | None = None
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
                        channel = await self._open_channel()
                    except BrokerUnavailable as error:
                        effort.note(error)
                        if self._is_closed:
                            break
                    else:
                        if await self._send(channel, effort):
                            return
                    await asyncio.sleep(pause)
        except TimeoutError:
            raise self._why_late(effort) from effort.trouble
        raise self._why_closed(effort) from effort.trouble

    @property
    def is_blocked(self) -> bool:
        """Whether RabbitMQ takes nothing on this connection, and so answers nothing (a memory or disk alarm)."""
        return self._channel is not None and self._channel.is_open and self._channel.tracker.is_blocked

    def why_silent(self) -> str:
        """What a question that was not answered in time ran into."""
        if self._channel is None or not self._channel.is_open:
            return self._last_reason or f"no connection yet, no answer from {', '.join(map(censor, self._hosts.urls))}"
        if self.is_blocked:
            return "RabbitMQ takes nothing on this connection now (a memory or disk alarm)"
        return "RabbitMQ did not answer"

    async def connection(self) -> amqp.Connection:
        """The open connection, for questions, which has just shown that it lives.

        Raises BrokerUnavailable or BrokerRefused.
        """
        channel = await self._open_channel()
        if not await channel.answers(self._hosts.patience):
            if channel is self._channel:
                channel.line.host_failed()
                self._part_with(channel)
            channel = await self._open_channel()
        return channel.line.connection

    async def send(self, message: Message) -> None:
        """Publish without waiting for a confirm or asking for a queue: answers that nobody may be waiting for."""
        (await self._open_channel()).tracker.post([message], mandatory=False)

    async def close(self) -> None:
        """For good: whoever publishes still would open a connection that nobody closes."""
        self._is_closed = True
        error = BrokerUnavailable("the connection was closed by this program; nothing was stored")
        self._opening.close(error)
        self._looking.close(error)
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.line.close()
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)

    async def _open_channel(self) -> ConfirmChannel:
        """The connection and its channel; opened anew when they are lost."""
        if self._channel is None or not self._channel.is_open:
            await self._opening.join(("channel",), self._reopen)
        if self._channel is None:
            raise BrokerUnavailable("the connection to RabbitMQ was lost again at once")
        return self._channel

    async def _reopen(self, _: Sequence[str]) -> None:
        if self._channel is not None:
            self._part_with(self._channel)
        self._channel = await self._opened()

    async def _opened(self) -> ConfirmChannel:
        if self._is_closed:
            raise BrokerUnavailable("the connection was closed by this program")
        try:
            channel = await ConfirmChannel.open(self._hosts, self.limits, fitted)
        except BrokerUnavailable as error:
            self._last_reason = str(error)
            # Why may change: from no answer in time to a limit that an operator has set.
            if str(error) not in self._reasons and len(self._reasons) < _MOST_REASONS:
                self._reasons.add(str(error))
                log.warning("RabbitMQ cannot be reached; it is tried again as long as somebody waits for it: %s", error)
            raise
        self._reasons.clear()
        self._last_reason = None
        return channel

    async def _send(self, channel: ConfirmChannel, effort: _Effort) -> bool:
        """Send what is pending; False when it must be sent again. Raises when any was refused."""
        call = effort.hand_over(channel)
        await call.done
        if call.refusals:
            refusal = call.refusals[min(call.refusals)]
            if not isinstance(refusal, QueueFull) or not await self._may_pass(channel, effort, call):
                refusal.ids = tuple(message.id for message in effort.pending)
                raise refusal
            effort.note(refusal)
        if call.pending:
            _raise_reason(channel.line.parting, call.pending.values())
            effort.note(_Lost("the connection was lost, or silent, before the confirm came"))
        return not (call.refusals or call.pending)

    async def _may_pass(self, channel: ConfirmChannel, effort: _Effort, call: PublishCall) -> bool:
        """Whether what was refused is to be sent again: on another channel, and not for ever.

        A channel of RabbitMQ 3.10 that publishes while its quorum queue elects a leader may refuse everything from
        then on, although the queue has neither a limit nor, soon, a lack of a leader.
        """
        if any(not isinstance(refusal, QueueFull) for refusal in call.refusals.values()):
            return False
        queues = {call.messages[place].queue for place in call.refusals}
        if all(queue in self.limits for queue in queues):
            return self._doubts(channel, SILENCE)
        self._doubts(channel, _DOUBTED)
        for queue in queues:
            if queue not in self.limits and await self._has_messages(queue):
                effort.refused_by.add(channel)
                if len(effort.refused_by) >= _REFUSALS:
                    self.limits.learn(queue, _REMEMBERED)
        return any(queue not in self.limits for queue in queues)

    async def _has_messages(self, queue: str) -> bool:
        """Whether a queue says that messages are ready in it, as a full one does, and one without a leader cannot."""

        async def look(_: Sequence[str]) -> None:
            self._had_messages[queue] = False
            async with asyncio.timeout(self._hosts.patience):
                found = await amqp.told(message_count(await self.connection(), queue))
            self._had_messages[queue] = found is not None and found[0] > 0

        try:
            await self._looking.join((queue,), look)
        except asyncio.CancelledError:
            if amqp.is_cancelled():
                raise
            return False
        except (LeveretError, TimeoutError, *amqp.CONNECTION_LOST):
            return False
        return self._had_messages[queue]

    def _doubts(self, channel: ConfirmChannel, seconds: float) -> bool:
        """Have a refusal be asked for again on a new connection: at most once in so many seconds."""
        if channel is not self._channel:
            return True  # doubted by now
        now = asyncio.get_running_loop().time()
        if now - self._doubted_at < seconds:
            return False
        self._doubted_at = now
        self._part_with(channel)
        return True

    def _part_with(self, channel: ConfirmChannel) -> None:
        """Use it no more, and close it behind the callers."""
        if channel is self._channel:
            self._channel = None
        task = asyncio.get_running_loop().create_task(self._retire(channel))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retire(self, channel: ConfirmChannel) -> None:
        """What is on the way is other callers': given up, it would be sent again, and most of it is stored."""
        try:
            await channel.tracker.retire()
        finally:
            if channel.tracker.is_over and not channel.line.is_lost:
                channel.line.host_failed()  # it was silent, and would not answer a farewell
                channel.line.abort()
            await channel.line.close()

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
        if effort.is_refused:
            return QueueUnavailable(
                f"RabbitMQ refused {len(ids)} tasks for queue {effort.pending[0].queue!r} again and again {within}; "
                "they were not stored. The queue has no length limit that this program knows of, so it has no leader "
                "(do most of its nodes run?), or a policy limits its length",
                ids,
            )
        if self._channel is not None and self._channel.tracker.is_blocked:
            return BrokerBlocked(
                f"RabbitMQ takes no publishes now (a memory or disk alarm) and confirmed nothing {within}; "
                f"{len(ids)} tasks may be stored when the alarm ends",
                ids,
            )
        if not effort.was_sent:
            return BrokerUnavailable(f"RabbitMQ could not be reached {within}; nothing was stored: {self.why_silent()}")
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
