"""What is in queues, and what an operator does to them: workers are asked what they run, and told of a pause."""

from __future__ import annotations

from contextlib import aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.base import in_use
from leveret.brokers.rabbitmq.admission import Emptied
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.control.bus import MOST_QUEUES, PAUSING, Signal, Tally
from leveret.brokers.rabbitmq.control.peek import peek
from leveret.brokers.rabbitmq.queues import (
    FEW_STEPS,
    FIRST_CLOSER_STEP,
    FIRST_STEP,
    Look,
    dead_queue,
    delay_queue,
    delete_queue,
    gate_queue,
    mark_paused,
    pause_marker,
    purge_queue,
    together,
    unmark_paused,
)
from leveret.errors import QueueMismatch, QueueNotFound
from leveret.model import QueueStats

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from leveret.brokers.base import WaitingState
    from leveret.brokers.rabbitmq.amqp import Hosts
    from leveret.brokers.rabbitmq.control.bus import ControlBus
    from leveret.brokers.rabbitmq.coordination import Claims
    from leveret.brokers.rabbitmq.limits import RabbitMQLimits
    from leveret.brokers.rabbitmq.queues import Publisher, Requester
    from leveret.model import Envelope, Removed


class RabbitMQQueues:
    """See `leveret.brokers.Queues`. ``forget``: called with a queue that was deleted."""

    def __init__(
        self,
        hosts: Hosts,
        publisher: Publisher,
        requester: Requester,
        bus: ControlBus,
        forget: Callable[[str], None],
        claims: Claims,
        limits: RabbitMQLimits,
    ) -> None:
        self._hosts = hosts
        self._publisher = publisher
        self._requester = requester
        self._bus = bus
        self._forget = forget
        self._claims = claims
        self._limits = limits
        self._ready = ReadyCounter()

    async def stats(self, queues: Sequence[str] = ()) -> Sequence[QueueStats]:
        return await self._requester.ask("counting", lambda: self._stats(queues))

    async def ready(self, queues: Sequence[str]) -> int:
        async def ask() -> int:
            return await self._ready.count(await self._publisher.connection(), queues)

        return await self._requester.once("counting what is ready", ask)

    async def peek(self, queue: str, state: WaitingState, *, limit: int) -> Sequence[Envelope]:
        return await self._requester.ask("looking at tasks", lambda: peek(self._hosts, queue, state, limit))

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
        async with aclosing(Look(connection)) as look:
            seen = await together([partial(_Seen.of, look, name) for name in dict.fromkeys(names)])
            expected = {one.name: one.tasks[1] for one in seen if one.tasks is not None}
            tally = await self._bus.take(connection, expected, more=any(any(one.marks) for one in seen))
            for name in sorted(tally.running.keys() - {one.name for one in seen})[:MOST_QUEUES]:
                # Anybody may answer, and name what nobody may look at.
                with suppress(QueueMismatch, amqp.AMQPChannelError):
                    seen.append(await _Seen.of(look, name))
        held = await self._limits.held() if any(one.gate is not None for one in seen) else {}
        return [one.stats(tally, held) for one in sorted(seen, key=lambda one: one.name) if one.is_there]

    async def _set_paused(self, queue: str, change: Callable[[amqp.Connection, str], Awaitable[None]]) -> None:
        connection = await self._publisher.connection()
        await change(connection, queue)
        await self._bus.announce(connection, Signal(kind=PAUSING, queue=queue))

    async def _clear(self, queue: str, *, force: bool, whole: bool) -> Removed:
        connection = await self._publisher.connection()
        async with aclosing(Look(connection)) as look:
            count = await look.settled_count(queue)
        if count is None:
            raise QueueNotFound(f"queue {queue!r} does not exist")
        consumers = count[1]
        if consumers and not force:
            raise in_use(queue, consumers=consumers, running=await self._taken(queue))
        cleared = await self._limits.clear(queue)
        removed = await (delete_queue if whole else purge_queue)(connection, queue)
        cleared += await self._limits.clear(queue)  # what was on the way to whoever admits tasks
        running = await self._running(connection) if consumers else ()
        taken = await self._taken(queue) if consumers else 0
        await self._limits.emptied(queue, taken, running)
        if await self._claims.exists():
            await self._claims.emptied(queue, running, with_dead=whole)
        return msgspec.structs.replace(removed, ready=removed.ready + cleared, kept=whole and bool(consumers))

    async def _taken(self, queue: str) -> int:
        """How many of its tasks workers have; the queue may be gone, and they with it."""
        return sum(found.running for found in await self._stats([queue]) if found.name == queue)

    async def look_into(self, queue: str) -> Emptied | None:
        """What workers have of an empty queue; None: it is not empty, or there are consumers that do not tell."""
        found = await self.stats([queue])
        if not found or found[0].ready or found[0].silent_consumers:
            return None
        return Emptied(queue, found[0].running, await self._running(await self._publisher.connection()))

    async def _running(self, connection: amqp.Connection) -> list[str]:
        """The ids of the tasks that run now."""
        workers = await self._bus.workers(connection)
        return [task.id for worker in workers for child in worker.children for task in child.running]


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


class _Seen(msgspec.Struct, frozen=True):
    """What RabbitMQ says of a task queue: messages that are ready, and consumers, of the queues that belong to it."""

    name: str
    tasks: tuple[int, int] | None
    dead: tuple[int, int] | None
    gate: tuple[int, int] | None
    waiting: dict[int, int | None]
    marks: tuple[bool, bool]

    @classmethod
    async def of(cls, look: Look, name: str) -> _Seen:
        tasks, dead = await look.settled_count(name), await look.settled_count(dead_queue(name))
        gate = await look.settled_count(gate_queue(name))
        return cls(name, tasks, dead, gate, await look.waiting(name), await look.pause_marks(name))

    @property
    def is_there(self) -> bool:
        """Whether it is, or was."""
        return self.tasks is not None or self.dead is not None

    def stats(self, tally: Tally, held: Mapping[str, int]) -> QueueStats:
        """``held``: how many of its tasks are with whoever admits them."""
        ready, consumers = self.tasks or (0, 0)
        silent = max(0, consumers - tally.consumers.get(self.name, 0))
        workers = tally.workers.get(self.name, 0)
        return QueueStats(
            name=self.name,
            ready=ready,
            running=tally.running.get(self.name, 0),
            dead=self.dead[0] if self.dead else 0,
            consumers=silent + workers,
            delayed=sum(filter(None, self.waiting.values())),
            silent_consumers=silent,
            paused=any(self.marks),
            limited=self.gate[0] + held.get(self.name, 0) if self.gate else 0,
            missing=tuple(self._missing(workers)),
        )

    def _missing(self, workers: int) -> Iterator[str]:
        """A worker makes the dead-letter queue, and whoever makes a delay queue makes the first ones too."""
        there = {step for step, count in self.waiting.items() if count is not None}
        if self.tasks is None:
            yield self.name
        if self.dead is None and workers > 0:
            yield dead_queue(self.name)
        if there and FIRST_STEP not in there:
            yield delay_queue(self.name, FIRST_STEP)
        if there - {*FEW_STEPS} and FIRST_CLOSER_STEP not in there:
            yield delay_queue(self.name, FIRST_CLOSER_STEP)
        if self.marks == (True, False):
            yield pause_marker(self.name).name
