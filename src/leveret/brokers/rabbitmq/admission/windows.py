"""What was delivered of the queues where tasks wait, and whether somebody takes what is admitted."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from leveret.brokers.rabbitmq.coordination import TenureLost
from leveret.brokers.rabbitmq.queues import gate_queue
from leveret.errors import BrokerError
from leveret.model import queue_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from leveret.brokers.gate import Permits
    from leveret.brokers.rabbitmq.admission.asked import Count
    from leveret.brokers.rabbitmq.amqp import Incoming
    from leveret.brokers.rabbitmq.coordination import Side, Tenure

log = logging.getLogger("leveret.rabbitmq.limits")

#: Of each queue, how many of the tasks that wait are known; fairness is among these.
WINDOW = 2_000
#: How often it is looked for queues that are not consumed yet (seconds).
LOOK = 1.0
#: What waits is taken anew when it was held for so long (seconds): before RabbitMQ 4.3 a message that is held keeps its
#: queue's log on disk, and its consumer is closed after half an hour.
_ANEW = 900.0
#: So often it is looked whether somebody takes a queue's tasks (seconds).
_WATCH = 0.2


class Window:
    """What was delivered of one queue where tasks wait, and is not acknowledged."""

    def __init__(self, queue: str, now: float) -> None:
        self.queue = queue
        self.since = now
        self.side: Side | None = None
        #: The limits of its tasks.
        self.limits = {queue_limit(queue)}
        #: In the order of the tags.
        self._tags: dict[int, None] = {}
        #: Whether somebody takes tasks of the queue, and how many of them stood in it, when that was last looked at
        #: (the loop's time).
        self.is_taken = False
        self.ready = 0
        self.seen_at = float("-inf")
        #: How many of those that were admitted workers had then.
        self.taken = 0
        #: Tasks that were admitted since.
        self.admitted = 0
        self._settled: list[int] = []
        self._flush: asyncio.Handle | None = None

    @property
    def is_closed(self) -> bool:
        return self.side is None or self.side.is_closed

    @property
    def held(self) -> int:
        """How many."""
        return len(self._tags)

    def hold(self, tag: int) -> None:
        self._tags[tag] = None

    def settle(self, tag: int) -> None:
        """It leaves its queue."""
        if tag in self._tags:
            del self._tags[tag]
            self._settled.append(tag)
            if self._flush is None:
                self._flush = asyncio.get_running_loop().call_soon(self._acknowledge)

    def see(self, found: tuple[int, int] | None, admitted: int) -> None:
        """``found``: messages and consumers of its task queue now. ``admitted``: its tasks that have not ended."""
        self.is_taken = found is not None and found[1] > 0
        self.ready, self.seen_at, self.admitted = found[0] if found else 0, time.monotonic(), 0
        self.taken = max(0, admitted - self.ready)

    def fastest(self, permits: Permits) -> float | None:
        """How many of its tasks may start in a second by the fastest of their rates; None: they have none."""
        rows = (permits.rows.get(name) for name in self.limits)
        intervals = [row.rule.rate.interval for row in rows if row is not None and row.rule.rate is not None]
        return 1 / min(intervals) if intervals else None

    def _acknowledge(self) -> None:
        self._flush = None
        settled, self._settled = self._settled, []
        if self.side is not None:
            self.side.acknowledge(settled, next(iter(self._tags), None))


class Windows:
    """Those of all queues.

    ``forget``: what is held of a queue comes anew. ``take``: something was delivered. ``room``: there may be some.
    """

    def __init__(
        self,
        tenure: Tenure,
        count: Count,
        permits: Permits,
        *,
        forget: Callable[[str], object],
        take: Callable[[Window, list[Incoming]], None],
        room: Callable[[], None],
    ) -> None:
        self._tenure = tenure
        self._count = count
        self._permits = permits
        self._forget = forget
        self._take = take
        self._room = room
        self._windows: dict[str, Window | None] = {}
        #: Queues of which it was said that what waits cannot be taken.
        self._refused: set[str] = set()
        self._added = asyncio.Event()

    def __contains__(self, queue: str) -> bool:
        """Whether a queue has tasks that may wait."""
        return queue in self._windows

    def __len__(self) -> int:
        return len(self._windows)

    def __iter__(self) -> Iterator[Window]:
        """Those that are, or were, consumed."""
        return (window for window in list(self._windows.values()) if window is not None)

    def get(self, queue: str) -> Window | None:
        return self._windows.get(queue)

    def add(self, queues: Iterable[str]) -> None:
        """They have tasks that may wait."""
        for queue in queues:
            self._windows.setdefault(queue, None)
        self._added.set()

    async def consume(self) -> None:
        """Consume what is not consumed, and what was held for long anew."""
        while True:
            for queue, window in list(self._windows.items()):
                if window is not None and time.monotonic() - window.since > _ANEW and window.side is not None:
                    await window.side.close()
                if window is None or window.is_closed:
                    await self._try_to_open(queue)
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK):
                    await self._added.wait()
            self._added.clear()

    async def open(self, queue: str) -> None:
        """Raises BrokerError."""
        self._forget(queue)
        self._windows[queue] = None
        if await self._count(gate_queue(queue)) is None:
            return
        window = Window(queue, time.monotonic())
        window.side = await self._tenure.consume(gate_queue(queue), WINDOW, partial(self._on_messages, window))
        self._windows[queue] = window

    async def watch(self) -> None:
        """Look whether somebody takes tasks of the queues of which some wait, and whether they stand there."""
        while True:
            for window in self:
                often = _WATCH if not window.is_taken or window.fastest(self._permits) is not None else LOOK
                if window.held and time.monotonic() - window.seen_at >= often:
                    with suppress(BrokerError):
                        await self._see(window)
            await asyncio.sleep(_WATCH / 2)

    async def _try_to_open(self, queue: str) -> None:
        try:
            await self.open(queue)
            self._refused.discard(queue)
        except TenureLost:
            raise
        except BrokerError as error:
            if queue not in self._refused:
                self._refused.add(queue)
                log.warning("tasks of queue %r that wait for limits cannot be taken, and wait: %s", queue, error)

    def _on_messages(self, window: Window, messages: list[Incoming]) -> None:
        for message in messages:
            window.hold(message.tag)
        self._take(window, messages)

    async def _see(self, window: Window) -> None:
        found = await self._count(window.queue)
        # A quorum queue that is slow to answer says 0 and 0.
        if found == (0, 0) and window.is_taken:
            found = await self._count(window.queue)
        was = window.is_taken
        window.see(found, self._permits.admitted[queue_limit(window.queue), ""])
        if window.is_taken and (not was or window.ready == 0):
            self._room()
