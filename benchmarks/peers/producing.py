"""How a producer's program enqueues: its order is JSON in its argument, what it took is JSON in its output."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.peers.ledger import own_ledger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

Send: TypeAlias = "Callable[[int], Awaitable[object]]"

URL = "LEVERET_BENCH_URL"
QUEUE = "LEVERET_BENCH_QUEUE"


class Order:
    """Which tasks to enqueue, and how. ``rate``: a second, 0 for as fast as it goes."""

    def __init__(self, first: int, count: int, outstanding: int, rate: float) -> None:
        self.tasks = range(first, first + count)
        self.outstanding = outstanding
        self.rate = rate

    @classmethod
    def read(cls) -> Order:
        asked: dict[str, Any] = json.loads(sys.argv[1])
        return cls(asked["first"], asked["count"], asked["outstanding"], asked["rate"])


def url() -> str:
    return os.environ[URL]


def queue() -> str:
    return os.environ[QUEUE]


class Stopwatch:
    """Started when it is made: time, and processor time of this program."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self._used = time.process_time()

    def report(self) -> None:
        """Tell the harness what it took since then."""
        took = {"seconds": time.perf_counter() - self.began, "cpu": time.process_time() - self._used}
        print(json.dumps(took), flush=True)


async def produce(send: Send, order: Order) -> None:
    """Enqueue one by one, so many at once, and report how long it took."""
    watch = Stopwatch()
    await (_paced(send, order) if order.rate else _fast(send, order))
    watch.report()


async def produce_batches(send: Callable[[Sequence[int]], Awaitable[object]], order: Order, size: int) -> None:
    """Enqueue many at a time, one batch after the other, and report how long it took."""
    watch = Stopwatch()
    for first in range(0, len(order.tasks), size):
        await send(order.tasks[first : first + size])
    watch.report()


def produce_in_turn(send: Callable[[int], object], order: Order) -> None:
    """The same for programs without an event loop: one after the other."""
    watch = Stopwatch()
    for number, task in enumerate(order.tasks):
        if order.rate:
            time.sleep(max(0.0, watch.began + number / order.rate - time.perf_counter()))
        own_ledger().note_sent(task)
        send(task)
    watch.report()


async def _fast(send: Send, order: Order) -> None:
    """A fixed number of senders, each waiting for its own confirm: no asyncio task for each message."""
    tasks = iter(order.tasks)

    async def sender() -> None:
        for task in tasks:
            own_ledger().note_sent(task)
            await send(task)

    await asyncio.gather(*(sender() for _ in range(order.outstanding)))


async def _paced(send: Send, order: Order) -> None:
    """At the times that the rate says, whether or not earlier ones are confirmed, up to so many outstanding."""
    room = asyncio.Semaphore(order.outstanding)
    running: set[asyncio.Task[None]] = set()
    began = time.perf_counter()

    async def one(task: int) -> None:
        try:
            own_ledger().note_sent(task)
            await send(task)
        finally:
            room.release()

    for number, task in enumerate(order.tasks):
        await asyncio.sleep(max(0.0, began + number / order.rate - time.perf_counter()))
        await room.acquire()
        started = asyncio.create_task(one(task))
        running.add(started)
        started.add_done_callback(running.discard)
    await asyncio.gather(*running)
