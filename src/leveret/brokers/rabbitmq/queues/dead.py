"""Looking at dead letters: taken from their queue unacknowledged, and put back so that no limit comes nearer.

A quorum queue counts what comes back, and drops what came back too often; an operator's policy may set that limit low,
and AMQP does not tell. Since RabbitMQ 4.3 what is handed back by `basic.nack` is not counted. Before, letters that have
come back once are stored anew, which counts from 0, instead of being handed back again; so whole letters are held.
Since 4.3 no more of each is held than the caller keeps: thousands of large ones must not be there together. Only when
one came back otherwise (a look was cut off) they are taken a second time, whole, to be stored anew.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Generic, TypeVar

from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.amqp import content_of
from leveret.brokers.rabbitmq.queues.codec import stored_anew
from leveret.brokers.rabbitmq.queues.topology import UNAPPLIED
from leveret.errors import LeveretError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.brokers.rabbitmq.amqp import Incoming
    from leveret.brokers.rabbitmq.queues.publisher import Publisher

T = TypeVar("T")

log = logging.getLogger("leveret.rabbitmq")

#: How long no dead letter comes until the queue is asked for one (seconds), and how often it must have none.
_QUIET = 0.2
_ENDS = 2
#: A look at some takes all, if they are not more and not larger (bytes): what comes back alone may come back elsewhere.
_MOST_IN_ORDER = 1_000
_MOST_BYTES = 32 * 1024 * 1024
#: How many are stored at once.
_BATCH = 200
#: Since then `basic.nack` is not counted.
_UNCOUNTED = (4, 3)


class Fetched(Generic[T]):
    """What was taken from a dead-letter queue, the oldest first. Nobody else sees or counts it until it is put back.

    ``keep``: what is kept of each for the caller; None: nothing.
    """

    def __init__(self, line: amqp.Link, queue: str, keep: Callable[[Incoming], T | None]) -> None:
        self._channel = line.channel
        self._queue = queue
        self._keep = keep
        self._version = amqp.server_version(line.connection)
        #: Whether no more is held than their tags, and what is kept.
        self._is_light = self._version >= _UNCOUNTED
        #: By delivery tag.
        self._held: dict[int, Incoming | None] = {}
        self._kept: dict[int, T] = {}
        #: Tags of those that came back to the queue before.
        self._returned: set[int] = set()
        #: Of all bodies that came (bytes).
        self._size = 0
        self._as_delivered = line.keep_headers()

    @property
    def count(self) -> int:
        return len(self._held)

    @property
    def kept(self) -> list[T]:
        return list(self._kept.values())

    async def take(self, limit: int | None, count: int) -> None:
        """Take messages, as many as there are or a few more than the limit. ``count``: about so many are there."""
        await self._fetch(limit, count)
        await self._complete(count)
        if self._is_light and self._returned:
            await self._hand_back()
            self._is_light = False
            await self._fetch(limit, count)
            await self._complete(count)

    async def _fetch(self, limit: int | None, count: int) -> None:
        """Take messages, as many as there are or a few more than the limit; not those that another program holds.

        By a consumer: to get them one by one costs a round trip each, and thousands of dead letters take minutes.
        ``count``: about so many are there.
        """
        came = asyncio.Event()
        start = len(self._held)

        async def take(message: amqp.DeliveredMessage) -> None:
            self._hold(message)
            came.set()

        def is_enough() -> bool:
            return limit is not None and len(self._held) - start >= limit

        await self._channel.basic_qos(prefetch_count=limit if limit and limit <= amqp.MOST_PREFETCH else 0)
        tag = (await self._channel.basic_consume(self._queue, take)).consumer_tag or ""
        ends = 0
        while ends < _ENDS and not is_enough():
            came.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_QUIET if len(self._held) - start < count else 0.0):
                    await came.wait()
                    continue
            # Only the queue itself knows: RabbitMQ 3.10 counts what is in it every few seconds.
            if not await self._get():
                ends += 1
        # What is put back as long as this consumes would be delivered again.
        await self._channel.basic_cancel(tag)

    async def remove(self, messages: Sequence[Incoming]) -> None:
        """Acknowledge; returned means that the queue has applied that, and the channel may close."""
        for start in range(0, len(messages), UNAPPLIED):
            for message in messages[start : start + UNAPPLIED]:
                await self._channel.basic_ack(message.tag, wait=False)
                self._held.pop(message.tag, None)
                self._kept.pop(message.tag, None)
            # Answered from the queue's log, behind them.
            await self._get()

    async def _complete(self, count: int) -> None:
        """Take the others too, if that is not too much. ``count``: about so many there are in all."""
        size = self._size // max(1, len(self._held))
        if len(self._held) < count <= _MOST_IN_ORDER and size * count <= _MOST_BYTES:
            await self._fetch(None, count - len(self._held))

    async def put_back(self, publisher: Publisher) -> None:
        """Have all that is held be there again, in its order, and count as if nobody had looked."""
        if not self._is_light and not self._returned.isdisjoint(self._held):
            await self._store_anew(publisher)
        await self._hand_back()

    async def _hand_back(self) -> None:
        if self._held:
            await self._channel.basic_nack(max(self._held), multiple=True, requeue=True, wait=False)
            await self._channel.queue_declare(self._queue, passive=True)
        self._held.clear()
        self._kept.clear()
        self._returned.clear()
        self._size = 0

    async def _store_anew(self, publisher: Publisher) -> None:
        messages = [message for message in self._held.values() if message is not None]
        for start in range(0, len(messages), _BATCH):
            batch = messages[start : start + _BATCH]
            try:
                await publisher.publish([stored_anew(message, self._queue) for message in batch])
            except LeveretError as error:
                log.warning(
                    "%d dead letters cannot be stored anew in %r after a look, so they are handed back, and a policy's "
                    "delivery-limit counts that: %s",
                    len(messages) - start,
                    self._queue,
                    error,
                )
                return
            last = batch[-1].tag
            # In one, which the channel does not keep to itself; to ask for an answer behind it would take a letter.
            await self._channel.basic_ack(last, multiple=True, wait=False)
            self._held = {tag: message for tag, message in self._held.items() if tag > last}

    async def _get(self) -> bool:
        """Take the next one; False when there is none."""
        message = await self._channel.basic_get(self._queue)
        if isinstance(message.delivery, amqp.GetEmpty):
            return False
        self._hold(message)
        return True

    def _hold(self, message: amqp.DeliveredMessage) -> None:
        whole = self._as_delivered(message)
        kept = self._keep(whole)
        if kept is not None:
            self._kept[whole.tag] = kept
        if _returns(whole, self._version):
            self._returned.add(whole.tag)
        self._size += len(whole.body)
        self._held[whole.tag] = None if self._is_light else whole


def _returns(message: Incoming, version: tuple[int, ...]) -> int:
    """How often it came back, as the server compares that with a limit."""
    headers = content_of(message.header).properties.headers or {}
    names = ("x-delivery-count",) if version >= _UNCOUNTED else ("x-delivery-count", "x-acquired-count")
    counts = [headers.get(name) for name in names]
    return max((count for count in counts if isinstance(count, int)), default=0)
