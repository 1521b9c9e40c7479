"""What is in queues, and what an operator does to them: workers are asked what they run, and told of a pause."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.base import in_use
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.control.bus import MOST_QUEUES, PAUSING, Signal, Tally
from leveret.brokers.rabbitmq.queues import (
    DELAY_STEPS,
    dead_queue,
    delay_queue,
    delete_queue,
    is_paused,
    mark_paused,
    message_count,
    pause_marker,
    pause_marks,
    purge_queue,
    unmark_paused,
)
from leveret.errors import QueueMismatch, QueueNotFound
from leveret.model import QueueStats

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from leveret.brokers.rabbitmq.control.bus import ControlBus
    from leveret.brokers.rabbitmq.queues import Publisher, Requester
    from leveret.model import Removed


class RabbitMQQueues:
    """See `leveret.brokers.Queues`. ``forget``: called with a queue that was deleted."""

    def __init__(
        self, publisher: Publisher, requester: Requester, bus: ControlBus, forget: Callable[[str], None]
    ) -> None:
        self._publisher = publisher
        self._requester = requester
        self._bus = bus
        self._forget = forget
        self._ready = ReadyCounter()

    async def stats(self, queues: Sequence[str] = ()) -> Sequence[QueueStats]:
        return await self._requester.ask("counting", lambda: self._stats(queues))

    async def ready(self, queues: Sequence[str]) -> int:
        async def ask() -> int:
            return await self._ready.count(await self._publisher.connection(), queues)

        return await self._requester.once("counting what is ready", ask)

    async def pause(self, queue: str) -> None:
        await self._requester.ask("pausing", lambda: self._set_paused(queue, mark_paused))

    async def resume(self, queue: str) -> None:
        await self._requester.ask("resuming", lambda: self._set_paused(queue, unmark_paused))

    async def purge(self, queue: str, *, force: bool = False) -> Removed:
        return await self._requester.ask("purging", lambda: self._clear(queue, force=force, whole=False))

    async def delete(self, queue: str, *, force: bool = False) -> Removed:
        removed = await self._requester.ask("deleting", lambda: self._clear(queue, force=force, whole=True))
        self._forget(queue)
        return removed

    async def _stats(self, names: Sequence[str]) -> list[QueueStats]:
        connection = await self._publisher.connection()
        counts = {name: await _count(connection, name) for name in names}
        expected = {name: count[1] for name, count in counts.items() if count is not None}
        paused = [name for name in counts if await is_paused(connection, name)]
        tally = await self._bus.take(connection, expected, more=bool(paused))
        for name in sorted(tally.running.keys() - counts.keys())[:MOST_QUEUES]:
            # Anybody may answer, and name what nobody may look at.
            with suppress(QueueMismatch, amqp.AMQPChannelError):
                counts[name] = await _count(connection, name)
        found = [await _queue_stats(connection, name, count, tally) for name, count in sorted(counts.items())]
        return [stats for stats in found if stats is not None]

    async def _set_paused(self, queue: str, change: Callable[[amqp.Connection, str], Awaitable[None]]) -> None:
        connection = await self._publisher.connection()
        await change(connection, queue)
        await self._bus.announce(connection, Signal(kind=PAUSING, queue=queue))

    async def _clear(self, queue: str, *, force: bool, whole: bool) -> Removed:
        connection = await self._publisher.connection()
        count = await _count(connection, queue)
        if count is None:
            raise QueueNotFound(f"queue {queue!r} does not exist")
        consumers = count[1]
        if consumers and not force:
            raise in_use(queue, consumers=consumers, running=(await self._stats([queue]))[0].running)
        removed = await (delete_queue if whole else purge_queue)(connection, queue)
        return msgspec.structs.replace(removed, kept=whole and bool(consumers))


class ReadyCounter:
    """What is ready, asked again and again: on one channel that is kept, as each one opened leaves a trace.

    Not for two questions at once.
    """

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


async def _count(connection: amqp.Connection, name: str) -> tuple[int, int] | None:
    """Ready messages and consumers. A quorum queue that is slow to answer says 0 and 0, so that is asked again."""
    count = await message_count(connection, name)
    return count if count != (0, 0) else await message_count(connection, name)


async def _queue_stats(
    connection: amqp.Connection, name: str, count: tuple[int, int] | None, tally: Tally
) -> QueueStats | None:
    """None for a queue that is not there, and was not."""
    dead = await _count(connection, dead_queue(name))
    if count is None and dead is None:
        return None
    ready, consumers = count or (0, 0)
    silent = max(0, consumers - tally.consumers.get(name, 0))
    workers = tally.workers.get(name, 0)
    waiting = {one: await message_count(connection, delay_queue(name, one)) for one in DELAY_STEPS}
    longest = max((one for one, there in waiting.items() if there is not None), default=0)
    marks = await pause_marks(connection, name)
    # A worker makes the dead-letter queue, and whoever makes a delay queue makes the shorter ones too.
    missing = {
        name: count is None,
        dead_queue(name): dead is None and workers > 0,
        **{delay_queue(name, one): there is None and one < longest for one, there in waiting.items()},
        pause_marker(name).name: marks == (True, False),
    }
    return QueueStats(
        name=name,
        ready=ready,
        running=tally.running.get(name, 0),
        dead=dead[0] if dead else 0,
        consumers=silent + workers,
        delayed=sum(there[0] for there in waiting.values() if there is not None),
        silent_consumers=silent,
        paused=any(marks),
        missing=tuple(queue for queue, is_missing in missing.items() if is_missing),
    )
