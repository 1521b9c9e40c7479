"""Asking RabbitMQ something: within a time, with its errors as Leveret's, and again while it is unavailable."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from leveret.brokers.backoff import backoff
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.errors import BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from leveret.brokers.rabbitmq.queues.publisher import Publisher

T = TypeVar("T")

#: For how long a question is asked again: a queue that was just made may have no leader yet (seconds).
QUESTION = 2.0
#: How often it is seen whether an alarm keeps an answer back that takes longer (seconds).
_LOOK = 0.2


class Requester:
    """Questions on the publisher's connection, mostly. ``timeout``: seconds."""

    def __init__(self, publisher: Publisher, *, timeout: float) -> None:
        self._publisher = publisher
        self.timeout = timeout

    async def ask(
        self,
        doing: str,
        question: Callable[[], Awaitable[T]],
        *,
        patience: float | None = QUESTION,
        limit: float | None = None,
    ) -> T:
        """Ask again while the broker is unavailable, for as long as ``patience`` (seconds; None: the timeout).

        ``limit``: for how long one answer may take (seconds; None: the timeout).
        """
        loop = asyncio.get_running_loop()
        seconds = self.timeout if patience is None else min(patience, self.timeout)
        began = loop.time()
        deadline = began + seconds
        pauses = backoff()
        while True:
            try:
                return await self.once(
                    doing, question, (limit or self.timeout) if patience else deadline - loop.time(), deadline
                )
            except BrokerUnavailable as error:
                pause = next(pauses)
                if loop.time() + pause > deadline:
                    # One answer may take longer than it is asked for again.
                    waited = max(seconds, loop.time() - began)
                    raise BrokerUnavailable(f"not possible within {waited:.2g} s: {error}") from error
            await asyncio.sleep(pause)

    async def once(
        self, doing: str, question: Callable[[], Awaitable[T]], limit: float = QUESTION, deadline: float | None = None
    ) -> T:
        """Ask once, for so long (seconds).

        ``deadline``: until when an answer is waited for during an alarm, when none comes (the loop's time).
        """
        loop = asyncio.get_running_loop()
        current = asyncio.current_task()
        cancelled_before = 0 if current is None else current.cancelling()
        watch: asyncio.TimerHandle | None = None

        def look() -> None:
            nonlocal watch
            if self._publisher.is_blocked:
                within.reschedule(loop.time())
            else:
                watch = loop.call_later(_LOOK, look)

        try:
            async with asyncio.timeout(limit) as within:
                if deadline is not None:
                    watch = loop.call_at(deadline, look)
                try:
                    return await amqp.told(question())
                finally:
                    if watch is not None:
                        watch.cancel()
        except asyncio.CancelledError as error:
            if amqp.is_cancelled():
                raise
            raise BrokerUnavailable(f"{doing}: the connection to RabbitMQ was lost") from error
        except TimeoutError as error:
            raise BrokerUnavailable(f"{doing}: {self._publisher.why_silent()}") from error
        except amqp.CONNECTION_LOST as error:
            raise amqp.translate(error, doing) from error
        finally:
            # aiormq swallows a cancellation that comes while it opens a channel: who was cancelled would go on.
            if current is not None and current.cancelling() > cancelled_before:
                raise asyncio.CancelledError
